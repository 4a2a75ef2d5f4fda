// The part of the C API that knows nothing of bundles: what the library is, the scan alone, and graphs from memory.

#include <atomic>
#include <cinttypes>
#include <cstring>

#include "affect_edge.h"
#include "kernels.h"
#include "model.h"
#include "program.h"
#include "support.h"

using namespace affect;

struct affect_graph {
    ~affect_graph() { Program::free(program); }
    void release() const noexcept {
        if (references.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            destroy(const_cast<affect_graph *>(this));
        }
    }

    mutable std::atomic<int32_t> references{1};
    Buffer copy;  // empty where the caller's bytes are borrowed
    Program *program = nullptr;
};

struct affect_runner {
    ~affect_runner() {
        if (graph != nullptr) {
            graph->release();
        }
    }

    const affect_graph *graph = nullptr;
    int most = 0;
    Workspace workspace;
};

namespace {

#define AFFECT_TEXT_OF(x) #x
#define AFFECT_TEXT(x) AFFECT_TEXT_OF(x)
constexpr char kVersion[] = AFFECT_TEXT(AFFECT_EDGE_VERSION_MAJOR) "." AFFECT_TEXT(
    AFFECT_EDGE_VERSION_MINOR) "." AFFECT_TEXT(AFFECT_EDGE_VERSION_PATCH);

constexpr int64_t kMostFloats = PTRDIFF_MAX / static_cast<int64_t>(sizeof(float));
// Of a scan step at a time: the scratch memory for so many is on the stack.
constexpr int64_t kChannels = 256;

bool fits(int64_t a, int64_t b, int64_t c) noexcept {
    int64_t product;
    return multiply(a, b, &product) && multiply(product, c, &product) && product <= kMostFloats;
}

// Whether `count` runs of `inner` floats, in `groups` groups, lie within what a pointer can reach.
bool reaches(int64_t count, int64_t stride, int64_t groups, int64_t group, int64_t inner) noexcept {
    int64_t along, across, last;
    return stride >= 0 && group >= 0 && multiply(count - 1, stride, &along) && multiply(groups - 1, group, &across) &&
           !__builtin_add_overflow(along, across, &last) && !__builtin_add_overflow(last, inner, &last) &&
           last <= kMostFloats;
}

template <class T>
affect_status check_args(const T *args) noexcept {
    if (args == nullptr) {
        return null_argument("args");
    }
    // First of all fields: nothing after it can be trusted when the caller's layout is another.
    return check_struct(args);
}

affect_status check(const affect_scan_step_args *args) noexcept {
    if (const affect_status status = check_args(args); status != AFFECT_OK) {
        return status;
    }
    if (args->batch < 1 || args->channels < 1 || args->states < 1 || !fits(args->batch, args->channels, args->states)) {
        return fail(AFFECT_ERROR_SIZE,
                    "batch %" PRId64 ", channels %" PRId64 " and states %" PRId64
                    " must be at least 1 and their product must fit in memory",
                    args->batch, args->channels, args->states);
    }
    const void *const buffers[] = {args->x, args->delta, args->a, args->b, args->c, args->d, args->state, args->y};
    return all_given(buffers, 8) ? AFFECT_OK : null_argument("one of the buffers of args");
}

affect_status check(const affect_scan_args *args) noexcept {
    if (const affect_status status = check_args(args); status != AFFECT_OK) {
        return status;
    }
    const int64_t length = args->length, channels = args->channels, states = args->states, groups = args->groups;
    if (length < 1 || channels < 1 || states < 1 || groups < 1 || !fits(channels, states, 1)) {
        return fail(AFFECT_ERROR_SIZE,
                    "length %" PRId64 ", channels %" PRId64 ", states %" PRId64 " and groups %" PRId64
                    " must be at least 1 and fit in memory",
                    length, channels, states, groups);
    }
    if (states > kMostStates) {
        return fail(AFFECT_ERROR_SIZE, "%" PRId64 " states are more than a scan takes, which is %" PRId64, states,
                    kMostStates);
    }
    if (channels % groups != 0) {
        return fail(AFFECT_ERROR_SIZE, "%" PRId64 " channels do not divide into %" PRId64 " groups", channels, groups);
    }
    if (args->rows < 0 || (args->rows != 0 && length % args->rows != 0)) {
        return fail(AFFECT_ERROR_SIZE, "rows is %" PRId64 "; it is 0 or divides the length, %" PRId64, args->rows,
                    length);
    }
    if (args->y_stride < channels || !reaches(length, args->x_stride, 1, 0, channels) ||
        !reaches(length, args->delta_stride, 1, 0, channels) || !reaches(length, args->y_stride, 1, 0, channels) ||
        !reaches(length, args->b_stride, groups, args->b_group, states) ||
        !reaches(length, args->c_stride, groups, args->c_group, states)) {
        return fail(
            AFFECT_ERROR_SIZE,
            "a stride is below 0 (that of y: below the number of channels) or leads beyond what fits in memory");
    }
    if ((args->flags & ~(AFFECT_SCAN_SOFTPLUS | AFFECT_SCAN_BACKWARDS | AFFECT_SCAN_ADD)) != 0 || args->zero != 0) {
        return fail(AFFECT_ERROR_VALUE,
                    "flags are %" PRIu32 " and zero is %" PRIu32 "; this release knows the flags 1, 2 and 4",
                    args->flags, args->zero);
    }
    const void *const buffers[] = {args->x, args->delta, args->a, args->b, args->c, args->y};
    return all_given(buffers, 6) ? AFFECT_OK : null_argument("one of the buffers of args");
}

const TensorRecord &record(const Program &program, int32_t which, uint32_t index) noexcept {
    return which == AFFECT_INPUTS ? program.input(index) : program.output(index);
}

// Points the bindings of one side at streams `at` and following of whole arrays.
template <class Pointer>
void bind(const Program &program, int32_t which, Pointer arrays, int64_t batch, int64_t at, int count,
          Binding *bindings) noexcept {
    const uint32_t tensors = which == AFFECT_INPUTS ? program.inputs() : program.outputs();
    for (uint32_t i = 0; i < tensors; ++i) {
        const int64_t inner = inner_floats(to_tensor(record(program, which, i)));
        bindings[i].stride = static_cast<uint64_t>(batch * inner) * sizeof(float);
        for (int s = 0; s < count; ++s) {
            // A binding is for inputs and outputs alike; a program never writes an input.
            bindings[i].base[s] = reinterpret_cast<char *>(const_cast<float *>(arrays[i] + (at + s) * inner));
        }
    }
}

bool batch_fits(const Program &program, int64_t batch) noexcept {
    for (const int32_t which : {AFFECT_INPUTS, AFFECT_OUTPUTS}) {
        const uint32_t tensors = which == AFFECT_INPUTS ? program.inputs() : program.outputs();
        for (uint32_t i = 0; i < tensors; ++i) {
            if (!fits(batch, static_cast<int64_t>(Program::floats(record(program, which, i))), 1)) {
                return false;
            }
        }
    }
    return true;
}

}  // namespace

extern "C" int32_t affect_edge_abi_version(void) noexcept { return AFFECT_EDGE_ABI_VERSION; }

extern "C" const char *affect_edge_version(void) noexcept { return kVersion; }

extern "C" const char *affect_instruction_set(void) noexcept { return kernels().name; }

extern "C" const char *affect_last_error(void) noexcept { return last_error(); }

extern "C" const char *affect_status_message(affect_status status) noexcept {
    switch (status) {
        case AFFECT_OK:
            return "done";
        case AFFECT_ERROR_NULL:
            return "an argument, or one of the buffers it names, is NULL";
        case AFFECT_ERROR_SIZE:
            return "a size is not at least 1, or sizes do not fit together or do not fit in memory";
        case AFFECT_ERROR_STRUCT:
            return "struct_size is not the size of the struct that this library was built with";
        case AFFECT_ERROR_MEMORY:
            return "there is not enough memory";
        case AFFECT_ERROR_FILE:
            return "a file or folder cannot be read";
        case AFFECT_ERROR_BUNDLE:
            return "the bundle or graph is malformed";
        case AFFECT_ERROR_INTEGRITY:
            return "a file of the bundle is not the one that was exported";
        case AFFECT_ERROR_STATE:
            return "the saved state is damaged or of another model";
        case AFFECT_ERROR_NAME:
            return "there is no graph, tensor or index of that name";
        case AFFECT_ERROR_BUFFER:
            return "the buffer is too small";
        case AFFECT_ERROR_VALUE:
            return "a number is outside its range, or streams do not go together";
        case AFFECT_ERROR_UNSUPPORTED:
            return "the bundle is for another machine, engine or release";
        default:
            return "unknown status";
    }
}

extern "C" affect_status affect_selective_scan_step(const affect_scan_step_args *args) noexcept {
    if (const affect_status status = check(args); status != AFFECT_OK) {
        return status;
    }
    const FloatMode mode;
    const Kernels &best = kernels();
    const int64_t channels = args->channels, states = args->states;
    float scratch[2 * kChannels];
    for (int64_t stream = 0; stream < args->batch; ++stream) {
        for (int64_t first = 0; first < channels; first += kChannels) {
            const int64_t at = stream * channels + first;
            ScanStepArgs step{};
            step.x = args->x + at;
            step.delta = args->delta + at;
            step.a = args->a + first * states;
            step.b = args->b + stream * states;
            step.c = args->c + stream * states;
            step.skip = args->d + first;
            step.h = args->state + at * states;
            step.next = args->state + at * states;
            step.y = args->y + at;
            step.scratch = scratch;
            step.channels = channels - first < kChannels ? channels - first : kChannels;
            step.states = states;
            step.dt = 1.0f;
            best.scan_step(step);
        }
    }
    return AFFECT_OK;
}

extern "C" affect_status affect_selective_scan(const affect_scan_args *args) noexcept {
    if (const affect_status status = check(args); status != AFFECT_OK) {
        return status;
    }
    ScanArgs scan{};
    scan.x = args->x;
    scan.delta = args->delta;
    scan.a = args->a;
    scan.b = args->b;
    scan.c = args->c;
    scan.skip = args->skip;
    scan.before = args->before;
    scan.after = args->after;
    scan.y = args->y;
    scan.length = args->length;
    scan.channels = args->channels;
    scan.states = args->states;
    scan.groups = args->groups;
    scan.x_stride = args->x_stride;
    scan.delta_stride = args->delta_stride;
    scan.b_stride = args->b_stride;
    scan.c_stride = args->c_stride;
    scan.y_stride = args->y_stride;
    scan.b_group = args->b_group;
    scan.c_group = args->c_group;
    scan.softplus = (args->flags & AFFECT_SCAN_SOFTPLUS) != 0;
    scan.backwards = (args->flags & AFFECT_SCAN_BACKWARDS) != 0;
    scan.add = (args->flags & AFFECT_SCAN_ADD) != 0;
    scan.rows = args->rows;
    const FloatMode mode;
    kernels().scan(scan);
    return AFFECT_OK;
}

extern "C" affect_status affect_math(int32_t function, const float *x, float *y, int64_t n) noexcept {
    constexpr UnaryOp functions[] = {UnaryOp::exp,  UnaryOp::sigmoid, UnaryOp::softplus,
                                     UnaryOp::silu, UnaryOp::tanh,    UnaryOp::gelu};
    if (function < AFFECT_EXP || function > AFFECT_GELU) {
        return fail(AFFECT_ERROR_VALUE, "there is no function %" PRId32 "; they are numbered 0 to 5", function);
    }
    if (n < 0 || n > kMostFloats) {
        return fail(AFFECT_ERROR_SIZE, "n is %" PRId64 "; it is at least 0, and so many floats must fit in memory", n);
    }
    if (n == 0) {
        return AFFECT_OK;
    }
    if (x == nullptr || y == nullptr) {
        return null_argument("x or y");
    }
    const FloatMode mode;
    kernels().unary(static_cast<int64_t>(functions[function]), x, y, n, 0.0f, 0.0f);
    return AFFECT_OK;
}

extern "C" affect_status affect_graph_open(const void *data, size_t size, const char *role,
                                           affect_graph **graph) noexcept {
    if (graph == nullptr) {
        return null_argument("graph");
    }
    *graph = nullptr;
    if (data == nullptr || role == nullptr) {
        return null_argument("data or role");
    }
    auto *const opened = create<affect_graph>();
    if (opened == nullptr) {
        return out_of_memory(sizeof(affect_graph));
    }
    const auto *bytes = static_cast<const uint8_t *>(data);
    if (reinterpret_cast<uintptr_t>(data) % kAlignment != 0) {
        if (!opened->copy.allocate(size)) {
            opened->release();
            return out_of_memory(size);
        }
        std::memcpy(opened->copy.data(), data, size);
        bytes = opened->copy.data();
    }
    if (const affect_status status = read_program(bytes, size, role, &opened->program); status != AFFECT_OK) {
        opened->release();
        return status;
    }
    *graph = opened;
    return AFFECT_OK;
}

extern "C" void affect_graph_free(affect_graph *graph) noexcept {
    if (graph != nullptr) {
        graph->release();
    }
}

extern "C" int32_t affect_graph_tensor_count(const affect_graph *graph, int32_t which) noexcept {
    if (graph == nullptr || (which != AFFECT_INPUTS && which != AFFECT_OUTPUTS)) {
        return -1;
    }
    return static_cast<int32_t>(which == AFFECT_INPUTS ? graph->program->inputs() : graph->program->outputs());
}

extern "C" affect_status affect_graph_tensor(const affect_graph *graph, int32_t which, int32_t index,
                                             affect_tensor_info *info) noexcept {
    if (graph == nullptr) {
        return null_argument("graph");
    }
    if (const affect_status status = check_struct(info); status != AFFECT_OK) {
        return status;
    }
    if (index < 0 || index >= affect_graph_tensor_count(graph, which)) {
        return fail(AFFECT_ERROR_NAME,
                    "the graph has no tensor %" PRId32
                    " of this kind; affect_graph_tensor_count says how many there are",
                    index);
    }
    fill_info(to_tensor(record(*graph->program, which, static_cast<uint32_t>(index))), info);
    return AFFECT_OK;
}

extern "C" affect_status affect_runner_create(const affect_graph *graph, int32_t streams,
                                              affect_runner **runner) noexcept {
    if (runner == nullptr) {
        return null_argument("runner");
    }
    *runner = nullptr;
    if (graph == nullptr) {
        return null_argument("graph");
    }
    if (streams < 1) {
        return fail(AFFECT_ERROR_SIZE, "a runner for %" PRId32 " streams was asked for; it takes at least 1", streams);
    }
    auto *const made = create<affect_runner>();
    if (made == nullptr) {
        return out_of_memory(sizeof(affect_runner));
    }
    made->most = streams < kMostStreams ? streams : kMostStreams;
    if (const affect_status status = made->workspace.allocate(graph->program, nullptr, made->most);
        status != AFFECT_OK) {
        destroy(made);
        return status;
    }
    graph->references.fetch_add(1, std::memory_order_relaxed);
    made->graph = graph;
    *runner = made;
    return AFFECT_OK;
}

extern "C" void affect_runner_free(affect_runner *runner) noexcept { destroy(runner); }

extern "C" affect_status affect_runner_run(affect_runner *runner, const float *const *inputs, float *const *outputs,
                                           int64_t batch) noexcept {
    if (runner == nullptr) {
        return null_argument("runner");
    }
    const Program &program = *runner->graph->program;
    if (!all_given(reinterpret_cast<const void *const *>(inputs), program.inputs()) ||
        !all_given(reinterpret_cast<const void *const *>(outputs), program.outputs())) {
        return null_argument("inputs or outputs");
    }
    if (batch < 1 || !batch_fits(program, batch)) {
        return fail(AFFECT_ERROR_SIZE, "batch is %" PRId64 "; it is at least 1, and so many streams must fit in memory",
                    batch);
    }
    Workspace &workspace = runner->workspace;
    for (int64_t at = 0; at < batch; at += runner->most) {
        const int count = static_cast<int>(batch - at < runner->most ? batch - at : runner->most);
        bind(program, AFFECT_INPUTS, inputs, batch, at, count, workspace.inputs.data());
        bind(program, AFFECT_OUTPUTS, outputs, batch, at, count, workspace.outputs.data());
        program.run(workspace.inputs.data(), workspace.outputs.data(), count, workspace.scratch.data());
    }
    return AFFECT_OK;
}
