#include "program.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace affect {

static_assert(sizeof(Binding::base) / sizeof(char *) == kMostStreams);

namespace {

constexpr int kMostOperands = 12;
constexpr uint32_t kMostTensors = 64;
constexpr uint32_t kMostInstructions = 1 << 16;
constexpr uint64_t kMostArena = uint64_t{1} << 32;
constexpr int64_t kMostSize = int64_t{1} << 40;
constexpr uint64_t kMostWork = uint64_t{1} << 44;
constexpr int64_t kMostInt8Inputs = 32768;  // sums of more products could leave 32 bits
constexpr int64_t kLanes = 16;
constexpr int64_t kMostAhead = 256 << 10;  // a part of the second cache
constexpr int kMostRows = 256;             // of a linear layer, in one call of a kernel

// Where an operand lies: which of the bases of a run, which piece of it, how many bytes behind that.
struct Ref {
    uint32_t slot;  // 0 for none
    uint32_t piece;
    uint64_t offset;
};

// Slots: none, the arena, the constants, then inputs and outputs.
constexpr uint32_t kArenaSlot = 1, kConstantSlot = 2, kFirstTensorSlot = 3;

int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

struct Program::Step {
    Op op;
    uint32_t flags;
    Ref refs[kMostOperands];  // in the order of the operands' fields
    int64_t v[kFields];
    // Of a scan: the weights of the next linear layer.
    const void *ahead;
    int64_t ahead_bytes;
};

namespace {

// Proves that an instruction stays where it may. The first thing that is wrong is remembered, in words.
class Checker {
  public:
    Checker(const TensorRecord *tensors, uint32_t inputs, uint32_t outputs, uint64_t arena, uint64_t constants)
        : tensors_(tensors), inputs_(inputs), outputs_(outputs), arena_(arena), constants_(constants) {}

    const char *wrong = nullptr;
    uint64_t work = 0;

    bool fail(const char *what) {
        if (wrong == nullptr) {
            wrong = what;
        }
        return false;
    }

    bool require(bool holds, const char *what) { return holds || fail(what); }

    // A size: at least `least`, and small enough that two of them can be multiplied.
    bool size(int64_t n, int64_t least = 1) { return require(n >= least && n <= (int64_t{1} << 31), "a size"); }

    // Products of sizes that `size` has passed; stays at most a little above kMostSize.
    static int64_t times(int64_t a, int64_t b) {
        if (a != 0 && b > kMostSize / a) {
            return kMostSize + 1;
        }
        return a * b;
    }

    void spend(int64_t a, int64_t b = 1, int64_t c = 1) {
        const int64_t n = times(times(a, b), c);
        work += static_cast<uint64_t>(n);
    }

    // `bytes` from the operand on, which begins `before` bytes earlier than it says.
    bool touches(int64_t field, int64_t bytes, bool write, int64_t alignment, Ref *ref, int64_t before = 0) {
        const uint64_t bits = static_cast<uint64_t>(field);
        const Place place = static_cast<Place>(bits >> 56);
        const uint32_t tensor = static_cast<uint32_t>(bits >> 48) & 0xFF;
        const int64_t offset = static_cast<int64_t>(bits & ((uint64_t{1} << 48) - 1));
        *ref = Ref{0, 0, static_cast<uint64_t>(offset)};
        if (!require(bytes >= 0 && bytes <= kMostSize && before >= 0 && before <= offset, "an extent") ||
            !require(offset % alignment == 0, "an alignment")) {
            return false;
        }
        const int64_t first = offset - before;
        uint64_t room = 0;
        switch (place) {
            case Place::arena:
                ref->slot = kArenaSlot;
                room = arena_;
                break;
            case Place::constant:
                ref->slot = kConstantSlot;
                room = constants_;
                if (write) {
                    return fail("a constant that is written");
                }
                break;
            case Place::input:
            case Place::output: {
                const bool input = place == Place::input;
                if (!require(tensor < (input ? inputs_ : outputs_), "the number of an input or output")) {
                    return false;
                }
                if (input && write) {
                    return fail("an input that is written");
                }
                const TensorRecord &record = tensors_[input ? tensor : inputs_ + tensor];
                const int64_t inner = static_cast<int64_t>(Program::floats(record) / Program::pieces(record) * 4);
                ref->slot = kFirstTensorSlot + (input ? tensor : inputs_ + tensor);
                ref->piece = static_cast<uint32_t>(offset / inner);
                ref->offset = static_cast<uint64_t>(offset % inner);
                if (bytes > 0 && first / inner != (first + bytes - 1) / inner) {
                    return fail("an access across the streams of an input or output");
                }
                if (first / inner != offset / inner) {
                    return fail("an access across the streams of an input or output");
                }
                room = Program::floats(record) * 4;
                break;
            }
            default:
                return fail("the place of an operand");
        }
        return require(static_cast<uint64_t>(first) + static_cast<uint64_t>(bytes) <= room, "an operand out of bounds");
    }

    bool reads(int64_t field, int64_t floats, Ref *ref) { return touches(field, times(floats, 4), false, 4, ref); }
    bool writes(int64_t field, int64_t floats, Ref *ref) { return touches(field, times(floats, 4), true, 4, ref); }
    bool may_read(int64_t field, int64_t floats, Ref *ref) {
        if (field == 0) {
            *ref = Ref{0, 0, 0};
            return true;
        }
        return reads(field, floats, ref);
    }
    bool may_write(int64_t field, int64_t floats, Ref *ref) {
        if (field == 0) {
            *ref = Ref{0, 0, 0};
            return true;
        }
        return writes(field, floats, ref);
    }
    // Weights and the like, which kernels read without regard to streams.
    bool constant(int64_t field, int64_t bytes, Ref *ref) {
        return require(static_cast<Place>(static_cast<uint64_t>(field) >> 56) == Place::constant,
                       "weights elsewhere") &&
               touches(field, bytes, false, 4, ref);
    }
    bool may_constant(int64_t field, int64_t bytes, Ref *ref) {
        if (field == 0) {
            *ref = Ref{0, 0, 0};
            return true;
        }
        return constant(field, bytes, ref);
    }
    bool bytes_in_arena(int64_t field, int64_t bytes, Ref *ref, bool write) {
        return require(static_cast<Place>(static_cast<uint64_t>(field) >> 56) == Place::arena, "codes elsewhere") &&
               touches(field, bytes, write, 1, ref);
    }

    // Elements reached with strides over `rank` sizes.
    bool strided(int64_t field, const int64_t *sizes, const int64_t *strides, int rank, int64_t element, bool write,
                 Ref *ref) {
        int64_t below = 0, above = 0;
        for (int i = 0; i < rank; ++i) {
            if (!require(strides[i] >= -kMostSize && strides[i] <= kMostSize, "a stride")) {
                return false;
            }
            const int64_t reach = times(sizes[i] - 1, strides[i] < 0 ? -strides[i] : strides[i]);
            (strides[i] < 0 ? below : above) += reach;
            if (!require(below <= kMostSize && above <= kMostSize, "a stride")) {
                return false;
            }
        }
        return touches(field, (below + above + 1) * element, write, element, ref, below * element);
    }

    bool number(int64_t field, bool positive) {
        const float f = float_of(field);
        return require(f - f == 0.0f && (!positive || f > 0.0f), "a number");
    }
    bool zero_point(int64_t field) { return require(field >= 0 && field <= 255, "a zero point"); }
    bool activation(int64_t field) {
        return require(field >= 0 && field < static_cast<int64_t>(Activation::count), "an activation");
    }

    static float float_of(int64_t field) {
        const uint32_t bits = static_cast<uint32_t>(field);
        float f;
        memcpy(&f, &bits, sizeof f);
        return f;
    }

    bool step(const Instruction &in, Ref *r);

  private:
    bool linear(const Instruction &in, Ref *r);
    bool conv(const Instruction &in, Ref *r, bool depthwise);
    bool scan(const Instruction &in, Ref *r);

    const TensorRecord *tensors_;
    uint32_t inputs_, outputs_;
    uint64_t arena_, constants_;
};

bool Checker::linear(const Instruction &in, Ref *r) {
    const int64_t *v = in.v;
    const int64_t rows = v[5], inputs = v[6], outputs = v[7];
    const bool int8 = in.flags & 1;
    if (!size(rows) || !size(inputs) || !size(outputs) || !size(v[8], 0) || !size(v[9], 0) || !activation(v[10])) {
        return false;
    }
    const int64_t wide = rounded_up(outputs, kLanes), packed = int8 ? rounded_up(inputs, 4) : inputs;
    spend(rows, packed, wide);
    const int64_t last = rows - 1;
    if (!reads(v[0], times(last, v[8]) + inputs, r) || !writes(v[1], times(last, v[9]) + outputs, r + 1) ||
        !constant(v[2], times(times(packed, wide), int8 ? 1 : 4), r + 2) || !may_constant(v[3], wide * 4, r + 3) ||
        !may_read(v[4], times(last, v[9]) + outputs, r + 4)) {
        return false;
    }
    if (!int8) {
        return true;
    }
    return require(inputs <= kMostInt8Inputs, "the inputs of an INT8 layer") && constant(v[11], wide * 4, r + 5) &&
           constant(v[12], wide * 4, r + 6) && number(v[13], true) && zero_point(v[14]) &&
           bytes_in_arena(v[15], times(rows, packed), r + 7, true);
}

bool Checker::conv(const Instruction &in, Ref *r, bool depthwise) {
    const int64_t *v = in.v;
    for (int i = 3; i <= 13; ++i) {
        if (!size(v[i])) {
            return false;
        }
    }
    const int64_t in_height = v[3], in_width = v[4], channels = v[5];
    const int64_t window_height = times(v[6] - 1, v[10]) + 1, window_width = times(v[7] - 1, v[11]) + 1;
    if (!require(times(v[12] - 1, v[8]) + window_height <= in_height, "the height of a convolution") ||
        !require(times(v[13] - 1, v[9]) + window_width <= in_width, "the width of a convolution")) {
        return false;
    }
    const int64_t pixels = times(v[12], v[13]), window = times(v[6], v[7]);
    const int64_t taken = times(times(in_height, in_width), channels);
    if (depthwise) {
        spend(pixels, window, rounded_up(channels, kLanes));
        return activation(v[14]) && reads(v[0], taken, r) && constant(v[1], times(times(window, channels), 4), r + 1) &&
               may_constant(v[2], channels * 4, r + 2) && writes(v[15], times(pixels, channels), r + 3);
    }
    const bool int8 = in.flags & 1;
    if (!size(v[14]) || !activation(v[15]) || !require(v[11] == 1, "dilation along the width")) {
        return false;
    }
    const int64_t outputs = v[14], wide = rounded_up(outputs, kLanes), inputs = times(window, channels);
    spend(pixels, inputs, wide);
    if (!constant(v[1], times(times(inputs, wide), int8 ? 1 : 4), r + 1) || !may_constant(v[2], wide * 4, r + 2) ||
        !may_write(v[16], times(pixels, outputs), r + 3) || !may_read(v[17], times(pixels, outputs), r + 4)) {
        return false;
    }
    if (!int8) {
        return reads(v[0], taken, r) && require(v[16] != 0, "a convolution without a result");
    }
    if (!require(channels % 4 == 0 && inputs <= kMostInt8Inputs, "the inputs of an INT8 layer") ||
        !bytes_in_arena(v[0], taken, r, false) || !constant(v[18], wide * 4, r + 5) ||
        !constant(v[19], wide * 4, r + 6) || !number(v[20], true) || !zero_point(v[21])) {
        return false;
    }
    if (v[22] == 0) {
        r[7] = Ref{0, 0, 0};
        return require(v[16] != 0, "a convolution without a result");
    }
    for (int i = 23; i <= 26; ++i) {
        if (!size(v[i], 0)) {
            return false;
        }
    }
    const int64_t lines = v[23] + v[12] + v[25], line = v[24] + v[13] + v[26];
    return size(v[27]) && require(v[27] >= outputs, "the channels of a border") && number(v[28], true) &&
           zero_point(v[29]) && bytes_in_arena(v[22], times(times(lines, line), v[27]), r + 7, true);
}

bool Checker::scan(const Instruction &in, Ref *r) {
    const int64_t *v = in.v;
    const int64_t length = v[9], channels = v[10], states = v[11], groups = v[12];
    if (!size(length) || !size(channels) || !size(states) || !size(groups) ||
        !require(states <= kMostStates, "the states of a scan") ||
        !require(channels % groups == 0, "the groups of a scan") || !size(v[20], 0) ||
        !require(v[20] == 0 || length % v[20] == 0, "the rows of a scan")) {
        return false;
    }
    for (int i = 13; i <= 19; ++i) {
        if (!size(v[i], 0)) {
            return false;
        }
    }
    spend(length, rounded_up(channels, kLanes), states * 4);
    const int64_t last = length - 1, group = groups - 1, held = times(channels, states);
    return reads(v[0], times(last, v[13]) + channels, r) && reads(v[1], times(last, v[14]) + channels, r + 1) &&
           reads(v[2], held, r + 2) && reads(v[3], times(last, v[15]) + times(group, v[18]) + states, r + 3) &&
           reads(v[4], times(last, v[16]) + times(group, v[19]) + states, r + 4) && may_read(v[5], channels, r + 5) &&
           may_read(v[6], held, r + 6) && may_write(v[7], held, r + 7) &&
           writes(v[8], times(last, v[17]) + channels, r + 8);
}

bool Checker::step(const Instruction &in, Ref *r) {
    const int64_t *v = in.v;
    switch (static_cast<Op>(in.op)) {
        case Op::linear:
            return linear(in, r);
        case Op::norm: {
            if (!size(v[4]) || !size(v[5]) || !number(v[6], false)) {
                return false;
            }
            const int64_t count = times(v[4], v[5]);
            spend(count, 4);
            return reads(v[0], count, r) && writes(v[1], count, r + 1) && may_constant(v[2], v[5] * 4, r + 2) &&
                   may_constant(v[3], v[5] * 4, r + 3);
        }
        case Op::conv_step: {
            if (!size(v[6]) || !size(v[7], 2) || !activation(v[8])) {
                return false;
            }
            const int64_t window = times(v[6], v[7]), state = times(v[6], v[7] - 1);
            spend(window, 2);
            return reads(v[0], v[6], r) && reads(v[1], state, r + 1) && writes(v[2], v[6], r + 2) &&
                   may_write(v[3], state, r + 3) && constant(v[4], times(window, 4), r + 4) &&
                   may_constant(v[5], v[6] * 4, r + 5);
        }
        case Op::scan_step: {
            if (!size(v[11]) || !size(v[12])) {
                return false;
            }
            const int64_t channels = v[11], states = v[12], held = times(channels, states);
            spend(rounded_up(held, kLanes), 8);
            return reads(v[0], channels, r) && reads(v[1], channels, r + 1) && may_read(v[2], 1, r + 2) &&
                   constant(v[3], times(held, 4), r + 3) && reads(v[4], states, r + 4) && reads(v[5], states, r + 5) &&
                   may_constant(v[6], channels * 4, r + 6) && may_read(v[7], channels, r + 7) &&
                   reads(v[8], held, r + 8) && writes(v[9], held, r + 9) && writes(v[10], channels, r + 10) &&
                   writes(v[13], times(channels, 2), r + 11);
        }
        case Op::scan:
            return scan(in, r);
        case Op::unary:
            if (!size(v[2]) || !require(v[3] >= 0 && v[3] < static_cast<int64_t>(UnaryOp::count), "an operation")) {
                return false;
            }
            spend(v[2], 2);
            return reads(v[0], v[2], r) && writes(v[1], v[2], r + 1);
        case Op::binary:
        case Op::select: {
            const bool three = static_cast<Op>(in.op) == Op::select;
            if (!three && !require(v[3] >= 0 && v[3] < static_cast<int64_t>(BinaryOp::count), "an operation")) {
                return false;
            }
            int64_t count = 1;
            for (int i = 4; i < 8; ++i) {
                if (!size(v[i])) {
                    return false;
                }
                count = times(count, v[i]);
            }
            spend(count, 2);
            const int sources = three ? 3 : 2;
            for (int i = 0; i < sources; ++i) {
                if (!strided(v[i], v + 4, v + 8 + 4 * i, 4, 4, false, r + i)) {
                    return false;
                }
            }
            return writes(v[sources], count, r + sources);
        }
        case Op::copy: {
            int64_t count = 1;
            for (int i = 4; i < 10; ++i) {
                if (!size(v[i])) {
                    return false;
                }
                count = times(count, v[i]);
            }
            if (!require(v[2] == 1 || v[2] == 4, "the size of an element")) {
                return false;
            }
            spend(count, 2);
            return strided(v[0], v + 4, v + 10, 6, v[2], false, r) &&
                   strided(v[1], v + 4, v + 16, 6, v[2], true, r + 1);
        }
        case Op::reduce: {
            if (!require(v[2] >= 0 && v[2] < static_cast<int64_t>(ReduceOp::count), "an operation") || !size(v[3]) ||
                !size(v[4]) || !size(v[5])) {
                return false;
            }
            const int64_t results = times(v[3], v[5]);
            spend(results, v[4]);
            return reads(v[0], times(results, v[4]), r) && writes(v[1], results, r + 1);
        }
        case Op::softmax:
            if (!size(v[2]) || !size(v[3])) {
                return false;
            }
            spend(v[2], v[3], 4);
            return reads(v[0], times(v[2], v[3]), r) && writes(v[1], times(v[2], v[3]), r + 1);
        case Op::matmul: {
            if (!size(v[4]) || !size(v[5]) || !size(v[14]) || !size(v[15]) || !size(v[16]) || !number(v[3], false)) {
                return false;
            }
            spend(times(v[4], v[5]), times(v[14], v[15]), v[16]);
            const int64_t a[4] = {v[4], v[5], v[14], v[15]}, b[4] = {v[4], v[5], v[15], v[16]};
            return strided(v[0], a, v + 6, 4, 4, false, r) && strided(v[1], b, v + 10, 4, 4, false, r + 1) &&
                   writes(v[2], times(times(v[4], v[5]), times(v[14], v[16])), r + 2);
        }
        case Op::pad: {
            if (!size(v[2]) || !size(v[3]) || !size(v[4]) || !size(v[5]) || !size(v[6], 0) || !size(v[7], 0) ||
                !size(v[8], 0) || !size(v[9], 0) || !require(v[5] >= v[4], "the channels of a border")) {
                return false;
            }
            const int64_t padded = times(times(v[6] + v[2] + v[8], v[7] + v[3] + v[9]), v[5]);
            spend(padded, 2);
            if (!reads(v[0], times(times(v[2], v[3]), v[4]), r)) {
                return false;
            }
            if (in.flags & 2) {
                return writes(v[1], padded, r + 1);
            }
            return number(v[10], true) && zero_point(v[11]) && bytes_in_arena(v[1], padded, r + 1, true);
        }
        case Op::conv:
            return conv(in, r, false);
        case Op::depthwise:
            return conv(in, r, true);
        case Op::pool: {
            for (int i = 2; i < 13; ++i) {
                if (!size(v[i], i == 9 || i == 10 ? 0 : 1)) {
                    return false;
                }
            }
            // Every window must have at least one number of x in it.
            if (!require(v[13] >= 0 && v[13] < static_cast<int64_t>(PoolOp::count), "an operation") ||
                !require(v[9] < v[5] && v[10] < v[6], "the border of a pool") ||
                !require(times(v[11] - 1, v[7]) - v[9] < v[2] && times(v[12] - 1, v[8]) - v[10] < v[3],
                         "the size of a pool")) {
                return false;
            }
            spend(times(v[11], v[12]), times(v[5], v[6]), v[4]);
            return reads(v[0], times(times(v[2], v[3]), v[4]), r) &&
                   writes(v[1], times(times(v[11], v[12]), v[4]), r + 1);
        }
        case Op::fill:
            if (!size(v[1])) {
                return false;
            }
            spend(v[1]);
            return writes(v[0], v[1], r);
        default:
            return fail("an instruction that this version does not know");
    }
}

bool in_file(uint64_t offset, uint64_t count, uint64_t each, uint64_t size) {
    return offset % kAlignment == 0 && offset <= size && count <= (size - offset) / each;
}

bool terminated(const char *text, size_t room) { return memchr(text, 0, room) != nullptr; }

[[gnu::format(printf, 3, 4)]] void say(char *error, size_t size, const char *format, ...) {
    va_list values;
    va_start(values, format);
    if (size > 0) {
        (void)vsnprintf(error, size, format, values);
    }
    va_end(values);
}

}  // namespace

uint64_t Program::pieces(const TensorRecord &tensor) noexcept {
    uint64_t n = 1;
    for (uint32_t i = 0; i < tensor.batch_axis; ++i) {
        n *= tensor.sizes[i];
    }
    return n;
}

uint64_t Program::floats(const TensorRecord &tensor) noexcept {
    uint64_t n = 1;
    for (uint32_t i = 0; i < tensor.rank; ++i) {
        n *= tensor.sizes[i];
    }
    return n;
}

void Program::free(Program *program) noexcept {
    if (program != nullptr) {
        ::free(program->tensors_);
        ::free(program->steps_);
        ::free(program);
    }
}

Program *Program::read(const uint8_t *data, uint64_t size, const char *role, char *error, size_t error_size) noexcept {
    FileHeader header;
    if (size < sizeof header) {
        say(error, error_size, "%llu bytes are no weights file; it begins with a header of %zu bytes",
            static_cast<unsigned long long>(size), sizeof header);
        return nullptr;
    }
    memcpy(&header, data, sizeof header);
    if (memcmp(header.magic, kMagic, sizeof kMagic) != 0) {
        say(error, error_size, "not a weights file of Affect Edge: it does not begin with %.8s", kMagic);
        return nullptr;
    }
    if (header.format != kFormat) {
        say(error, error_size, "the weights file has format %u, this library reads %u: export the model again",
            header.format, kFormat);
        return nullptr;
    }
    if (header.size != size) {
        say(error, error_size, "the weights file has %llu bytes and says %llu: it was cut short or changed",
            static_cast<unsigned long long>(size), static_cast<unsigned long long>(header.size));
        return nullptr;
    }
    if (!in_file(header.constants, header.constants_size, 1, size) ||
        !in_file(sizeof header, header.graphs, sizeof(GraphRecord), size)) {
        say(error, error_size, "the weights file's table of contents points out of it");
        return nullptr;
    }
    GraphRecord record;
    bool found = false;
    for (uint32_t i = 0; i < header.graphs && !found; ++i) {
        memcpy(&record, data + sizeof header + i * sizeof record, sizeof record);
        if (!terminated(record.role, sizeof record.role)) {
            say(error, error_size, "the weights file has a graph without a name");
            return nullptr;
        }
        found = strcmp(record.role, role) == 0;
    }
    if (!found) {
        say(error, error_size, "the weights file has no graph %s", role);
        return nullptr;
    }
    const uint64_t tensors = uint64_t{record.inputs} + record.outputs;
    if (record.inputs == 0 || record.outputs == 0 || record.inputs > kMostTensors || record.outputs > kMostTensors ||
        record.instructions == 0 || record.instructions > kMostInstructions || record.arena > kMostArena ||
        record.arena % kAlignment != 0 || !in_file(record.tensors, tensors, sizeof(TensorRecord), size) ||
        !in_file(record.instructions_at, record.instructions, sizeof(Instruction), size)) {
        say(error, error_size, "graph %s of the weights file has impossible sizes", role);
        return nullptr;
    }

    Program *const program = static_cast<Program *>(calloc(1, sizeof(Program)));
    if (program != nullptr) {
        // Copies: whoever can change a mapped file must not change what was checked.
        program->tensors_ = static_cast<TensorRecord *>(malloc(tensors * sizeof(TensorRecord)));
        program->steps_ = static_cast<Step *>(calloc(record.instructions, sizeof(Step)));
    }
    if (program == nullptr || program->tensors_ == nullptr || program->steps_ == nullptr) {
        say(error, error_size, "out of memory while reading graph %s", role);
        free(program);
        return nullptr;
    }
    program->inputs_ = record.inputs;
    program->outputs_ = record.outputs;
    program->count_ = record.instructions;
    program->arena_ = record.arena;
    program->constants_ = data + header.constants;
    memcpy(program->tensors_, data + record.tensors, tensors * sizeof(TensorRecord));
    for (uint64_t i = 0; i < tensors; ++i) {
        const TensorRecord &tensor = program->tensors_[i];
        bool fits = terminated(tensor.name, sizeof tensor.name) && tensor.name[0] != 0 && tensor.rank >= 1 &&
                    tensor.rank <= kMostRank && tensor.batch_axis < tensor.rank;
        uint64_t count = 1;
        for (uint32_t axis = 0; fits && axis < tensor.rank; ++axis) {
            fits = tensor.sizes[axis] >= 1 && tensor.sizes[axis] <= (uint64_t{1} << 30) / count;
            count *= fits ? tensor.sizes[axis] : 1;
        }
        if (!fits || tensor.sizes[tensor.batch_axis] != 1) {
            say(error, error_size, "graph %s of the weights file has an impossible input or output", role);
            free(program);
            return nullptr;
        }
    }
    Checker checker(program->tensors_, record.inputs, record.outputs, record.arena, header.constants_size);
    for (uint32_t i = 0; i < record.instructions; ++i) {
        Instruction in;
        memcpy(&in, data + record.instructions_at + i * sizeof in, sizeof in);
        Step &step = program->steps_[i];
        step.op = static_cast<Op>(in.op);
        step.flags = in.flags;
        memcpy(step.v, in.v, sizeof in.v);
        const bool fits = checker.step(in, step.refs);
        if (!fits || checker.work > kMostWork) {
            say(error, error_size, "instruction %u of graph %s is not valid: %s", i, role,
                checker.wrong == nullptr ? "too much work" : checker.wrong);
            free(program);
            return nullptr;
        }
    }
    program->work_ = checker.work;
    const void *ahead = nullptr;
    int64_t ahead_bytes = 0;
    for (uint32_t i = record.instructions; i-- > 0;) {
        Step &step = program->steps_[i];
        if (step.op == Op::linear) {
            const bool int8 = step.flags & 1;
            const int64_t inputs = int8 ? rounded_up(step.v[6], 4) : step.v[6];
            const int64_t bytes = inputs * rounded_up(step.v[7], kLanes) * (int8 ? 1 : 4);
            ahead = program->constants_ + step.refs[2].offset;
            ahead_bytes = bytes < kMostAhead ? bytes : kMostAhead;
        } else if (step.op == Op::scan_step) {
            step.ahead = ahead;
            step.ahead_bytes = ahead_bytes;
        }
    }
    return program;
}

uint64_t Program::workspace(int streams) const noexcept {
    // An odd number of cache lines between streams: with a power of two, all would compete for the same few lines.
    return static_cast<uint64_t>(streams) * ((arena_ / kAlignment | 1) * kAlignment);
}

namespace {

// The addresses of one run.
class Places {
  public:
    Places(const Binding *inputs, uint32_t input_count, const Binding *outputs, const uint8_t *constants, char *arena,
           uint64_t arena_stride)
        : inputs_(inputs),
          outputs_(outputs - input_count),
          input_count_(input_count),
          constants_(const_cast<char *>(reinterpret_cast<const char *>(constants))),
          arena_(arena),
          arena_stride_(arena_stride) {}

    char *at(const Ref &ref, int stream) const {
        switch (ref.slot) {
            case 0:
                return nullptr;
            case kArenaSlot:
                return arena_ + static_cast<uint64_t>(stream) * arena_stride_ + ref.offset;
            case kConstantSlot:
                return constants_ + ref.offset;
            default: {
                const uint32_t number = ref.slot - kFirstTensorSlot;
                const Binding &binding = number < input_count_ ? inputs_[number] : outputs_[number];
                return binding.base[stream] + ref.piece * binding.stride + ref.offset;
            }
        }
    }
    float *floats(const Ref &ref, int stream) const { return reinterpret_cast<float *>(at(ref, stream)); }

  private:
    const Binding *inputs_, *outputs_;
    uint32_t input_count_;
    char *constants_, *arena_;
    uint64_t arena_stride_;
};

void copy(char *from, char *to, const int64_t *v) {
    const int64_t element = v[2];
    const int64_t *sizes = v + 4, *x = v + 10, *y = v + 16;
    const bool runs = x[5] == 1 && y[5] == 1;
    int64_t at[5] = {0, 0, 0, 0, 0};
    for (;;) {
        int64_t a = 0, b = 0;
        for (int i = 0; i < 5; ++i) {
            a += at[i] * x[i];
            b += at[i] * y[i];
        }
        const char *const source = from + a * element;
        char *const target = to + b * element;
        if (runs) {
            memmove(target, source, static_cast<size_t>(sizes[5] * element));
        } else if (element == 4) {
            for (int64_t i = 0; i < sizes[5]; ++i) {
                memcpy(target + i * y[5] * 4, source + i * x[5] * 4, 4);
            }
        } else {
            for (int64_t i = 0; i < sizes[5]; ++i) {
                target[i * y[5]] = source[i * x[5]];
            }
        }
        int axis = 4;
        while (axis >= 0 && ++at[axis] == sizes[axis]) {
            at[axis--] = 0;
        }
        if (axis < 0) {
            return;
        }
    }
}

void broadcast(const Kernels &k, const float *a, const float *b, float *y, const int64_t *v) {
    const int64_t *n = v + 4, *sa = v + 8, *sb = v + 12;
    for (int64_t i = 0; i < n[0]; ++i) {
        for (int64_t j = 0; j < n[1]; ++j) {
            for (int64_t l = 0; l < n[2]; ++l, y += n[3]) {
                k.binary(v[3], a + i * sa[0] + j * sa[1] + l * sa[2], sa[3], b + i * sb[0] + j * sb[1] + l * sb[2],
                         sb[3], y, n[3]);
            }
        }
    }
}

void select(const float *c, const float *a, const float *b, float *y, const int64_t *v) {
    const int64_t *n = v + 4, *sc = v + 8, *sa = v + 12, *sb = v + 16;
    for (int64_t i = 0; i < n[0]; ++i) {
        for (int64_t j = 0; j < n[1]; ++j) {
            for (int64_t l = 0; l < n[2]; ++l) {
                for (int64_t m = 0; m < n[3]; ++m) {
                    const bool chosen = c[i * sc[0] + j * sc[1] + l * sc[2] + m * sc[3]] != 0.0f;
                    *y++ = chosen ? a[i * sa[0] + j * sa[1] + l * sa[2] + m * sa[3]]
                                  : b[i * sb[0] + j * sb[1] + l * sb[2] + m * sb[3]];
                }
            }
        }
    }
}

void pool(const Kernels &k, const float *x, float *y, const int64_t *v) {
    const int64_t in_height = v[2], in_width = v[3], channels = v[4], height = v[11], width = v[12];
    const PoolOp op = static_cast<PoolOp>(v[13]);
    const int64_t join = static_cast<int64_t>(op == PoolOp::max ? BinaryOp::max : BinaryOp::add);
    for (int64_t oy = 0; oy < height; ++oy) {
        const int64_t top = oy * v[7] - v[9];
        const int64_t y0 = top < 0 ? 0 : top, y1 = top + v[5] < in_height ? top + v[5] : in_height;
        for (int64_t ox = 0; ox < width; ++ox, y += channels) {
            const int64_t left = ox * v[8] - v[10];
            const int64_t x0 = left < 0 ? 0 : left, x1 = left + v[6] < in_width ? left + v[6] : in_width;
            bool begun = false;
            for (int64_t iy = y0; iy < y1; ++iy) {
                for (int64_t ix = x0; ix < x1; ++ix) {
                    const float *const from = x + (iy * in_width + ix) * channels;
                    if (begun) {
                        k.binary(join, y, 1, from, 1, y, channels);
                    } else {
                        memmove(y, from, static_cast<size_t>(channels) * sizeof(float));
                        begun = true;
                    }
                }
            }
            if (op != PoolOp::max) {
                const int64_t count = op == PoolOp::mean ? (y1 - y0) * (x1 - x0) : v[5] * v[6];
                const float share = 1.0f / static_cast<float>(count);
                k.binary(static_cast<int64_t>(BinaryOp::mul), y, 1, &share, 0, y, channels);
            }
        }
    }
}

}  // namespace

void Program::run(const Binding *inputs, const Binding *outputs, int streams, void *workspace) const noexcept {
    const FloatMode mode;
    const Kernels &k = kernels();
    const uint64_t stride = this->workspace(1);
    const Places places(inputs, inputs_, outputs, constants_, static_cast<char *>(workspace), stride);
    for (uint32_t number = 0; number < count_; ++number) {
        const Step &step = steps_[number];
        const int64_t *v = step.v;
        const Ref *r = step.refs;
        const auto f = [&](int field) { return Checker::float_of(v[field]); };
        if (step.op == Op::linear) {
            // Rows of all streams together: they share the weights.
            const bool int8 = step.flags & 1;
            const int64_t packed = rounded_up(v[6], 4), all = v[5] * streams;
            const float *x[kMostRows], *add[kMostRows];
            float *y[kMostRows];
            uint8_t *codes[kMostRows];
            LinearArgs args{};
            args.x = x;
            args.y = y;
            args.add = r[4].slot != 0 ? add : nullptr;
            args.weights = places.at(r[2], 0);
            args.bias = places.floats(r[3], 0);
            args.inputs = v[6];
            args.outputs = v[7];
            args.act = v[10];
            if (int8) {
                args.scales = places.floats(r[5], 0);
                args.sums = reinterpret_cast<const int32_t *>(places.at(r[6], 0));
                args.scale = f(13);
                args.zero = static_cast<int32_t>(v[14]);
                args.codes = codes;
            }
            int64_t row = 0;
            int stream = 0;
            for (int64_t begun = 0; begun < all; begun += kMostRows) {
                args.rows = all - begun < kMostRows ? all - begun : kMostRows;
                for (int64_t i = 0; i < args.rows; ++i) {
                    x[i] = places.floats(r[0], stream) + row * v[8];
                    y[i] = places.floats(r[1], stream) + row * v[9];
                    if (args.add != nullptr) {
                        add[i] = places.floats(r[4], stream) + row * v[9];
                    }
                    if (int8) {
                        codes[i] = reinterpret_cast<uint8_t *>(places.at(r[7], stream)) + row * packed;
                    }
                    if (++row == v[5]) {
                        row = 0;
                        ++stream;
                    }
                }
                int8 ? k.linear_int8(args) : k.linear(args);
            }
            continue;
        }
        for (int s = 0; s < streams; ++s) {
            switch (step.op) {
                case Op::norm:
                    k.norm({places.floats(r[0], s), places.floats(r[1], s), places.floats(r[2], s),
                            places.floats(r[3], s), v[4], v[5], f(6), (step.flags & 1) != 0});
                    break;
                case Op::conv_step:
                    k.conv_step({places.floats(r[0], s), places.floats(r[1], s), places.floats(r[4], s),
                                 places.floats(r[5], s), places.floats(r[2], s), places.floats(r[3], s), v[6], v[7],
                                 v[8]});
                    break;
                case Op::scan_step: {
                    const float *const dt = places.floats(r[2], s);
                    k.scan_step({places.floats(r[0], s), places.floats(r[1], s), places.floats(r[3], s),
                                 places.floats(r[4], s), places.floats(r[5], s), places.floats(r[6], s),
                                 places.floats(r[7], s), places.floats(r[8], s), places.floats(r[9], s),
                                 places.floats(r[10], s), places.floats(r[11], s), v[11], v[12],
                                 dt == nullptr ? 1.0f : *dt, (step.flags & 1) != 0, (step.flags & 2) != 0, step.ahead,
                                 s == 0 ? step.ahead_bytes : 0});
                    break;
                }
                case Op::scan:
                    k.scan({places.floats(r[0], s),
                            places.floats(r[1], s),
                            places.floats(r[2], s),
                            places.floats(r[3], s),
                            places.floats(r[4], s),
                            places.floats(r[5], s),
                            places.floats(r[6], s),
                            places.floats(r[7], s),
                            places.floats(r[8], s),
                            v[9],
                            v[10],
                            v[11],
                            v[12],
                            v[13],
                            v[14],
                            v[15],
                            v[16],
                            v[17],
                            v[18],
                            v[19],
                            (step.flags & 2) != 0,
                            (step.flags & 4) != 0,
                            (step.flags & 8) != 0,
                            v[20]});
                    break;
                case Op::unary:
                    k.unary(v[3], places.floats(r[0], s), places.floats(r[1], s), v[2], f(4), f(5));
                    break;
                case Op::binary:
                    broadcast(k, places.floats(r[0], s), places.floats(r[1], s), places.floats(r[2], s), v);
                    break;
                case Op::select:
                    select(places.floats(r[0], s), places.floats(r[1], s), places.floats(r[2], s),
                           places.floats(r[3], s), v);
                    break;
                case Op::copy:
                    copy(places.at(r[0], s), places.at(r[1], s), v);
                    break;
                case Op::reduce: {
                    const float *const x = places.floats(r[0], s);
                    float *const y = places.floats(r[1], s);
                    for (int64_t i = 0; i < v[3]; ++i) {
                        k.reduce(v[2], x + i * v[4] * v[5], y + i * v[5], v[4], v[5]);
                    }
                    if (static_cast<ReduceOp>(v[2]) == ReduceOp::mean) {
                        const float share = 1.0f / static_cast<float>(v[4]);
                        k.binary(static_cast<int64_t>(BinaryOp::mul), y, 1, &share, 0, y, v[3] * v[5]);
                    }
                    break;
                }
                case Op::softmax:
                    for (int64_t i = 0; i < v[2]; ++i) {
                        k.softmax(places.floats(r[0], s) + i * v[3], places.floats(r[1], s) + i * v[3], v[3]);
                    }
                    break;
                case Op::matmul:
                    for (int64_t g = 0; g < v[4]; ++g) {
                        for (int64_t h = 0; h < v[5]; ++h) {
                            k.matmul({places.floats(r[0], s) + g * v[6] + h * v[7],
                                      places.floats(r[1], s) + g * v[10] + h * v[11],
                                      places.floats(r[2], s) + (g * v[5] + h) * v[14] * v[16], f(3), v[14], v[15],
                                      v[16], v[8], v[9], v[12], v[13]});
                        }
                    }
                    break;
                case Op::pad:
                    k.pad({places.floats(r[0], s), places.at(r[1], s), v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9],
                           f(10), static_cast<int32_t>(v[11]), (step.flags & 1) != 0, (step.flags & 2) != 0});
                    break;
                case Op::conv:
                case Op::depthwise: {
                    ConvArgs args{};
                    args.x = places.at(r[0], s);
                    args.weights = places.at(r[1], s);
                    args.bias = places.floats(r[2], s);
                    args.y = places.floats(r[3], s);
                    args.in_height = v[3];
                    args.in_width = v[4];
                    args.channels = v[5];
                    args.kernel_height = v[6];
                    args.kernel_width = v[7];
                    args.stride_height = v[8];
                    args.stride_width = v[9];
                    args.dilation_height = v[10];
                    args.dilation_width = v[11];
                    args.height = v[12];
                    args.width = v[13];
                    if (step.op == Op::depthwise) {
                        args.act = v[14];
                        k.depthwise(args);
                        break;
                    }
                    args.outputs = v[14];
                    args.act = v[15];
                    args.add = places.floats(r[4], s);
                    if (!(step.flags & 1)) {
                        k.conv(args);
                        break;
                    }
                    args.scales = places.floats(r[5], s);
                    args.sums = reinterpret_cast<const int32_t *>(places.at(r[6], s));
                    args.scale = f(20);
                    args.zero = static_cast<int32_t>(v[21]);
                    args.codes = reinterpret_cast<uint8_t *>(places.at(r[7], s));
                    args.top = v[23];
                    args.left = v[24];
                    args.bottom = v[25];
                    args.right = v[26];
                    args.pitch = v[27];
                    args.codes_scale = f(28);
                    args.codes_zero = static_cast<int32_t>(v[29]);
                    k.conv_int8(args);
                    break;
                }
                case Op::pool:
                    pool(k, places.floats(r[0], s), places.floats(r[1], s), v);
                    break;
                case Op::fill: {
                    const float value = f(2);
                    float *const y = places.floats(r[0], s);
                    for (int64_t i = 0; i < v[1]; ++i) {
                        y[i] = value;
                    }
                    break;
                }
                default:
                    break;
            }
        }
    }
}

}  // namespace affect
