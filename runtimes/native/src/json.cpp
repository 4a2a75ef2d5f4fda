#include "json.h"

#include <locale.h>

#include <clocale>
#include <cmath>
#include <cstdlib>

namespace affect {
namespace {

// Above this, names of an object are sorted to find one that is there twice; below, comparing all pairs is faster.
constexpr uint32_t kManyMembers = 32;
// The longest number that is read: more than any double needs to be written exactly enough.
constexpr size_t kMostDigits = 1100;

struct Name {
    const char *text;
    size_t size;
};

int compare_names(const void *left, const void *right) noexcept {
    const auto *const a = static_cast<const Name *>(left);
    const auto *const b = static_cast<const Name *>(right);
    const int order = std::memcmp(a->text, b->text, a->size < b->size ? a->size : b->size);
    return order != 0 ? order : (a->size > b->size) - (a->size < b->size);
}

bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }

// Bytes of the UTF-8 sequence at `at`, 0 where there is none: Unicode 15, table 3-7.
size_t utf8_length(const char *at, size_t size) noexcept {
    const auto byte = [at](size_t i) { return static_cast<uint8_t>(at[i]); };
    const uint8_t lead = byte(0);
    if (lead < 0x80) {
        return 1;
    }
    const size_t length = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : 2;
    if (lead < 0xc2 || lead > 0xf4 || size < length) {
        return 0;
    }
    // The second byte's range excludes overlong forms, surrogates, and what lies beyond U+10FFFF.
    const uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
    const uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
    if (byte(1) < low || byte(1) > high) {
        return 0;
    }
    for (size_t i = 2; i < length; ++i) {
        if (byte(i) < 0x80 || byte(i) > 0xbf) {
            return 0;
        }
    }
    return length;
}

// Returns the end of what it wrote, at most 4 bytes.
char *write_utf8(uint32_t code, char *to) noexcept {
    const auto put = [&to](uint32_t value) { *to++ = static_cast<char>(value); };
    if (code < 0x80) {
        put(code);
    } else if (code < 0x800) {
        put(0xc0 | code >> 6);
        put(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        put(0xe0 | code >> 12);
        put(0x80 | (code >> 6 & 0x3f));
        put(0x80 | (code & 0x3f));
    } else {
        put(0xf0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3f));
        put(0x80 | (code >> 6 & 0x3f));
        put(0x80 | (code & 0x3f));
    }
    return to;
}

// strtod reads the decimal point of the program's locale; this one is always a full stop.
class PlainLocale {
  public:
    PlainLocale() noexcept : plain_(::newlocale(LC_ALL_MASK, "C", nullptr)) {
        if (plain_ != nullptr) {
            before_ = ::uselocale(plain_);
        }
    }
    ~PlainLocale() {
        if (plain_ != nullptr) {
            ::uselocale(before_);
            ::freelocale(plain_);
        }
    }
    PlainLocale(const PlainLocale &) = delete;
    PlainLocale &operator=(const PlainLocale &) = delete;
    bool is_set() const noexcept { return plain_ != nullptr; }

  private:
    locale_t plain_;
    locale_t before_ = nullptr;
};

}  // namespace

class JsonReader {
  public:
    JsonReader(Json &document, const char *text, size_t size) noexcept
        : document_(document), start_(text), at_(text), end_(text + size), write_(document.strings_.data()) {}

    affect_status read() noexcept {
        uint32_t root;
        skip_space();
        if (const affect_status status = value(0, &root); status != AFFECT_OK) {
            return status;
        }
        skip_space();
        return at_ == end_ ? AFFECT_OK : malformed("something follows the end of the value");
    }

  private:
    using Kind = JsonValue::Kind;
    using Node = Json::Node;

    affect_status malformed(const char *what) const noexcept {
        return fail(AFFECT_ERROR_BUNDLE, "is not valid JSON at byte %zu: %s", static_cast<size_t>(at_ - start_), what);
    }

    size_t left() const noexcept { return static_cast<size_t>(end_ - at_); }
    bool next_is(char c) const noexcept { return at_ != end_ && *at_ == c; }

    bool take(char c) noexcept {
        if (!next_is(c)) {
            return false;
        }
        ++at_;
        return true;
    }

    bool take_word(std::string_view word) noexcept {
        if (left() < word.size() || std::memcmp(at_, word.data(), word.size()) != 0) {
            return false;
        }
        at_ += word.size();
        return true;
    }

    void skip_space() noexcept {
        while (at_ != end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\n' || *at_ == '\r')) {
            ++at_;
        }
    }

    affect_status add(uint32_t *index) noexcept {
        if (document_.count_ == capacity_) {
            if (capacity_ == Json::kMostValues) {
                return malformed("it holds more values than any manifest does");
            }
            const uint32_t more = capacity_ == 0 ? 256 : 2 * capacity_;
            void *const nodes = std::realloc(document_.nodes_, more * sizeof(Node));
            if (nodes == nullptr) {
                return out_of_memory(more * sizeof(Node));
            }
            document_.nodes_ = static_cast<Node *>(nodes);
            capacity_ = more;
        }
        *index = document_.count_++;
        document_.nodes_[*index] = Node{};
        return AFFECT_OK;
    }

    affect_status value(int depth, uint32_t *index) noexcept {
        if (const affect_status status = add(index); status != AFFECT_OK) {
            return status;
        }
        if (at_ == end_) {
            return malformed("it ends where a value is expected");
        }
        if (*at_ == '{' || *at_ == '[') {
            return depth == Json::kMostDepth ? malformed("it is nested too deeply") : members(depth, *index);
        }
        // Valid until the next value is added.
        Node &node = document_.nodes_[*index];
        if (*at_ == '"') {
            node.kind = Kind::string;
            return string(&node.string, &node.string_size);
        }
        if (*at_ == '-' || is_digit(*at_)) {
            return number(node);
        }
        if (take_word("null")) {
            node.kind = Kind::null;
        } else if (take_word("true")) {
            node.kind = Kind::boolean;
            node.boolean = true;
        } else if (take_word("false")) {
            node.kind = Kind::boolean;
        } else {
            return malformed("a value is expected here");
        }
        return AFFECT_OK;
    }

    // An object or array. Nodes move when the table grows, so they are named by index until the end.
    affect_status members(int depth, uint32_t index) noexcept {
        const bool object = *at_++ == '{';
        const char end = object ? '}' : ']';
        document_.nodes_[index].kind = object ? Kind::object : Kind::array;
        skip_space();
        if (take(end)) {
            return AFFECT_OK;
        }
        for (uint32_t before = 0;;) {
            uint32_t key = 0, key_size = 0, member;
            if (object) {
                if (!next_is('"')) {
                    return malformed("a name in quotation marks is expected here");
                }
                if (const affect_status status = string(&key, &key_size); status != AFFECT_OK) {
                    return status;
                }
                skip_space();
                if (!take(':')) {
                    return malformed("a colon is expected here");
                }
                skip_space();
            }
            if (const affect_status status = value(depth + 1, &member); status != AFFECT_OK) {
                return status;
            }
            Node *const nodes = document_.nodes_;
            nodes[member].key = key;
            nodes[member].key_size = key_size;
            (before == 0 ? nodes[index].first : nodes[before].next) = member;
            ++nodes[index].members;
            before = member;
            skip_space();
            if (take(end)) {
                return object ? check_names(index) : AFFECT_OK;
            }
            if (!take(',')) {
                return malformed(object ? "a comma or closing brace is expected here"
                                        : "a comma or closing bracket is expected here");
            }
            skip_space();
        }
    }

    affect_status check_names(uint32_t index) noexcept {
        const Node *const nodes = document_.nodes_;
        const uint32_t count = nodes[index].members;
        Name few[kManyMembers];
        Array<Name> many;
        if (count > kManyMembers && !many.allocate(count)) {
            return out_of_memory(count * sizeof(Name));
        }
        Name *const names = count > kManyMembers ? many.data() : few;
        uint32_t filled = 0;
        for (uint32_t at = nodes[index].first; at != 0; at = nodes[at].next) {
            names[filled++] = {document_.strings_.data() + nodes[at].key, nodes[at].key_size};
        }
        if (count > kManyMembers) {
            std::qsort(names, count, sizeof(Name), compare_names);
        }
        for (uint32_t i = 1; i < count; ++i) {
            // Sorted, equal names are neighbours.
            for (uint32_t j = count > kManyMembers ? i - 1 : 0; j < i; ++j) {
                if (compare_names(&names[i], &names[j]) == 0) {
                    return malformed("the object that ends here has a name twice");
                }
            }
        }
        return AFFECT_OK;
    }

    bool hex4(uint32_t *code) noexcept {
        if (left() < 4) {
            return false;
        }
        *code = 0;
        for (int i = 0; i < 4; ++i) {
            const char c = *at_++;
            const char lower = static_cast<char>(c | 0x20);
            if (!is_digit(c) && (lower < 'a' || lower > 'f')) {
                return false;
            }
            *code = *code << 4 | static_cast<uint32_t>(is_digit(c) ? c - '0' : lower - 'a' + 10);
        }
        return true;
    }

    // After "\u". A character beyond U+FFFF is written as two of them.
    affect_status escaped_code(uint32_t *code) noexcept {
        if (!hex4(code)) {
            return malformed("four hexadecimal digits are expected after \\u");
        }
        if (*code < 0xd800 || *code > 0xdfff) {
            return AFFECT_OK;
        }
        uint32_t low = 0;
        if (*code > 0xdbff || !take_word("\\u") || !hex4(&low) || low < 0xdc00 || low > 0xdfff) {
            return malformed("one half of a surrogate pair stands alone");
        }
        *code = 0x10000 + ((*code - 0xd800) << 10) + (low - 0xdc00);
        return AFFECT_OK;
    }

    affect_status escape() noexcept {
        constexpr std::string_view written = "\"\\/bfnrt", meant = "\"\\/\b\f\n\r\t";
        if (at_ == end_) {
            return malformed("it ends within a string");
        }
        const char c = *at_++;
        if (c == 'u') {
            uint32_t code = 0;
            if (const affect_status status = escaped_code(&code); status != AFFECT_OK) {
                return status;
            }
            write_ = write_utf8(code, write_);
            return AFFECT_OK;
        }
        for (size_t i = 0; i < written.size(); ++i) {
            if (c == written[i]) {
                *write_++ = meant[i];
                return AFFECT_OK;
            }
        }
        return malformed("an unknown escape sequence");
    }

    // What is decoded never takes more room than what is read: an escape shrinks, and the quotation marks make room for
    // the zero at the end.
    affect_status string(uint32_t *offset, uint32_t *size) noexcept {
        ++at_;
        const char *const begin = write_;
        for (;;) {
            if (at_ == end_) {
                return malformed("it ends within a string");
            }
            if (take('"')) {
                break;
            }
            if (take('\\')) {
                if (const affect_status status = escape(); status != AFFECT_OK) {
                    return status;
                }
                continue;
            }
            if (static_cast<uint8_t>(*at_) < 0x20) {
                return malformed("a control character in a string has to be escaped");
            }
            const size_t length = utf8_length(at_, left());
            if (length == 0) {
                return malformed("these bytes are not UTF-8");
            }
            std::memcpy(write_, at_, length);
            write_ += length;
            at_ += length;
        }
        *offset = static_cast<uint32_t>(begin - document_.strings_.data());
        *size = static_cast<uint32_t>(write_ - begin);
        *write_++ = '\0';
        return AFFECT_OK;
    }

    bool take_digits() noexcept {
        const char *const begin = at_;
        while (at_ != end_ && is_digit(*at_)) {
            ++at_;
        }
        return at_ != begin;
    }

    affect_status number(Node &node) noexcept {
        const char *const begin = at_;
        take('-');
        const bool zero = next_is('0');
        const char *const digits = at_;
        if (!take_digits()) {
            return malformed("a digit is expected here");
        }
        if (zero && at_ - digits > 1) {
            return malformed("a number begins with a zero");
        }
        const char *const whole_end = at_;
        if (take('.') && !take_digits()) {
            return malformed("a digit is expected here");
        }
        if (take('e') || take('E')) {
            if (!take('+')) {
                take('-');
            }
            if (!take_digits()) {
                return malformed("a digit is expected here");
            }
        }
        const auto size = static_cast<size_t>(at_ - begin);
        char text[kMostDigits + 1];
        if (size > kMostDigits) {
            return malformed("a number has too many digits");
        }
        std::memcpy(text, begin, size);
        text[size] = '\0';
        node.kind = Kind::number;
        node.number = std::strtod(text, nullptr);
        if (!std::isfinite(node.number)) {
            return malformed("a number is out of range");
        }
        node.whole = at_ == whole_end && read_whole(digits, whole_end, *begin == '-', &node.integer);
        return AFFECT_OK;
    }

    static bool read_whole(const char *at, const char *end, bool negative, int64_t *value) noexcept {
        int64_t sum = 0;
        for (; at != end; ++at) {
            const int64_t digit = negative ? -(*at - '0') : *at - '0';
            if (__builtin_mul_overflow(sum, int64_t{10}, &sum) || __builtin_add_overflow(sum, digit, &sum)) {
                return false;
            }
        }
        *value = sum;
        return true;
    }

    Json &document_;
    const char *start_, *at_, *end_;
    char *write_;
    uint32_t capacity_ = 0;
};

affect_status Json::parse(const char *text, size_t size) noexcept {
    std::free(nodes_);
    nodes_ = nullptr;
    count_ = 0;
    if (size > kMostBytes) {
        return fail(AFFECT_ERROR_BUNDLE, "has %zu bytes of JSON; at most %zu are read", size, kMostBytes);
    }
    const PlainLocale plain;
    if (!plain.is_set() || !strings_.allocate(size + 1)) {
        return out_of_memory(size + 1);
    }
    const affect_status status = JsonReader(*this, text, size).read();
    if (status != AFFECT_OK) {
        count_ = 0;
    }
    return status;
}

JsonValue Json::root() const noexcept { return count_ == 0 ? JsonValue() : JsonValue(this, 0); }

JsonValue::Kind JsonValue::kind() const noexcept {
    return document_ == nullptr ? Kind::none : document_->nodes_[index_].kind;
}

bool JsonValue::boolean() const noexcept { return document_ != nullptr && document_->nodes_[index_].boolean; }

double JsonValue::number() const noexcept { return document_ == nullptr ? 0.0 : document_->nodes_[index_].number; }

bool JsonValue::whole(int64_t *value) const noexcept {
    if (!is(Kind::number) || !document_->nodes_[index_].whole) {
        return false;
    }
    *value = document_->nodes_[index_].integer;
    return true;
}

std::string_view JsonValue::string() const noexcept {
    if (!is(Kind::string)) {
        return {"", 0};
    }
    const Json::Node &node = document_->nodes_[index_];
    return {document_->strings_.data() + node.string, node.string_size};
}

uint32_t JsonValue::size() const noexcept { return document_ == nullptr ? 0 : document_->nodes_[index_].members; }

JsonValue JsonValue::first() const noexcept {
    const uint32_t at = document_ == nullptr ? 0 : document_->nodes_[index_].first;
    return at == 0 ? JsonValue() : JsonValue(document_, at);
}

JsonValue JsonValue::next() const noexcept {
    const uint32_t at = document_ == nullptr ? 0 : document_->nodes_[index_].next;
    return at == 0 ? JsonValue() : JsonValue(document_, at);
}

std::string_view JsonValue::key() const noexcept {
    if (document_ == nullptr) {
        return {"", 0};
    }
    const Json::Node &node = document_->nodes_[index_];
    return {document_->strings_.data() + node.key, node.key_size};
}

JsonValue JsonValue::operator[](std::string_view key) const noexcept {
    if (!is(Kind::object)) {
        return {};
    }
    for (JsonValue member = first(); !member.is(Kind::none); member = member.next()) {
        if (member.key() == key) {
            return member;
        }
    }
    return {};
}

}  // namespace affect
