// What the tests of the native library are made of: CHECK counts what does not hold, and `finish` ends the program.
#ifndef AFFECT_CHECK_H
#define AFFECT_CHECK_H

#include <cstdio>

inline int failures = 0;

inline bool check(bool holds, const char *what, const char *file, int line, const char *about = "") {
    if (!holds) {
        std::fprintf(stderr, "%s:%d: does not hold: %s %s\n", file, line, what, about);
        ++failures;
    }
    return holds;
}

#define CHECK(...) check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
// With a text that says which case of a table it is.
#define CHECK_FOR(about, ...) check((__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__, about)

inline int finish() {
    if (failures != 0) {
        std::fprintf(stderr, "%d checks failed\n", failures);
    }
    return failures == 0 ? 0 : 1;
}

#endif
