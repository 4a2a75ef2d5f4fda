// One number for many results, to compare those of one processor with another's (test_kernels and test_math --digest).
#ifndef AFFECT_DIGEST_H
#define AFFECT_DIGEST_H

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>

// 64-bit FNV-1a.
struct Digest {
    uint64_t value = 0xcbf29ce484222325u;

    void bytes(const void *data, size_t size) {
        for (size_t i = 0; i < size; ++i) {
            value = (value ^ static_cast<const uint8_t *>(data)[i]) * 0x100000001b3u;
        }
    }
    void floats(const float *data, int64_t count) {
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits = 0x7fc00000;  // which NaN it is differs between processors
            if (std::fabs(data[i]) < 2e-38f) {
                bits = 0;  // and so does the edge of the subnormal numbers: see kernels.h
            } else if (!std::isnan(data[i])) {
                std::memcpy(&bits, &data[i], sizeof(bits));
            }
            bytes(&bits, sizeof(bits));
        }
    }
    void print() const { std::printf("%016llx\n", static_cast<unsigned long long>(value)); }
};

#endif
