// Around `fuzz_one`: for libFuzzer its entry, otherwise a program that feeds it every file of some folders.
//
//     replay_... FOLDER...              the files may be accepted or not
//     replay_... --accepted FOLDER...   every file must be: a harness that refuses valid files finds nothing
#include "fuzz.h"

#if defined(AFFECT_LIBFUZZER)

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    (void)fuzz_one(data, size);
    return 0;
}

#else

#include <dirent.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

std::vector<std::string> files_of(const char *folder) {
    std::vector<std::string> names;
    DIR *const opened = opendir(folder);
    if (opened == nullptr) {
        std::perror(folder);
        std::exit(1);
    }
    while (const dirent *const entry = readdir(opened)) {
        if (entry->d_name[0] != '.') {
            names.push_back(std::string(folder) + "/" + entry->d_name);
        }
    }
    closedir(opened);
    std::sort(names.begin(), names.end());
    return names;
}

}  // namespace

int main(int argc, char **argv) {
    bool must_accept = false;
    size_t count = 0, accepted = 0;
    for (int i = 1; i < argc; ++i) {
        if (std::strcmp(argv[i], "--accepted") == 0) {
            must_accept = true;
            continue;
        }
        for (const std::string &name : files_of(argv[i])) {
            std::vector<uint8_t> bytes;
            std::FILE *const file = std::fopen(name.c_str(), "rb");
            if (file == nullptr) {
                std::perror(name.c_str());
                return 1;
            }
            uint8_t piece[4096];
            for (size_t read; (read = std::fread(piece, 1, sizeof(piece), file)) > 0;) {
                bytes.insert(bytes.end(), piece, piece + read);
            }
            std::fclose(file);
            const bool good = fuzz_one(bytes.data(), bytes.size());
            if (must_accept && !good) {
                std::fprintf(stderr, "%s is valid and was refused\n", name.c_str());
                return 1;
            }
            ++count;
            accepted += good ? 1 : 0;
        }
    }
    std::printf("%zu files, %zu of them accepted\n", count, accepted);
    return count == 0 ? 1 : 0;
}

#endif
