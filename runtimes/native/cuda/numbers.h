// Arithmetic that a GPU and a processor do alike, bit for bit.
//
// Everything is made of fp32 sums, products, divisions, square roots and fmaf, each of which IEEE 754 leaves one
// result, and of moves of bits. Compilers are told not to fuse any others (--fmad=false, -ffp-contract=off), and
// nothing here is approximated by the GPU's own exp2 or reciprocal. So what the tests find out on a processor holds for
// a GPU: a kernel that adds in the same order gives the same bits.
//
// The polynomials are those of the native library (src/functions.h, tools/polynomials.py). Over every float32, errors
// are at most 1.02 units in the last place for exp, 1.51 for tanh, 1.97 for log1p, 2.41 for sigmoid, 2.8 for softplus,
// 3.2 for silu and 3.38 for expm1_ratio (../tests/test_cuda_numbers.cpp); results below 1.2e-38, for silu 1.1e-36 and
// for softplus 2e-38, are off by at most as much.
#ifndef AFFECT_NUMBERS_H
#define AFFECT_NUMBERS_H

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#define AFFECT_ON_GPU 1
// NVRTC has no headers.
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
#define AFFECT_SHARED(name)              \
    extern __shared__ uint4 name##_16[]; \
    char *const name = reinterpret_cast<char *>(name##_16)
#define AFFECT_REGISTER(kernel, parameters)
// A thread that waits for another block lets others have the processor, or the lanes.
__device__ __forceinline__ void affect_pause() { __nanosleep(64); }
#else
#include "host/emulator.h"
#endif
typedef long long affect_int64;
typedef unsigned long long affect_address;

#define AFFECT_FN __device__ __forceinline__

AFFECT_FN uint32_t bits_of(float x) {
#ifdef AFFECT_ON_GPU
    return __float_as_uint(x);
#else
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
#endif
}

AFFECT_FN float float_of(uint32_t bits) {
#ifdef AFFECT_ON_GPU
    return __uint_as_float(bits);
#else
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
#endif
}

// fp16, as its bits. Both ways are exact as IEEE 754 has them, to the nearest even.
AFFECT_FN float half_to_float(uint16_t h) {
#ifdef AFFECT_ON_GPU
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
#else
    // Shifted into place, an exponent is 112 too small; a product with 2^112 mends that, for subnormal numbers, too.
    const uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13, sign = static_cast<uint32_t>(h & 0x8000u) << 16;
    const uint32_t size = (h & 0x7c00u) == 0x7c00u ? rest | 0x7f800000u : bits_of(float_of(rest) * 0x1p112f);
    return float_of(size | sign);
#endif
}

AFFECT_FN uint16_t float_to_half(float x) {
#ifdef AFFECT_ON_GPU
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
#else
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) {
        return 0x7fff;
    }
    if (size >= 0x477ff000u) {  // 65520, half way to what fp16 has no more
        return static_cast<uint16_t>(sign | 0x7c00u);
    }
    if (size < 0x38800000u) {
        // Below 2^-14 the numbers of fp16 are as far apart as those of fp32 near 1/2.
        return static_cast<uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((size + 0xfffu + (size >> 13 & 1u) - 0x38000000u) >> 13));
#endif
}

// x, but not below or above a bound; a NaN stays one, unlike with fmaxf.
AFFECT_FN float at_least(float low, float x) { return x < low ? low : x; }
AFFECT_FN float at_most(float high, float x) { return x > high ? high : x; }
// The larger and the smaller; NaN if either is.
AFFECT_FN float larger(float a, float b) { return a > b || a != a ? a : b; }
AFFECT_FN float smaller(float a, float b) { return a < b || a != a ? a : b; }
AFFECT_FN float size_of(float x) { return float_of(bits_of(x) & 0x7fffffffu); }
AFFECT_FN float with_sign(float size, float sign) {
    return float_of((bits_of(size) & 0x7fffffffu) | (bits_of(sign) & 0x80000000u));
}

// Added to a number, it leaves the nearest integer in the low bits.
#define AFFECT_MAGIC 12582912.0f

// 2^n from AFFECT_MAGIC + n.
AFFECT_FN float power_of_two(float whole) { return float_of((bits_of(whole) << 23) + 0x3f800000u); }

// exp(x) as p * 2^n, for x in [-87.4, 89]; n both as a number and in the low bits of `whole`.
AFFECT_FN float exp_parts(float x, float &whole, float &n) {
    whole = fmaf(x, 1.44269504f, AFFECT_MAGIC);
    n = whole - AFFECT_MAGIC;
    const float r = fmaf(-n, -1.90465421e-09f, fmaf(-n, 0.693147182f, x));
    float p = 0.001375115f;
    p = fmaf(p, r, 0.008368988f);
    p = fmaf(p, r, 0.041669544f);
    p = fmaf(p, r, 0.16666518f);
    p = fmaf(p, r, 0.49999988f);
    return fmaf(r * r, p, r) + 1.0f;
}

// exp of numbers up to 0, which is what the decay of a state is: 1 for 0, at least 1.2e-38.
AFFECT_FN float exp_nonpositive(float x) {
    float whole, n;
    const float p = exp_parts(at_least(-87.3365402f, x), whole, n);
    return p * power_of_two(whole);
}

// exp of any number: infinity above 88.7, 0 below -87.3.
AFFECT_FN float exp_(float x) {
    float whole, n;
    const float p = exp_parts(at_most(89.0f, at_least(-87.3365402f, x)), whole, n);
    // 2^n in two factors, as 2^128 is no float32.
    const float half = fmaf(n, 0.5f, AFFECT_MAGIC);
    const float rest = (n - (half - AFFECT_MAGIC)) + AFFECT_MAGIC;
    return x < -87.3365402f ? 0.0f : p * power_of_two(half) * power_of_two(rest);
}

// exp(-|x|), and 0 where that is no normal number.
AFFECT_FN float exp_down(float x) {
    const float down = -size_of(x);
    return down < -87.3365402f ? 0.0f : exp_nonpositive(down);
}

AFFECT_FN float sigmoid_(float x) {
    const float e = exp_down(x);
    return (x < 0.0f ? e : 1.0f) / (e + 1.0f);
}

AFFECT_FN float silu_(float x) { return x * sigmoid_(x); }

// log(1 + t) for t from 0 to 1.
AFFECT_FN float log1p_(float t) {
    const float s = t / (t + 2.0f);
    const float square = s * s, twice = s + s;
    float p = 0.12107076f;
    p = fmaf(p, square, 0.10725827f);
    p = fmaf(p, square, 0.1430729f);
    p = fmaf(p, square, 0.19999483f);
    p = fmaf(p, square, 0.33333337f);
    return fmaf(twice * square, p, twice);
}

AFFECT_FN float softplus_(float x) { return at_least(0.0f, x) + log1p_(exp_down(x)); }

AFFECT_FN float tanh_(float x) {
    const float size = size_of(x), square = x * x;
    float p = 0.0021396133f;
    p = fmaf(p, square, -0.00817385f);
    p = fmaf(p, square, 0.021699317f);
    p = fmaf(p, square, -0.053946517f);
    p = fmaf(p, square, 0.13333204f);
    p = fmaf(p, square, -0.3333333f);
    const float e = exp_nonpositive(-2.0f * size);
    const float far = with_sign((1.0f - e) / (1.0f + e), x);
    return size < 0.625f ? fmaf(x * square, p, x) : far;
}

// (exp(z) - 1) / z for z <= 0, and its limit 1 at 0: expm1(z) = 2 t / (1 - t) with t = tanh(z / 2) keeps every digit.
AFFECT_FN float expm1_ratio_(float z) {
    const bool limit = z > -1e-30f;
    const float safe = limit ? -1.0f : z;
    const float t = tanh_(safe * 0.5f);
    return limit ? 1.0f : (t + t) / (1.0f - t) / safe;
}

#endif
