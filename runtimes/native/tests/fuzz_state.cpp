// Fuzzes saved states past their checksum. The first byte says how the rest becomes one, so that mutation need not
// guess checksums and lengths: 0 as it is, 1 with its checksum, 2 a header that gets the right frame and numbers, 3 one
// that gets a number too few.

#include <cstdlib>
#include <cstring>

#include "affect_edge.h"
#include "fuzz.h"
#include "small_bundle.h"

namespace {

constexpr size_t kNumbers = 11;  // of a stream of the small bundle

affect_stream *make_stream() {
    const small::Folder folder;
    affect_model *model = nullptr;
    affect_stream *made = nullptr;
    if (affect_model_open(folder.path.c_str(), &model) != AFFECT_OK ||
        affect_stream_create(model, &made) != AFFECT_OK) {
        std::abort();
    }
    affect_model_free(model);
    return made;
}

std::string saved(const affect_stream *stream) {
    size_t size = 0;
    (void)affect_stream_save(stream, nullptr, 0, &size);
    std::string bytes(size, '\0');
    if (affect_stream_save(stream, bytes.data(), size, &size) != AFFECT_OK) {
        std::abort();
    }
    return bytes;
}

std::string state_from(const uint8_t *data, size_t size) {
    const int how = size == 0 ? 0 : data[0] & 3;
    const std::string rest = size == 0 ? "" : std::string(reinterpret_cast<const char *>(data) + 1, size - 1);
    std::string made = rest;
    if (how >= 2) {
        made = "AFFSTATE";
        small::append(&made, uint32_t{1});
        small::append(&made, static_cast<uint32_t>(rest.size()));
        made += rest;
        for (size_t i = 0; i < kNumbers - (how == 3 ? 1 : 0); ++i) {
            small::append(&made, static_cast<float>(i));
        }
    }
    if (how >= 1) {
        affect::Sha256 sha;
        uint8_t digest[affect::Sha256::kBytes];
        sha.update(made.data(), made.size());
        sha.finish(digest);
        made.append(reinterpret_cast<const char *>(digest), sizeof(digest));
    }
    return made;
}

}  // namespace

bool fuzz_one(const uint8_t *data, size_t size) {
    static affect_stream *const stream = make_stream();
    const std::string state = state_from(data, size);
    char *const bytes = static_cast<char *>(std::malloc(state.size() + 1));
    if (bytes == nullptr) {
        return false;
    }
    // At the block's end, so that a read beyond it is seen, and unaligned, as in a file with something before it.
    std::memcpy(bytes + 1, state.data(), state.size());
    (void)affect_stream_reset(stream);
    const std::string before = saved(stream);
    const bool accepted = affect_stream_restore(stream, bytes + 1, state.size()) == AFFECT_OK;
    if (!accepted && saved(stream) != before) {
        std::fprintf(stderr, "a refused state changed the stream\n");
        std::abort();
    }
    if (accepted) {
        const float features[4] = {0.1f, 0.2f, 0.3f, 0.4f}, *const given = features;
        float expression[4], valence, *const outputs[] = {expression, &valence};
        if (affect_stream_step(stream, &given, 1.0f, outputs) != AFFECT_OK) {
            std::abort();
        }
    }
    std::free(bytes);
    return accepted;
}
