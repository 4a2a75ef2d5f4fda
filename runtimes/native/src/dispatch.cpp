#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace affect {

// Each table is in an object of its own, compiled for its instruction set.
#define AFFECT_TABLE(name)          \
    namespace isa_##name {          \
        extern const Kernels table; \
    }
AFFECT_TABLE(portable)
#if defined(AFFECT_HAVE_AVX2)
AFFECT_TABLE(avx2)
#endif
#if defined(AFFECT_HAVE_AVXVNNI)
AFFECT_TABLE(avxvnni)
#endif
#if defined(AFFECT_HAVE_AVX512)
AFFECT_TABLE(avx512)
#endif
#if defined(AFFECT_HAVE_AVX512VNNI)
AFFECT_TABLE(avx512vnni)
#endif
#if defined(AFFECT_HAVE_NEON)
AFFECT_TABLE(neon)
#endif
#if defined(AFFECT_HAVE_NEONDOT)
AFFECT_TABLE(neondot)
#endif
#undef AFFECT_TABLE

namespace {

struct Tables {
    const Kernels *all[7];
    const Kernels *chosen;
};

// Also asks whether the operating system keeps the wider registers, as the compiler's own function does.
Tables find_tables() noexcept {
    Tables tables{};
    size_t count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(AFFECT_HAVE_AVX512VNNI)
    if (avx512 && __builtin_cpu_supports("avx512vnni")) {
        tables.all[count++] = &isa_avx512vnni::table;
    }
#endif
#if defined(AFFECT_HAVE_AVX512)
    if (avx512) {
        tables.all[count++] = &isa_avx512::table;
    }
#endif
#if defined(AFFECT_HAVE_AVXVNNI)
    // Not every compiler's __builtin_cpu_supports knows it.
    unsigned int a = 0, b = 0, c = 0, d = 0;
    if (avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 4)) != 0) {
        tables.all[count++] = &isa_avxvnni::table;
    }
#endif
#if defined(AFFECT_HAVE_AVX2)
    if (avx2) {
        tables.all[count++] = &isa_avx2::table;
    }
#endif
#elif defined(__aarch64__)
#if defined(AFFECT_HAVE_NEONDOT)
#if defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) {
        tables.all[count++] = &isa_neondot::table;
    }
#elif defined(__APPLE__)
    tables.all[count++] = &isa_neondot::table;  // every 64-bit Arm processor of theirs that runs current systems
#endif
#endif
#if defined(AFFECT_HAVE_NEON)
    tables.all[count++] = &isa_neon::table;  // part of the architecture
#endif
#endif
    tables.all[count] = &isa_portable::table;
    tables.chosen = tables.all[0];
    if (const char *const wanted = getenv("AFFECT_EDGE_ISA")) {
        for (size_t i = 0; i <= count; ++i) {
            if (strcmp(tables.all[i]->name, wanted) == 0) {
                tables.chosen = tables.all[i];
            }
        }
    }
    return tables;
}

// Before any function of the library can be called, so that a step never has to look, or to wait for another thread.
const Tables tables = find_tables();

#if defined(__x86_64__)
constexpr uint32_t kNearestNoSubnormals = 0x9FC0;  // every exception masked, results and operands flushed to 0
#elif defined(__aarch64__)
constexpr uint64_t kFlush = uint64_t{1} << 24, kRounding = uint64_t{3} << 22;
#endif

}  // namespace

// Another library's initialiser may call this one before its own has run.
const Kernels &kernels() noexcept { return tables.chosen == nullptr ? isa_portable::table : *tables.chosen; }

const Kernels *const *all_kernels() noexcept { return tables.all; }

FloatMode::FloatMode() noexcept {
#if defined(__x86_64__)
    saved_ = _mm_getcsr();
    _mm_setcsr(kNearestNoSubnormals);
#elif defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    const uint64_t wanted = (saved_ & ~kRounding) | kFlush;
    __asm__ volatile("msr fpcr, %0" : : "r"(wanted));
#else
    saved_ = 0;
#endif
}

FloatMode::~FloatMode() noexcept {
#if defined(__x86_64__)
    _mm_setcsr(static_cast<uint32_t>(saved_));
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_));
#endif
}

}  // namespace affect
