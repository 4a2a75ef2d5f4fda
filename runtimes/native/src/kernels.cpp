// The kernels, compiled once for each instruction set: AFFECT_ISA names the table that comes out.

#include "kernels.h"

#include "program.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define AFFECT_CONCAT_(a, b) a##b
#define AFFECT_CONCAT(a, b) AFFECT_CONCAT_(a, b)
#define AFFECT_NAMESPACE AFFECT_CONCAT(isa_, AFFECT_ISA)
#define AFFECT_STRING_(a) #a
#define AFFECT_STRING(a) AFFECT_STRING_(a)

namespace affect {
namespace AFFECT_NAMESPACE {
namespace {

#include "simd.h"
// After it, as it is written in its words.
#include "functions.h"

constexpr int64_t kLanes = 16;
constexpr int64_t kGroup = 4;  // strips of 16 outputs that lie together, see program.h

AFFECT_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
AFFECT_INLINE int64_t rounded_up(int64_t a, int64_t to) { return (a + to - 1) / to * to; }

AFFECT_INLINE V load_part(const float *p, int64_t n) { return n >= kLanes ? load(p) : load_n(p, n); }
AFFECT_INLINE void store_part(float *p, V a, int64_t n) {
    if (n >= kLanes) {
        store(p, a);
    } else {
        store_n(p, a, n);
    }
}

// clip(round(x / scale) + zero, 0, 255), halves to even; NaN becomes 0.
AFFECT_INLINE void quantize(const float *x, uint8_t *y, int64_t n, float scale, int32_t zero) {
    const V divisor = set(scale), least = set(static_cast<float>(-zero)), most = set(static_cast<float>(255 - zero));
    const V magic = set(kMagic);  // its last byte is 0
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        store_bytes(y + i, min(max(load(x + i) / divisor, least), most) + magic, zero);
    }
    if (i < n) {
        uint8_t rest[kLanes];
        store_bytes(rest, min(max(load_n(x + i, n - i) / divisor, least), most) + magic, zero);
        __builtin_memcpy(y + i, rest, static_cast<size_t>(n - i));
    }
}

// ---- Matrices and convolutions: one loop for all of them -----------------------------------------------------------
//
// R rows of x at a time against S strips of 16 outputs, all R * S sums in registers. A row's inputs may lie in several
// segments, as the rows of a convolution's window do. Each sum runs over the inputs in their order, one by one, so that
// R and S, and with them the number of streams, make no difference to a result.

struct Reach {
    int64_t segments, length, distance;  // of one row of x: how many runs of inputs, how long, how far apart
};

template <int R, int S>
AFFECT_INLINE void products(const float *const *x, const float *w, Reach reach, int64_t width, V (&y)[R][S]) {
    for (int r = 0; r < R; ++r) {
        for (int s = 0; s < S; ++s) {
            y[r][s] = set(0.0f);
        }
    }
    for (int64_t g = 0; g < reach.segments; ++g) {
        const int64_t at = g * reach.distance;
        for (int64_t k = 0; k < reach.length; ++k, w += width) {
            V weights[S];
            for (int s = 0; s < S; ++s) {
                weights[s] = load(w + s * kLanes);
            }
            for (int r = 0; r < R; ++r) {
                const V a = set(x[r][at + k]);
                for (int s = 0; s < S; ++s) {
                    y[r][s] = fma(a, weights[s], y[r][s]);
                }
            }
        }
    }
}

// The sums of codes as numbers; `sums` and `scales` are those of the first strip's outputs.
template <int R, int S>
AFFECT_INLINE void products_int8(const uint8_t *const *x, const int8_t *w, Reach reach, int64_t width,
                                 const int32_t *sums, const float *scales, float scale, int32_t zero, V (&y)[R][S]) {
    Sums total[R][S];
    for (int r = 0; r < R; ++r) {
        for (int s = 0; s < S; ++s) {
            total[r][s] = no_sums();
        }
    }
    for (int64_t g = 0; g < reach.segments; ++g) {
        const int64_t at = g * reach.distance;
        for (int64_t k = 0; k < reach.length; k += 4, w += 4 * width) {
            Codes weights[S];
            for (int s = 0; s < S; ++s) {
                weights[s] = load_codes(w + 4 * s * kLanes);
            }
            for (int r = 0; r < R; ++r) {
                const Bytes a = repeat(x[r] + at + k);
                for (int s = 0; s < S; ++s) {
                    total[r][s] = add_products(total[r][s], a, weights[s]);
                }
            }
        }
    }
    for (int s = 0; s < S; ++s) {
        const V by = load(scales + s * kLanes) * set(scale);
        for (int r = 0; r < R; ++r) {
            y[r][s] = finished(total[r][s], sums + s * kLanes, zero) * by;
        }
    }
}

// How many rows and strips keep all sums in registers, and the multipliers busy.
#if defined(__AVX512F__)
constexpr int kRows = 8, kStrips = 2, kRows8 = 8, kStrips8 = 2, kOneRow = 4;
#elif defined(__AVXVNNI__)
constexpr int kRows = 4, kStrips = 1, kRows8 = 4, kStrips8 = 1, kOneRow = 4;
#elif defined(__AVX2__)
constexpr int kRows = 4, kStrips = 1, kRows8 = 2, kStrips8 = 1, kOneRow = 4;
#elif defined(AFFECT_NEON)
constexpr int kRows = 4, kStrips = 1, kRows8 = 4, kStrips8 = 1, kOneRow = 4;
#else
constexpr int kRows = 2, kStrips = 1, kRows8 = 2, kStrips8 = 1, kOneRow = 1;
#endif

// The outputs of one strip of one row, on their way out.
struct End {
    const float *bias;  // of the strip, or null
    int64_t act;
};
AFFECT_INLINE V ended(V v, const End &end) {
    if (end.bias != nullptr) {
        v = v + load(end.bias);
    }
    return end.act == 0 ? v : activated(end.act, v);
}

// Where rows come from and results go: a linear layer's or a convolution's.
struct LinearRows {
    const LinearArgs &args;

    const float *row(int64_t r) const { return args.x[r]; }
    const uint8_t *codes(int64_t r) const { return args.codes[r]; }
    void put(int64_t r, int64_t first, int64_t count, V v) const {
        if (args.add != nullptr) {
            v = v + load_part(args.add[r] + first, count);
        }
        store_part(args.y[r] + first, v, count);
    }
    // add comes behind the activation here.
    V end(int64_t, int64_t, int64_t, V v, const End &end) const { return ended(v, end); }
};

struct ConvRows {
    const ConvArgs &args;
    int64_t size;  // bytes of a number of x

    const uint8_t *at(int64_t r) const {
        const int64_t y = r / args.width * args.stride_height, x = r % args.width * args.stride_width;
        return static_cast<const uint8_t *>(args.x) + (y * args.in_width + x) * args.channels * size;
    }
    const float *row(int64_t r) const { return reinterpret_cast<const float *>(at(r)); }
    const uint8_t *codes(int64_t r) const { return at(r); }
    V end(int64_t r, int64_t first, int64_t count, V v, const End &end) const {
        if (args.add == nullptr) {
            return ended(v, end);
        }
        if (end.bias != nullptr) {
            v = v + load(end.bias);
        }
        v = v + load_part(args.add + r * args.outputs + first, count);
        return end.act == 0 ? v : activated(end.act, v);
    }
    void put(int64_t r, int64_t first, int64_t count, V v) const {
        if (args.y != nullptr) {
            store_part(args.y + r * args.outputs + first, v, count);
        }
        if (args.codes != nullptr) {
            alignas(64) float part[kLanes];
            store(part, v);
            const int64_t line = args.left + args.width + args.right;
            const int64_t pixel = (args.top + r / args.width) * line + args.left + r % args.width;
            quantize(part, args.codes + pixel * args.pitch + first, smaller(count, kLanes), args.codes_scale,
                     args.codes_zero);
        }
    }
};

struct Product {
    const void *weights;
    const float *bias;
    int64_t rows, outputs, inputs;  // inputs: as packed
    int64_t act;
    const float *scales;
    const int32_t *sums;
    float scale;
    int32_t zero;
};

template <bool Int8, int R, int S, typename Rows>
AFFECT_INLINE void tile(const Rows &rows, const Product &p, Reach reach, int64_t r0, int64_t strip, int64_t width,
                        const uint8_t *w) {
    V y[R][S];
    if constexpr (Int8) {
        const uint8_t *x[R];
        for (int r = 0; r < R; ++r) {
            x[r] = rows.codes(r0 + r);
        }
        products_int8<R, S>(x, reinterpret_cast<const int8_t *>(w), reach, width, p.sums + strip * kLanes,
                            p.scales + strip * kLanes, p.scale, p.zero, y);
    } else {
        const float *x[R];
        for (int r = 0; r < R; ++r) {
            x[r] = rows.row(r0 + r);
        }
        products<R, S>(x, reinterpret_cast<const float *>(w), reach, width, y);
    }
    for (int s = 0; s < S; ++s) {
        const int64_t first = (strip + s) * kLanes, count = p.outputs - first;
        const End end{p.bias == nullptr ? nullptr : p.bias + first, p.act};
        for (int r = 0; r < R; ++r) {
            rows.put(r0 + r, first, count, rows.end(r0 + r, first, count, y[r][s], end));
        }
    }
}

// All strips of one group for rows r0 to r0 + R.
template <bool Int8, int R, int S, typename Rows>
AFFECT_INLINE void strips(const Rows &rows, const Product &p, Reach reach, int64_t r0, int64_t first, int64_t count,
                          const uint8_t *w) {
    constexpr int64_t size = Int8 ? 4 : sizeof(float);  // bytes of a strip's row by output
    const int64_t width = count * kLanes;
    int64_t s = 0;
    for (; s + S <= count; s += S) {
        tile<Int8, R, S>(rows, p, reach, r0, first + s, width, w + s * kLanes * size);
    }
    if constexpr (S > 2) {
        if (s + 2 <= count) {
            tile<Int8, R, 2>(rows, p, reach, r0, first + s, width, w + s * kLanes * size);
            s += 2;
        }
    }
    if constexpr (S > 1) {
        if (s < count) {
            tile<Int8, R, 1>(rows, p, reach, r0, first + s, width, w + s * kLanes * size);
        }
    }
}

template <bool Int8, typename Rows>
AFFECT_INLINE void multiply(const Rows &rows, const Product &p, Reach reach) {
    constexpr int R = Int8 ? kRows8 : kRows, S = Int8 ? kStrips8 : kStrips;
    constexpr int64_t size = Int8 ? 1 : sizeof(float);
    const int64_t all = (p.outputs + kLanes - 1) / kLanes;
    const uint8_t *w = static_cast<const uint8_t *>(p.weights);
    // By groups of strips outside: a group's weights stay in the cache while all rows use them.
    for (int64_t first = 0; first < all; first += kGroup) {
        const int64_t count = smaller(kGroup, all - first);
        int64_t r = 0;
        for (; r + R <= p.rows; r += R) {
            strips<Int8, R, S>(rows, p, reach, r, first, count, w);
        }
        if constexpr (R > 4) {
            for (; r + 4 <= p.rows; r += 4) {
                strips<Int8, 4, S>(rows, p, reach, r, first, count, w);
            }
        }
        if constexpr (R > 2) {
            for (; r + 2 <= p.rows; r += 2) {
                strips<Int8, 2, S>(rows, p, reach, r, first, count, w);
            }
        }
        for (; r < p.rows; ++r) {
            strips<Int8, 1, kOneRow>(rows, p, reach, r, first, count, w);
        }
        w += p.inputs * count * kLanes * size;
    }
}

void linear(const LinearArgs &args) noexcept {
    const Product p{args.weights, args.bias, args.rows, args.outputs, args.inputs, args.act, nullptr, nullptr, 0, 0};
    multiply<false>(LinearRows{args}, p, Reach{1, args.inputs, 0});
}

void linear_int8(const LinearArgs &args) noexcept {
    const int64_t packed = rounded_up(args.inputs, 4);
    for (int64_t r = 0; r < args.rows; ++r) {
        quantize(args.x[r], args.codes[r], args.inputs, args.scale, args.zero);
        for (int64_t k = args.inputs; k < packed; ++k) {
            args.codes[r][k] = 0;
        }
    }
    const Product p{args.weights, args.bias,   args.rows, args.outputs, packed,
                    args.act,     args.scales, args.sums, args.scale,   args.zero};
    multiply<true>(LinearRows{args}, p, Reach{1, packed, 0});
}

template <bool Int8>
AFFECT_INLINE void convolve(const ConvArgs &args) {
    const int64_t inputs = args.kernel_height * args.kernel_width * args.channels;
    const Product p{
        args.weights, args.bias, args.height * args.width, args.outputs, inputs, args.act, args.scales, args.sums,
        args.scale,   args.zero};
    // Without dilation along the rows, a row of the window is one run.
    const Reach reach{args.kernel_height, args.kernel_width * args.channels,
                      args.dilation_height * args.in_width * args.channels};
    multiply<Int8>(ConvRows{args, Int8 ? 1 : static_cast<int64_t>(sizeof(float))}, p, reach);
}

void conv(const ConvArgs &args) noexcept { convolve<false>(args); }

void conv_int8(const ConvArgs &args) noexcept {
    if (args.codes != nullptr) {
        // The border, and the channels that only pad: what the next convolution takes for 0.
        const int64_t line = args.left + args.width + args.right, lines = args.top + args.height + args.bottom;
        const uint8_t zero = static_cast<uint8_t>(args.codes_zero);
        if (args.pitch != args.outputs) {
            __builtin_memset(args.codes, zero, static_cast<size_t>(lines * line * args.pitch));
        } else {
            const size_t pixel = static_cast<size_t>(args.pitch);
            const size_t left = static_cast<size_t>(args.left) * pixel, right = static_cast<size_t>(args.right) * pixel;
            __builtin_memset(args.codes, zero, static_cast<size_t>(args.top * line) * pixel);
            for (int64_t y = args.top; y < args.top + args.height; ++y) {
                uint8_t *const start = args.codes + static_cast<size_t>(y * line) * pixel;
                __builtin_memset(start, zero, left);
                __builtin_memset(start + static_cast<size_t>(line) * pixel - right, zero, right);
            }
            __builtin_memset(args.codes + static_cast<size_t>((args.top + args.height) * line) * pixel, zero,
                             static_cast<size_t>(args.bottom * line) * pixel);
        }
    }
    convolve<true>(args);
}

void depthwise(const ConvArgs &args) noexcept {
    const float *const x = static_cast<const float *>(args.x), *const w = static_cast<const float *>(args.weights);
    for (int64_t oy = 0; oy < args.height; ++oy) {
        for (int64_t ox = 0; ox < args.width; ++ox) {
            float *const y = args.y + (oy * args.width + ox) * args.channels;
            for (int64_t c = 0; c < args.channels; c += kLanes) {
                const int64_t n = args.channels - c;
                V total = set(0.0f);
                for (int64_t ky = 0; ky < args.kernel_height; ++ky) {
                    const int64_t iy = oy * args.stride_height + ky * args.dilation_height;
                    for (int64_t kx = 0; kx < args.kernel_width; ++kx) {
                        const int64_t ix = ox * args.stride_width + kx * args.dilation_width;
                        total = fma(load_part(x + (iy * args.in_width + ix) * args.channels + c, n),
                                    load_part(w + (ky * args.kernel_width + kx) * args.channels + c, n), total);
                    }
                }
                if (args.bias != nullptr) {
                    total = total + load_part(args.bias + c, n);
                }
                store_part(y + c, args.act == 0 ? total : activated(args.act, total), n);
            }
        }
    }
}

void pad(const PadArgs &args) noexcept {
    const int64_t line = args.left + args.width + args.right, lines = args.top + args.height + args.bottom;
    const int64_t size = args.single ? static_cast<int64_t>(sizeof(float)) : 1;
    uint8_t *const out = static_cast<uint8_t *>(args.y);
    const bool room = lines != args.height || line != args.width || args.pitch != args.channels;
    if (room) {
        __builtin_memset(out, args.single ? 0 : args.zero, static_cast<size_t>(lines * line * args.pitch * size));
    }
    for (int64_t y = 0; y < args.height; ++y) {
        uint8_t *const start = out + ((args.top + y) * line + args.left) * args.pitch * size;
        if (args.planar) {
            for (int64_t c = 0; c < args.channels; ++c) {
                const float *const from = args.x + (c * args.height + y) * args.width;
                if (args.single) {
                    float *const to = reinterpret_cast<float *>(start) + c;
                    for (int64_t x = 0; x < args.width; ++x) {
                        to[x * args.pitch] = from[x];
                    }
                    continue;
                }
                uint8_t codes[256];
                for (int64_t x = 0; x < args.width; x += 256) {
                    const int64_t n = smaller(256, args.width - x);
                    quantize(from + x, codes, n, args.scale, args.zero);
                    for (int64_t i = 0; i < n; ++i) {
                        start[(x + i) * args.pitch + c] = codes[i];
                    }
                }
            }
            continue;
        }
        const float *const from = args.x + y * args.width * args.channels;
        if (args.pitch == args.channels) {
            const int64_t n = args.width * args.channels;
            if (args.single) {
                __builtin_memmove(start, from, static_cast<size_t>(n * size));
            } else {
                quantize(from, start, n, args.scale, args.zero);
            }
            continue;
        }
        for (int64_t x = 0; x < args.width; ++x) {
            uint8_t *const to = start + x * args.pitch * size;
            if (args.single) {
                __builtin_memmove(to, from + x * args.channels, static_cast<size_t>(args.channels * size));
            } else {
                quantize(from + x * args.channels, to, args.channels, args.scale, args.zero);
            }
        }
    }
}

void matmul(const MatmulArgs &args) noexcept {
    for (int64_t m = 0; m < args.rows; ++m) {
        const float *const a = args.a + m * args.a_row;
        float *const y = args.y + m * args.columns;
        if (args.b_column == 1) {
            for (int64_t n = 0; n < args.columns; n += kLanes) {
                const int64_t count = args.columns - n;
                V total = set(0.0f);
                for (int64_t k = 0; k < args.inner; ++k) {
                    total = fma(set(a[k * args.a_inner]), load_part(args.b + k * args.b_inner + n, count), total);
                }
                store_part(y + n, total * set(args.scale), count);
            }
            continue;
        }
        for (int64_t n = 0; n < args.columns; ++n) {
            const float *const b = args.b + n * args.b_column;
            float total = 0.0f;
            if (args.a_inner == 1 && args.b_inner == 1) {
                V lanes = set(0.0f);
                for (int64_t k = 0; k < args.inner; k += kLanes) {
                    lanes = fma(load_part(a + k, args.inner - k), load_part(b + k, args.inner - k), lanes);
                }
                total = sum(lanes);
            } else {
                for (int64_t k = 0; k < args.inner; ++k) {
                    total = __builtin_fmaf(a[k * args.a_inner], b[k * args.b_inner], total);
                }
            }
            y[n] = total * args.scale;
        }
    }
}

// ---- Norms and the like --------------------------------------------------------------------------------------------

void norm(const NormArgs &args) noexcept {
    const float share = 1.0f / static_cast<float>(args.n);
    for (int64_t r = 0; r < args.rows; ++r) {
        const float *const x = args.x + r * args.n;
        float *const y = args.y + r * args.n;
        float mean = 0.0f;
        if (!args.rms) {
            V total = set(0.0f);
            for (int64_t i = 0; i < args.n; i += kLanes) {
                total = total + load_part(x + i, args.n - i);
            }
            mean = sum(total) * share;
        }
        V squares = set(0.0f);
        for (int64_t i = 0; i < args.n; i += kLanes) {
            const int64_t n = args.n - i;
            V off = load_part(x + i, n) - set(mean);
            if (n < kLanes) {
                // Lanes behind the end would count with the mean.
                alignas(64) float part[kLanes];
                store(part, off);
                off = load_n(part, n);
            }
            squares = fma(off, off, squares);
        }
        const V by = set(1.0f / __builtin_sqrtf(sum(squares) * share + args.eps));
        for (int64_t i = 0; i < args.n; i += kLanes) {
            const int64_t n = args.n - i;
            V v = (load_part(x + i, n) - set(mean)) * by;
            if (args.gamma != nullptr) {
                v = v * load_part(args.gamma + i, n);
            }
            if (args.beta != nullptr) {
                v = v + load_part(args.beta + i, n);
            }
            store_part(y + i, v, n);
        }
    }
}

void softmax(const float *x, float *y, int64_t n) noexcept {
    float most = x[0];
    for (int64_t i = 1; i < n; ++i) {
        most = x[i] > most ? x[i] : most;
    }
    V total = set(0.0f);
    for (int64_t i = 0; i < n; i += kLanes) {
        V e = exp(load_part(x + i, n - i) - set(most));
        store_part(y + i, e, n - i);
        if (n - i < kLanes) {
            e = load_n(y + i, n - i);
        }
        total = total + e;
    }
    const V by = set(1.0f / sum(total));
    for (int64_t i = 0; i < n; i += kLanes) {
        store_part(y + i, load_part(y + i, n - i) * by, n - i);
    }
}

AFFECT_INLINE V one_of(int64_t op, V x, float p, float q) {
    switch (static_cast<UnaryOp>(op)) {
        case UnaryOp::relu:
            return max(set(0.0f), x);
        case UnaryOp::silu:
            return x * sigmoid(x);
        case UnaryOp::sigmoid:
            return sigmoid(x);
        case UnaryOp::tanh:
            return tanh(x);
        case UnaryOp::softplus:
            return softplus(x);
        case UnaryOp::gelu:
            return gelu(x);
        case UnaryOp::exp:
            return exp(x);
        case UnaryOp::sqrt:
            return sqrt(x);
        case UnaryOp::neg:
            return set(-0.0f) - x;
        case UnaryOp::abs:
            return abs(x);
        case UnaryOp::reciprocal:
            return set(1.0f) / x;
        case UnaryOp::clip:
            return min(set(q), max(set(p), x));
        case UnaryOp::leaky:
            return select(less(x, set(0.0f)), x * set(p), x);
        case UnaryOp::elu:
            return select(less(x, set(0.0f)), (exp(x) - set(1.0f)) * set(p), x);
        case UnaryOp::scale:
            return fma(x, set(p), set(q));
        case UnaryOp::floor:
            return floor(x);
        case UnaryOp::erf:
            return erf(x);
        default:
            return x;
    }
}

void unary(int64_t op, const float *x, float *y, int64_t n, float p, float q) noexcept {
    // Rare enough to be left to the C library.
    if (op == static_cast<int64_t>(UnaryOp::log)) {
        for (int64_t i = 0; i < n; ++i) {
            y[i] = __builtin_logf(x[i]);
        }
        return;
    }
    if (op == static_cast<int64_t>(UnaryOp::pow)) {
        for (int64_t i = 0; i < n; ++i) {
            y[i] = p == 2.0f ? x[i] * x[i] : __builtin_powf(x[i], p);
        }
        return;
    }
    for (int64_t i = 0; i < n; i += kLanes) {
        store_part(y + i, one_of(op, load_part(x + i, n - i), p, q), n - i);
    }
}

AFFECT_INLINE V two_of(int64_t op, V a, V b) {
    switch (static_cast<BinaryOp>(op)) {
        case BinaryOp::add:
            return a + b;
        case BinaryOp::sub:
            return a - b;
        case BinaryOp::mul:
            return a * b;
        case BinaryOp::div:
            return a / b;
        case BinaryOp::max:
            return max(a, b);
        case BinaryOp::min:
            return min(a, b);
        case BinaryOp::prelu:
            return select(less(a, set(0.0f)), a * b, a);
        case BinaryOp::greater:
            return select(less(b, a), set(1.0f), set(0.0f));
        case BinaryOp::less:
            return select(less(a, b), set(1.0f), set(0.0f));
        case BinaryOp::equal:
            return select(equal(a, b), set(1.0f), set(0.0f));
        default:
            return a;
    }
}

void binary(int64_t op, const float *a, int64_t a_step, const float *b, int64_t b_step, float *y, int64_t n) noexcept {
    if (op == static_cast<int64_t>(BinaryOp::pow)) {
        for (int64_t i = 0; i < n; ++i) {
            y[i] = __builtin_powf(a[i * a_step], b[i * b_step]);
        }
        return;
    }
    alignas(64) float gathered[2][kLanes];
    for (int64_t i = 0; i < n; i += kLanes) {
        const int64_t count = n - i;
        V v[2];
        const float *const from[2] = {a, b};
        const int64_t steps[2] = {a_step, b_step};
        for (int side = 0; side < 2; ++side) {
            if (steps[side] == 1) {
                v[side] = load_part(from[side] + i, count);
            } else if (steps[side] == 0) {
                v[side] = set(from[side][0]);
            } else {
                for (int64_t k = 0; k < smaller(count, kLanes); ++k) {
                    gathered[side][k] = from[side][(i + k) * steps[side]];
                }
                v[side] = load_part(gathered[side], count);
            }
        }
        store_part(y + i, two_of(op, v[0], v[1]), count);
    }
}

AFFECT_INLINE V joined(int64_t op, V a, V b) {
    switch (static_cast<ReduceOp>(op)) {
        case ReduceOp::max:
            return max(a, b);
        case ReduceOp::min:
            return min(a, b);
        default:
            return a + b;
    }
}

void reduce(int64_t op, const float *x, float *y, int64_t n, int64_t inner) noexcept {
    if (inner == 1) {
        V total = load_part(x, n);
        if (n < kLanes) {
            alignas(64) float part[kLanes];
            store(part, total);
            float all = part[0];
            for (int64_t i = 1; i < n; ++i) {
                all = first(joined(op, set(all), set(part[i])));
            }
            y[0] = all;
            return;
        }
        int64_t i = kLanes;
        for (; i + kLanes <= n; i += kLanes) {
            total = joined(op, total, load(x + i));
        }
        total = joined(op, total, swap8(total));
        total = joined(op, total, swap4(total));
        total = joined(op, total, swap2(total));
        float all = first(joined(op, total, swap1(total)));
        for (; i < n; ++i) {
            all = first(joined(op, set(all), set(x[i])));
        }
        y[0] = all;
        return;
    }
    for (int64_t c = 0; c < inner; c += kLanes) {
        V total = load_part(x + c, inner - c);
        for (int64_t i = 1; i < n; ++i) {
            total = joined(op, total, load_part(x + i * inner + c, inner - c));
        }
        store_part(y + c, total, inner - c);
    }
}

// ---- The recurrence ------------------------------------------------------------------------------------------------

template <int Width>
AFFECT_INLINE void conv_channels(const ConvStepArgs &args, int64_t width) {
    const int64_t w = Width > 0 ? Width : width;
    for (int64_t c = 0; c < args.channels; ++c) {
        const float *const weights = args.weights + c * w, *const state = args.state + c * (w - 1);
        float total = args.bias == nullptr ? 0.0f : args.bias[c];
        for (int64_t k = 0; k + 1 < w; ++k) {
            total = __builtin_fmaf(weights[k], state[k], total);
        }
        args.y[c] = __builtin_fmaf(weights[w - 1], args.x[c], total);
    }
    if (args.next != nullptr) {
        for (int64_t c = 0; c < args.channels; ++c) {
            const float *const state = args.state + c * (w - 1);
            float *const next = args.next + c * (w - 1);
            for (int64_t k = 0; k + 2 < w; ++k) {
                next[k] = state[k + 1];
            }
            if (w > 1) {
                next[w - 2] = args.x[c];
            }
        }
    }
}

void conv_step(const ConvStepArgs &args) noexcept {
    if (args.width == 4) {
        conv_channels<4>(args, 4);
    } else {
        conv_channels<0>(args, args.width);
    }
    if (args.act != 0) {
        for (int64_t c = 0; c < args.channels; c += kLanes) {
            store_part(args.y + c, activated(args.act, load_part(args.y + c, args.channels - c)), args.channels - c);
        }
    }
}

// The new state of 16 entries: exp(delta a) h + r (delta x) b.
template <bool Zoh>
AFFECT_INLINE V advanced(V delta, V input, V a, V b, V h) {
    const V z = delta * a;
    V drive = input * b;
    if constexpr (Zoh) {
        drive = drive * expm1_ratio(z);
    }
    return fma(exp_decay(z), h, drive);
}

template <bool Zoh>
AFFECT_INLINE void scan_channels(const ScanStepArgs &args, const float *delta, const float *input) {
    const int64_t n = args.states;
    if (n == kLanes) {
        const V b = load(args.b), c = load(args.c);
        int64_t d = 0;
        const char *ahead = static_cast<const char *>(args.ahead);
        const int64_t share = args.ahead_bytes * kLanes / args.channels;
        for (; d + kLanes <= args.channels; d += kLanes, ahead += share) {
            for (int64_t i = 0; i < share; i += 64) {
                __builtin_prefetch(ahead + i, 0, 2);
            }
            V rows[kLanes];
            for (int64_t i = 0; i < kLanes; ++i) {
                const int64_t at = (d + i) * n;
                const V h =
                    advanced<Zoh>(set(delta[d + i]), set(input[d + i]), load(args.a + at), b, load(args.h + at));
                store(args.next + at, h);
                rows[i] = c * h;
            }
            store(args.y + d, row_sums(rows));
        }
        for (; d < args.channels; ++d) {
            const int64_t at = d * n;
            const V h = advanced<Zoh>(set(delta[d]), set(input[d]), load(args.a + at), b, load(args.h + at));
            store(args.next + at, h);
            args.y[d] = sum(c * h);
        }
        return;
    }
    if (n == 1 || n == 2 || n == 4 || n == 8) {
        // Several channels at a time, each n lanes.
        const int shift = n == 1 ? 0 : n == 2 ? 1 : n == 4 ? 2 : 3;
        const int64_t step = kLanes >> shift;
        alignas(64) float tiled[2][kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
            tiled[0][i] = args.b[i & (n - 1)];
            tiled[1][i] = args.c[i & (n - 1)];
        }
        const V b = load(tiled[0]), c = load(tiled[1]);
        int64_t d = 0;
        for (; d + step <= args.channels; d += step) {
            const int64_t at = d * n;
            const V h = advanced<Zoh>(spread(delta + d, shift), spread(input + d, shift), load(args.a + at), b,
                                      load(args.h + at));
            store(args.next + at, h);
            V y = c * h;
            y = n > 4 ? y + swap4(y) : y;
            y = n > 2 ? y + swap2(y) : y;
            y = n > 1 ? y + swap1(y) : y;
            alignas(64) float sums[kLanes];
            store(sums, y);
            for (int64_t i = 0; i < step; ++i) {
                args.y[d + i] = sums[i << shift];
            }
        }
        for (; d < args.channels; ++d) {
            const int64_t at = d * n;
            const V h = advanced<Zoh>(set(delta[d]), set(input[d]), load_n(args.a + at, n), load_n(tiled[0], n),
                                      load_n(args.h + at, n));
            store_n(args.next + at, h, n);
            alignas(64) float part[kLanes];
            store(part, load_n(tiled[1], n) * h);
            V y = load_n(part, n);
            y = n > 4 ? y + swap4(y) : y;
            y = n > 2 ? y + swap2(y) : y;
            y = n > 1 ? y + swap1(y) : y;
            args.y[d] = first(y);
        }
        return;
    }
    for (int64_t d = 0; d < args.channels; ++d) {
        V total = set(0.0f);
        for (int64_t i = 0; i < n; i += kLanes) {
            const int64_t at = d * n + i, count = n - i;
            const V h = advanced<Zoh>(set(delta[d]), set(input[d]), load_part(args.a + at, count),
                                      load_part(args.b + i, count), load_part(args.h + at, count));
            store_part(args.next + at, h, count);
            // c is 0 behind the end, and h may be anything but infinite or NaN there: a, b and h were read as 0.
            total = fma(load_part(args.c + i, count), h, total);
        }
        args.y[d] = sum(total);
    }
}

void scan_step(const ScanStepArgs &args) noexcept {
    float *const delta = args.scratch, *const input = args.scratch + args.channels;
    for (int64_t d = 0; d < args.channels; d += kLanes) {
        const int64_t n = args.channels - d;
        V v = load_part(args.delta + d, n);
        v = (args.softplus ? softplus(v) : v) * set(args.dt);
        store_part(delta + d, v, n);
        store_part(input + d, v * load_part(args.x + d, n), n);
    }
    if (args.zoh) {
        scan_channels<true>(args, delta, input);
    } else {
        scan_channels<false>(args, delta, input);
    }
    if (args.skip == nullptr && args.gate == nullptr) {
        return;
    }
    for (int64_t d = 0; d < args.channels; d += kLanes) {
        const int64_t n = args.channels - d;
        V y = load_part(args.y + d, n);
        if (args.skip != nullptr) {
            y = fma(load_part(args.skip + d, n), load_part(args.x + d, n), y);
        }
        if (args.gate != nullptr) {
            const V gate = load_part(args.gate + d, n);
            y = y * (gate * sigmoid(gate));
        }
        store_part(args.y + d, y, n);
    }
}

// W strips of 16 channels at a time, with their states and their rows of a in registers or in the first cache.
template <int W, int N, bool Softplus>
AFFECT_INLINE void scan_strips(const ScanArgs &args, int64_t d, int64_t count, const float *b, const float *c,
                               int64_t states) {
    constexpr int64_t most = N > 0 ? N : kMostStates;
    const int64_t n = N > 0 ? N : states;
    alignas(64) float a[most][W * kLanes], h[most][W * kLanes];
    for (int64_t k = 0; k < n; ++k) {
        for (int64_t i = 0; i < W * kLanes; ++i) {
            const bool there = i < count;
            a[k][i] = there ? args.a[(d + i) * n + k] : 0.0f;
            h[k][i] = there && args.before != nullptr ? args.before[(d + i) * n + k] : 0.0f;
        }
    }
    V state[N > 0 ? N : 1][W];
    if constexpr (N > 0) {
        for (int k = 0; k < N; ++k) {
            for (int s = 0; s < W; ++s) {
                state[k][s] = load(h[k] + s * kLanes);
            }
        }
    }
    int64_t row = 0, column = 0;
    for (int64_t step = 0; step < args.length; ++step) {
        int64_t l = step;
        if (args.rows > 0) {
            l = row * (args.length / args.rows) + column;
            if (++row == args.rows) {
                row = 0;
                ++column;
            }
        }
        l = args.backwards ? args.length - 1 - l : l;
        const float *const bl = b + l * args.b_stride, *const cl = c + l * args.c_stride;
        for (int s = 0; s < W; ++s) {
            const int64_t at = d + s * kLanes, left = W == 1 ? count : kLanes;
            const V x = load_part(args.x + l * args.x_stride + at, left);
            V delta = load_part(args.delta + l * args.delta_stride + at, left);
            delta = Softplus ? softplus(delta) : delta;
            const V input = delta * x;
            V y = set(0.0f);
            for (int64_t k = 0; k < n; ++k) {
                const V decay = exp_decay(delta * load(a[k] + s * kLanes));
                if constexpr (N > 0) {
                    state[k][s] = fma(decay, state[k][s], input * set(bl[k]));
                    y = fma(set(cl[k]), state[k][s], y);
                } else {
                    const V now = fma(decay, load(h[k] + s * kLanes), input * set(bl[k]));
                    store(h[k] + s * kLanes, now);
                    y = fma(set(cl[k]), now, y);
                }
            }
            if (args.skip != nullptr) {
                y = fma(load_part(args.skip + at, left), x, y);
            }
            float *const to = args.y + l * args.y_stride + at;
            store_part(to, args.add ? y + load_part(to, left) : y, left);
        }
    }
    if (args.after != nullptr) {
        if constexpr (N > 0) {
            for (int k = 0; k < N; ++k) {
                for (int s = 0; s < W; ++s) {
                    store(h[k] + s * kLanes, state[k][s]);
                }
            }
        }
        for (int64_t k = 0; k < n; ++k) {
            for (int64_t i = 0; i < smaller(count, W * kLanes); ++i) {
                args.after[(d + i) * n + k] = h[k][i];
            }
        }
    }
}

template <bool Softplus>
AFFECT_INLINE void scan_all(const ScanArgs &args) {
    const int64_t width = args.channels / args.groups;
    for (int64_t g = 0; g < args.groups; ++g) {
        const float *const b = args.b + g * args.b_group, *const c = args.c + g * args.c_group;
        int64_t d = g * width;
        const int64_t end = d + width;
        while (d < end) {
            const int64_t count = end - d;
            if (args.states == 1 && count >= 4 * kLanes) {
                scan_strips<4, 1, Softplus>(args, d, 4 * kLanes, b, c, 1);
                d += 4 * kLanes;
                continue;
            }
            if (args.states == 1) {
                scan_strips<1, 1, Softplus>(args, d, smaller(count, kLanes), b, c, 1);
            } else if (args.states == 16) {
                scan_strips<1, 16, Softplus>(args, d, smaller(count, kLanes), b, c, 16);
            } else {
                scan_strips<1, 0, Softplus>(args, d, smaller(count, kLanes), b, c, args.states);
            }
            d += kLanes;
        }
    }
}

void scan(const ScanArgs &args) noexcept {
    if (args.softplus) {
        scan_all<true>(args);
    } else {
        scan_all<false>(args);
    }
}

}  // namespace

extern const Kernels table;
const Kernels table = {AFFECT_STRING(AFFECT_ISA),
                       linear,
                       linear_int8,
                       norm,
                       conv_step,
                       scan_step,
                       scan,
                       conv,
                       conv_int8,
                       depthwise,
                       pad,
                       matmul,
                       softmax,
                       unary,
                       binary,
                       reduce};

}  // namespace AFFECT_NAMESPACE
}  // namespace affect
