// The arithmetic of the CUDA kernels on a processor: what it finds out holds for a GPU, which computes the same bits.
//
//     test_cuda_numbers [stride]      every stride-th float32; 1 for all of them, a quarter of an hour; 61 if not given

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../cuda/numbers.h"
#include "check.h"

namespace {

double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }
double silu(double x) { return std::isinf(x) && x < 0 ? NAN : x * sigmoid(x); }  // infinity times 0
double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
double expm1_ratio(double x) { return x == 0 ? 1 : expm1(x) / x; }

struct Function {
    const char *name;
    float (*ours)(float);
    double (*exact)(double);
    double low, high;  // where it is defined
    double most;       // error in units of the last place
    // Below it, an absolute error of this size instead: where factors are no normal numbers any more.
    double negligible;
};

// The largest errors at any float32, as a run with stride 1 finds them, rounded up. A wrapper each, as what is always
// inlined has no address to call.
const Function functions[] = {
    {"exp_nonpositive", [](float x) { return exp_nonpositive(x); }, exp, -INFINITY, 0, 1.02, 1.2e-38},
    {"exp", [](float x) { return exp_(x); }, exp, -INFINITY, INFINITY, 1.02, 1.2e-38},
    {"sigmoid", [](float x) { return sigmoid_(x); }, sigmoid, -INFINITY, INFINITY, 2.41, 1.2e-38},
    {"silu", [](float x) { return silu_(x); }, silu, -INFINITY, INFINITY, 3.2, 1.1e-36},
    {"softplus", [](float x) { return softplus_(x); }, softplus, -INFINITY, INFINITY, 2.8, 2e-38},
    {"tanh", [](float x) { return tanh_(x); }, tanh, -INFINITY, INFINITY, 1.51, 1.2e-38},
    {"log1p", [](float x) { return log1p_(x); }, log1p, 0, 1, 1.97, 1.2e-38},
    {"expm1_ratio", [](float x) { return expm1_ratio_(x); }, expm1_ratio, -INFINITY, 0, 3.38, 1.2e-38},
};

double last_place(double exact) {
    int exponent;
    frexp(exact, &exponent);
    return ldexp(1.0, exponent - 24);
}

void check_function(const Function &function, uint64_t stride) {
    double worst = 0;
    float worst_at = 0;
    uint64_t wrong = 0;  // what is neither that number nor near it
    for (uint64_t next = 0; next < uint64_t{1} << 32; next += stride) {
        const float x = float_of(static_cast<uint32_t>(next));
        const double at = static_cast<double>(x), found = static_cast<double>(function.ours(x));
        if (at < function.low || at > function.high) {
            continue;
        }
        const double exact = std::isnan(x) ? NAN : function.exact(at);
        if (std::isnan(exact)) {
            wrong += !std::isnan(found);
        } else if (fabs(exact) < function.negligible) {
            wrong += !(fabs(found - exact) <= function.negligible);
        } else if (exact > static_cast<double>(FLT_MAX)) {
            wrong += !(std::isinf(found) && found > 0);
        } else if (std::isinf(found) || std::isnan(found)) {
            ++wrong;
        } else {
            const double off = fabs(found - exact) / last_place(exact);
            if (off > worst) {
                worst = off;
                worst_at = x;
            }
        }
    }
    std::printf("%-15s at most %.3f units in the last place off, at %.9g\n", function.name, worst,
                static_cast<double>(worst_at));
    CHECK_FOR(function.name, worst <= function.most);
    CHECK_FOR(function.name, wrong == 0);
}

void check_ends() {
    CHECK(exp_(INFINITY) == INFINITY && exp_(-INFINITY) == 0.0f && exp_(0.0f) == 1.0f && exp_(-0.0f) == 1.0f);
    CHECK(std::isinf(exp_(88.8f)) && exp_(88.7f) < INFINITY);
    CHECK(exp_nonpositive(0.0f) == 1.0f && exp_nonpositive(-0.0f) == 1.0f);
    CHECK(exp_nonpositive(-INFINITY) >= FLT_MIN && exp_nonpositive(-INFINITY) <= 1.2e-38f);
    CHECK(sigmoid_(INFINITY) == 1.0f && sigmoid_(-INFINITY) == 0.0f && sigmoid_(0.0f) == 0.5f);
    CHECK(silu_(INFINITY) == INFINITY && silu_(0.0f) == 0.0f);
    CHECK(softplus_(INFINITY) == INFINITY && softplus_(-INFINITY) == 0.0f);
    CHECK(tanh_(INFINITY) == 1.0f && tanh_(-INFINITY) == -1.0f && tanh_(0.0f) == 0.0f);
    CHECK(expm1_ratio_(-INFINITY) == 0.0f && expm1_ratio_(0.0f) == 1.0f && expm1_ratio_(-0.0f) == 1.0f);
    CHECK(log1p_(0.0f) == 0.0f);
    CHECK(std::isnan(at_least(0.0f, NAN)) && std::isnan(at_most(0.0f, NAN)) && std::isnan(size_of(NAN)));
    CHECK(with_sign(-2.0f, 1.0f) == 2.0f && with_sign(2.0f, -0.0f) == -2.0f);
}

// What the fields of an fp16 number say; 65536 for infinity, where the next number would be.
double half_value(uint32_t h) {
    const int exponent = h >> 10 & 0x1f, rest = h & 0x3ff;
    const double size = exponent == 0 ? ldexp(rest, -24) : ldexp(1024 + rest, exponent - 25);
    return h & 0x8000 ? -size : size;
}

bool is_number(uint32_t h) { return (h & 0x7c00) != 0x7c00; }

void check_halves() {
    for (uint32_t h = 0; h < 0x10000; ++h) {
        const float x = half_to_float(static_cast<uint16_t>(h));
        const uint32_t back = float_to_half(x);
        if (is_number(h)) {
            CHECK(static_cast<double>(x) == half_value(h) && (bits_of(x) >> 31 != 0) == (h >> 15 != 0));
            CHECK(back == h);
        } else if ((h & 0x3ff) == 0) {
            CHECK(std::isinf(x) && (x < 0) == (h >> 15 != 0) && back == h);
        } else {
            CHECK(std::isnan(x) && (back & 0x7c00) == 0x7c00 && (back & 0x3ff) != 0);
        }
    }
    // Half way between neighbours, and the numbers of fp32 beside it.
    for (uint32_t sign = 0; sign <= 0x8000; sign += 0x8000) {
        for (uint32_t h = 0; h < 0x7c00; ++h) {
            const uint32_t low = sign | h, high = low + 1, even = h % 2 == 0 ? low : high;
            const float middle = static_cast<float>((half_value(low) + half_value(high)) / 2);
            CHECK(static_cast<double>(middle) == (half_value(low) + half_value(high)) / 2);
            const float less = std::nextafterf(middle, 0.0f), more = std::nextafterf(middle, middle * INFINITY);
            CHECK(float_to_half(middle) == even);
            CHECK(float_to_half(less) == low);
            CHECK(float_to_half(more) == high);
        }
    }
}

// To the nearest even by the processor's own rounding, of numbers in units of fp16's last place.
void check_to_half(uint64_t stride) {
    uint64_t wrong = 0;
    for (uint64_t next = 0; next < uint64_t{1} << 32; next += stride) {
        const float x = float_of(static_cast<uint32_t>(next));
        const uint32_t found = float_to_half(x);
        if (std::isnan(x)) {
            wrong += is_number(found) || (found & 0x3ff) == 0;
            continue;
        }
        int exponent = 0;
        if (!std::isinf(x)) {
            frexp(static_cast<double>(x), &exponent);
        }
        const int unit = (exponent < -13 ? -13 : exponent) - 11;
        const double exact = ldexp(std::nearbyint(ldexp(static_cast<double>(x), -unit)), unit);
        wrong += (found >> 15 != 0) != std::signbit(x);
        wrong += fabs(exact) >= 65536 ? (found & 0x7fff) != 0x7c00 : !is_number(found) || half_value(found) != exact;
    }
    CHECK(wrong == 0);
}

}  // namespace

int main(int argc, char **argv) {
    const uint64_t stride = argc > 1 ? strtoull(argv[1], nullptr, 10) : 61;
    check_ends();
    check_halves();
    check_to_half(stride);
    for (const Function &function : functions) {
        check_function(function, stride);
    }
    return finish();
}
