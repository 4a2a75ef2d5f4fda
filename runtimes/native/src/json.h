// A reader of JSON (RFC 8259) for text that somebody else wrote. Written here so that a device gets one library and
// nothing that it depends on; strict, so that what two readers might understand differently is refused.
#ifndef AFFECT_JSON_H
#define AFFECT_JSON_H

#include <cstdint>
#include <cstring>
#include <string_view>

#include "support.h"

namespace affect {

class Json;

// One value of a document, which must outlive it. A value that is not there is of the kind `none` and has no members,
// so that a path into a document can be followed without asking at every step.
class JsonValue {
  public:
    enum class Kind : uint8_t { none, null, boolean, number, string, array, object };

    JsonValue() = default;
    Kind kind() const noexcept;
    bool is(Kind kind) const noexcept { return this->kind() == kind; }

    // Valid for the kind that each names; otherwise false, 0.0, 0 and "".
    bool boolean() const noexcept;
    double number() const noexcept;
    // Whether the number is written as a whole one, without point or exponent, and fits; if so, what it is.
    bool whole(int64_t *value) const noexcept;
    // Decoded to UTF-8. A zero follows it, but it may contain others.
    std::string_view string() const noexcept;

    // Members of an object or array; 0 for all else.
    uint32_t size() const noexcept;
    JsonValue first() const noexcept;
    // The member after this one.
    JsonValue next() const noexcept;
    // This member's name in its object.
    std::string_view key() const noexcept;
    // The member of an object that has this name.
    JsonValue operator[](std::string_view key) const noexcept;

  private:
    friend class Json;
    JsonValue(const Json *document, uint32_t index) noexcept : document_(document), index_(index) {}
    const Json *document_ = nullptr;
    uint32_t index_ = 0;
};

class Json {
  public:
    static constexpr size_t kMostBytes = size_t{16} << 20;
    static constexpr uint32_t kMostValues = 1u << 18;
    static constexpr int kMostDepth = 64;

    Json() = default;
    ~Json() { std::free(nodes_); }
    Json(const Json &) = delete;
    Json &operator=(const Json &) = delete;

    // Reads a text. Refused: what RFC 8259 does not allow, and beyond it invalid UTF-8, a byte order mark, lone
    // surrogates, an object with the same name twice, numbers that overflow a double, and anything above the limits.
    affect_status parse(const char *text, size_t size) noexcept;
    JsonValue root() const noexcept;

  private:
    friend class JsonValue;
    friend class JsonReader;

    struct Node {
        JsonValue::Kind kind;
        bool boolean, whole;
        uint32_t members, first, next;                // indices; 0 for none, as no member is the root
        uint32_t key, key_size, string, string_size;  // offsets in strings_
        double number;
        int64_t integer;
    };

    Array<char> strings_;
    Node *nodes_ = nullptr;
    uint32_t count_ = 0;
};

}  // namespace affect

#endif
