// SHA-256 against the examples of FIPS 180-4 and its own definition over pieces.

#include <algorithm>
#include <string>

#include "check.h"
#include "sha256.h"

namespace {

std::string hash(const std::string &text, size_t piece) {
    affect::Sha256 sha;
    for (size_t at = 0; at < text.size(); at += piece) {
        sha.update(text.data() + at, std::min(piece, text.size() - at));
    }
    uint8_t digest[affect::Sha256::kBytes];
    sha.finish(digest);
    char hex[2 * affect::Sha256::kBytes + 1];
    affect::to_hex(digest, hex);
    return hex;
}

}  // namespace

int main() {
    const struct {
        std::string text;
        const char *digest;
    } known[] = {
        {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
        {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
         "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
        {std::string(1000000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
    };
    for (const auto &each : known) {
        CHECK(hash(each.text, 4096) == each.digest);
    }
    // Every length around the ends of a block, in pieces of every kind.
    for (size_t length = 0; length < 200; ++length) {
        std::string text(length, ' ');
        for (size_t i = 0; i < length; ++i) {
            text[i] = static_cast<char>(i * 7);
        }
        for (const size_t piece : {1, 3, 55, 56, 63, 64, 65, 127}) {
            CHECK(hash(text, piece) == hash(text, 1000));
        }
    }
    return finish();
}
