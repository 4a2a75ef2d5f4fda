// An open model and what runs it: how the tensors of its graphs are joined with features, dt, states and outputs.
#ifndef AFFECT_MODEL_H
#define AFFECT_MODEL_H

#include <atomic>

#include "bundle.h"
#include "kernels.h"
#include "program.h"
#include "support.h"

namespace affect {

// Where one input or output of a graph comes from or goes to.
struct Slot {
    enum class Side : uint8_t { feature, dt, state, output, input } side;
    uint32_t index;   // among the features, states, outputs or inputs of the model
    uint64_t stride;  // bytes from one piece before the batch axis to the next, for one stream
};

// Everything that running a graph writes, apart from its outputs: allocated once, so that a step allocates nothing.
struct Workspace {
    Buffer scratch;
    Array<Binding> inputs, outputs;

    // Enough for each of the programs that is not null.
    affect_status allocate(const Program *first, const Program *second, int streams) noexcept;
};

// Checks what an out-parameter says of its own size.
template <class T>
affect_status check_struct(const T *info) noexcept {
    if (info == nullptr) {
        return fail(AFFECT_ERROR_NULL, "the struct to be filled is NULL");
    }
    if (info->struct_size != sizeof(T)) {
        return fail(
            AFFECT_ERROR_STRUCT,
            "struct_size is %llu, this library's struct has %zu bytes; set it to its sizeof, and compile with the "
            "library's own header",
            static_cast<unsigned long long>(info->struct_size), sizeof(T));
    }
    return AFFECT_OK;
}

affect_status null_argument(const char *name) noexcept;
// False where one of the pointers, or the list itself, is null.
bool all_given(const void *const *pointers, int64_t count) noexcept;
void fill_info(const Tensor &tensor, affect_tensor_info *info) noexcept;
// Program::read with errors as the C API gives them.
affect_status read_program(const uint8_t *data, uint64_t size, const char *role, Program **program) noexcept;

}  // namespace affect

struct affect_model {
    ~affect_model();
    affect_status open(const char *folder) noexcept;
    void retain() const noexcept { references.fetch_add(1, std::memory_order_relaxed); }
    void release() const noexcept;

    // Where a state lies among those of its kind, in bytes.
    uint64_t state_bytes(uint32_t index) const noexcept;
    const affect::Picture *picture(int32_t input, uint32_t *index) const noexcept;

    mutable std::atomic<int32_t> references{1};
    affect::Bundle bundle;
    affect::Program *encoder = nullptr, *step = nullptr;
    affect::Array<affect::Slot> encoder_inputs, encoder_outputs, step_inputs, step_outputs;
    // Of each state: its place in a bank where a graph keeps it, otherwise among the rings.
    affect::Array<uint64_t> places;
    uint64_t bank_bytes = 0, ring_bytes = 0, workspace_bytes = 0;
    // What each level of each channel of a picture becomes.
    affect::Array<float> levels;
    // What a saved state begins with, up to the numbers themselves, and its whole size.
    affect::Array<char> saved_head;
    size_t saved_size = 0;

  private:
    affect_status join(const affect::Program &program, const affect::Graph &graph, affect::Array<affect::Slot> *inputs,
                       affect::Array<affect::Slot> *outputs) noexcept;
    bool find_slot(const char *name, bool is_input, bool of_encoder, affect::Slot *slot) const noexcept;
    affect_status place_states() noexcept;
    affect_status make_levels() noexcept;
    affect_status make_saved_head() noexcept;
};

struct affect_stream {
    ~affect_stream();
    void reset() noexcept;
    // Those that a step reads, and those that it writes: never the same.
    uint8_t *bank(bool next) noexcept { return memory.data() + (next != second ? model->bank_bytes : 0); }
    const uint8_t *bank(bool next) const noexcept { return const_cast<affect_stream *>(this)->bank(next); }
    float *state(uint32_t index) noexcept;
    const float *state(uint32_t index) const noexcept { return const_cast<affect_stream *>(this)->state(index); }

    const affect_model *model = nullptr;
    affect::Buffer memory;  // two banks of the states that the graph keeps, then those that the runtime keeps
    bool second = false;    // which bank is the present one
    uint64_t mark = 0;      // of the last batch that took this stream
    affect::Workspace workspace;
};

struct affect_batch {
    ~affect_batch();
    const affect_model *model = nullptr;
    int most = 0;
    affect::Workspace workspace;
};

#endif
