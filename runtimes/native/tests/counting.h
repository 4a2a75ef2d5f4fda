// Counts allocations, and makes them fail, where the C library lets a program put its own in their place. To be
// included in one file of a program.
#ifndef AFFECT_COUNTING_H
#define AFFECT_COUNTING_H

#include <cstddef>
#include <limits>

#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#if !defined(__has_feature)
#define COUNTS_MEMORY 1
#elif !__has_feature(address_sanitizer) && !__has_feature(thread_sanitizer) && !__has_feature(memory_sanitizer)
#define COUNTS_MEMORY 1
#endif
#endif
#ifndef COUNTS_MEMORY
#define COUNTS_MEMORY 0
#endif

#if COUNTS_MEMORY
namespace {
// Of this thread: how many allocations there were, and how many more succeed.
thread_local long allocations = 0, remaining = std::numeric_limits<long>::max();
}  // namespace

extern "C" void *__libc_malloc(size_t);
extern "C" void *__libc_calloc(size_t, size_t);
extern "C" void *__libc_realloc(void *, size_t);
static bool may_allocate() { return ++allocations, remaining-- > 0; }
extern "C" void *malloc(size_t size) { return may_allocate() ? __libc_malloc(size) : nullptr; }
extern "C" void *calloc(size_t n, size_t size) { return may_allocate() ? __libc_calloc(n, size) : nullptr; }
extern "C" void *realloc(void *old, size_t size) { return may_allocate() ? __libc_realloc(old, size) : nullptr; }
#endif

#endif
