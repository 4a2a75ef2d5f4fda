#include "bundle.h"

#include <sys/utsname.h>

#include <cfloat>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstring>

namespace affect {
namespace {

using Kind = JsonValue::Kind;

constexpr int64_t kSchema = 2;
constexpr double kLeastInterval = 1e-6, kMostInterval = 86400.0;  // seconds
constexpr double kLeastStd = 1e-6, kMostScale = 1e6;
constexpr int64_t kMostPixels = 8192;
// Of one stream. The published systems carry some megabytes; a gibibyte is a slip or a trap.
constexpr int64_t kMostStateFloats = (int64_t{1} << 30) / 4;
constexpr int64_t kMostFloats = PTRDIFF_MAX / 4;
// In one list. Names are compared in pairs, which is fast enough for so many.
constexpr uint32_t kMostTensors = 1024;

struct OutputKind {
    const char *word;
    int32_t kind;
    int64_t columns;  // of a table, otherwise 0
};
constexpr OutputKind kOutputKinds[] = {
    {"regression", AFFECT_REGRESSION, 0}, {"distribution", AFFECT_DISTRIBUTION, 0},
    {"multilabel", AFFECT_MULTILABEL, 0}, {"faces", AFFECT_FACES, 15},
    {"points", AFFECT_POINTS, 2},
};

affect_status wrong(const char *where, const char *key, const char *expected) noexcept {
    return fail(AFFECT_ERROR_BUNDLE, "%s: %s: expected %s; export the bundle again", where, key, expected);
}

// A text of at least one character, without zeros within, which C could not show whole.
affect_status read_text(JsonValue value, const char *where, const char *key, const char **text) noexcept {
    const std::string_view found = value.string();
    if (found.empty() || std::memchr(found.data(), 0, found.size()) != nullptr) {
        return wrong(where, key, "text");
    }
    *text = found.data();
    return AFFECT_OK;
}

affect_status read_number(JsonValue value, const char *where, const char *key, double low, double high,
                          double *number) noexcept {
    if (!value.is(Kind::number) || value.number() < low || value.number() > high) {
        return fail(AFFECT_ERROR_BUNDLE, "%s: %s: expected a number in [%g, %g]; export the bundle again", where, key,
                    low, high);
    }
    *number = value.number();
    return AFFECT_OK;
}

affect_status read_flag(JsonValue value, const char *where, const char *key, bool *flag) noexcept {
    if (!value.is(Kind::boolean)) {
        return wrong(where, key, "true or false");
    }
    *flag = value.boolean();
    return AFFECT_OK;
}

affect_status read_digest(JsonValue value, const char *where, const char *key, const char **digest) noexcept {
    const std::string_view found = value.string();
    bool good = found.size() == 2 * Sha256::kBytes;
    for (const char c : found) {
        good = good && ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'));
    }
    if (!good) {
        return wrong(where, key, "a sha256 in lower-case hex");
    }
    *digest = found.data();
    return AFFECT_OK;
}

// Narrower than Python's identifiers, which may have letters of any script: a weights file gives a name 63 bytes.
affect_status read_name(JsonValue value, const char *where, const char **name) noexcept {
    const std::string_view found = value.string();
    bool good = !found.empty() && found.size() < sizeof(TensorRecord::name) && (found[0] < '0' || found[0] > '9');
    for (const char c : found) {
        good = good && (c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'));
    }
    if (!good) {
        return wrong(where, "name", "up to 63 letters, digits and underscores, no digit first");
    }
    *name = found.data();
    return AFFECT_OK;
}

affect_status read_array(JsonValue value, const char *key, uint32_t least = 0) noexcept {
    const bool good = value.is(Kind::array) && value.size() >= least && value.size() <= kMostTensors;
    return good ? AFFECT_OK : wrong("the manifest", key, least == 0 ? "a list of at most 1024" : "a list of 1 to 1024");
}

// One axis more; false where there are too many, or too many floats.
bool append_axis(Tensor *tensor, int64_t size) noexcept {
    if (tensor->rank == kMostRank || size < 1 || !multiply(tensor->floats, size, &tensor->floats) ||
        tensor->floats > kMostFloats) {
        return false;
    }
    tensor->sizes[tensor->rank++] = size;
    return true;
}

affect_status read_tensor(JsonValue value, const char *where, Tensor *tensor) noexcept {
    *tensor = Tensor{};
    tensor->floats = 1;
    tensor->batch_axis = -1;
    if (const affect_status status = read_name(value["name"], where, &tensor->name); status != AFFECT_OK) {
        return status;
    }
    const JsonValue shape = value["shape"];
    bool good = shape.is(Kind::array);
    for (JsonValue size = shape.first(); good && !size.is(Kind::none); size = size.next()) {
        int64_t axis = 1;
        if (size.string() == "batch") {
            good = tensor->batch_axis < 0;
            tensor->batch_axis = tensor->rank;
        } else {
            good = size.whole(&axis);
        }
        good = good && append_axis(tensor, axis);
    }
    if (!good || tensor->batch_axis < 0) {
        return wrong(tensor->name, "shape", "a list of at most 6 with one \"batch\" and otherwise positive sizes");
    }
    if (value["dtype"].string() != "float32") {
        return wrong(tensor->name, "dtype", "float32, which is all that this engine computes with");
    }
    return AFFECT_OK;
}

affect_status read_tensors(JsonValue value, const char *where, Array<Tensor> *tensors) noexcept {
    if (!value.is(Kind::array) || value.size() == 0 || value.size() > kMostTensors) {
        return wrong("a graph", where, "a list of 1 to 1024 tensors");
    }
    if (!tensors->allocate(value.size())) {
        return out_of_memory(value.size() * sizeof(Tensor));
    }
    Tensor *tensor = tensors->begin();
    for (JsonValue each = value.first(); !each.is(Kind::none); each = each.next(), ++tensor) {
        if (const affect_status status = read_tensor(each, where, tensor); status != AFFECT_OK) {
            return status;
        }
        for (const Tensor *other = tensors->begin(); other != tensor; ++other) {
            if (std::strcmp(other->name, tensor->name) == 0) {
                return fail(AFFECT_ERROR_BUNDLE, "%s: %s is there twice; export the bundle again", where, tensor->name);
            }
        }
    }
    return AFFECT_OK;
}

// How a device takes a path is decided in `open_inside`; this catches what would be unclear in the manifest itself.
affect_status read_path(JsonValue value, const char *where, const char **path) noexcept {
    if (const affect_status status = read_text(value, where, "file", path); status != AFFECT_OK) {
        return status;
    }
    for (const char *c = *path; *c != '\0'; ++c) {
        if (static_cast<uint8_t>(*c) < 0x20 || *c == 0x7f || *c == '\\' || *c == ':') {
            return wrong(where, "file", "a path of printable characters, without backslash and colon");
        }
    }
    return AFFECT_OK;
}

affect_status read_three(JsonValue value, const char *where, const char *key, double low, float three[3]) noexcept {
    JsonValue each = value.first();
    if (!value.is(Kind::array) || value.size() != 3) {
        return wrong(where, key, "a list of 3 numbers");
    }
    for (int i = 0; i < 3; ++i, each = each.next()) {
        double number = 0.0;
        if (const affect_status status = read_number(each, where, key, low, kMostScale, &number); status != AFFECT_OK) {
            return status;
        }
        three[i] = static_cast<float>(number);
    }
    return AFFECT_OK;
}

affect_status read_picture(JsonValue value, Picture *picture) noexcept {
    const char *name = picture->name;
    Tensor tensor;
    if (const affect_status status = read_tensor(value, "an input", &tensor); status != AFFECT_OK) {
        return status;
    }
    if (tensor.rank != 4 || tensor.batch_axis != 0 || tensor.sizes[1] != 3 || tensor.sizes[2] != tensor.sizes[3] ||
        tensor.sizes[2] > kMostPixels) {
        return wrong(name, "shape", "[\"batch\", 3, side, side] with a side of at most 8192 pixels");
    }
    if (value["colour"].string() != "rgb") {
        return wrong(name, "colour", "rgb");
    }
    picture->size = static_cast<int32_t>(tensor.sizes[2]);
    affect_status status = read_text(value["align"], name, "align", &picture->align);
    if (status == AFFECT_OK) {
        status = read_three(value["mean"], name, "mean", -kMostScale, picture->mean);
    }
    if (status == AFFECT_OK) {
        status = read_three(value["std"], name, "std", kLeastStd, picture->std);
    }
    if (status == AFFECT_OK && !value["growth"].is(Kind::none)) {
        status = read_number(value["growth"], name, "growth", 0.0, 2.0, &picture->growth);
    }
    if (status == AFFECT_OK && !value["filters"].is(Kind::none)) {
        status = read_array(value["filters"], "filters");
        picture->filters = static_cast<int32_t>(value["filters"].size());
    }
    return status;
}

affect_status read_graph(JsonValue value, Graph *graph) noexcept {
    affect_status status = read_path(value["file"], "a graph", &graph->file);
    if (status == AFFECT_OK) {
        status = read_digest(value["sha256"], graph->file, "sha256", &graph->sha256);
    }
    if (status == AFFECT_OK) {
        status = read_tensors(value["inputs"], "inputs", &graph->inputs);
    }
    return status == AFFECT_OK ? read_tensors(value["outputs"], "outputs", &graph->outputs) : status;
}

// This machine, in the words of manifests, which are those of uname.
const char *machine(utsname *buffer) noexcept {
#if defined(__x86_64__)
    (void)buffer;
    return "x86_64";
#elif defined(__aarch64__)
    (void)buffer;
    return "aarch64";
#else
    return uname(buffer) == 0 ? buffer->machine : "unknown";
#endif
}

affect_status compare_digest(const uint8_t digest[Sha256::kBytes], const char *expected) noexcept {
    char hex[2 * Sha256::kBytes + 1];
    to_hex(digest, hex);
    if (std::memcmp(hex, expected, 2 * Sha256::kBytes) == 0) {
        return AFFECT_OK;
    }
    return fail(
        AFFECT_ERROR_INTEGRITY,
        "has the sha256 %.12s..., the manifest says %.12s...; the file was cut short or changed, copy or export the "
        "bundle again",
        hex, expected);
}

affect_status mismatch(const char *what, const char *name) noexcept {
    return fail(AFFECT_ERROR_BUNDLE,
                "the graph's %s do not fit the rest of the manifest at %s; export the bundle again", what, name);
}

}  // namespace

const Tensor *find(const Array<Tensor> &tensors, const char *name) noexcept {
    for (const Tensor &tensor : tensors) {
        if (std::strcmp(tensor.name, name) == 0) {
            return &tensor;
        }
    }
    return nullptr;
}

bool same_shape(const Tensor &a, const Tensor &b) noexcept {
    return a.rank == b.rank && a.batch_axis == b.batch_axis && std::memcmp(a.sizes, b.sizes, sizeof(a.sizes)) == 0;
}

Tensor to_tensor(const TensorRecord &record) noexcept {
    Tensor tensor{};
    tensor.name = record.name;
    tensor.rank = static_cast<int32_t>(record.rank);
    tensor.batch_axis = static_cast<int32_t>(record.batch_axis);
    for (uint32_t i = 0; i < record.rank; ++i) {
        tensor.sizes[i] = static_cast<int64_t>(record.sizes[i]);
    }
    tensor.floats = static_cast<int64_t>(Program::floats(record));
    return tensor;
}

int64_t inner_floats(const Tensor &tensor) noexcept {
    int64_t inner = 1;
    for (int32_t axis = tensor.batch_axis + 1; axis < tensor.rank; ++axis) {
        inner *= tensor.sizes[axis];
    }
    return inner;
}

affect_status Manifest::check_digest(const char *text, size_t size) noexcept {
    // The writer puts the digest last and takes it over the text without it, so the text before it and the closing
    // brace are what was hashed: nothing has to be written again to check it.
    constexpr std::string_view before = ",\n \"manifest_sha256\": \"", after = "\"\n}\n", closing = "\n}";
    constexpr size_t digits = 2 * Sha256::kBytes;
    constexpr size_t tail = before.size() + digits + after.size();
    if (size < tail || std::memcmp(text + size - tail, before.data(), before.size()) != 0 ||
        std::memcmp(text + size - after.size(), after.data(), after.size()) != 0) {
        return fail(
            AFFECT_ERROR_INTEGRITY,
            "does not end with the digest that an export writes; it was changed or cut short, copy or export the "
            "bundle again");
    }
    Sha256 hash;
    uint8_t digest[Sha256::kBytes];
    hash.update(text, size - tail);
    hash.update(closing.data(), closing.size());
    hash.finish(digest);
    char hex[digits + 1];
    to_hex(digest, hex);
    if (std::memcmp(hex, text + size - after.size() - digits, digits) != 0) {
        return fail(AFFECT_ERROR_INTEGRITY,
                    "was changed after the export (its digest does not match); copy or export the bundle again");
    }
    return AFFECT_OK;
}

affect_status Manifest::read(const char *text, size_t size) noexcept {
    if (const affect_status status = document.parse(text, size); status != AFFECT_OK) {
        return status;
    }
    const JsonValue root = document.root();
    int64_t schema = 0;
    if (!root.is(Kind::object) || !root["schema"].whole(&schema)) {
        return wrong("the manifest", "schema", "an object with a whole number");
    }
    if (schema != kSchema) {
        return fail(AFFECT_ERROR_UNSUPPORTED,
                    "has schema %" PRId64 "; this release reads schema %" PRId64 "; export the bundle again", schema,
                    kSchema);
    }
    affect_status status = check_target(root["target"]);
    if (status == AFFECT_OK) {
        status = read_model(root);
    }
    if (status == AFFECT_OK) {
        status = read_inputs(root["inputs"]);
    }
    if (status == AFFECT_OK) {
        status = read_outputs(root["outputs"]);
    }
    if (status == AFFECT_OK) {
        status = read_states(root["states"]);
    }
    if (status == AFFECT_OK) {
        status = read_graphs(root["graphs"]);
    }
    if (status == AFFECT_OK) {
        status = read_files(root["files"]);
    }
    if (status == AFFECT_OK) {
        status = check_step();
    }
    return status == AFFECT_OK ? check_encoder() : status;
}

affect_status Manifest::check_target(JsonValue target) noexcept {
    const char *engine = nullptr;
    if (const affect_status status = read_text(target["engine"], "target", "engine", &engine); status != AFFECT_OK) {
        return status;
    }
    if (std::strcmp(engine, "native") != 0) {
        return fail(
            AFFECT_ERROR_UNSUPPORTED,
            "needs the engine %.64s; this library runs bundles for the engine native, so export the model for it",
            engine);
    }
    const JsonValue arch = target["arch"];
    if (!arch.is(Kind::array)) {
        return wrong("target", "arch", "a list of machines");
    }
    utsname buffer{};
    const char *const here = machine(&buffer);
    bool found = false;
    for (JsonValue each = arch.first(); !each.is(Kind::none); each = each.next()) {
        found = found || each.string() == here;
    }
    if (!found) {
        return fail(AFFECT_ERROR_UNSUPPORTED,
                    "is for other machines than this one, which is %s; export the model for this machine", here);
    }
    return read_flag(target["verified_on_target"], "target", "verified_on_target", &verified_on_target);
}

affect_status Manifest::read_model(JsonValue root) noexcept {
    const JsonValue model = root["model"], clock = root["clock"];
    affect_status status = read_text(model["name"], "model", "name", &name);
    if (status == AFFECT_OK) {
        status = read_text(model["version"], "model", "version", &version);
    }
    if (status == AFFECT_OK) {
        status = read_text(model["licence"], "model", "licence", &licence);
    }
    if (status == AFFECT_OK) {
        status = read_digest(model["weights_sha256"], "model", "weights_sha256", &weights_sha256);
    }
    if (status == AFFECT_OK) {
        status = read_flag(model["trained"], "model", "trained", &trained);
    }
    if (status == AFFECT_OK) {
        status = read_flag(clock["variable_dt"], "clock", "variable_dt", &variable_dt);
    }
    return status == AFFECT_OK ? read_number(clock["frame_interval_s"], "clock", "frame_interval_s", kLeastInterval,
                                             kMostInterval, &frame_interval_s)
                               : status;
}

affect_status Manifest::read_inputs(JsonValue inputs) noexcept {
    if (const affect_status status = read_array(inputs, "inputs"); status != AFFECT_OK) {
        return status;
    }
    size_t count = 0;
    for (JsonValue each = inputs.first(); !each.is(Kind::none); each = each.next()) {
        count += each["kind"].string() == "image";
    }
    if (!pictures.allocate(count)) {
        return out_of_memory(count * sizeof(Picture));
    }
    Picture *picture = pictures.begin();
    for (JsonValue each = inputs.first(); !each.is(Kind::none); each = each.next()) {
        const char *input = nullptr;
        if (const affect_status status = read_name(each["name"], "an input", &input); status != AFFECT_OK) {
            return status;
        }
        if (each["kind"].string() == "image") {
            picture->name = input;
            if (const affect_status status = read_picture(each, picture++); status != AFFECT_OK) {
                return status;
            }
        }
    }
    return AFFECT_OK;
}

affect_status Manifest::read_outputs(JsonValue values) noexcept {
    if (const affect_status status = read_array(values, "outputs", 1); status != AFFECT_OK) {
        return status;
    }
    size_t count = 0;
    for (JsonValue each = values.first(); !each.is(Kind::none); each = each.next()) {
        count += each["labels"].size();
    }
    if (!outputs.allocate(values.size()) || !labels.allocate(count)) {
        return out_of_memory(values.size() * sizeof(Output) + count * sizeof(char *));
    }
    uint32_t label = 0;
    Output *output = outputs.begin();
    for (JsonValue each = values.first(); !each.is(Kind::none); each = each.next(), ++output) {
        Tensor &tensor = output->tensor;
        tensor = Tensor{};
        tensor.floats = 1;
        append_axis(&tensor, 1);
        affect_status status = read_name(each["name"], "an output", &tensor.name);
        if (status != AFFECT_OK) {
            return status;
        }
        const char *const where = tensor.name;
        for (const Output *other = outputs.begin(); other != output; ++other) {
            if (std::strcmp(other->tensor.name, where) == 0) {
                return wrong(where, "name", "one that no other output has");
            }
        }
        const JsonValue range = each["range"], words = each["labels"], shape = each["shape"];
        if (range.size() != 2) {
            return wrong(where, "range", "the lowest value, then the highest");
        }
        status = read_number(range.first(), where, "range", -DBL_MAX, DBL_MAX, &output->low);
        if (status == AFFECT_OK) {
            status = read_number(range.first().next(), where, "range", -DBL_MAX, DBL_MAX, &output->high);
        }
        if (status == AFFECT_OK) {
            status = read_text(each["signal"], where, "signal", &output->signal);
        }
        if (status == AFFECT_OK && !each["smoothing_s"].is(Kind::none) && !each["smoothing_s"].is(Kind::null)) {
            status = read_number(each["smoothing_s"], where, "smoothing_s", kLeastInterval, kMostInterval,
                                 &output->smoothing_s);
        }
        if (status != AFFECT_OK) {
            return status;
        }
        if (!(output->low < output->high)) {
            return wrong(where, "range", "the lowest value, then the highest");
        }
        const OutputKind *kind = nullptr;
        for (const OutputKind &known : kOutputKinds) {
            kind = each["kind"].string() == known.word ? &known : kind;
        }
        if (kind == nullptr) {
            return wrong(where, "kind", "regression, distribution, multilabel, faces or points");
        }
        output->kind = kind->kind;
        const bool labelled = kind->kind == AFFECT_DISTRIBUTION || kind->kind == AFFECT_MULTILABEL;
        if (!words.is(Kind::none) && !words.is(Kind::array)) {
            return wrong(where, "labels", "a list of texts");
        }
        if (kind->columns != 0 ? words.size() != 0 : labelled && words.size() == 0) {
            return wrong(where, "labels", "none for a table, and at least one for this kind otherwise");
        }
        output->labels = label;
        output->label_count = static_cast<int32_t>(words.size());
        for (JsonValue word = words.first(); !word.is(Kind::none); word = word.next()) {
            if (status = read_text(word, where, "labels", &labels[label++]); status != AFFECT_OK) {
                return status;
            }
        }
        if (words.size() != 0) {
            append_axis(&tensor, words.size());
        }
        if (kind->columns != 0) {
            int64_t rows = 0, columns = 0;
            if (shape.size() != 2 || !shape.first().whole(&rows) || !shape.first().next().whole(&columns) ||
                columns != kind->columns || !append_axis(&tensor, rows) || !append_axis(&tensor, columns)) {
                return wrong(where, "shape", "[rows, 15] for faces and [rows, 2] for points");
            }
        } else if (!shape.is(Kind::none)) {
            return wrong(where, "shape", "none for this kind");
        }
    }
    return AFFECT_OK;
}

affect_status Manifest::read_states(JsonValue values) noexcept {
    if (const affect_status status = read_array(values, "states"); status != AFFECT_OK) {
        return status;
    }
    if (!states.allocate(values.size())) {
        return out_of_memory(values.size() * sizeof(State));
    }
    State *state = states.begin();
    int64_t total = 0;
    for (JsonValue each = values.first(); !each.is(Kind::none); each = each.next(), ++state) {
        affect_status status = read_tensor(each, "a state", &state->tensor);
        double initial = 0.0;
        if (status == AFFECT_OK) {
            status = read_number(each["init"], state->tensor.name, "init", -static_cast<double>(FLT_MAX),
                                 static_cast<double>(FLT_MAX), &initial);
        }
        if (status != AFFECT_OK) {
            return status;
        }
        state->initial = static_cast<float>(initial);
        const JsonValue keeper = each["kept_by"];
        state->in_graph = keeper.is(Kind::none) || keeper.string() == "graph";
        if (!state->in_graph && keeper.string() != "runtime") {
            return wrong(state->tensor.name, "kept_by", "graph or runtime");
        }
        for (const State *other = states.begin(); other != state; ++other) {
            if (std::strcmp(other->tensor.name, state->tensor.name) == 0) {
                return wrong(state->tensor.name, "name", "one that no other state has");
            }
        }
        if (state->tensor.floats > kMostStateFloats - total) {
            return fail(AFFECT_ERROR_BUNDLE,
                        "the states of one stream would take more than 1 GiB; export the bundle again");
        }
        total += state->tensor.floats;
    }
    return AFFECT_OK;
}

affect_status Manifest::read_graphs(JsonValue graphs) noexcept {
    if (const affect_status status = read_array(graphs, "graphs"); status != AFFECT_OK) {
        return status;
    }
    for (JsonValue each = graphs.first(); !each.is(Kind::none); each = each.next()) {
        const std::string_view role = each["role"].string();
        Graph *const graph = role == "encoder" ? &encoder : role == "step" ? &step : nullptr;
        if (graph == nullptr || graph->is_given()) {
            return wrong("graphs", "role", "encoder or step, each once");
        }
        if (const affect_status status = read_graph(each, graph); status != AFFECT_OK) {
            return status;
        }
    }
    if (!step.is_given()) {
        return wrong("the manifest", "graphs", "one of the role step");
    }
    if (encoder.is_given() && std::strcmp(encoder.file, step.file) == 0 &&
        std::strcmp(encoder.sha256, step.sha256) != 0) {
        return wrong("graphs", "sha256", "one digest for one file");
    }
    return AFFECT_OK;
}

affect_status Manifest::read_files(JsonValue values) noexcept {
    if (!values.is(Kind::object)) {
        return wrong("the manifest", "files", "an object");
    }
    if (!files.allocate(values.size())) {
        return out_of_memory(values.size() * sizeof(ListedFile));
    }
    ListedFile *file = files.begin();
    bool has_replay = false, has_parity = false;
    for (JsonValue each = values.first(); !each.is(Kind::none); each = each.next(), ++file) {
        const std::string_view key = each.key();
        file->name = key.data();
        for (const char c : key) {
            if (static_cast<uint8_t>(c) < 0x20 || c == 0x7f || c == '\\' || c == ':') {
                return wrong("files", "a name", "a path of printable characters, without backslash and colon");
            }
        }
        if (const affect_status status = read_digest(each, "files", "sha256", &file->sha256); status != AFFECT_OK) {
            return status;
        }
        has_replay = has_replay || key == "verify.npz";
        has_parity = has_parity || key == "parity.json";
    }
    return has_replay && has_parity ? AFFECT_OK
                                    : wrong("the manifest", "files", "verify.npz and parity.json among them");
}

affect_status Manifest::check_step() noexcept {
    Tensor dt{};
    dt.name = "dt";
    dt.floats = 1;
    append_axis(&dt, 1);
    const Tensor *const found = find(step.inputs, dt.name);
    if (found == nullptr || !same_shape(*found, dt)) {
        return mismatch("inputs", dt.name);
    }
    size_t others = 1, next = 0;
    for (const State &state : states) {
        if (!state.in_graph) {
            continue;
        }
        char following[sizeof(TensorRecord::name) + 8];
        std::snprintf(following, sizeof(following), "next_%s", state.tensor.name);
        const Tensor *const before = find(step.inputs, state.tensor.name);
        const Tensor *const after = find(step.outputs, following);
        if (before == nullptr || !same_shape(*before, state.tensor) || std::strcmp(state.tensor.name, dt.name) == 0) {
            return mismatch("inputs", state.tensor.name);
        }
        if (after == nullptr || !same_shape(*after, state.tensor)) {
            return mismatch("outputs", following);
        }
        ++others;
        ++next;
    }
    for (const Output &output : outputs) {
        const Tensor *const made = find(step.outputs, output.tensor.name);
        if (made == nullptr || !same_shape(*made, output.tensor)) {
            return mismatch("outputs", output.tensor.name);
        }
    }
    // With every name found once, equal numbers mean that there is nothing else.
    if (step.outputs.size() != outputs.size() + next) {
        return mismatch("outputs", "their number");
    }
    if (!features.allocate(step.inputs.size() - others)) {
        return out_of_memory(step.inputs.size() * sizeof(Tensor));
    }
    size_t count = 0;
    for (const Tensor &input : step.inputs) {
        bool is_feature = std::strcmp(input.name, dt.name) != 0;
        for (const State &state : states) {
            is_feature = is_feature && !(state.in_graph && std::strcmp(input.name, state.tensor.name) == 0);
        }
        if (is_feature) {
            features[count++] = input;
        }
    }
    return AFFECT_OK;
}

affect_status Manifest::check_encoder() noexcept {
    if (!encoder.is_given()) {
        return AFFECT_OK;
    }
    for (const Tensor &feature : features) {
        const Tensor *const made = find(encoder.outputs, feature.name);
        if (made == nullptr || !same_shape(*made, feature)) {
            return mismatch("features", feature.name);
        }
    }
    if (encoder.outputs.size() != features.size()) {
        return mismatch("features", "their number");
    }
    for (const Picture &picture : pictures) {
        const Tensor *const taken = find(encoder.inputs, picture.name);
        Tensor shape{};
        shape.floats = 1;
        for (const int64_t size : {int64_t{1}, int64_t{3}, int64_t{picture.size}, int64_t{picture.size}}) {
            append_axis(&shape, size);
        }
        if (taken == nullptr || !same_shape(*taken, shape)) {
            return mismatch("inputs", picture.name);
        }
    }
    return AFFECT_OK;
}

affect_status Bundle::map(const Descriptor &folder, const Graph &graph, MappedFile *file) noexcept {
    Descriptor opened;
    affect_status status = open_inside(folder, graph.file, &opened);
    if (status == AFFECT_OK) {
        status = file->map(opened);
    }
    if (status == AFFECT_OK) {
        Sha256 hash;
        uint8_t digest[Sha256::kBytes];
        hash.update(file->data(), file->size());
        hash.finish(digest);
        status = compare_digest(digest, graph.sha256);
    }
    return status == AFFECT_OK ? status : add_context(status, graph.file);
}

affect_status Bundle::open(const char *path) noexcept {
    Descriptor folder, listing;
    if (const affect_status status = open_folder(path, &folder); status != AFFECT_OK) {
        return status;
    }
    {
        Array<char> text;
        affect_status status = open_inside(folder, "manifest.json", &listing);
        if (status == AFFECT_OK) {
            status = read_whole(listing, Json::kMostBytes, &text);
        }
        if (status == AFFECT_OK) {
            status = Manifest::check_digest(text.data(), text.size());
        }
        if (status == AFFECT_OK) {
            status = manifest.read(text.data(), text.size());
        }
        if (status != AFFECT_OK) {
            return add_context(status, "manifest.json");
        }
    }
    for (const ListedFile &listed : manifest.files) {
        Descriptor file;
        uint8_t digest[Sha256::kBytes];
        affect_status status = open_inside(folder, listed.name, &file);
        if (status == AFFECT_OK) {
            status = hash_file(file, digest);
        }
        if (status == AFFECT_OK) {
            status = compare_digest(digest, listed.sha256);
        }
        if (status != AFFECT_OK) {
            return add_context(status, listed.name);
        }
    }
    if (const affect_status status = map(folder, manifest.step, &step_file); status != AFFECT_OK) {
        return status;
    }
    const Graph &encoder = manifest.encoder;
    return encoder.is_given() && std::strcmp(encoder.file, manifest.step.file) != 0
               ? map(folder, encoder, &encoder_file)
               : AFFECT_OK;
}

}  // namespace affect
