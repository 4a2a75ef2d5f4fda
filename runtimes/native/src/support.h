// What every part of the library needs where there is no C++ runtime: memory that frees itself, and errors in words.
#ifndef AFFECT_SUPPORT_H
#define AFFECT_SUPPORT_H

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>
#include <utility>

#include "affect_edge.h"

namespace affect {

// Remembers a sentence, formatted as by printf, as the calling thread's last error. Returns `status`.
[[gnu::format(printf, 2, 3)]] affect_status fail(affect_status status, const char *format, ...) noexcept;
// Puts where it happened in front of the last error: "where: ...". Returns `status`.
affect_status add_context(affect_status status, const char *where) noexcept;
// The calling thread's last error.
const char *last_error() noexcept;
// AFFECT_ERROR_MEMORY, in words.
affect_status out_of_memory(uint64_t bytes) noexcept;

// An array on the heap, zeroed. Elements are plain data: nothing runs when they come and go.
template <class T>
class Array {
    static_assert(std::is_trivially_copyable_v<T> && std::is_trivially_destructible_v<T>);

  public:
    Array() = default;
    ~Array() { std::free(data_); }
    Array(Array &&other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
    Array &operator=(Array &&other) noexcept {
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        return *this;
    }

    // False where there is not enough memory. What the array held before is gone.
    [[nodiscard]] bool allocate(size_t size) noexcept {
        std::free(data_);
        // One element at the least, so that null always means failure.
        data_ = static_cast<T *>(std::calloc(size == 0 ? 1 : size, sizeof(T)));
        size_ = data_ == nullptr ? 0 : size;
        return data_ != nullptr;
    }

    T *data() noexcept { return data_; }
    const T *data() const noexcept { return data_; }
    size_t size() const noexcept { return size_; }
    T &operator[](size_t i) noexcept { return data_[i]; }
    const T &operator[](size_t i) const noexcept { return data_[i]; }
    T *begin() noexcept { return data_; }
    T *end() noexcept { return data_ + size_; }
    const T *begin() const noexcept { return data_; }
    const T *end() const noexcept { return data_ + size_; }

  private:
    T *data_ = nullptr;
    size_t size_ = 0;
};

// Bytes at an address that is a multiple of 64, zeroed.
class Buffer {
  public:
    Buffer() = default;
    ~Buffer() { std::free(memory_); }
    Buffer(const Buffer &) = delete;
    Buffer &operator=(const Buffer &) = delete;

    // False where there is not enough memory.
    [[nodiscard]] bool allocate(uint64_t size) noexcept;
    uint8_t *data() noexcept { return data_; }
    const uint8_t *data() const noexcept { return data_; }

  private:
    uint8_t *memory_ = nullptr, *data_ = nullptr;
};

// One object on the heap, value-initialised; null where there is not enough memory.
template <class T>
T *create() noexcept {
    void *const memory = std::malloc(sizeof(T));
    return memory == nullptr ? nullptr : ::new (memory) T();
}

template <class T>
void destroy(T *object) noexcept {
    if (object != nullptr) {
        object->~T();
        std::free(object);
    }
}

// The product of two sizes; false where it does not fit.
inline bool multiply(int64_t a, int64_t b, int64_t *product) noexcept { return !__builtin_mul_overflow(a, b, product); }

}  // namespace affect

#endif
