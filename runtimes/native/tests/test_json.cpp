// What the JSON reader takes, what it gives, and what it refuses.

#include <clocale>
#include <cstring>
#include <limits>
#include <string>

#include "check.h"
#include "json.h"

using namespace affect;
using Kind = JsonValue::Kind;

namespace {

affect_status parse(Json *json, const std::string &text) {
    // In memory of its own size, so that a sanitizer sees a read beyond the end.
    Array<char> exact;
    if (!CHECK(exact.allocate(text.size()))) {
        return AFFECT_ERROR_MEMORY;
    }
    std::memcpy(exact.data(), text.data(), text.size());
    return json->parse(exact.data(), text.size());
}

bool accepts(const std::string &text) {
    Json json;
    return parse(&json, text) == AFFECT_OK;
}

std::string repeated(const char *text, int count) {
    std::string all;
    for (int i = 0; i < count; ++i) {
        all += text;
    }
    return all;
}

void test_accepts() {
    const std::string texts[] = {
        "null",
        " true\n",
        "false",
        "0",
        "-0",
        "-0.5e-3",
        "1E+2",
        "123456789012345678901234567890",
        "\"\"",
        "[]",
        "{}",
        "[1,2 , 3]",
        "{\"a\":1,\"b\":{\"a\":2}}",
        "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\ude00\"",
        "\"\x7f\"",
        "\"\xc2\x80\xdf\xbf\xe0\xa0\x80\xed\x9f\xbf\xee\x80\x80\xf0\x90\x80\x80\xf4\x8f\xbf\xbf\"",
        "1e-999",
        repeated("[", 64) + repeated("]", 64),
    };
    for (const std::string &text : texts) {
        CHECK_FOR(text.c_str(), accepts(text));
    }
}

void test_refuses() {
    const std::string texts[] = {
        "",
        " ",
        "nul",
        "truee",
        "True",
        "NaN",
        "Infinity",
        "-Infinity",
        "-",
        "+1",
        "01",
        "-01",
        "1.",
        ".5",
        "1e",
        "1e+",
        "0x1",
        "1 2",
        "[1,]",
        "[,1]",
        "[1",
        "[",
        "]",
        "{",
        "}",
        "{\"a\"}",
        "{\"a\":}",
        "{\"a\":1,}",
        "{a:1}",
        "{\"a\" 1}",
        "[1 2]",
        "{\"a\":1,\"a\":2}",
        "{\"a\":1,\"\\u0061\":2}",
        "{\"a\":[{\"b\":1,\"b\":1}]}",
        "\"",
        "\"\\",
        "\"\\u12\"",
        "\"\\u12g4\"",
        "\"\\x41\"",
        "\"\n\"",
        "\"\x1f\"",
        "\"\\ud800\"",
        "\"\\udc00\"",
        "\"\\ud800\\u0041\"",
        "\"\\ud800\\ud800\"",
        "\"\\ud800x\"",
        "\"\x80\"",
        "\"\xc0\x80\"",
        "\"\xc1\xbf\"",
        "\"\xe0\x9f\xbf\"",
        "\"\xed\xa0\x80\"",
        "\"\xf0\x8f\xbf\xbf\"",
        "\"\xf4\x90\x80\x80\"",
        "\"\xf5\x80\x80\x80\"",
        "\"\xc2\"",
        "\"\xe2\x82\"",
        "\"\xff\"",
        "\xef\xbb\xbf{}",
        "1e999",
        "-1e999",
        "//x\n1",
        "'a'",
        "[1]]",
        repeated("[", 65) + repeated("]", 65),
        std::string(2000, '1'),
        std::string("1\0", 2),
        repeated("{\"a\":", 100000),
    };
    for (const std::string &text : texts) {
        Json json;
        CHECK_FOR(text.substr(0, 40).c_str(), parse(&json, text) == AFFECT_ERROR_BUNDLE);
        CHECK_FOR(text.substr(0, 40).c_str(), json.root().is(Kind::none));
        CHECK(std::strlen(last_error()) > 20);
    }
}

void test_limits() {
    Json json;
    CHECK(parse(&json, "[" + repeated("0,", (1 << 18) - 2) + "0]") == AFFECT_OK);
    CHECK(json.root().size() == (1u << 18) - 1);
    CHECK(parse(&json, "[" + repeated("0,", (1 << 18) - 1) + "0]") == AFFECT_ERROR_BUNDLE);
    CHECK(parse(&json, std::string((16 << 20) + 1, ' ')) == AFFECT_ERROR_BUNDLE);
    // Many names in one object are checked by sorting; one of them twice, wherever, is found.
    for (const int twice : {-1, 0, 33, 999}) {
        std::string text = "{";
        for (int i = 0; i < 1000; ++i) {
            text += "\"" + std::to_string(i * 7919 % 1000) + "\":0,";
        }
        text += "\"" + std::to_string(twice) + "\":0}";
        CHECK((parse(&json, text) == AFFECT_OK) == (twice == -1));
    }
    // What is deep inside is still the right value after the table of values has grown.
    CHECK(parse(&json, "{\"a\":[" + repeated("[0],", 5000) + "[7]],\"b\":9}") == AFFECT_OK);
    JsonValue last;
    for (JsonValue each = json.root()["a"].first(); !each.is(Kind::none); each = each.next()) {
        last = each;
    }
    CHECK(last.first().number() == 7.0 && json.root()["b"].number() == 9.0);
}

void test_every_prefix_is_refused() {
    const std::string text = "{\"a\": [1.5e3, \"\\u00e9\\ud83d\\ude00\xc3\xa9\", null, true], \"b\": {\"c\": -0.25}}";
    CHECK(accepts(text));
    for (size_t size = 0; size < text.size(); ++size) {
        CHECK_FOR(std::to_string(size).c_str(), !accepts(text.substr(0, size)));
    }
}

void test_values() {
    Json json;
    CHECK(parse(&json,
                "{\"s\":\"\\u0041\\u0000\\u00e9\\u20ac\\ud83d\\ude00\",\"i\":-9223372036854775808,\"j\":"
                "9223372036854775808,"
                "\"k\":9223372036854775807,\"f\":1.0,\"e\":1e2,\"t\":true,\"n\":null,\"l\":[1,2]}") == AFFECT_OK);
    const JsonValue root = json.root();
    CHECK(root["s"].string() == std::string_view("A\0\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", 11));
    CHECK(root["s"].string().data()[11] == '\0');
    int64_t whole = 1;
    CHECK(root["i"].whole(&whole) && whole == std::numeric_limits<int64_t>::min());
    CHECK(root["k"].whole(&whole) && whole == std::numeric_limits<int64_t>::max());
    CHECK(!root["j"].whole(&whole) && root["j"].number() == 9223372036854775808.0);
    CHECK(!root["f"].whole(&whole) && !root["e"].whole(&whole) && !root["t"].whole(&whole) && !root["x"].whole(&whole));
    CHECK(root["e"].number() == 100.0 && root["t"].boolean() && !root["n"].boolean());
    CHECK(root["n"].is(Kind::null) && root["x"].is(Kind::none) && root["l"].is(Kind::array));
    CHECK(root["l"].size() == 2 && root["l"].first().next().number() == 2.0);
    CHECK(root["l"].first().next().next().is(Kind::none));
    CHECK(root["x"]["y"].first().next()["z"].string().empty());
    CHECK(root.first().key() == "s" && root.size() == 9);
}

void test_numbers_are_read_to_the_nearest_whatever_the_locale() {
    const struct {
        const char *text;
        double value;
    } numbers[] = {
        {"0.03333333333333333", 0.03333333333333333},
        {"0.1", 0.1},
        {"2.2250738585072014e-308", 2.2250738585072014e-308},
        {"1.7976931348623157e308", 1.7976931348623157e308},
        {"5e-324", 5e-324},
        {"9007199254740993", 9007199254740992.0},
        {"0.500000000000000166533453693773481063544750213623046875", 0.5000000000000002},
    };
    // Where the system has such a locale, its decimal point is a comma.
    std::setlocale(LC_ALL, "de_DE.UTF-8");
    for (const auto &each : numbers) {
        Json json;
        CHECK_FOR(each.text, parse(&json, each.text) == AFFECT_OK && json.root().number() == each.value);
    }
    std::setlocale(LC_ALL, "C");
}

}  // namespace

int main() {
    test_accepts();
    test_refuses();
    test_limits();
    test_every_prefix_is_refused();
    test_values();
    test_numbers_are_read_to_the_nearest_whatever_the_locale();
    return finish();
}
