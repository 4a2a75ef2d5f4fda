// What one core can do at best: the floor under benchmarks/native_step.py, which compiles and runs this.
//
//     native_floor BYTES...      for each working set, bytes a second; then multiply-adds a second in fp32 and INT8

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

#if defined(__AVX512F__)
using Vector = __m512i;
using Float = __m512;
#elif defined(__AVX2__)
using Vector = __m256i;
using Float = __m256;
#else
typedef int32_t Vector __attribute__((vector_size(16)));
typedef float Float __attribute__((vector_size(16)));
#endif
constexpr int kSums = 12;  // enough in flight to hide the latency, few enough for the registers

// Keeps the compiler from folding the sums: it must believe that each was changed.
#if defined(__x86_64__)
#define KEEP(x) asm volatile("" : "+v"(x))
#else
#define KEEP(x) asm volatile("" : "+w"(x))
#endif

volatile int32_t sink;

double bandwidth(size_t bytes) {
    const size_t count = bytes / sizeof(Vector) / 8 * 8;
    Vector *const data = static_cast<Vector *>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    std::memset(data, 1, bytes);
    double best = 0;
    for (int round = 0; round < 15; ++round) {
        Vector sums[8] = {};
        const int times = static_cast<int>(50e6 / static_cast<double>(bytes)) + 1;
        const double began = now();
        for (int t = 0; t < times; ++t) {
            for (size_t i = 0; i < count; i += 8) {
                for (int k = 0; k < 8; ++k) {
                    sums[k] ^= data[i + static_cast<size_t>(k)];
                }
            }
            asm volatile("" ::: "memory");
        }
        const double took = now() - began;
        for (int k = 1; k < 8; ++k) {
            sums[0] ^= sums[k];
        }
        int32_t one;
        std::memcpy(&one, &sums[0], sizeof one);
        sink = one;
        const double rate = static_cast<double>(count * sizeof(Vector)) * times / took;
        best = rate > best ? rate : best;
    }
    std::free(data);
    return best;
}

double fp32() {
    double best = 0;
    for (int round = 0; round < 15; ++round) {
        Float sums[kSums] = {};
        Float a = {}, b = {};
        a += 0.5f;
        b += 0.25f;
        constexpr int times = 2000000;
        const double began = now();
        for (int t = 0; t < times; ++t) {
            for (int k = 0; k < kSums; ++k) {
                sums[k] += a * b;  // fused by -ffp-contract=fast
                KEEP(sums[k]);
            }
        }
        const double rate = static_cast<double>(times) * kSums * sizeof(Float) / sizeof(float) / (now() - began);
        best = rate > best ? rate : best;
    }
    return best;
}

double int8() {
    double best = 0;
    for (int round = 0; round < 15; ++round) {
        constexpr int times = 2000000;
        double products = 0;
#if defined(__AVX512VNNI__)
        __m512i sums[kSums] = {}, a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
        const double began = now();
        for (int t = 0; t < times; ++t) {
            for (int k = 0; k < kSums; ++k) {
                sums[k] = _mm512_dpbusd_epi32(sums[k], a, b);
                KEEP(sums[k]);
            }
        }
        products = 64;
#elif defined(__AVX2__)
        // Exact sums without VNNI: products of 16-bit numbers.
        __m256i sums[kSums] = {}, a = _mm256_set1_epi16(1), b = _mm256_set1_epi16(2);
        const double began = now();
        for (int t = 0; t < times; ++t) {
            for (int k = 0; k < kSums; ++k) {
                sums[k] = _mm256_add_epi32(sums[k], _mm256_madd_epi16(a, b));
                KEEP(sums[k]);
            }
        }
        products = 16;
#elif defined(__ARM_FEATURE_DOTPROD)
        int32x4_t sums[kSums] = {};
        int8x16_t a = vdupq_n_s8(1), b = vdupq_n_s8(2);
        const double began = now();
        for (int t = 0; t < times; ++t) {
            for (int k = 0; k < kSums; ++k) {
                sums[k] = vdotq_s32(sums[k], a, b);
                KEEP(sums[k]);
            }
        }
        products = 16;
#else
        const double began = now();
        return 0;
#endif
        const double rate = static_cast<double>(times) * kSums * products / (now() - began);
        best = rate > best ? rate : best;
    }
    return best;
}

}  // namespace

int main(int argc, char **argv) {
    std::printf("{\"bandwidth\": {");
    for (int i = 1; i < argc; ++i) {
        const size_t bytes = std::strtoull(argv[i], nullptr, 10);
        std::printf("%s\"%zu\": %.6g", i > 1 ? ", " : "", bytes, bandwidth(bytes));
    }
    std::printf("}, \"fp32\": %.6g, \"int8\": %.6g}\n", fp32(), int8());
    return 0;
}
