// What a bundle must be before anything in it is used: every way of spoiling one is refused, in words.

#include <fcntl.h>

#include <cstring>

#include "affect_edge.h"
#include "bundle.h"
#include "check.h"
#include "small_bundle.h"

namespace {

affect_status open(const std::string &path) {
    affect_model *model = nullptr;
    const affect_status status = affect_model_open(path.c_str(), &model);
    CHECK((status == AFFECT_OK) == (model != nullptr));
    affect_model_free(model);
    return status;
}

std::string replaced(std::string text, const std::string &from, const std::string &to) {
    const size_t at = text.find(from);
    return CHECK_FOR(from.c_str(), at != std::string::npos) ? text.replace(at, from.size(), to) : text;
}

void test_opens() {
    const small::Folder folder;
    CHECK_FOR(affect_last_error(), open(folder.path) == AFFECT_OK);
    CHECK_FOR(affect_last_error(), open(folder.path + "/") == AFFECT_OK);
    // The folder itself may be reached by a link, such as the one that an update turns to a new bundle.
    const std::string link = folder.path + "-link";
    CHECK(::symlink(folder.path.c_str(), link.c_str()) == 0);
    CHECK_FOR(affect_last_error(), open(link) == AFFECT_OK);
    ::unlink(link.c_str());
}

void test_refuses_changed_manifests() {
    const small::Folder folder;
    const std::string good = small::manifest(small::sha256(small::weights()));
    const struct {
        const char *from, *to;
        affect_status status;
    } changes[] = {
        {"\"schema\": 2", "\"schema\": 1", AFFECT_ERROR_UNSUPPORTED},
        {"\"schema\": 2", "\"schema\": \"2\"", AFFECT_ERROR_BUNDLE},
        {"\"engine\": \"native\"", "\"engine\": \"onnxruntime\"", AFFECT_ERROR_UNSUPPORTED},
        {"\"arch\": [", "\"arch\": [], \"was\": [", AFFECT_ERROR_UNSUPPORTED},
        {"\"arch\": [", "\"arch\": \"x\", \"was\": [", AFFECT_ERROR_BUNDLE},
        {"\"trained\": false", "\"trained\": 0", AFFECT_ERROR_BUNDLE},
        {"\"licence\": \"Apache-2.0\"", "\"licence\": \"\"", AFFECT_ERROR_BUNDLE},
        {"\"licence\": \"Apache-2.0\"", "\"licence\": \"a\\u0000b\"", AFFECT_ERROR_BUNDLE},
        {"aaaaaaaa", "AAAAAAAA", AFFECT_ERROR_BUNDLE},
        {"0.03333333333333333", "0", AFFECT_ERROR_BUNDLE},
        {"[\"batch\", 3, 4, 4]", "[\"batch\", 3, 4, 5]", AFFECT_ERROR_BUNDLE},
        {"[\"batch\", 3, 4, 4]", "[1, 3, 4, 4]", AFFECT_ERROR_BUNDLE},
        {"[\"batch\", 3, 4, 4]", "[\"batch\", \"batch\", 4, 4]", AFFECT_ERROR_BUNDLE},
        {"[\"batch\", 3, 4, 4]", "[\"batch\", 3, 2, 2]", AFFECT_ERROR_BUNDLE},
        {"0.229]", "0.0]", AFFECT_ERROR_BUNDLE},
        {"\"kind\": \"distribution\"", "\"kind\": \"points\"", AFFECT_ERROR_BUNDLE},
        {"\"kind\": \"distribution\"", "\"kind\": \"mood\"", AFFECT_ERROR_BUNDLE},
        {"\"calm\", ", "", AFFECT_ERROR_BUNDLE},
        {"\"calm\"", "7", AFFECT_ERROR_BUNDLE},
        {"[-1, 1]", "[1, -1]", AFFECT_ERROR_BUNDLE},
        {"[-1, 1]", "[-1]", AFFECT_ERROR_BUNDLE},
        {"\"name\": \"valence\", \"kind\"", "\"name\": \"expression\", \"kind\"", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[4, \"batch\", 2]", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[9223372036854775807, \"batch\", 9223372036854775807]", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[1000000000, \"batch\", 4]", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[2, \"batch\", 4.0]", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[2, \"batch\", -4]", AFFECT_ERROR_BUNDLE},
        {"[2, \"batch\", 4]", "[1, 1, 1, 1, 2, \"batch\", 4]", AFFECT_ERROR_BUNDLE},
        {"\"init\": 0.5", "\"init\": 1e39", AFFECT_ERROR_BUNDLE},
        {"\"name\": \"sound\"", "\"name\": \"sum\"", AFFECT_ERROR_BUNDLE},
        {"\"name\": \"sound\"", "\"name\": \"s\\u00e9\"", AFFECT_ERROR_BUNDLE},
        {"\"kept_by\": \"runtime\"", "\"kept_by\": \"graph\"", AFFECT_ERROR_BUNDLE},
        {"\"kept_by\": \"runtime\"", "\"kept_by\": 1", AFFECT_ERROR_BUNDLE},
        {"\"role\": \"step\"", "\"role\": \"other\"", AFFECT_ERROR_BUNDLE},
        {"\"role\": \"step\"", "\"role\": \"encoder\"", AFFECT_ERROR_BUNDLE},
        {"\"file\": \"model.native\"", "\"file\": \"../model.native\"", AFFECT_ERROR_INTEGRITY},
        {"\"file\": \"model.native\"", "\"file\": \"/etc/passwd\"", AFFECT_ERROR_INTEGRITY},
        {"\"file\": \"model.native\"", "\"file\": \"a//b\"", AFFECT_ERROR_FILE},
        {"\"file\": \"model.native\"", "\"file\": \"c:\\\\b\"", AFFECT_ERROR_BUNDLE},
        {"\"file\": \"model.native\"", "\"file\": \".\"", AFFECT_ERROR_FILE},
        {"\"file\": \"model.native\"", "\"file\": \"verify.npz\"", AFFECT_ERROR_INTEGRITY},
        {"\"name\": \"next_sum\"", "\"name\": \"next\"", AFFECT_ERROR_BUNDLE},
        {"\"verify.npz\": ", "\"verify\": ", AFFECT_ERROR_BUNDLE},
        {"\"verify.npz\": ",
         "\"../verify.npz\": \""
         "0000000000000000000000000000000000000000000000000000000000000000"
         "\", \"verify.npz\": ",
         AFFECT_ERROR_INTEGRITY},
        {"\"files\": {", "\"files\": {\"verify.npz\": 1, ", AFFECT_ERROR_BUNDLE},
    };
    for (const auto &change : changes) {
        folder.write("manifest.json", small::sealed(replaced(good, change.from, change.to)));
        const affect_status found = open(folder.path);
        const std::string about =
            std::string(change.from) + " -> " + change.to + ": " + std::to_string(found) + ", " + affect_last_error();
        CHECK_FOR(about.c_str(), found == change.status);
        CHECK(std::strlen(affect_last_error()) > 30);
    }
    folder.write("manifest.json", small::sealed(good));
    CHECK(open(folder.path) == AFFECT_OK);
}

void test_any_changed_byte_of_a_manifest_is_noticed() {
    std::string text = small::sealed(small::manifest(small::sha256(small::weights())));
    CHECK(affect::Manifest::check_digest(text.data(), text.size()) == AFFECT_OK);
    for (size_t i = 0; i < text.size(); ++i) {
        for (const int bit : {0x01, 0x20}) {
            text[i] = static_cast<char>(text[i] ^ bit);
            CHECK_FOR(std::to_string(i).c_str(), affect::Manifest::check_digest(text.data(), text.size()) != AFFECT_OK);
            text[i] = static_cast<char>(text[i] ^ bit);
        }
    }
    for (size_t size = 0; size < text.size(); ++size) {
        CHECK(affect::Manifest::check_digest(text.data(), size) == AFFECT_ERROR_INTEGRITY);
    }
    text += '\n';
    CHECK(affect::Manifest::check_digest(text.data(), text.size()) == AFFECT_ERROR_INTEGRITY);
}

void test_any_broken_manifest_is_survived() {
    // Without the digest before it, which a hostile writer would have made to fit.
    const std::string text = small::sealed(small::manifest(small::sha256(small::weights())));
    for (size_t i = 0; i < text.size(); ++i) {
        std::string broken = text;
        for (const char c : {'\0', '"', '{', '0', '9', '-', ' ', '\xff'}) {
            broken[i] = c;
            affect::Manifest manifest{};
            manifest.read(broken.data(), broken.size());
        }
        affect::Manifest manifest{};
        CHECK(manifest.read(text.data(), i) != AFFECT_OK || i + 1 == text.size());
    }
}

void test_refuses_spoilt_files() {
    const small::Folder folder;
    const std::string weights = small::weights();
    const auto put_back = [&] {
        folder.write("model.native", weights);
        folder.write("verify.npz", "replay");
        folder.write("parity.json", "{}");
    };
    for (const char *const name : {"model.native", "verify.npz", "parity.json"}) {
        std::string bytes = name == std::string("model.native") ? weights : "replay";
        bytes.back() = static_cast<char>(bytes.back() ^ 1);
        folder.write(name, bytes);
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_INTEGRITY);
        CHECK(std::strstr(affect_last_error(), name) != nullptr);
        folder.write(name, "");
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_INTEGRITY);
        folder.remove(name);
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_FILE);
        // Nobody writes into this pipe: opening it like a file would wait for ever.
        CHECK(::mkfifo(folder.at(name).c_str(), 0600) == 0);
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_FILE);
        folder.remove(name);
        CHECK(::mkdir(folder.at(name).c_str(), 0700) == 0);
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_FILE);
        ::rmdir(folder.at(name).c_str());
        put_back();
        // The right bytes, but elsewhere.
        CHECK(std::rename(folder.at(name).c_str(), (folder.path + ".elsewhere").c_str()) == 0);
        CHECK(::symlink((folder.path + ".elsewhere").c_str(), folder.at(name).c_str()) == 0);
        CHECK_FOR(name, open(folder.path) == AFFECT_ERROR_FILE);
        CHECK(std::strstr(affect_last_error(), "symbolic link") != nullptr);
        ::unlink((folder.path + ".elsewhere").c_str());
        put_back();
        CHECK_FOR(name, open(folder.path) == AFFECT_OK);
    }
    const std::string manifest = small::sealed(small::manifest(small::sha256(weights)));
    for (const size_t size : {size_t{0}, size_t{1}, manifest.size() / 2, manifest.size() - 1}) {
        folder.write("manifest.json", manifest.substr(0, size));
        CHECK(open(folder.path) == AFFECT_ERROR_INTEGRITY);
    }
    folder.write("manifest.json", "");
    CHECK(::truncate(folder.at("manifest.json").c_str(), off_t{1} << 40) == 0);
    CHECK(open(folder.path) == AFFECT_ERROR_BUNDLE);
    folder.remove("manifest.json");
    CHECK(open(folder.path) == AFFECT_ERROR_FILE);
    CHECK(open(folder.path + "/nowhere") == AFFECT_ERROR_FILE);
    CHECK(open(folder.at("model.native")) == AFFECT_ERROR_FILE);
    CHECK(open("") == AFFECT_ERROR_FILE);
    CHECK(open(std::string(100000, 'x')) == AFFECT_ERROR_FILE);
    CHECK(std::strlen(affect_last_error()) < 512);
}

void test_weights_that_say_something_else_than_the_manifest() {
    const small::Folder folder;
    const std::string good = small::weights();
    for (const char *const name : {"next_sum", "valence", "frame", "features", "encoder", "dt"}) {
        std::string weights = good;
        weights[weights.find(name)] = 'x';
        folder.write("model.native", weights);
        folder.write("manifest.json", small::sealed(small::manifest(small::sha256(weights))));
        const affect_status status = open(folder.path);
        CHECK_FOR(name, status == (name == std::string("encoder") ? AFFECT_ERROR_NAME : AFFECT_ERROR_BUNDLE));
        CHECK(std::strstr(affect_last_error(), "model.native") != nullptr);
    }
}

void test_a_bundle_without_encoder() {
    const small::Folder folder;
    std::string text = small::manifest(small::sha256(small::weights()));
    const size_t begin = text.find("{\"role\": \"encoder\""), end = text.find("{\"role\": \"step\"");
    folder.write("manifest.json", small::sealed(text.erase(begin, end - begin)));
    affect_model *model = nullptr;
    affect_stream *stream = nullptr;
    CHECK_FOR(affect_last_error(), affect_model_open(folder.path.c_str(), &model) == AFFECT_OK);
    affect_model_info info{};
    info.struct_size = sizeof(info);
    CHECK(affect_model_describe(model, &info) == AFFECT_OK && info.has_encoder == 0);
    CHECK(affect_model_tensor_count(model, AFFECT_INPUTS) == 0 &&
          affect_model_tensor_count(model, AFFECT_FEATURES) == 1);
    CHECK(affect_stream_create(model, &stream) == AFFECT_OK);
    float features[4], *made[] = {features};
    CHECK(affect_stream_encode(stream, nullptr, made) == AFFECT_ERROR_NAME);
    affect_stream_free(stream);
    affect_model_free(model);
}

}  // namespace

int main() {
    test_opens();
    test_refuses_changed_manifests();
    test_any_changed_byte_of_a_manifest_is_noticed();
    test_any_broken_manifest_is_survived();
    test_refuses_spoilt_files();
    test_weights_that_say_something_else_than_the_manifest();
    test_a_bundle_without_encoder();
    return finish();
}
