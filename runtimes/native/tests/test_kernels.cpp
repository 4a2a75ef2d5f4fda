// Every kernel, on random sizes, in every table that this processor can run: the same bits everywhere, and close to
// sums in double.
//
//     test_kernels [rounds]
//     test_kernels --digest [rounds]      one number for the results of the portable table, and nothing else computed

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "digest.h"
#include "kernels.h"
#include "program.h"

namespace {

using affect::Kernels;

uint64_t state = 88172645463325252u;
uint32_t random_bits() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 16);
}
int64_t between(int64_t least, int64_t most) { return least + random_bits() % (most - least + 1); }
float uniform(float low, float high) {
    return low + (high - low) * static_cast<float>(random_bits() >> 8) / 16777216.0f;
}

// Memory that the sanitizer guards to the byte.
struct Floats {
    float *p;
    int64_t n;
    explicit Floats(int64_t count, float low = -1, float high = 1)
        : p(static_cast<float *>(malloc(static_cast<size_t>(count) * sizeof(float)))), n(count) {
        for (int64_t i = 0; i < n; ++i) {
            p[i] = uniform(low, high);
        }
    }
    ~Floats() { free(p); }
    Floats(const Floats &) = delete;
    Floats &operator=(const Floats &) = delete;
};

int tables() {
    int n = 0;
    while (affect::all_kernels()[n] != nullptr) {
        ++n;
    }
    return n;
}

bool digesting = false;
Digest digest;

// Runs `call` with every table into an array of its own, and compares the bits with the last table's, the portable one.
template <typename Call>
void same_everywhere(const char *what, Floats &y, const Call &call) {
    const int count = tables();
    const affect::FloatMode mode;
    call(*affect::all_kernels()[count - 1], y.p);
    if (digesting) {
        digest.floats(y.p, y.n);
        return;
    }
    for (int t = 0; t + 1 < count; ++t) {
        Floats other(y.n);
        call(*affect::all_kernels()[t], other.p);
        const bool same = memcmp(other.p, y.p, static_cast<size_t>(y.n) * sizeof(float)) == 0;
        if (!same) {
            fprintf(stderr, "%s differs in %s\n", what, affect::all_kernels()[t]->name);
        }
        CHECK(same);
    }
}

void close(double found, double wanted, double scale) { CHECK(fabs(found - wanted) <= 2e-6 * (scale + fabs(wanted))); }

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Where the weight of input k and output n lies, in packed weights; `unit` inputs lie together.
int64_t packed(int64_t k, int64_t n, int64_t inputs, int64_t outputs, int64_t unit) {
    const int64_t strips = up(outputs, 16) / 16, strip = n / 16, group = strip / 4;
    const int64_t width = strips - group * 4 < 4 ? strips - group * 4 : 4;
    return group * 4 * 16 * inputs + ((k / unit * width + strip % 4) * 16 + n % 16) * unit + k % unit;
}

void linear(bool int8) {
    const int64_t rows = between(1, 19), inputs = between(1, 70), outputs = between(1, 150);
    const int64_t in = up(inputs, 4), wide = up(outputs, 16);  // in fp32, the last rows of the weights are not read
    Floats x(rows * inputs), bias(wide), add(rows * outputs), scales(wide, 0.001f, 0.01f), w(in * wide);
    int8_t *const codes = static_cast<int8_t *>(calloc(static_cast<size_t>(in * wide), 1));
    int32_t *const sums = static_cast<int32_t *>(calloc(static_cast<size_t>(wide), sizeof(int32_t)));
    uint8_t *const scratch = static_cast<uint8_t *>(malloc(static_cast<size_t>(rows * in)));
    for (int64_t i = 0; i < in * wide; ++i) {
        w.p[i] = 0;
    }
    for (int64_t n = 0; n < outputs; ++n) {
        for (int64_t k = 0; k < inputs; ++k) {
            w.p[packed(k, n, inputs, outputs, 1)] = uniform(-1, 1);
            // Also -128: no file of ours has it, and every table must take it.
            const int8_t code = static_cast<int8_t>(between(-128, 127));
            codes[packed(k, n, in, outputs, 4)] = code;
            sums[n] += code;
        }
    }
    const float *xs[32], *adds[32];
    uint8_t *bytes[32];
    for (int64_t r = 0; r < rows; ++r) {
        xs[r] = x.p + r * inputs;
        adds[r] = add.p + r * outputs;
        bytes[r] = scratch + r * in;
    }
    affect::LinearArgs args{};
    const bool biased = between(0, 1), added = between(0, 1);
    args.x = xs;
    args.add = added ? adds : nullptr;
    args.bias = biased ? bias.p : nullptr;
    args.rows = rows;
    args.inputs = inputs;
    args.outputs = outputs;
    args.weights = int8 ? static_cast<const void *>(codes) : w.p;
    args.scales = scales.p;
    args.sums = sums;
    args.scale = 0.01f;
    args.zero = static_cast<int32_t>(between(0, 255));
    args.codes = bytes;
    Floats y(rows * outputs);
    const auto call = [&](const Kernels &k, float *to) {
        float *ys[32];
        for (int64_t r = 0; r < rows; ++r) {
            ys[r] = to + r * outputs;
        }
        affect::LinearArgs here = args;
        here.y = ys;
        int8 ? k.linear_int8(here) : k.linear(here);
    };
    same_everywhere(int8 ? "linear_int8" : "linear", y, call);
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t n = 0; n < outputs; ++n) {
            double total = 0, size = 1;
            for (int64_t k = 0; k < inputs; ++k) {
                double product;
                if (int8) {
                    double code = nearbyint(static_cast<double>(xs[r][k] / args.scale)) + args.zero;
                    code = code < 0 ? 0 : code > 255 ? 255 : code;
                    product = (code - args.zero) * codes[packed(k, n, in, outputs, 4)] *
                              static_cast<double>(args.scale * scales.p[n]);
                } else {
                    product =
                        static_cast<double>(xs[r][k]) * static_cast<double>(w.p[packed(k, n, inputs, outputs, 1)]);
                }
                total += product;
                size += fabs(product);
            }
            total += (biased ? static_cast<double>(bias.p[n]) : 0) + (added ? static_cast<double>(adds[r][n]) : 0);
            close(static_cast<double>(y.p[r * outputs + n]), total, size);
        }
    }
    // A row alone gives what it gives among others.
    const int64_t row = between(0, rows - 1);
    Floats alone(outputs);
    affect::LinearArgs one = args;
    const float *one_x = xs[row], *one_add = adds[row];
    float *one_y = alone.p;
    uint8_t *one_codes = bytes[row];
    one.x = &one_x;
    one.add = added ? &one_add : nullptr;
    one.y = &one_y;
    one.codes = &one_codes;
    one.rows = 1;
    {
        const affect::FloatMode mode;
        const Kernels &best = affect::kernels();
        int8 ? best.linear_int8(one) : best.linear(one);
    }
    CHECK(memcmp(alone.p, y.p + row * outputs, static_cast<size_t>(outputs) * sizeof(float)) == 0);
    free(codes);
    free(sums);
    free(scratch);
}

void conv(bool int8) {
    const int64_t channels = int8 ? 4 * between(1, 6) : between(1, 20), outputs = between(1, 70);
    affect::ConvArgs args{};
    args.kernel_height = between(1, 3);
    args.kernel_width = between(1, 4);
    args.stride_height = between(1, 2);
    args.stride_width = between(1, 3);
    args.dilation_height = between(1, 2);
    args.dilation_width = 1;
    args.height = between(1, 7);
    args.width = between(1, 9);
    args.channels = channels;
    args.outputs = outputs;
    args.in_height = (args.height - 1) * args.stride_height + (args.kernel_height - 1) * args.dilation_height + 1;
    args.in_width = (args.width - 1) * args.stride_width + args.kernel_width + between(0, 2);
    const int64_t inputs = args.kernel_height * args.kernel_width * channels, wide = up(outputs, 16);
    const int64_t taken = args.in_height * args.in_width * channels, pixels = args.height * args.width;
    Floats x(taken), w(inputs * wide), bias(wide), add(pixels * outputs), scales(wide, 0.001f, 0.01f);
    uint8_t *const bytes = static_cast<uint8_t *>(malloc(static_cast<size_t>(taken)));
    int8_t *const codes = static_cast<int8_t *>(calloc(static_cast<size_t>(inputs * wide), 1));
    int32_t *const sums = static_cast<int32_t *>(calloc(static_cast<size_t>(wide), sizeof(int32_t)));
    for (int64_t i = 0; i < taken; ++i) {
        bytes[i] = static_cast<uint8_t>(random_bits());
    }
    for (int64_t n = 0; n < outputs; ++n) {
        for (int64_t k = 0; k < inputs; ++k) {
            const int8_t code = static_cast<int8_t>(between(-127, 127));
            if (int8) {
                codes[packed(k, n, inputs, outputs, 4)] = code;
                sums[n] += code;
            }
        }
    }
    args.x = int8 ? static_cast<const void *>(bytes) : x.p;
    args.weights = int8 ? static_cast<const void *>(codes) : w.p;
    args.bias = bias.p;
    args.add = between(0, 1) ? add.p : nullptr;
    args.act = between(0, 1);
    args.scales = scales.p;
    args.sums = sums;
    args.scale = 0.02f;
    args.zero = static_cast<int32_t>(between(0, 255));
    args.top = between(0, 2);
    args.left = between(0, 2);
    args.bottom = between(0, 2);
    args.right = between(0, 2);
    args.pitch = up(outputs, 4);
    args.codes_scale = 0.05f;
    args.codes_zero = static_cast<int32_t>(between(0, 255));
    const int64_t line = args.left + args.width + args.right, lines = args.top + args.height + args.bottom;
    const size_t room = static_cast<size_t>(lines * line * args.pitch);
    uint8_t *const out = static_cast<uint8_t *>(malloc(room)), *const first = static_cast<uint8_t *>(malloc(room));
    Floats y(pixels * outputs);
    same_everywhere(int8 ? "conv_int8" : "conv", y, [&](const Kernels &k, float *to) {
        affect::ConvArgs here = args;
        here.y = to;
        here.codes = int8 ? out : nullptr;
        int8 ? k.conv_int8(here) : k.conv(here);
        if (int8 && to == y.p) {
            memcpy(first, out, room);
            if (digesting) {
                digest.bytes(first, room);
            }
        } else if (int8) {
            CHECK(memcmp(first, out, room) == 0);
        }
    });
    for (int64_t oy = 0; oy < args.height; ++oy) {
        for (int64_t ox = 0; ox < args.width; ++ox) {
            for (int64_t n = 0; n < outputs; ++n) {
                double total = static_cast<double>(bias.p[n]), size = 1;
                for (int64_t ky = 0; ky < args.kernel_height; ++ky) {
                    for (int64_t kx = 0; kx < args.kernel_width; ++kx) {
                        for (int64_t c = 0; c < channels; ++c) {
                            const int64_t k = (ky * args.kernel_width + kx) * channels + c;
                            const int64_t at = ((oy * args.stride_height + ky * args.dilation_height) * args.in_width +
                                                ox * args.stride_width + kx) *
                                                   channels +
                                               c;
                            const double product =
                                int8 ? static_cast<double>(args.scale * scales.p[n]) * (bytes[at] - args.zero) *
                                           codes[packed(k, n, inputs, outputs, 4)]
                                     : static_cast<double>(x.p[at]) *
                                           static_cast<double>(w.p[packed(k, n, inputs, outputs, 1)]);
                            total += product;
                            size += fabs(product);
                        }
                    }
                }
                const int64_t at = (oy * args.width + ox) * outputs + n;
                total += args.add == nullptr ? 0 : static_cast<double>(add.p[at]);
                total = args.act == 1 && total < 0 ? 0 : total;
                close(static_cast<double>(y.p[at]), total, size);
                if (int8) {
                    float code = nearbyintf(y.p[at] / args.codes_scale) + static_cast<float>(args.codes_zero);
                    code = code < 0 ? 0 : code > 255 ? 255 : code;
                    CHECK(first[((args.top + oy) * line + args.left + ox) * args.pitch + n] ==
                          static_cast<uint8_t>(code));
                }
            }
        }
    }
    if (int8 && args.top > 0) {
        CHECK(first[0] == args.codes_zero);
    }
    if (int8 && args.right > 0) {
        CHECK(first[room - 1] == args.codes_zero);
    }
    free(bytes);
    free(codes);
    free(sums);
    free(out);
    free(first);
}

double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }

void scan_step() {
    static const int64_t sizes[] = {1, 2, 3, 4, 5, 8, 16, 17, 32, 64};
    const int64_t channels = between(1, 70), states = sizes[between(0, 9)], held = channels * states;
    Floats x(channels), delta(channels, -3, 3), a(held, -16, -0.01f), b(states), c(states), skip(channels),
        gate(channels, -4, 4);
    Floats h(held);
    a.p[0] = -1e-35f;  // where the ratio of the zero-order hold is its limit
    const bool zoh = between(0, 1), soft = between(0, 1), skips = between(0, 1), gates = between(0, 1);
    if (!soft) {
        for (int64_t d = 0; d < channels; ++d) {
            delta.p[d] = fabsf(delta.p[d]);
        }
    }
    const float dt = uniform(0.3f, 3);
    Floats both(channels + held);
    same_everywhere("scan_step", both, [&](const Kernels &k, float *to) {
        Floats scratch(2 * channels);
        affect::ScanStepArgs args{x.p,
                                  delta.p,
                                  a.p,
                                  b.p,
                                  c.p,
                                  skips ? skip.p : nullptr,
                                  gates ? gate.p : nullptr,
                                  h.p,
                                  to + channels,
                                  to,
                                  scratch.p,
                                  channels,
                                  states,
                                  dt,
                                  zoh,
                                  soft,
                                  a.p,
                                  4 * held};
        k.scan_step(args);
    });
    for (int64_t d = 0; d < channels; ++d) {
        double step = static_cast<double>(delta.p[d]);
        step = (soft ? softplus(step) : step) * static_cast<double>(dt);
        const double in = static_cast<double>(x.p[d]);
        double y = 0, size = 1;
        for (int64_t n = 0; n < states; ++n) {
            const double z = step * static_cast<double>(a.p[d * states + n]);
            const double ratio = zoh && z < -1e-30 ? expm1(z) / z : 1;
            const double now =
                exp(z) * static_cast<double>(h.p[d * states + n]) + ratio * step * static_cast<double>(b.p[n]) * in;
            close(static_cast<double>(both.p[channels + d * states + n]), now, 1 + fabs(step));
            y += static_cast<double>(c.p[n]) * now;
            size += fabs(now);
        }
        y += skips ? static_cast<double>(skip.p[d]) * in : 0;
        const double g = static_cast<double>(gate.p[d]);
        y *= gates ? g / (1 + exp(-g)) : 1;
        close(static_cast<double>(both.p[d]), y, 4 * size);
    }
}

void scan() {
    static const int64_t sizes[] = {1, 4, 5, 8, 16, 32};
    const int64_t groups = between(1, 3), channels = groups * between(1, 90), states = sizes[between(0, 5)];
    const int64_t columns = between(1, 5), rows = between(1, 6), length = columns * rows, held = channels * states;
    Floats x(length * channels), delta(length * channels, -3, 1), a(held, -4, -0.01f), b(length * groups * states);
    Floats c(length * groups * states), skip(channels), before(held);
    const bool soft = between(0, 1), backwards = between(0, 1), by_columns = between(0, 1), skips = between(0, 1);
    const bool starts = between(0, 1), add = between(0, 1);
    if (!soft) {
        for (int64_t i = 0; i < delta.n; ++i) {
            delta.p[i] = fabsf(delta.p[i]);
        }
    }
    Floats y(length * channels + held), initial(length * channels);
    affect::ScanArgs args{x.p,
                          delta.p,
                          a.p,
                          b.p,
                          c.p,
                          skips ? skip.p : nullptr,
                          starts ? before.p : nullptr,
                          nullptr,
                          nullptr,
                          length,
                          channels,
                          states,
                          groups,
                          channels,
                          channels,
                          groups * states,
                          groups * states,
                          channels,
                          states,
                          states,
                          soft,
                          backwards,
                          add,
                          by_columns ? rows : 0};
    same_everywhere("scan", y, [&](const Kernels &k, float *to) {
        memcpy(to, initial.p, static_cast<size_t>(initial.n) * sizeof(float));
        affect::ScanArgs here = args;
        here.y = to;
        here.after = to + length * channels;
        k.scan(here);
    });
    for (int64_t d = 0; d < channels; ++d) {
        const int64_t g = d / (channels / groups);
        double h[32];
        for (int64_t n = 0; n < states; ++n) {
            h[n] = starts ? static_cast<double>(before.p[d * states + n]) : 0;
        }
        for (int64_t i = 0; i < length; ++i) {
            int64_t l = by_columns ? i % rows * columns + i / rows : i;
            l = backwards ? length - 1 - l : l;
            double step = static_cast<double>(delta.p[l * channels + d]);
            step = soft ? softplus(step) : step;
            const double in = static_cast<double>(x.p[l * channels + d]);
            double out = 0, size = 1;
            for (int64_t n = 0; n < states; ++n) {
                h[n] = exp(step * static_cast<double>(a.p[d * states + n])) * h[n] +
                       step * in * static_cast<double>(b.p[(l * groups + g) * states + n]);
                out += static_cast<double>(c.p[(l * groups + g) * states + n]) * h[n];
                size += fabs(h[n]);
            }
            out += skips ? static_cast<double>(skip.p[d]) * in : 0;
            out += add ? static_cast<double>(initial.p[l * channels + d]) : 0;
            close(static_cast<double>(y.p[l * channels + d]), out, 4 * size);
        }
        for (int64_t n = 0; n < states; ++n) {
            close(static_cast<double>(y.p[length * channels + d * states + n]), h[n], 4 + fabs(h[n]));
        }
    }
}

void conv_step() {
    const int64_t channels = between(1, 50), width = between(2, 6);
    Floats x(channels), held(channels * (width - 1)), w(channels * width), bias(channels), y(channels * width);
    same_everywhere("conv_step", y, [&](const Kernels &k, float *to) {
        k.conv_step({x.p, held.p, w.p, bias.p, to, to + channels, channels, width, 0});
    });
    for (int64_t c = 0; c < channels; ++c) {
        double total = static_cast<double>(bias.p[c]);
        for (int64_t k = 0; k < width; ++k) {
            const float in = k + 1 < width ? held.p[c * (width - 1) + k] : x.p[c];
            total += static_cast<double>(in) * static_cast<double>(w.p[c * width + k]);
            if (k > 0) {
                CHECK(memcmp(&y.p[channels + c * (width - 1) + k - 1], &in, sizeof in) == 0);
            }
        }
        close(static_cast<double>(y.p[c]), total, 4);
    }
}

void others() {
    const int64_t rows = between(1, 4), n = between(1, 60);
    Floats x(rows * n, -5, 5), gamma(n), beta(n), y(rows * n);
    const bool rms = between(0, 1);
    same_everywhere("norm", y,
                    [&](const Kernels &k, float *to) { k.norm({x.p, to, gamma.p, beta.p, rows, n, 1e-5f, rms}); });
    for (int64_t r = 0; r < rows; ++r) {
        double mean = 0, square = 0;
        for (int64_t i = 0; i < n; ++i) {
            mean += rms ? 0 : static_cast<double>(x.p[r * n + i]) / static_cast<double>(n);
        }
        for (int64_t i = 0; i < n; ++i) {
            const double off = static_cast<double>(x.p[r * n + i]) - mean;
            square += off * off / static_cast<double>(n);
        }
        for (int64_t i = 0; i < n; ++i) {
            const double v = (static_cast<double>(x.p[r * n + i]) - mean) / sqrt(square + 1e-5);
            close(static_cast<double>(y.p[r * n + i]),
                  v * static_cast<double>(gamma.p[i]) + static_cast<double>(beta.p[i]), 20);
        }
    }
    Floats soft(n);
    same_everywhere("softmax", soft, [&](const Kernels &k, float *to) { k.softmax(x.p, to, n); });
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
        total += exp(static_cast<double>(x.p[i]));
    }
    for (int64_t i = 0; i < n; ++i) {
        close(static_cast<double>(soft.p[i]), exp(static_cast<double>(x.p[i])) / total, 0.1);
    }
    for (int64_t op = 0; op < static_cast<int64_t>(affect::ReduceOp::count); ++op) {
        const int64_t widths[] = {1, between(2, 40)};
        for (const int64_t inner : widths) {
            Floats in(n * inner, -5, 5), out(inner);
            same_everywhere("reduce", out, [&](const Kernels &k, float *to) { k.reduce(op, in.p, to, n, inner); });
            for (int64_t c = 0; c < inner; ++c) {
                double all = static_cast<double>(in.p[c]);
                for (int64_t i = 1; i < n; ++i) {
                    const double v = static_cast<double>(in.p[i * inner + c]);
                    all = op == 2 ? (v > all ? v : all) : op == 3 ? (v < all ? v : all) : all + v;
                }
                close(static_cast<double>(out.p[c]), all, 50);
            }
        }
    }
    for (int64_t op = 0; op + 1 < static_cast<int64_t>(affect::BinaryOp::count); ++op) {
        Floats a(n * 3), b(n * 3, 0.5f, 2), out(n);
        const int64_t sa = between(0, 3), sb = between(0, 3);
        same_everywhere("binary", out, [&](const Kernels &k, float *to) { k.binary(op, a.p, sa, b.p, sb, to, n); });
        for (int64_t i = 0; i < n; ++i) {
            const double u = static_cast<double>(a.p[i * sa]), v = static_cast<double>(b.p[i * sb]);
            const double wanted[] = {u + v,
                                     u - v,
                                     u * v,
                                     u / v,
                                     fmax(u, v),
                                     fmin(u, v),
                                     u < 0 ? u * v : u,
                                     u > v ? 1.0 : 0.0,
                                     u < v ? 1.0 : 0.0,
                                     u == v ? 1.0 : 0.0};
            close(static_cast<double>(out.p[i]), wanted[op], 1);
        }
    }
    const int64_t m = between(1, 9), inner = between(1, 40), columns = between(1, 40);
    Floats a(m * inner), b(inner * columns), out(m * columns);
    const bool across = between(0, 1);
    same_everywhere("matmul", out, [&](const Kernels &k, float *to) {
        k.matmul({a.p, b.p, to, 0.5f, m, inner, columns, inner, 1, across ? 1 : columns, across ? inner : 1});
    });
    for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < columns; ++j) {
            double all = 0;
            for (int64_t k = 0; k < inner; ++k) {
                all += static_cast<double>(a.p[i * inner + k]) *
                       static_cast<double>(b.p[across ? j * inner + k : k * columns + j]);
            }
            close(static_cast<double>(out.p[i * columns + j]), all / 2, static_cast<double>(inner));
        }
    }
    affect::ConvArgs depth{};
    depth.channels = between(1, 40);
    depth.kernel_height = between(1, 3);
    depth.kernel_width = between(1, 3);
    depth.stride_height = depth.stride_width = between(1, 2);
    depth.dilation_height = depth.dilation_width = 1;
    depth.height = between(1, 4);
    depth.width = between(1, 4);
    depth.in_height = (depth.height - 1) * depth.stride_height + depth.kernel_height;
    depth.in_width = (depth.width - 1) * depth.stride_width + depth.kernel_width;
    Floats picture(depth.in_height * depth.in_width * depth.channels);
    Floats w(depth.kernel_height * depth.kernel_width * depth.channels),
        made(depth.height * depth.width * depth.channels);
    depth.x = picture.p;
    depth.weights = w.p;
    same_everywhere("depthwise", made, [&](const Kernels &k, float *to) {
        affect::ConvArgs here = depth;
        here.y = to;
        k.depthwise(here);
    });
}

}  // namespace

int main(int argc, char **argv) {
    digesting = argc > 1 && strcmp(argv[1], "--digest") == 0;
    const int first = digesting ? 2 : 1, rounds = argc > first ? atoi(argv[first]) : 300;
    for (int t = 0; t < tables() && !digesting; ++t) {
        printf("%s ", affect::all_kernels()[t]->name);
    }
    if (!digesting) {
        printf("\n");
    }
    for (int i = 0; i < rounds; ++i) {
        linear(false);
        linear(true);
        conv(false);
        conv(true);
        scan_step();
        scan();
        conv_step();
        others();
    }
    if (digesting) {
        digest.print();
    }
    return finish();
}
