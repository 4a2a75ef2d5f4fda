// The arithmetic of the library, one table of functions for each instruction set that it was compiled for.
//
// All of them are made from the one source kernels.cpp. Every function gives the same bits in every table: sums are
// taken in the same order, multiplications and additions are fused in the same places, and exp and its kin are the same
// polynomials. (Only at the edge of the subnormal numbers, which are taken as 0, may processors differ by 1.2e-38.)
//
// Nothing here allocates, locks, throws, or checks: `Program::read` has proved the sizes.
#ifndef AFFECT_KERNELS_H
#define AFFECT_KERNELS_H

#include <cstdint>

namespace affect {

inline constexpr int kMostStreams = 16;      // that one kernel call takes
inline constexpr int64_t kMostStates = 256;  // of a channel, in a scan over a sequence

struct LinearArgs {
    const float *const *x;  // rows
    float *const *y;
    const float *const *add;  // or null
    const void *weights;
    const float *bias;  // or null
    int64_t rows, inputs, outputs;
    int64_t act;
    // INT8 only.
    const float *scales;
    const int32_t *sums;
    float scale;
    int32_t zero;
    uint8_t *const *codes;  // rows of inputs rounded up to 4: the rounded x, written and read
};

struct NormArgs {
    const float *x;
    float *y;
    const float *gamma, *beta;  // or null
    int64_t rows, n;
    float eps;
    bool rms;
};

struct ConvStepArgs {
    const float *x, *state, *weights, *bias;  // bias or null
    float *y, *next;                          // next or null
    int64_t channels, width;
    int64_t act;
};

struct ScanStepArgs {
    const float *x, *delta, *a, *b, *c, *skip, *gate, *h;  // skip and gate or null
    float *next, *y, *scratch;                             // scratch: 2 channels; next may be h
    int64_t channels, states;
    float dt;
    bool zoh, softplus;
    // Weights of a layer to come: a scan leaves the way to memory idle, and a layer does little but wait for it.
    const void *ahead;
    int64_t ahead_bytes;
};

struct ScanArgs {
    const float *x, *delta, *a, *b, *c, *skip, *before;  // skip and before or null
    float *after, *y;                                    // after or null
    int64_t length, channels, states, groups;
    int64_t x_stride, delta_stride, b_stride, c_stride, y_stride, b_group, c_group;
    bool softplus, backwards, add;
    // The positions of a grid scanned by columns: position l is at (l % rows) * columns + l / rows. 0 for none.
    int64_t rows;
};

struct ConvArgs {
    const void *x;
    const void *weights;
    const float *bias, *add;  // or null
    float *y;                 // or null
    int64_t in_height, in_width, channels;
    int64_t kernel_height, kernel_width, stride_height, stride_width, dilation_height, dilation_width;
    int64_t height, width, outputs;
    int64_t act;
    // INT8 only.
    const float *scales;
    const int32_t *sums;
    float scale;
    int32_t zero;
    uint8_t *codes;  // or null
    int64_t top, left, bottom, right, pitch;
    float codes_scale;
    int32_t codes_zero;
};

struct PadArgs {
    const float *x;
    void *y;
    int64_t height, width, channels, pitch, top, left, bottom, right;
    float scale;
    int32_t zero;
    bool planar, single;  // x is (C, H, W); y is fp32
};

struct MatmulArgs {
    const float *a, *b;
    float *y;
    float scale;
    int64_t rows, inner, columns;
    int64_t a_row, a_inner, b_inner, b_column;
};

struct Kernels {
    const char *name;
    void (*linear)(const LinearArgs &) noexcept;
    void (*linear_int8)(const LinearArgs &) noexcept;
    void (*norm)(const NormArgs &) noexcept;
    void (*conv_step)(const ConvStepArgs &) noexcept;
    void (*scan_step)(const ScanStepArgs &) noexcept;
    void (*scan)(const ScanArgs &) noexcept;
    void (*conv)(const ConvArgs &) noexcept;
    void (*conv_int8)(const ConvArgs &) noexcept;
    void (*depthwise)(const ConvArgs &) noexcept;
    void (*pad)(const PadArgs &) noexcept;
    void (*matmul)(const MatmulArgs &) noexcept;
    void (*softmax)(const float *x, float *y, int64_t n) noexcept;
    // op: see UnaryOp and BinaryOp. A step of 0 repeats one number.
    void (*unary)(int64_t op, const float *x, float *y, int64_t n, float p, float q) noexcept;
    void (*binary)(int64_t op, const float *a, int64_t a_step, const float *b, int64_t b_step, float *y,
                   int64_t n) noexcept;
    // One row of `inner` sums, maxima or minima over `n` rows of x. op: see ReduceOp; the mean is a sum.
    void (*reduce)(int64_t op, const float *x, float *y, int64_t n, int64_t inner) noexcept;
};

// Subnormal numbers are 0 while one of these lives: a state that fades towards 0 would otherwise slow the processor
// down a hundredfold. Rounding is to nearest, whatever the caller had set.
class FloatMode {
  public:
    FloatMode() noexcept;
    ~FloatMode() noexcept;
    FloatMode(const FloatMode &) = delete;
    FloatMode &operator=(const FloatMode &) = delete;

  private:
    uint64_t saved_;
};

// The best table for this processor, or, for tests, the one that AFFECT_EDGE_ISA names, if this processor can run it.
const Kernels &kernels() noexcept;
// Every table that this processor can run, the best first; null at the end.
const Kernels *const *all_kernels() noexcept;

}  // namespace affect

#endif
