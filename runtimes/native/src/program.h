// A program: what one graph of a model is in a weights file, and what runs it.
//
// The file (little-endian, every section on a multiple of 64 bytes):
//
//     FileHeader
//     GraphRecord       x graphs
//     of each graph: TensorRecord x (inputs + outputs), then Instruction x instructions
//     constants         weights, in the very order in which the kernels read them; mapped, never copied
//
// A program knows nothing of batches: shapes are those of one stream, and every instruction runs for each stream of a
// call. Where streams share weights (linear layers), a kernel takes several at a time. What an instruction reads and
// writes lies in one of four places: the arena (scratch memory, one piece for each stream), the constants, an input or
// an output. Everything that an instruction can touch follows from its fields alone, so `Program::read` proves before
// the first run that no access leaves its place; a hostile file can give wrong numbers, and nothing else.
#ifndef AFFECT_PROGRAM_H
#define AFFECT_PROGRAM_H

#include <cstddef>
#include <cstdint>

namespace affect {

inline constexpr char kMagic[8] = {'A', 'F', 'F', 'N', 'A', 'T', 'V', '1'};
inline constexpr uint32_t kFormat = 1;
inline constexpr uint64_t kAlignment = 64;
inline constexpr int kMostRank = 6;
inline constexpr int kFields = 31;

struct FileHeader {
    char magic[8];
    uint32_t format;
    uint32_t graphs;
    uint64_t size;  // of the whole file
    uint64_t constants;
    uint64_t constants_size;
    uint8_t zero[24];
};
static_assert(sizeof(FileHeader) == 64);

struct GraphRecord {
    char role[16];  // zero-terminated
    uint32_t inputs;
    uint32_t outputs;
    uint32_t instructions;
    uint32_t zero;
    uint64_t tensors;          // offset in the file
    uint64_t instructions_at;  // offset in the file
    uint64_t arena;            // bytes for one stream, a multiple of 64
    uint8_t zeros[8];
};
static_assert(sizeof(GraphRecord) == 64);

// An input or output, always float32. The batch axis has the size 1 here.
struct TensorRecord {
    char name[64];  // zero-terminated
    uint32_t rank;
    uint32_t batch_axis;
    uint64_t sizes[kMostRank];
    uint8_t zero[8];
};
static_assert(sizeof(TensorRecord) == 128);

struct Instruction {
    uint32_t op;
    uint32_t flags;
    int64_t v[kFields];
};
static_assert(sizeof(Instruction) == 256);

// An operand is one field: place in the top byte, number of the input or output in the byte below, and the offset in
// bytes in the rest. An input or output is read as one stream's part of it, without the batch axis; an access must not
// cross from one index to the next of the axes before the batch axis, as in memory other streams lie between them. What
// was written to an output may be read again by what follows.
enum class Place : uint8_t { none = 0, arena = 1, constant = 2, input = 3, output = 4 };
constexpr int64_t operand(Place place, int tensor, int64_t offset) {
    return static_cast<int64_t>((static_cast<uint64_t>(place) << 56) | (static_cast<uint64_t>(tensor) << 48)) | offset;
}

enum class Activation : int64_t { none = 0, relu, silu, sigmoid, tanh, softplus, gelu, count };

// Fields are numbered as in v. f: the bits of a float32 in the low half. [x]: the operand may be absent (0). Unless a
// stride says otherwise, arrays are dense, float32, and row-major. K4 = K rounded up to 4, N16 = N rounded up to 16.
//
// Packed weights of a matrix (K inputs, N outputs): outputs in strips of 16, strips in groups of 4 (the last group has
// what is left). A group of S strips is, in fp32, K rows of S x 16; in INT8, K4 / 4 rows of S x 16 x 4, the last axis
// being 4 successive inputs. Missing inputs and outputs are 0. Those of a convolution are a matrix with K = kh * kw *
// C, C padded to 4 in INT8.
enum class Op : uint32_t {
    // y = act(x W + bias) + add, for `rows` rows.
    // 0 x  1 y  2 weights  3 [bias: N16]  4 [add: as y]  5 rows  6 K  7 N  8 x row stride  9 y row stride  10 act
    // With flag 1 the weights are INT8; x is first rounded to unsigned 8 bits, clip(round(x / scale) + zero, 0, 255):
    // 11 scale of each output: N16  12 sum of the codes of each output: int32, N16  13 f scale of x  14 zero of x
    // 15 scratch in the arena: rows x K4 bytes. The result: (sum of codes - zero * 12) * 13 * 11.
    linear = 1,
    // y = (x - mean) / sqrt(variance + eps) * gamma + beta over the last axis.
    // 0 x  1 y  2 [gamma]  3 [beta]  4 rows  5 n  6 f eps.   Flag 1: RMS norm, no mean.
    norm = 2,
    // A causal depthwise convolution of one frame. window = concat(state, x) by channel; y = act(sum of window * w +
    // b).
    // 0 x: C  1 state: C x (W - 1)  2 y: C  3 [next: C x (W - 1)]  4 w: C x W  5 [bias: C]  6 C  7 W  8 act
    conv_step = 3,
    // One step of the selective scan; x, delta, gate and y are (D), a is (D, N), b and c are (N), h is (D, N).
    // h' = exp(delta a) h + r delta b x ; y = (sum over n of c h' + skip x) * silu(gate) ; delta = act(delta) * dt
    // r is 1, or with flag 1 (exp(delta a) - 1) / (delta a). Flag 2: softplus of delta first.
    // 0 x  1 delta  2 [dt: 1]  3 a  4 b  5 c  6 [skip: D]  7 [gate]  8 h  9 h'  10 y  11 D  12 N
    // 13 scratch in the arena: 2 D floats
    scan_step = 4,
    // The scan over a whole sequence: x, delta, y (L, D); b, c (L, G, N), one for each of G groups of D / G channels.
    // 0 x  1 delta  2 a: D x N  3 b  4 c  5 [skip: D]  6 [h before: D x N]  7 [h after: D x N]  8 y  9 L  10 D  11 N 12
    // G
    // Strides by position, in floats: 13 of x  14 of delta  15 of b  16 of c  17 of y; by group: 18 of b  19 of c.
    // Flag 2: softplus of delta first. Flag 4: from the last position to the first. Flag 8: y is added to.
    // 20 rows of the grid that is scanned by columns, position i being (i % rows) * (L / rows) + i / rows; 0 for none
    scan = 5,
    // 0 x  1 y  2 count  3 UnaryOp  4 f p  5 f q
    unary = 6,
    // y = a op b, broadcast: y is dense with sizes 4..7; strides of a 8..11, of b 12..15, in floats, 0 to repeat, below
    // 0 to go backwards.
    // 0 a  1 b  2 y  3 BinaryOp
    binary = 7,
    // Moves elements: sizes 4..9, strides of x 10..15, of y 16..21, in elements, of either sign.
    // 0 x  1 y  2 bytes of an element, 1 or 4
    copy = 8,
    // Over the middle axis of (outer, n, inner). 0 x  1 y  2 ReduceOp  3 outer  4 n  5 inner
    reduce = 9,
    // Over the last axis. 0 x  1 y  2 rows  3 n
    softmax = 10,
    // y (G, H, M, N) = scale * a b; strides in floats of a: 6 g  7 h  8 m  9 k ; of b: 10 g  11 h  12 k  13 n.
    // 0 a  1 b  2 y  3 f scale  4 G  5 H  14 M  15 K  16 N
    matmul = 11,
    // fp32 to unsigned 8 bits (or, with flag 2, to fp32) with room around it: (H, W, C) -> (top + H + bottom,
    // left + W + right, P), P >= C. Channels beyond C and the border are `zero` (or 0.0).
    // 0 x  1 y  2 H  3 W  4 C  5 P  6 top  7 left  8 bottom  9 right  10 f scale  11 zero
    // Flag 1: x is (C, H, W).
    pad = 12,
    // y (OH, OW, N) = act(conv(x) + bias + add) from x (IH, IW, P) that has its border already.
    // Along the width there is no dilation: 11 is 1.
    // 0 x  1 weights  2 [bias: N16]  3 IH  4 IW  5 P  6 kh  7 kw  8 sh  9 sw  10 dilation h  11 dilation w  12 OH  13
    // OW
    // 14 N  15 act  16 [y: fp32, (OH, OW, N)]  17 [add: fp32, (OH, OW, N)]
    // Flag 1: INT8, x unsigned; with 18 scale of each output  19 sums of codes  20 f scale of x  21 zero of x, and
    // 22 [y rounded to 8 bits: (top + OH + bottom, left + OW + right, Q), border included]  23 top  24 left  25 bottom
    // 26 right  27 Q  28 f scale  29 zero
    conv = 13,
    // The same in fp32 with one channel in and out: y (OH, OW, C) from x (IH, IW, C), weights (kh, kw, C).
    // 0 x  1 weights  2 [bias: C]  3 IH  4 IW  5 C  6 kh  7 kw  8 sh  9 sw  10 dilation h  11 dilation w  12 OH  13 OW
    // 14 act  15 y
    depthwise = 14,
    // Over windows of (IH, IW, C), each cut off at the edge of x. 0 x  1 y  2 IH  3 IW  4 C  5 kh  6 kw  7 sh  8 sw
    // 9 top  10 left  11 OH  12 OW  13 PoolOp
    pool = 15,
    // 0 y  1 count  2 f value
    fill = 16,
    // y = c != 0 ? a : b, broadcast. 0 c  1 a  2 b  3 y  4..7 sizes  8..11 strides of c  12..15 of a  16..19 of b
    select = 17,
    count
};

// p and q: clip to [p, q]; leaky: x < 0 ? p x : x; elu: p; pow: x ** p; scale: p x + q.
enum class UnaryOp : int64_t {
    relu = 0,
    silu,
    sigmoid,
    tanh,
    softplus,
    gelu,
    exp,
    log,
    sqrt,
    neg,
    abs,
    reciprocal,
    clip,
    leaky,
    elu,
    pow,
    scale,
    floor,
    erf,
    count
};
// prelu: a < 0 ? a b : a. Comparisons give 1 and 0.
enum class BinaryOp : int64_t { add = 0, sub, mul, div, max, min, prelu, greater, less, equal, pow, count };
enum class ReduceOp : int64_t { sum = 0, mean, max, min, count };
enum class PoolOp : int64_t { max = 0, mean, mean_with_border, count };

// Where one input or output lies for each stream of a call: the pieces before the batch axis are `stride` bytes apart.
struct Binding {
    char *base[16];
    uint64_t stride;
};

// One graph, checked and ready to run. It keeps pointers into the file's bytes, which must outlive it. Immutable: any
// number of threads may run it at once, each with a workspace of its own.
class Program {
  public:
    // Reads the graph `role`. Returns null, with an English sentence in `error`, where the bytes are not a valid file,
    // have no such graph, or memory runs out. `data` must be aligned to 64 bytes.
    static Program *read(const uint8_t *data, uint64_t size, const char *role, char *error, size_t error_size) noexcept;
    static void free(Program *program) noexcept;

    uint32_t inputs() const noexcept { return inputs_; }
    uint32_t outputs() const noexcept { return outputs_; }
    const TensorRecord &input(uint32_t i) const noexcept { return tensors_[i]; }
    const TensorRecord &output(uint32_t i) const noexcept { return tensors_[inputs_ + i]; }
    // Floats of one stream's part of a tensor, and how many pieces the axes before the batch axis cut it into.
    static uint64_t floats(const TensorRecord &tensor) noexcept;
    static uint64_t pieces(const TensorRecord &tensor) noexcept;

    // Multiply-adds and the like of one stream, roughly.
    uint64_t work() const noexcept { return work_; }
    // Bytes of scratch memory for so many streams at a time, 1 to kMostStreams; to be aligned to 64 bytes, and zeroed
    // once.
    uint64_t workspace(int streams) const noexcept;
    // One pass for `streams` streams, at most as many as the workspace is for. Nothing is allocated.
    void run(const Binding *inputs, const Binding *outputs, int streams, void *workspace) const noexcept;

    Program(const Program &) = delete;
    Program &operator=(const Program &) = delete;

  private:
    Program() = default;
    struct Step;

    uint32_t inputs_ = 0, outputs_ = 0, count_ = 0;
    TensorRecord *tensors_ = nullptr;
    Step *steps_ = nullptr;
    const uint8_t *constants_ = nullptr;
    uint64_t arena_ = 0, work_ = 0;
};

}  // namespace affect

#endif
