// What a step program is to the kernels that run it, and to whoever launches them (affect_runtimes/fused).
//
// A step program is one graph of a model, the recurrent step, as a list of instructions; affect_export/fused makes it.
// It has the operations of the native library's programs (native/src/program.h), without those that look at pictures
// and sound, and with weights laid out for a GPU. Like there, an instruction says what happens to one stream, and every
// one is done for each stream of a launch.
//
// Memory, all arrays dense, row-major fp32 unless said otherwise:
//   arena      scratch of a stream; a tile of up to kTile streams at a time
//   constants  weights and what belongs to them, each on a multiple of 16 bytes
//   tensors    inputs, then outputs. A shape such as (2, batch, 256, 3) is 2 pieces of (batch, 256, 3): piece p of
//   stream
//              s begins at base + (p * streams + s) * stride bytes
#ifndef AFFECT_STEP_H
#define AFFECT_STEP_H

#include "numbers.h"

constexpr int kTile = 8;  // streams that one block, or one team of blocks, takes at a time
constexpr int kMostTensors = 64;
constexpr int kOperands = 11, kNumbers = 20, kReals = 2;

enum class Place : uint8_t { none = 0, arena = 1, constant = 2, tensor = 3 };

struct Operand {
    Place place;
    uint8_t number;   // of the tensor
    uint16_t piece;   // of the tensor
    uint32_t offset;  // bytes
};
static_assert(sizeof(Operand) == 8, "as affect_runtimes/fused/program.py packs it");

// What follows an instruction reads or writes what it wrote, or writes what it read.
constexpr int32_t kBarrier = 1 << 8;

struct Instruction {
    int32_t op;
    int32_t flags;
    Operand at[kOperands];
    int32_t n[kNumbers];
    float f[kReals];
};
static_assert(sizeof(Instruction) == 184, "as affect_runtimes/fused/program.py packs it");

// Numbers as in the native library. [x]: the operand may be absent.
enum class Op : int32_t {
    // y = act(x W + bias) + [add].   at: 0 x  1 y  2 weights  3 [bias: N]  4 [add: N]  5 [scales: N]   n: 0 K  1 N  2
    // act
    // Weights, groups of 32 outputs: for each 16 bytes of inputs, the 16 bytes of the 32 outputs one after another.
    // That
    // is 8 inputs in fp16, or, with flag 1, 16 in INT8, whose codes have 128 added to them. Inputs and outputs that the
    // last 16 bytes and the last group have too many are 0. With flag 1 an output is multiplied by its scale.
    linear = 1,
    // y = (x - mean) / sqrt(variance + f0) [* gamma] [+ beta] over rows.   at: 0 x  1 y  2 [gamma]  3 [beta]
    // n: 0 rows  1 width.   Flag 1: no mean.
    norm = 2,
    // window = concat(state, x) by channel; y = act(sum of window * weights [+ bias]).
    // at: 0 x: C  1 state: (C, W - 1)  2 y: C  3 [next state]  4 weights: (C, W)  5 [bias: C]   n: 0 C  1 W  2 act
    conv_step = 3,
    // delta = [softplus of, with flag 2] delta [* dt];  h' = exp(delta a) h + r delta x b;
    // y = (sum over n of c h' [+ skip x]) [* silu(gate)].   r is 1, or with flag 1 (exp(delta a) - 1) / (delta a)
    // at: 0 x: D  1 delta: D  2 [dt: 1]  3 a: (D, N)  4 b: N  5 c: N  6 [skip: D]  7 [gate: D]  8 h: (D, N)  9 h'  10
    // y: D
    // n: 0 D  1 N
    scan_step = 4,
    // at: 0 x  1 y   n: 0 count  1 UnaryOp   f: p, q
    unary = 6,
    // y = a op b.   at: 0 a  1 b  2 y   n: 0 BinaryOp  1..4 sizes  5..8 strides of a  9..12 of b
    binary = 7,
    // at: 0 x  1 y   n: 0..5 sizes  6..11 strides of x  12..17 of y
    copy = 8,
    // Over the middle axis of (outer, n, inner).   at: 0 x  1 y   n: 0 ReduceOp  1 outer  2 n  3 inner
    reduce = 9,
    // at: 0 x  1 y   n: 0 rows  1 width
    softmax = 10,
    // y (G, H, M, N) = f0 * a b.   at: 0 a  1 b  2 y   n: 0 G  1 H  2 M  3 K  4 N  5..8 strides of a: g h m k
    // 9..12 of b: g h k n
    matmul = 11,
    // at: 0 y   n: 0 count   f: value
    fill = 16,
    // y = c != 0 ? a : b.   at: 0 c  1 a  2 b  3 y   n: 0..3 sizes  4..7 strides of c  8..11 of a  12..15 of b
    select = 17,
};
constexpr int32_t kInt8 = 1, kNoMean = 1, kHold = 1, kSoftplus = 2;

enum class Activation : int32_t { none = 0, relu, silu, sigmoid, tanh, softplus };
// p and q: clip to [p, q]; leaky: x < 0 ? p x : x; scale: p x + q.
enum class UnaryOp : int32_t {
    relu = 0,
    silu = 1,
    sigmoid = 2,
    tanh = 3,
    softplus = 4,
    exp = 6,
    sqrt = 8,
    neg = 9,
    abs = 10,
    reciprocal = 11,
    clip = 12,
    leaky = 13,
    scale = 16,
};
enum class BinaryOp : int32_t { add = 0, sub, mul, div, max, min, prelu, greater, less, equal };
enum class ReduceOp : int32_t { sum = 0, mean, max, min };

struct Tensor {
    char *base;
    uint32_t stride;  // bytes from one stream to the next within a piece
    uint32_t unused;
};

// The argument of both kernels.
struct StepLaunch {
    const Instruction *program;
    const char *constants;
    char *arena;         // affect_step_team: kTile streams for each team
    uint32_t *barriers;  // affect_step_team: two numbers for each team, 0 before the first launch
    int32_t instructions;
    int32_t streams;
    int32_t arena_stride;  // bytes from one stream of a tile to the next, a multiple of 16
    int32_t team;          // blocks that share a tile; 1 for affect_step
    Tensor tensors[kMostTensors];
};
static_assert(sizeof(StepLaunch) == 48 + 16 * kMostTensors, "as affect_runtimes/fused/step.py packs it");

#endif
