// A bundle: its manifest, read and checked, and the files that it lists, compared with their digests.
#ifndef AFFECT_BUNDLE_H
#define AFFECT_BUNDLE_H

#include "json.h"
#include "mapped_file.h"
#include "program.h"
#include "support.h"

namespace affect {

// One array of one stream: the batch axis has the size 1.
struct Tensor {
    const char *name;
    int32_t rank, batch_axis;
    int64_t sizes[kMostRank];
    int64_t floats;
};

struct Picture {
    const char *name;
    const char *align;
    int32_t size, filters;
    double growth;
    float mean[3], std[3];
};

struct Output {
    Tensor tensor;
    int32_t kind;
    int32_t label_count;
    uint32_t labels;  // the first one's place in Manifest::labels
    double low, high;
    const char *signal;
    double smoothing_s;
};

struct State {
    Tensor tensor;
    float initial;
    bool in_graph;  // otherwise kept by the runtime: no graph takes or gives it
};

struct Graph {
    const char *file, *sha256;
    Array<Tensor> inputs, outputs;
    bool is_given() const noexcept { return file != nullptr; }
};

struct ListedFile {
    const char *name, *sha256;
};

// Everything of a manifest that running it takes. Strings lie in the document.
struct Manifest {
    Json document;
    const char *name, *version, *licence, *weights_sha256;
    bool trained, variable_dt, verified_on_target;
    double frame_interval_s;
    Array<Picture> pictures;
    Array<Output> outputs;
    Array<const char *> labels;
    Array<State> states;
    Graph encoder, step;
    Array<Tensor> features;  // what the step takes besides dt and states, in its order
    Array<ListedFile> files;

    // Compares a manifest's text with the digest at its end, so that any changed byte is noticed.
    static affect_status check_digest(const char *text, size_t size) noexcept;
    // Reads a manifest whose digest has been checked; `this` is new.
    affect_status read(const char *text, size_t size) noexcept;

  private:
    affect_status read_model(JsonValue root) noexcept;
    affect_status read_inputs(JsonValue inputs) noexcept;
    affect_status read_outputs(JsonValue outputs) noexcept;
    affect_status read_states(JsonValue states) noexcept;
    affect_status read_graphs(JsonValue graphs) noexcept;
    affect_status read_files(JsonValue files) noexcept;
    affect_status check_target(JsonValue target) noexcept;
    affect_status check_step() noexcept;
    affect_status check_encoder() noexcept;
};

// A verified folder.
struct Bundle {
    Manifest manifest{};
    MappedFile encoder_file, step_file;  // the first is empty where one file holds both graphs

    // `this` is new.
    affect_status open(const char *path) noexcept;

  private:
    affect_status map(const Descriptor &folder, const Graph &graph, MappedFile *file) noexcept;
};

// The tensor of this name, or null.
const Tensor *find(const Array<Tensor> &tensors, const char *name) noexcept;
bool same_shape(const Tensor &a, const Tensor &b) noexcept;
// What a program says of a tensor, in the words of a manifest.
Tensor to_tensor(const TensorRecord &record) noexcept;
// The inner size in floats: what lies after the batch axis.
int64_t inner_floats(const Tensor &tensor) noexcept;

}  // namespace affect

#endif
