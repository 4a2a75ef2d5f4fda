// What a fuzzer is made of: `fuzz_one`, which libFuzzer calls with bytes that it has found, and which the tests of
// every build call with those that were kept (fuzz_main.cpp).
#ifndef AFFECT_FUZZ_H
#define AFFECT_FUZZ_H

#include <cstddef>
#include <cstdint>

// Ends the program where something is wrong. True where the bytes were accepted.
bool fuzz_one(const uint8_t *data, size_t size);

#if defined(__SANITIZE_ADDRESS__)
#define AFFECT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define AFFECT_ASAN 1
#endif
#endif
#if defined(AFFECT_ASAN)
#include <sanitizer/asan_interface.h>
#define AFFECT_POISON(memory, size) ASAN_POISON_MEMORY_REGION(memory, size)
#define AFFECT_UNPOISON(memory, size) ASAN_UNPOISON_MEMORY_REGION(memory, size)
#else
#define AFFECT_POISON(memory, size) ((void)(memory), (void)(size))
#define AFFECT_UNPOISON(memory, size) ((void)(memory), (void)(size))
#endif

#endif
