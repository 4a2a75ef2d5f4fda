// One recurrent step of a whole model in one launch, for any number of streams.
//
//   affect_step       one block for each tile of up to 8 streams; scratch in shared memory, barriers within the block
//   affect_step_team  several blocks for each tile, which meet at barriers in global memory, where their scratch is,
//   too;
//                     all blocks have to run at once (a cooperative launch)
//
// Which one. A launch cannot end before it has begun (some microseconds), nor before the weights and states have been
// read and the states written. One block, on one multiprocessor, reads at most 64 bytes a clock from L2: some 100 GB/s,
// a tenth of what a 4090 has and half of an Orin's. So a small model (the student: 0.25 MB, 2.5 us) is done by one
// block before several could have met once for each of its 17 barriers, of about a microsecond each, and a large one
// (15 MB and more) by a team that fills the GPU. `affect_runtimes.fused.shape` puts numbers to it. With many streams
// there are as many tiles as multiprocessors, and only the states come from memory: weights stay in L2.
//
// Blocks have up to 512 threads: 16 warps, each with 4 loads of 16 bytes a lane on their way, are 32 KB, which is what
// 64 bytes a clock and a latency of 500 clocks ask for. More would take registers that the 8 sums of a lane need.
//
// Numbers. Weights are fp16, or INT8 with a scale for each output; all else, states and scan included, is fp32. The
// step is bound by memory and latency: arithmetic in fp16 would save neither bytes nor launches, and costs digits.
// Every sum is taken in an order that depends on the team's size alone, so equal launches give equal bits, on a
// processor as well.
#include "step.h"

// An operation is called, not inlined: the registers of one would be short of what others keep in theirs.
#ifdef AFFECT_ON_GPU
#define AFFECT_OP __device__ __noinline__
#else
#define AFFECT_OP inline
#endif

namespace {

// Where an operand of the streams of a tile lies.
struct View {
    char *base;
    affect_int64 stride;
    AFFECT_FN const float *in(int s) const { return reinterpret_cast<const float *>(base + s * stride); }
    AFFECT_FN float *out(int s) const { return reinterpret_cast<float *>(base + s * stride); }
    AFFECT_FN explicit operator bool() const { return base != nullptr; }
};

// Who works on a tile: `threads` threads in `blocks` blocks.
struct Team {
    int rank, threads;
    int block, blocks;
    int warps;    // of one block
    int streams;  // of this tile
    char *arena;  // of this tile
    int first;    // stream
    float *sums;  // of the block: warps * kTile * 32
    const StepLaunch *launch;

    AFFECT_FN View view(const Operand &o) const {
        switch (o.place) {
            case Place::arena:
                return {arena + o.offset, launch->arena_stride};
            case Place::constant:
                return {const_cast<char *>(launch->constants) + o.offset, 0};
            case Place::tensor: {
                const Tensor &t = launch->tensors[o.number];
                const affect_int64 row = static_cast<affect_int64>(o.piece) * launch->streams + first;
                return {t.base + row * t.stride + o.offset, t.stride};
            }
            default:
                return {nullptr, 0};
        }
    }
};

AFFECT_FN float activated(int32_t act, float x) {
    switch (static_cast<Activation>(act)) {
        case Activation::relu:
            return at_least(0.0f, x);
        case Activation::silu:
            return silu_(x);
        case Activation::sigmoid:
            return sigmoid_(x);
        case Activation::tanh:
            return tanh_(x);
        case Activation::softplus:
            return softplus_(x);
        default:
            return x;
    }
}

AFFECT_FN float warp_sum(float x) {
    for (int m = 16; m > 0; m /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, m);
    }
    return x;
}

AFFECT_FN float warp_max(float x) {
    for (int m = 16; m > 0; m /= 2) {
        x = larger(__shfl_xor_sync(0xffffffffu, x, m), x);
    }
    return x;
}

// The inputs of 16 bytes of weights: 8 in fp16, 16 in INT8; 2 or 4 in each of its words.
template <bool kCodes>
constexpr int kInputsOf = kCodes ? 16 : 8;

template <bool kCodes>
AFFECT_FN float weight_of(uint32_t word, int i) {
    // 2^23 + code, exactly: the code in the low bits.
    return kCodes ? float_of((word >> i * 8 & 0xffu) | 0x4b000000u) - 8388736.0f
                  : half_to_float(static_cast<uint16_t>(word >> i * 16));
}

// sums[s] += the products of 16 bytes of weights with x. Of streams beyond the last, the last is read.
template <bool kCodes, int kStreams>
AFFECT_FN void multiply(const uint4 &weights, const View &x, int streams, int k, float (&sums)[kStreams]) {
    const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
    for (int p = 0; p < kInputsOf<kCodes> / 4; ++p) {
        const uint32_t low = words[kCodes ? p : 2 * p], high = words[kCodes ? p : 2 * p + 1];
        const float four[4] = {weight_of<kCodes>(low, 0), weight_of<kCodes>(low, 1),
                               weight_of<kCodes>(high, kCodes ? 2 : 0), weight_of<kCodes>(high, kCodes ? 3 : 1)};
#pragma unroll
        for (int s = 0; s < kStreams; ++s) {
            const float *row = x.in(s < streams ? s : streams - 1) + k + 4 * p;
            const float4 with = *reinterpret_cast<const float4 *>(row);
            sums[s] = fmaf(four[0], with.x, sums[s]);
            sums[s] = fmaf(four[1], with.y, sums[s]);
            sums[s] = fmaf(four[2], with.z, sums[s]);
            sums[s] = fmaf(four[3], with.w, sums[s]);
        }
    }
}

// The same where x does not lie on 16 bytes, or ends before the weights do: behind its last number may lie anything,
// NaN too.
template <bool kCodes, int kStreams>
AFFECT_FN void multiply_some(const uint4 &weights, const View &x, int streams, int k, int inputs,
                             float (&sums)[kStreams]) {
    constexpr int kEach = kInputsOf<kCodes> / 4;
#pragma unroll 1
    for (int w = 0; w < 4; ++w) {
        const uint32_t word = w == 0 ? weights.x : w == 1 ? weights.y : w == 2 ? weights.z : weights.w;
#pragma unroll
        for (int p = 0; p < kEach; ++p) {
            const int at = k + w * kEach + p;
            if (at < inputs) {
#pragma unroll
                for (int s = 0; s < kStreams; ++s) {
                    sums[s] = fmaf(weight_of<kCodes>(word, p), x.in(s < streams ? s : streams - 1)[at], sums[s]);
                }
            }
        }
    }
}

// A lane has one output of each stream; a warp has 32 outputs and some of the inputs, so that all warps have work.
template <bool kCodes, int kStreams>
AFFECT_OP void linear_of(const Instruction &i, const Team &team) {
    constexpr int kInputs = kInputsOf<kCodes>, kAhead = kStreams > 2 ? 2 : 4;
    const int inputs = i.n[0], outputs = i.n[1];
    const int pieces = (inputs + kInputs - 1) / kInputs, groups = (outputs + 31) / 32;
    int split = 1;
    while (2 * split <= team.warps && 2 * split <= pieces && 2 * split * groups <= team.blocks * team.warps) {
        split *= 2;
    }
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int slots = team.warps / split, slot = warp / split, part = warp % split;
    const int each = (pieces + split - 1) / split;
    const int from = part * each, left = slot < slots ? pieces - from : 0;
    const int count = left < each ? left : each;
    const View x = team.view(i.at[0]), y = team.view(i.at[1]), bias = team.view(i.at[3]), add = team.view(i.at[4]);
    const View scales = team.view(i.at[5]);
    const uint4 *weights = reinterpret_cast<const uint4 *>(team.view(i.at[2]).base);
    const bool aligned =
        inputs % kInputs == 0 && x.stride % 16 == 0 && reinterpret_cast<affect_address>(x.base) % 16 == 0;
    // Every warp goes round equally often: there are barriers inside.
    for (int begin = team.block * slots; begin < groups; begin += team.blocks * slots) {
        const int group = begin + slot;
        float sums[kStreams] = {};
        if (group < groups) {
            const uint4 *mine = weights + (static_cast<affect_int64>(group) * pieces + from) * 32 + lane;
            int k = from * kInputs;
            for (int piece = 0; piece < count; piece += kAhead) {
                // All on their way before the first is needed.
                uint4 ahead[kAhead];
#pragma unroll
                for (int j = 0; j < kAhead; ++j) {
                    ahead[j] = piece + j < count ? mine[(piece + j) * 32] : uint4{0, 0, 0, 0};
                }
#pragma unroll
                for (int j = 0; j < kAhead; ++j, k += kInputs) {
                    if (piece + j < count) {
                        if (aligned) {
                            multiply<kCodes>(ahead[j], x, team.streams, k, sums);
                        } else {
                            multiply_some<kCodes>(ahead[j], x, team.streams, k, inputs, sums);
                        }
                    }
                }
            }
        }
        if (split > 1) {
#pragma unroll
            for (int s = 0; s < kStreams; ++s) {
                team.sums[(warp * kStreams + s) * 32 + lane] = sums[s];
            }
            __syncthreads();
            if (part == 0 && slot < slots) {
                for (int other = warp + 1; other < warp + split; ++other) {
#pragma unroll
                    for (int s = 0; s < kStreams; ++s) {
                        sums[s] += team.sums[(other * kStreams + s) * 32 + lane];
                    }
                }
            }
        }
        const int output = group * 32 + lane;
        if (part == 0 && slot < slots && output < outputs) {
            const float scale = kCodes ? scales.in(0)[output] : 1.0f;
            const float shift = bias ? bias.in(0)[output] : 0.0f;
#pragma unroll
            for (int s = 0; s < kStreams; ++s) {
                if (s < team.streams) {
                    const float sum = kCodes ? fmaf(sums[s], scale, shift) : sums[s] + shift;
                    const float found = activated(i.n[2], sum);
                    y.out(s)[output] = add ? found + add.in(s)[output] : found;
                }
            }
        }
        if (split > 1) {
            __syncthreads();
        }
    }
}

template <bool kCodes>
AFFECT_FN void linear_by_streams(const Instruction &i, const Team &team) {
    // Code of its own for few streams; the others have sums for a whole tile.
    if (team.streams == 1) {
        linear_of<kCodes, 1>(i, team);
    } else if (team.streams == 2) {
        linear_of<kCodes, 2>(i, team);
    } else if (team.streams == 4) {
        linear_of<kCodes, 4>(i, team);
    } else {
        linear_of<kCodes, kTile>(i, team);
    }
}

AFFECT_FN void linear(const Instruction &i, const Team &team) {
    if (i.flags & kInt8) {
        linear_by_streams<true>(i, team);
    } else {
        linear_by_streams<false>(i, team);
    }
}

// A warp has a row.
AFFECT_OP void norm(const Instruction &i, const Team &team) {
    const int rows = i.n[0], width = i.n[1], lane = team.rank % 32;
    const View x = team.view(i.at[0]), y = team.view(i.at[1]), gamma = team.view(i.at[2]), beta = team.view(i.at[3]);
    for (int item = team.rank / 32; item < rows * team.streams; item += team.threads / 32) {
        const float *from = x.in(item / rows) + item % rows * width;
        float *to = y.out(item / rows) + item % rows * width;
        float mean = 0.0f;
        if (!(i.flags & kNoMean)) {
            for (int k = lane; k < width; k += 32) {
                mean += from[k];
            }
            mean = warp_sum(mean) / static_cast<float>(width);
        }
        float square = 0.0f;
        for (int k = lane; k < width; k += 32) {
            const float d = from[k] - mean;
            square = fmaf(d, d, square);
        }
        const float deviation = sqrtf(warp_sum(square) / static_cast<float>(width) + i.f[0]);
        for (int k = lane; k < width; k += 32) {
            const float found = (from[k] - mean) / deviation;
            const float scaled = gamma ? found * gamma.in(0)[k] : found;
            to[k] = beta ? scaled + beta.in(0)[k] : scaled;
        }
    }
}

AFFECT_OP void conv_step(const Instruction &i, const Team &team) {
    const int channels = i.n[0], before = i.n[1] - 1;
    const View x = team.view(i.at[0]), state = team.view(i.at[1]), y = team.view(i.at[2]), next = team.view(i.at[3]);
    const View weights = team.view(i.at[4]), bias = team.view(i.at[5]);
    for (int item = team.rank; item < channels * team.streams; item += team.threads) {
        const int s = item / channels, c = item % channels;
        const float *w = weights.in(0) + c * (before + 1), *seen = state.in(s) + c * before;
        const float now = x.in(s)[c];
        float sum = bias ? bias.in(0)[c] : 0.0f;
        for (int k = 0; k < before; ++k) {
            const float value = seen[k];
            sum = fmaf(value, w[k], sum);
            if (next && k > 0) {
                next.out(s)[c * before + k - 1] = value;
            }
        }
        sum = fmaf(now, w[before], sum);
        if (next && before > 0) {
            next.out(s)[c * before + before - 1] = now;
        }
        y.out(s)[c] = activated(i.n[2], sum);
    }
}

// Some neighbouring lanes have a channel, each 4 states of it at a time: 16 bytes, as they lie in memory.
AFFECT_OP void scan_step(const Instruction &i, const Team &team) {
    const int channels = i.n[0], states = i.n[1];
    const View x = team.view(i.at[0]), delta = team.view(i.at[1]), dt = team.view(i.at[2]), a = team.view(i.at[3]);
    const View b = team.view(i.at[4]), c = team.view(i.at[5]), skip = team.view(i.at[6]), gate = team.view(i.at[7]);
    const View h = team.view(i.at[8]), next = team.view(i.at[9]), y = team.view(i.at[10]);
    int lanes = 1;
    while (lanes < 8 && lanes * 4 < states) {
        lanes *= 2;
    }
    const int share = team.rank % lanes;
    // Whole warps go round, as lanes add up their shares: those beyond the last channel do the last once more.
    const int each = team.threads / lanes, count = channels * team.streams;
    for (int begin = 0; begin < count; begin += each) {
        const int wanted = begin + team.rank / lanes;
        const int item = wanted < count ? wanted : count - 1;
        const int s = item / channels, d = item % channels;
        const float signal = x.in(s)[d];
        float step = delta.in(s)[d];
        step = i.flags & kSoftplus ? softplus_(step) : step;
        step = dt ? step * dt.in(s)[0] : step;
        const float drive = step * signal;
        const float *decay = a.in(0) + d * states, *before = h.in(s) + d * states;
        float *after = next.out(s) + d * states;
        float sum = 0.0f;
        for (int from = share * 4; from < states; from += lanes * 4) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int n = from + k;
                if (n < states) {
                    const float z = step * decay[n];
                    const float input = drive * b.in(s)[n];
                    const float held = i.flags & kHold ? input * expm1_ratio_(z) : input;
                    const float now = fmaf(exp_nonpositive(z), before[n], held);
                    if (wanted < count) {
                        after[n] = now;
                    }
                    sum = fmaf(now, c.in(s)[n], sum);
                }
            }
        }
        for (int m = lanes / 2; m > 0; m /= 2) {
            sum += __shfl_xor_sync(0xffffffffu, sum, m);
        }
        if (share == 0 && wanted < count) {
            sum = skip ? fmaf(skip.in(0)[d], signal, sum) : sum;
            y.out(s)[d] = gate ? sum * silu_(gate.in(s)[d]) : sum;
        }
    }
}

AFFECT_FN float unary_of(UnaryOp op, float x, float p, float q) {
    switch (op) {
        case UnaryOp::relu:
            return at_least(0.0f, x);
        case UnaryOp::silu:
            return silu_(x);
        case UnaryOp::sigmoid:
            return sigmoid_(x);
        case UnaryOp::tanh:
            return tanh_(x);
        case UnaryOp::softplus:
            return softplus_(x);
        case UnaryOp::exp:
            return exp_(x);
        case UnaryOp::sqrt:
            return sqrtf(x);
        case UnaryOp::neg:
            return -x;
        case UnaryOp::abs:
            return size_of(x);
        case UnaryOp::reciprocal:
            return 1.0f / x;
        case UnaryOp::clip:
            return at_most(q, at_least(p, x));
        case UnaryOp::leaky:
            return x < 0.0f ? p * x : x;
        case UnaryOp::scale:
            return fmaf(p, x, q);
        default:
            return x;
    }
}

AFFECT_OP void unary(const Instruction &i, const Team &team) {
    const View x = team.view(i.at[0]), y = team.view(i.at[1]);
    for (int item = team.rank; item < i.n[0] * team.streams; item += team.threads) {
        const int s = item / i.n[0], k = item % i.n[0];
        y.out(s)[k] = unary_of(static_cast<UnaryOp>(i.n[1]), x.in(s)[k], i.f[0], i.f[1]);
    }
}

AFFECT_FN float binary_of(BinaryOp op, float a, float b) {
    switch (op) {
        case BinaryOp::add:
            return a + b;
        case BinaryOp::sub:
            return a - b;
        case BinaryOp::mul:
            return a * b;
        case BinaryOp::div:
            return a / b;
        case BinaryOp::max:
            return larger(a, b);
        case BinaryOp::min:
            return smaller(a, b);
        case BinaryOp::prelu:
            return a < 0.0f ? a * b : a;
        case BinaryOp::greater:
            return a > b ? 1.0f : 0.0f;
        case BinaryOp::less:
            return a < b ? 1.0f : 0.0f;
        default:
            return a == b ? 1.0f : 0.0f;
    }
}

// Where element `item` of `axes` axes lies, by up to three rows of strides.
template <int kAxes, int kRows>
AFFECT_FN void place_of(int item, const int32_t *sizes, const int32_t *strides, int (&at)[kRows]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
        at[r] = 0;
    }
#pragma unroll
    for (int axis = kAxes - 1; axis >= 0; --axis) {
        const int size = sizes[axis];
        if (size > 1) {
            const int index = item % size;
            item /= size;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                at[r] += index * strides[r * kAxes + axis];
            }
        }
    }
}

template <int kAxes>
AFFECT_FN int volume(const int32_t *sizes) {
    int found = 1;
#pragma unroll
    for (int axis = 0; axis < kAxes; ++axis) {
        found *= sizes[axis];
    }
    return found;
}

AFFECT_OP void binary(const Instruction &i, const Team &team) {
    const View a = team.view(i.at[0]), b = team.view(i.at[1]), y = team.view(i.at[2]);
    const int count = volume<4>(i.n + 1);
    for (int item = team.rank; item < count * team.streams; item += team.threads) {
        const int s = item / count, k = item % count;
        int at[2];
        place_of<4>(k, i.n + 1, i.n + 5, at);
        y.out(s)[k] = binary_of(static_cast<BinaryOp>(i.n[0]), a.in(s)[at[0]], b.in(s)[at[1]]);
    }
}

AFFECT_OP void select(const Instruction &i, const Team &team) {
    const View c = team.view(i.at[0]), a = team.view(i.at[1]), b = team.view(i.at[2]), y = team.view(i.at[3]);
    const int count = volume<4>(i.n);
    for (int item = team.rank; item < count * team.streams; item += team.threads) {
        const int s = item / count, k = item % count;
        int at[3];
        place_of<4>(k, i.n, i.n + 4, at);
        y.out(s)[k] = c.in(s)[at[0]] != 0.0f ? a.in(s)[at[1]] : b.in(s)[at[2]];
    }
}

AFFECT_OP void copy(const Instruction &i, const Team &team) {
    const View x = team.view(i.at[0]), y = team.view(i.at[1]);
    const int count = volume<6>(i.n);
    for (int item = team.rank; item < count * team.streams; item += team.threads) {
        const int s = item / count;
        int at[2];
        place_of<6>(item % count, i.n, i.n + 6, at);
        y.out(s)[at[1]] = x.in(s)[at[0]];
    }
}

AFFECT_OP void fill(const Instruction &i, const Team &team) {
    const View y = team.view(i.at[0]);
    for (int item = team.rank; item < i.n[0] * team.streams; item += team.threads) {
        y.out(item / i.n[0])[item % i.n[0]] = i.f[0];
    }
}

AFFECT_OP void reduce(const Instruction &i, const Team &team) {
    const ReduceOp op = static_cast<ReduceOp>(i.n[0]);
    const int outer = i.n[1], n = i.n[2], inner = i.n[3], count = outer * inner;
    const View x = team.view(i.at[0]), y = team.view(i.at[1]);
    for (int item = team.rank; item < count * team.streams; item += team.threads) {
        const int s = item / count, k = item % count;
        const float *from = x.in(s) + k / inner * n * inner + k % inner;
        float found = from[0];
        for (int j = 1; j < n; ++j) {
            const float next = from[j * inner];
            if (op == ReduceOp::max) {
                found = larger(next, found);
            } else if (op == ReduceOp::min) {
                found = smaller(next, found);
            } else {
                found += next;
            }
        }
        y.out(s)[k] = op == ReduceOp::mean ? found / static_cast<float>(n) : found;
    }
}

// A warp has a row.
AFFECT_OP void softmax(const Instruction &i, const Team &team) {
    const int rows = i.n[0], width = i.n[1], lane = team.rank % 32;
    const View x = team.view(i.at[0]), y = team.view(i.at[1]);
    for (int item = team.rank / 32; item < rows * team.streams; item += team.threads / 32) {
        const float *from = x.in(item / rows) + item % rows * width;
        float *to = y.out(item / rows) + item % rows * width;
        float most = from[0];
        for (int k = lane; k < width; k += 32) {
            most = larger(from[k], most);
        }
        most = warp_max(most);
        float sum = 0.0f;
        for (int k = lane; k < width; k += 32) {
            sum += exp_(from[k] - most);
        }
        sum = warp_sum(sum);
        for (int k = lane; k < width; k += 32) {
            to[k] = exp_(from[k] - most) / sum;
        }
    }
}

// A warp has a number where both rows lie along memory, and else a lane.
AFFECT_OP void matmul(const Instruction &i, const Team &team) {
    const int heads = i.n[1], rows = i.n[2], inner = i.n[3], columns = i.n[4];
    const int count = i.n[0] * heads * rows * columns, lane = team.rank % 32;
    const bool along = i.n[8] == 1 && i.n[11] == 1 && inner >= 32;
    const View a = team.view(i.at[0]), b = team.view(i.at[1]), y = team.view(i.at[2]);
    const int workers = along ? team.threads / 32 : team.threads;
    for (int item = along ? team.rank / 32 : team.rank; item < count * team.streams; item += workers) {
        const int s = item / count, k = item % count;
        const int column = k % columns, row = k / columns % rows, head = k / columns / rows % heads;
        const int group = k / columns / rows / heads;
        const float *left = a.in(s) + group * i.n[5] + head * i.n[6] + row * i.n[7];
        const float *right = b.in(s) + group * i.n[9] + head * i.n[10] + column * i.n[12];
        float sum = 0.0f;
        for (int j = along ? lane : 0; j < inner; j += along ? 32 : 1) {
            sum = fmaf(left[j * i.n[8]], right[j * i.n[11]], sum);
        }
        sum = along ? warp_sum(sum) : sum;
        if (!along || lane == 0) {
            y.out(s)[k] = i.f[0] * sum;
        }
    }
}

AFFECT_FN void perform(const Instruction &i, const Team &team) {
    switch (static_cast<Op>(i.op)) {
        case Op::linear:
            return linear(i, team);
        case Op::norm:
            return norm(i, team);
        case Op::conv_step:
            return conv_step(i, team);
        case Op::scan_step:
            return scan_step(i, team);
        case Op::unary:
            return unary(i, team);
        case Op::binary:
            return binary(i, team);
        case Op::copy:
            return copy(i, team);
        case Op::reduce:
            return reduce(i, team);
        case Op::softmax:
            return softmax(i, team);
        case Op::matmul:
            return matmul(i, team);
        case Op::fill:
            return fill(i, team);
        case Op::select:
            return select(i, team);
    }
}

// Until all blocks of a team are here, and see what all have written. `at` has how many have come, and how often all
// had.
AFFECT_FN void meet(uint32_t *at, uint32_t blocks) {
    __syncthreads();
    if (blocks > 1 && threadIdx.x == 0) {
        volatile uint32_t *rounds = at + 1;
        const uint32_t round = *rounds;
        __threadfence();
        if (atomicAdd(at, 1u) == blocks - 1) {
            *static_cast<volatile uint32_t *>(at) = 0;
            __threadfence();
            *rounds = round + 1;
        } else {
            while (*rounds == round) {
                affect_pause();
            }
        }
        __threadfence();
    }
    __syncthreads();
}

AFFECT_FN int tiles_of(const StepLaunch &p) { return (p.streams + kTile - 1) / kTile; }

// The program and the sums, at the start of shared memory; returns what lies behind them.
AFFECT_FN char *prepare(const StepLaunch &p, char *shared, Team &team, const Instruction *&program) {
    const int words = p.instructions * static_cast<int>(sizeof(Instruction) / 8);
    for (int k = static_cast<int>(threadIdx.x); k < words; k += static_cast<int>(blockDim.x)) {
        reinterpret_cast<uint2 *>(shared)[k] = reinterpret_cast<const uint2 *>(p.program)[k];
    }
    program = reinterpret_cast<const Instruction *>(shared);
    char *behind = shared + (words + 1) / 2 * 16;
    team.warps = static_cast<int>(blockDim.x) / 32;
    team.sums = reinterpret_cast<float *>(behind);
    team.launch = &p;
    __syncthreads();
    return behind + team.warps * kTile * 32 * static_cast<int>(sizeof(float));
}

AFFECT_FN void choose(Team &team, const StepLaunch &p, int tile) {
    team.first = tile * kTile;
    team.streams = p.streams - team.first < kTile ? p.streams - team.first : kTile;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512) affect_step(const __grid_constant__ StepLaunch p) {
    AFFECT_SHARED(shared);
    Team team;
    const Instruction *program;
    team.arena = prepare(p, shared, team, program);
    team.rank = static_cast<int>(threadIdx.x);
    team.threads = static_cast<int>(blockDim.x);
    team.block = 0;
    team.blocks = 1;
    for (int tile = static_cast<int>(blockIdx.x); tile < tiles_of(p); tile += static_cast<int>(gridDim.x)) {
        choose(team, p, tile);
        for (int i = 0; i < p.instructions; ++i) {
            perform(program[i], team);
            if (program[i].flags & kBarrier) {
                __syncthreads();
            }
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(512) affect_step_team(const __grid_constant__ StepLaunch p) {
    AFFECT_SHARED(shared);
    Team team;
    const Instruction *program;
    prepare(p, shared, team, program);
    team.blocks = p.team;
    team.block = static_cast<int>(blockIdx.x) % p.team;
    team.rank = team.block * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    team.threads = p.team * static_cast<int>(blockDim.x);
    const int number = static_cast<int>(blockIdx.x) / p.team, teams = static_cast<int>(gridDim.x) / p.team;
    team.arena = p.arena + static_cast<affect_int64>(number) * kTile * p.arena_stride;
    uint32_t *const barriers = p.barriers + 2 * number;
    for (int tile = number; tile < tiles_of(p); tile += teams) {
        choose(team, p, tile);
        for (int i = 0; i < p.instructions; ++i) {
            perform(program[i], team);
            if (program[i].flags & kBarrier) {
                meet(barriers, static_cast<uint32_t>(p.team));
            }
        }
        meet(barriers, static_cast<uint32_t>(p.team));
    }
}

AFFECT_REGISTER(affect_step, StepLaunch)
AFFECT_REGISTER(affect_step_team, StepLaunch)
