// The selective scan over whole sequences, and the 2-D scan of pictures along four paths (SS2D).
//
//   h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t,   y_t = C_t · h_t + skip x_t          (Gu and Dao 2023, algorithm 2, Euler)
//
// Memory, all dense, row-major, by position whatever the order in which a path meets it. L = H W positions, P paths (1,
// or the 4 of a picture), D channels, G groups of D / G successive channels, N states. "Stored" is fp32 (affect_scan_*)
// or fp16 (affect_scan_half_*), which halves what is moved; all arithmetic is fp32.
//   x       (B, H, W, D)        stored   the same for all paths
//   delta   (B, H, W, P, D)     stored   the step size, or what bias is added to and softplus taken of
//   b, c    (B, H, W, P, G, N)  stored
//   a       (P, D, N)           fp32     negative
//   skip    (P, D)              fp32     or null
//   bias    (P, D)              fp32     or null
//   before  (B, P, D, N)        fp32     or null: zeros
//   after   (B, P, D, N)        fp32     or null: nobody asks
//   y       (B, P, H, W, D)     stored   where the position is
//   partial as y                fp32     only with more states than kTile: y itself, or scratch where y is fp16
// Path 0 goes row by row from the top left, 1 column by column, 2 as 0 backwards, 3 as 1 backwards. A sequence is a
// picture of one row, and `path` (0 or 2) says in which direction.
//
// How a scan is cut. The recurrence is linear: what a chunk of positions does to any state is h -> exp(A ΣΔ) h + g,
// where g is what it leaves from zero. A block has 32 channels, one a lane, so that x, delta and y are read and written
// in whole lines, and up to 32 warps, a chunk each. All warps but the last first find ΣΔ and g of their chunks; the
// first, which knows its start, writes its y at once. Then the starts of the others follow from one another through
// shared memory, and they go through their chunks again, writing y. Longer sequences go on segment by segment, so that
// the second reading comes from L1 or L2, and the arrays cross the memory's bus once.
//
// Block and grid against floors. A launch takes some 3 us. A position of a channel moves 12 bytes (x, delta, y) in
// fp32, 6 in fp16, and takes about 40 + 39 N instructions of a lane in its two passes. An RTX 4090 does 41 such
// instructions in the time of a byte (82.6 TFLOP/s, 1.0 TB/s), a Jetson AGX Orin 13: so the bus is the floor on the one
// up to N = 11 (fp16: 5), on the other up to 3 (1), and arithmetic beyond. MS-VSSM's pictures have N = 1. The GPU's own
// approximate exp would move that border, and the bits with it.
//
// One warp alone would go L positions deep, some 100 clocks each. As most positions are visited twice, W warps divide
// that by W / 2: two never pay. A start costs as much as one position or less, of which a block does W in turn. So from
// 4 chunks of 16 positions on a scan is cut (16 * 2 + 4 positions deep instead of 64), and at 32 warps starts are a
// tenth of it. Above 2 states the registers hold 16 warps. Where a launch would fill the GPU uncut, the cut costs up to
// twice the arithmetic; but it depends on L and N alone, never on the batch or the GPU, so that a stream gives the same
// bits in any company. No block waits for another, and nothing is added by atomics.
//
// Error. y_t is a sum of terms: one for each state n of h_before and of each position s up to t, and skip x_t. To first
// order, each is off by at most so many u = 2^-24 of its size, where Z = |A| (Δ_(s+1) + ... + Δ_t), its decay exp(-Z):
//
//   5 + N + 8 (t - s) + 4 Z
//
// 8: exp 6, product, sum. 4: Δ A, the sum of Δ (compensated: 2, however long) and its product. 5: Δ x B, its sum, the
// sum at the end of its chunk, and one to spare. N: the sum of y. Softplus, taken of fp32(delta + bias), has 6 more in
// Δ: 11 + N + 8 (t - s) + 10 Z. A decay, of a position or of a chunk, is never below 1.2e-38, which
// adds up to 1.2e-38 of the state at every earlier position. Of `after`, the same without N. In fp16, 2^-11 |y| + 2^-25
// more. It holds for finite numbers with products in the range of fp32 (y: of what is stored) and 0 <= Δ, of a chunk
// below 1e38 together.
//
// Measured: at most 8 u of the sum of all sizes where steps differ. Where a decay near 1 repeats, so does the rounding
// of exp: after 100,000 steps of 1e-3 with A = -1e-3, 1,200 u (7e-5 of y).
#include "numbers.h"

namespace affect_scan {

constexpr uint32_t kLanes = 32;

struct ScanLaunch {
    const void *x, *delta, *b, *c;
    const float *a, *skip, *bias, *before;
    void *y;
    float *partial, *after;
    uint32_t height, width, channels, groups, states;
    uint32_t paths;     // 1 or 4
    uint32_t path;      // the first of them
    uint32_t chunk;     // positions of a warp in a segment
    uint32_t softplus;  // whether it is taken
    uint32_t unused;
};
static_assert(sizeof(ScanLaunch) == 128, "as affect_runtimes/fused/scan.py packs it");

struct MergeLaunch {
    const void *y;         // (B, 4, L, D) stored
    const float *weights;  // (B, 4, D), or null: ones
    void *merged;          // (B, L, D) stored
    uint32_t length, channels;
};
static_assert(sizeof(MergeLaunch) == 32, "as affect_runtimes/fused/scan.py packs it");

AFFECT_FN float loaded(float x) { return x; }
AFFECT_FN float loaded(uint16_t x) { return half_to_float(x); }
AFFECT_FN void store(float *to, float x) { *to = x; }
AFFECT_FN void store(uint16_t *to, float x) { *to = float_to_half(x); }

AFFECT_FN constexpr uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

// Successive numbers that are read at once.
template <class Stored, int kTile>
struct alignas(least(16, sizeof(Stored) * kTile)) Row {
    Stored at[kTile];
};

// b or c of `count` states; those that a tile has too many are 0.
template <int kTile, class Stored>
AFFECT_FN void load_row(const Stored *from, uint32_t count, bool whole, float (&row)[kTile]) {
    if (whole) {
        const Row<Stored, kTile> found = *reinterpret_cast<const Row<Stored, kTile> *>(from);
#pragma unroll
        for (int n = 0; n < kTile; ++n) {
            row[n] = loaded(found.at[n]);
        }
        return;
    }
#pragma unroll
    for (int n = 0; n < kTile; ++n) {
        row[n] = static_cast<uint32_t>(n) < count ? loaded(from[n]) : 0.0f;
    }
}

// The positions of a path, one after another, without a division for each.
struct Walk {
    uint32_t place;  // in the picture, row by row
    uint32_t inner;  // steps since the row or column began
    uint32_t size, stride, jump;

    AFFECT_FN Walk(uint32_t path, uint32_t height, uint32_t width, uint32_t step) {
        const bool by_columns = path & 1u, backwards = path & 2u;
        const uint32_t length = height * width;
        size = by_columns ? height : length;
        stride = by_columns ? width : 1u;
        jump = 1u - (height - 1u) * width;
        const uint32_t at = backwards ? length - 1u - step : step;
        place = by_columns ? at % height * width + at / height : at;
        inner = step % size;
        if (backwards) {
            // Unsigned numbers wrap: adding 2^32 - n takes n away.
            stride = 0u - stride;
            jump = 0u - jump;
        }
    }

    AFFECT_FN void advance() {
        const bool turns = ++inner == size;
        place += turns ? jump : stride;
        inner = turns ? 0u : inner;
    }
};

// The sum of numbers that are not negative, without the error that grows with their count (Kahan 1965).
struct Sum {
    float total = 0.0f, excess = 0.0f;
    AFFECT_FN void add(float x) {
        const float mended = x - excess, next = total + mended;
        excess = (next - total) - mended;
        total = next;
    }
};

// What one thread scans: a channel of a path of a stream, and of its states a tile.
template <int kTile, class Stored>
struct Lane {
    static constexpr uint32_t kAhead = kTile >= 16 ? 1 : kTile >= 2 ? 2 : 4;  // positions that are read at once

    const Stored *x, *delta, *b, *c;
    Stored *y;
    float *partial;
    uint32_t x_stride, delta_stride, gate_stride;  // from one position to the next
    uint32_t path, height, width;
    uint32_t count;              // states of this tile
    bool whole;                  // the tile has no state too many
    bool live;                   // the channel exists
    bool first, last, softplus;  // of the tiles
    float a[kTile];
    float skip, bias;

    // Steps [from, to) of the path. With `writes`, y as well; without, the sum of the step sizes instead.
    AFFECT_FN void scan(uint32_t from, uint32_t to, bool writes, float (&state)[kTile], Sum &covered) const {
        if (from >= to) {
            return;
        }
        Walk walk(path, height, width, from);
        for (uint32_t t = from; t < to; t += kAhead) {
            uint32_t places[kAhead] = {};
            float xs[kAhead] = {}, deltas[kAhead] = {}, ys[kAhead] = {};
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                if (t + i < to) {
                    places[i] = walk.place;
                    xs[i] = loaded(x[offset(walk.place, x_stride)]);
                    deltas[i] = loaded(delta[offset(walk.place, delta_stride)]);
                    walk.advance();
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                if (t + i < to) {
                    ys[i] = position(places[i], xs[i], deltas[i], writes, state, covered);
                }
            }
            // After the reading, so that nothing which is read has to wait for what is written.
#pragma unroll
            for (uint32_t i = 0; i < kAhead; ++i) {
                if (t + i < to && writes && live) {
                    write(offset(places[i], x_stride), ys[i]);
                }
            }
        }
    }

  private:
    static AFFECT_FN affect_int64 offset(uint32_t place, uint32_t stride) {
        return static_cast<affect_int64>(place) * stride;
    }

    AFFECT_FN float position(uint32_t place, float at, float raw, bool writes, float (&state)[kTile],
                             Sum &covered) const {
        raw += bias;
        const float step = softplus ? softplus_(raw) : raw, drive = step * at;
        const affect_int64 gate = offset(place, gate_stride);
        float row[kTile];
        load_row<kTile>(b + gate, count, whole, row);
#pragma unroll
        for (int n = 0; n < kTile; ++n) {
            state[n] = fmaf(exp_nonpositive(step * a[n]), state[n], drive * row[n]);
        }
        if (!writes) {
            covered.add(step);
            return 0.0f;
        }
        load_row<kTile>(c + gate, count, whole, row);
        float sum = first ? skip * at : 0.0f;
#pragma unroll
        for (int n = 0; n < kTile; ++n) {
            sum = fmaf(row[n], state[n], sum);
        }
        return sum;
    }

    AFFECT_FN void write(affect_int64 at, float sum) const {
        const float all = first ? sum : partial[at] + sum;
        if (last) {
            store(y + at, all);
        } else {
            partial[at] = all;
        }
    }
};

// Block: up to 1024 threads. Grid: (B P ceil(D / 32)). Shared: 128 bytes for each warp and each of kTile + 1.
template <int kTile, class Stored>
AFFECT_FN void scan(const ScanLaunch &p, char *shared) {
    const uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
    const uint32_t tiles = (p.channels + kLanes - 1u) / kLanes, length = p.height * p.width;
    const uint32_t row = blockIdx.x / tiles, wanted = blockIdx.x % tiles * kLanes + lane;
    const affect_int64 stream = row / p.paths;
    const uint32_t path = row % p.paths;
    // A lane too many repeats the last channel and writes nothing: all have to meet at the barriers.
    const bool live = wanted < p.channels;
    const uint32_t channel = live ? wanted : p.channels - 1u;
    const uint32_t group = channel / (p.channels / p.groups);
    const affect_int64 own = static_cast<affect_int64>(path) * p.channels + channel;
    const affect_int64 held = (stream * p.paths * p.channels + own) * p.states;
    const affect_int64 gates = ((stream * length * p.paths + path) * p.groups + group) * p.states;
    const affect_int64 written = (stream * p.paths + path) * length * p.channels + channel;

    // (warps, kTile, 32) states: after phase 1 what a chunk leaves, then what is there after it; and (warps, 32) sums.
    float *const left = reinterpret_cast<float *>(shared) + lane;
    float *const sums = left + warps * kTile * kLanes;

    Lane<kTile, Stored> at;
    at.x = static_cast<const Stored *>(p.x) + stream * length * p.channels + channel;
    at.delta = static_cast<const Stored *>(p.delta) + stream * length * p.paths * p.channels + own;
    at.y = static_cast<Stored *>(p.y) + written;
    at.partial = p.partial + (p.partial ? written : 0);
    at.x_stride = p.channels;
    at.delta_stride = p.paths * p.channels;
    at.gate_stride = p.paths * p.groups * p.states;
    at.path = p.path + path;
    at.height = p.height;
    at.width = p.width;
    at.live = live;
    at.softplus = p.softplus;
    at.skip = p.skip ? p.skip[own] : 0.0f;
    at.bias = p.bias ? p.bias[own] : 0.0f;

    for (uint32_t tile = 0; tile < p.states; tile += kTile) {
        at.b = static_cast<const Stored *>(p.b) + gates + tile;
        at.c = static_cast<const Stored *>(p.c) + gates + tile;
        at.count = least(kTile, p.states - tile);
        at.whole = p.states % kTile == 0;
        at.first = tile == 0;
        at.last = tile + kTile >= p.states;
        const float *const decays = p.a + own * p.states + tile;
        load_row<kTile>(decays, at.count, at.whole, at.a);

        for (uint32_t segment = 0; segment < length; segment += warps * p.chunk) {
            const uint32_t from = least(length, segment + warp * p.chunk), to = least(length, from + p.chunk);
            float state[kTile] = {};
            Sum covered;
            if (warp == 0 || warp + 1u < warps) {
                if (warp == 0 && segment) {
#pragma unroll
                    for (int n = 0; n < kTile; ++n) {
                        state[n] = left[((warps - 1u) * kTile + n) * kLanes];
                    }
                } else if (warp == 0 && p.before) {
                    load_row<kTile>(p.before + held + tile, at.count, at.whole, state);
                }
                at.scan(from, to, warp == 0, state, covered);
#pragma unroll
                for (int n = 0; n < kTile; ++n) {
                    left[(warp * kTile + n) * kLanes] = state[n];
                }
                sums[warp * kLanes] = covered.total;
            }
            __syncthreads();
            for (uint32_t n = warp; n < at.count; n += warps) {
                float start = left[n * kLanes];
                const float decay = decays[n];
#pragma unroll 4
                for (uint32_t i = 1; i + 1u < warps; ++i) {
                    float &leaves = left[(i * kTile + n) * kLanes];
                    start = fmaf(exp_nonpositive(decay * sums[i * kLanes]), start, leaves);
                    leaves = start;
                }
            }
            __syncthreads();
            if (warp > 0) {
#pragma unroll
                for (int n = 0; n < kTile; ++n) {
                    state[n] = left[((warp - 1u) * kTile + n) * kLanes];
                }
                at.scan(from, to, true, state, covered);
                if (warp + 1u == warps) {
#pragma unroll
                    for (int n = 0; n < kTile; ++n) {
                        left[(warp * kTile + n) * kLanes] = state[n];
                    }
                }
            }
            __syncthreads();
        }

        if (warp == 0 && live && p.after) {
            for (uint32_t n = 0; n < at.count; ++n) {
                p.after[held + tile + n] = left[((warps - 1u) * kTile + n) * kLanes];
            }
        }
    }
}

// Adds the four paths of a picture, each channel weighed: (y0 w0 + y2 w2) + (y1 w1 + y3 w3).
//
// Block: 256 threads, of which a warp has 32 channels of kPositions positions. Grid: (B ceil(L / 32) ceil(D / 32)). It
// moves 5 numbers for 7 operations, so all that counts is that 16 readings of a thread are on their way at once.
// Error: at most 4 * 2^-24 of the sum of the four sizes; with fp16, 2^-11 |merged| + 2^-25 more.
template <class Stored>
AFFECT_FN void merge(const MergeLaunch &p) {
    constexpr uint32_t kPositions = 4, kPaths = 4, kWarps = 8;
    const uint32_t tiles = (p.channels + kLanes - 1u) / kLanes;
    const uint32_t pieces = (p.length + kWarps * kPositions - 1u) / (kWarps * kPositions);
    const uint32_t channel = blockIdx.x % tiles * kLanes + threadIdx.x % kLanes;
    const uint32_t rest = blockIdx.x / tiles, start = (rest % pieces * kWarps + threadIdx.x / kLanes) * kPositions;
    const affect_int64 stream = rest / pieces, picture = static_cast<affect_int64>(p.length) * p.channels;
    if (channel >= p.channels) {
        return;
    }
    const Stored *const y = static_cast<const Stored *>(p.y) + stream * kPaths * picture + channel;
    Stored *const merged = static_cast<Stored *>(p.merged) + stream * picture + channel;
    float weights[kPaths], found[kPositions][kPaths] = {};
#pragma unroll
    for (uint32_t k = 0; k < kPaths; ++k) {
        weights[k] = p.weights ? p.weights[(stream * kPaths + k) * p.channels + channel] : 1.0f;
    }
#pragma unroll
    for (uint32_t i = 0; i < kPositions; ++i) {
        if (start + i < p.length) {
#pragma unroll
            for (uint32_t k = 0; k < kPaths; ++k) {
                found[i][k] = loaded(y[k * picture + static_cast<affect_int64>(start + i) * p.channels]);
            }
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < kPositions; ++i) {
        if (start + i < p.length) {
            const float rows = fmaf(found[i][2], weights[2], found[i][0] * weights[0]);
            const float columns = fmaf(found[i][3], weights[3], found[i][1] * weights[1]);
            store(merged + static_cast<affect_int64>(start + i) * p.channels, rows + columns);
        }
    }
}

}  // namespace affect_scan

// The number is kTile: the least that holds all states, or 16, tile by tile. The bounds give a thread of many states
// the registers for them.
#define AFFECT_SCAN(name, tile, stored, threads)                       \
    extern "C" __global__ void __launch_bounds__(threads, 1)           \
        name(const __grid_constant__ affect_scan::ScanLaunch launch) { \
        AFFECT_SHARED(shared);                                         \
        affect_scan::scan<tile, stored>(launch, shared);               \
    }                                                                  \
    AFFECT_REGISTER(name, affect_scan::ScanLaunch)

AFFECT_SCAN(affect_scan_1, 1, float, 1024)
AFFECT_SCAN(affect_scan_2, 2, float, 1024)
AFFECT_SCAN(affect_scan_4, 4, float, 512)
AFFECT_SCAN(affect_scan_8, 8, float, 512)
AFFECT_SCAN(affect_scan_16, 16, float, 512)
AFFECT_SCAN(affect_scan_half_1, 1, uint16_t, 1024)
AFFECT_SCAN(affect_scan_half_2, 2, uint16_t, 1024)
AFFECT_SCAN(affect_scan_half_4, 4, uint16_t, 512)
AFFECT_SCAN(affect_scan_half_8, 8, uint16_t, 512)
AFFECT_SCAN(affect_scan_half_16, 16, uint16_t, 512)

extern "C" __global__ void __launch_bounds__(256)
    affect_merge(const __grid_constant__ affect_scan::MergeLaunch launch) {
    affect_scan::merge<float>(launch);
}
AFFECT_REGISTER(affect_merge, affect_scan::MergeLaunch)

extern "C" __global__ void __launch_bounds__(256)
    affect_merge_half(const __grid_constant__ affect_scan::MergeLaunch launch) {
    affect_scan::merge<uint16_t>(launch);
}
AFFECT_REGISTER(affect_merge_half, affect_scan::MergeLaunch)
