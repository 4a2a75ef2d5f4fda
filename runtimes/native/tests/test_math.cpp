// exp and its kin over their whole range, in every table that this processor can run.
//
//     test_math [stride]      every stride-th float32; 1 for all of them
//     test_math --digest      one number for the results of the portable table at every 4001st

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "digest.h"
#include "kernels.h"
#include "program.h"

namespace {

using affect::Kernels;
using affect::UnaryOp;

struct Function {
    const char *name;
    UnaryOp op;
    double (*exact)(double);
    double most;        // error in units of the last place
    double negligible;  // below it, an absolute error of this size instead: what is left of a sum near 0
};

double sigmoid(double x) { return x < 0 ? exp(x) / (1 + exp(x)) : 1 / (1 + exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double softplus(double x) { return x > 0 ? x + log1p(exp(-x)) : log1p(exp(x)); }
double gelu(double x) { return 0.5 * x * erfc(-x / 1.41421356237309504880); }

// No less than what every 31st number shows, which the documentation states; of exp, SiLU and softplus what all do, as
// test_cuda_numbers.cpp finds for the same arithmetic.
const Function functions[] = {
    {"exp", UnaryOp::exp, exp, 1.02, 0},         {"sigmoid", UnaryOp::sigmoid, sigmoid, 2.5, 0},
    {"silu", UnaryOp::silu, silu, 3.2, 1.1e-36}, {"softplus", UnaryOp::softplus, softplus, 2.8, 2e-38},
    {"tanh", UnaryOp::tanh, tanh, 2.5, 0},       {"gelu", UnaryOp::gelu, gelu, 7.0, 1e-30},
    {"erf", UnaryOp::erf, erf, 2.5, 0},
};

double last_place(double exact) {
    int exponent;
    frexp(exact, &exponent);
    return ldexp(1.0, exponent - 24);
}

float number(uint32_t bits) {
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

int print_digest() {
    Digest digest;
    const Kernels *const *portable = affect::all_kernels();
    while (portable[1] != nullptr) {
        ++portable;
    }
    constexpr int count = 4096;
    const affect::FloatMode mode;
    for (const Function &function : functions) {
        for (uint64_t next = 0; next < (uint64_t{1} << 32);) {
            static float x[count], y[count];
            int n = 0;
            for (; n < count && next < (uint64_t{1} << 32); ++n, next += 4001) {
                x[n] = number(static_cast<uint32_t>(next));
            }
            (*portable)->unary(static_cast<int64_t>(function.op), x, y, n, 0, 0);
            digest.floats(y, n);
        }
    }
    digest.print();
    return 0;
}

}  // namespace

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--digest") == 0) {
        return print_digest();
    }
    const uint64_t stride = argc > 1 ? strtoull(argv[1], nullptr, 10) : 997;
    constexpr int count = 4096;
    const double smallest = 1.1754943508222875e-38;
    for (const Function &function : functions) {
        const Kernels *const *tables = affect::all_kernels();
        double worst = 0;
        float worst_at = 0;
        for (uint64_t next = 0; next < (uint64_t{1} << 32);) {
            static float x[count], y[count], other[count];
            for (int i = 0; i < count; ++i, next += stride) {
                x[i] = number(static_cast<uint32_t>(next));
            }
            {
                const affect::FloatMode mode;
                tables[0]->unary(static_cast<int64_t>(function.op), x, y, count, 0, 0);
            }
            // The portable one asks the C library for every multiplication on some processors: now and then is enough.
            for (int t = 1; tables[t] != nullptr; ++t) {
                if (tables[t + 1] == nullptr && next / stride / count % 16 != 0) {
                    continue;
                }
                const affect::FloatMode mode;
                tables[t]->unary(static_cast<int64_t>(function.op), x, other, count, 0, 0);
                for (int i = 0; i < count; ++i) {
                    const bool same = memcmp(&y[i], &other[i], sizeof(float)) == 0;
                    CHECK(same || (isnan(y[i]) && isnan(other[i])));
                }
            }
            for (int i = 0; i < count; ++i) {
                if (isnan(x[i])) {
                    CHECK(isnan(y[i]));
                    continue;
                }
                const double at = fabs(static_cast<double>(x[i])) < smallest ? 0 : static_cast<double>(x[i]);
                const double exact =
                    isinf(at) && at < 0 && (function.op == UnaryOp::silu || function.op == UnaryOp::gelu)
                        ? 0
                        : function.exact(at);
                if (isinf(at) && at < 0 && (function.op == UnaryOp::silu || function.op == UnaryOp::gelu)) {
                    continue;  // infinity times 0
                }
                if (fabs(exact) < smallest + function.negligible) {
                    CHECK(fabs(static_cast<double>(y[i]) - exact) <= smallest + function.negligible);
                    continue;
                }
                if (exact > 3.4028234663852886e38) {
                    CHECK(isinf(y[i]) || static_cast<double>(y[i]) > 3.4028e38);
                    continue;
                }
                const double off = fabs(static_cast<double>(y[i]) - exact) / last_place(exact);
                if (off > worst) {
                    worst = off;
                    worst_at = x[i];
                }
            }
        }
        printf("%-9s at most %.2f units in the last place off, at %.9g\n", function.name, worst,
               static_cast<double>(worst_at));
        CHECK(worst <= function.most);
    }
    return finish();
}
