// Writes what the fuzzers begin with: valid files that use everything their format has.
//
//     fuzz_seeds FOLDER      into FOLDER/program, FOLDER/manifest and FOLDER/state

#include <cerrno>

#include "small_programs.h"

namespace {

void make(const std::string &folder) {
    if (::mkdir(folder.c_str(), 0777) != 0 && errno != EEXIST) {
        std::perror(folder.c_str());
        std::exit(1);
    }
}

void write(const std::string &path, const std::string &bytes) {
    std::FILE *const file = std::fopen(path.c_str(), "wb");
    if (file == nullptr || std::fwrite(bytes.data(), 1, bytes.size(), file) != bytes.size() || std::fclose(file) != 0) {
        std::perror(path.c_str());
        std::exit(1);
    }
}

}  // namespace

int main(int argc, char **argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: fuzz_seeds FOLDER\n");
        return 2;
    }
    const std::string folder = argv[1];
    make(folder);
    for (const char *const name : {"/program", "/manifest", "/state"}) {
        make(folder + name);
    }
    for (const small::Builder &program : small::programs()) {
        write(folder + "/program/" + program.name, program.file());
    }
    write(folder + "/program/small-bundle", small::weights());
    write(folder + "/manifest/small-bundle", small::sealed(small::manifest(small::sha256(small::weights()))));
    // The first byte says what fuzz_state does with the rest.
    const std::string head = "{\"model\": \"" + std::string(64, 'a') +
                             "\", \"batch\": 1, \"arrays\": [[\"sum\", \"float32\", [2, 1, 4], 1], "
                             "[\"sound\", \"float32\", [1, 3], 0]]}";
    write(folder + "/state/framed", '\2' + head);
    write(folder + "/state/short", '\3' + head);
    std::string saved = "AFFSTATE";
    small::append(&saved, uint32_t{1});
    small::append(&saved, static_cast<uint32_t>(head.size()));
    saved += head + std::string(11 * sizeof(float), '\1');
    write(folder + "/state/sealed", '\1' + saved);
    write(folder + "/state/raw", '\0' + saved);
    return 0;
}
