#include "support.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace affect {
namespace {

constexpr size_t kMostText = 512;

// A plain array: a type with a destructor would need the C++ runtime to register it for each thread.
thread_local char text[kMostText];

}  // namespace

affect_status fail(affect_status status, const char *format, ...) noexcept {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    return status;
}

affect_status add_context(affect_status status, const char *where) noexcept {
    // Names of files come from outside; half of the room is left for the sentence itself.
    constexpr size_t most = kMostText / 2;
    size_t room = std::strlen(where);
    const char *shown = where;
    if (room > most) {
        shown += room - most;
        room = most;
    }
    const size_t shift = room + 2;
    std::memmove(text + shift, text, kMostText - shift);
    std::memcpy(text, shown, room);
    std::memcpy(text + room, ": ", 2);
    text[kMostText - 1] = '\0';
    return status;
}

const char *last_error() noexcept { return text; }

affect_status out_of_memory(uint64_t bytes) noexcept {
    return fail(AFFECT_ERROR_MEMORY, "%" PRIu64 " bytes of memory were asked for and there are not so many; free some",
                bytes);
}

bool Buffer::allocate(uint64_t size) noexcept {
    constexpr uint64_t alignment = 64;
    std::free(memory_);
    memory_ = data_ = nullptr;
    if (size > PTRDIFF_MAX - alignment) {
        return false;
    }
    // calloc takes large blocks fresh from the system, which has zeroed them: what is never used then costs nothing.
    memory_ = static_cast<uint8_t *>(std::calloc(1, static_cast<size_t>(size + alignment)));
    if (memory_ == nullptr) {
        return false;
    }
    const uintptr_t past = reinterpret_cast<uintptr_t>(memory_) % alignment;
    data_ = memory_ + (past == 0 ? 0 : alignment - past);
    return true;
}

}  // namespace affect
