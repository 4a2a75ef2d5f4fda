// Fuzzes manifests past their digest, which a hostile writer would have made to fit, and what opening them leads to.

#include <cstdlib>
#include <cstring>

#include "affect_edge.h"
#include "bundle.h"
#include "fuzz.h"
#include "small_bundle.h"

namespace {

constexpr int64_t kMostMemory = 1 << 20;

// A manifest that was read opens a model as far as its files allow, which are those of the small bundle.
void open(const char *folder) {
    affect_model *model = nullptr;
    if (affect_model_open(folder, &model) != AFFECT_OK) {
        return;
    }
    affect_model_info info{};
    info.struct_size = sizeof(info);
    if (affect_model_describe(model, &info) != AFFECT_OK) {
        std::abort();
    }
    for (int32_t which = 0; which < 4; ++which) {
        for (int32_t i = 0; i < affect_model_tensor_count(model, which); ++i) {
            affect_tensor_info tensor{};
            tensor.struct_size = sizeof(tensor);
            int32_t found = -1;
            if (affect_model_tensor(model, which, i, &tensor) != AFFECT_OK || tensor.floats < 1 ||
                affect_model_find(model, which, tensor.name, &found) != AFFECT_OK || found != i) {
                std::abort();
            }
        }
    }
    affect_stream *stream = nullptr;
    size_t size = 0;
    if (info.memory_bytes <= kMostMemory && affect_stream_create(model, &stream) == AFFECT_OK &&
        affect_stream_save(stream, nullptr, 0, &size) == AFFECT_OK) {
        std::string saved(size, '\0');
        if (affect_stream_save(stream, saved.data(), saved.size(), &size) != AFFECT_OK ||
            affect_stream_restore(stream, saved.data(), saved.size()) != AFFECT_OK) {
            std::abort();
        }
    }
    affect_stream_free(stream);
    affect_model_free(model);
}

}  // namespace

bool fuzz_one(const uint8_t *data, size_t size) {
    // Of exactly this size, so that a read beyond its end is seen.
    char *const text = static_cast<char *>(std::malloc(size == 0 ? 1 : size));
    if (text == nullptr) {
        return false;
    }
    if (size > 0) {
        std::memcpy(text, data, size);
    }
    bool accepted = false;
    {
        affect::Manifest manifest{};
        accepted = manifest.read(text, size) == AFFECT_OK;
        (void)affect::Manifest::check_digest(text, size);
    }
    if (accepted) {
        // With a digest that fits, whatever stood there before.
        static const small::Folder folder;
        std::string inner(text, size);
        const size_t digest = inner.rfind(",\n \"manifest_sha256\""), end = inner.find_last_of('}');
        inner.resize(digest != std::string::npos ? digest : end);
        folder.write("manifest.json", small::sealed(inner));
        open(folder.path.c_str());
    }
    std::free(text);
    return accepted;
}
