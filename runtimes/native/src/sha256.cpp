#include "sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace affect {
namespace {

// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
constexpr uint32_t kRound[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

uint32_t read_big_endian(const uint8_t *bytes) noexcept {
    return uint32_t{bytes[0]} << 24 | uint32_t{bytes[1]} << 16 | uint32_t{bytes[2]} << 8 | uint32_t{bytes[3]};
}

void write_big_endian(uint8_t *bytes, uint32_t value) noexcept {
    for (int i = 0; i < 4; ++i) {
        bytes[i] = static_cast<uint8_t>(value >> (24 - 8 * i));
    }
}

}  // namespace

void Sha256::block(const uint8_t *bytes) noexcept {
    uint32_t w[64];
    for (int t = 0; t < 16; ++t) {
        w[t] = read_big_endian(bytes + 4 * t);
    }
    for (int t = 16; t < 64; ++t) {
        const uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
        const uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    uint32_t a = state_[0], b = state_[1], c = state_[2], d = state_[3];
    uint32_t e = state_[4], f = state_[5], g = state_[6], h = state_[7];
    for (int t = 0; t < 64; ++t) {
        const uint32_t sum1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
        const uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kRound[t] + w[t];
        const uint32_t sum0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
        const uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g;
        g = f;
        f = e;
        e = d + t1;
        d = c;
        c = b;
        b = a;
        a = t1 + t2;
    }
    const uint32_t sums[8] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) {
        state_[i] += sums[i];
    }
}

void Sha256::update(const void *data, size_t size) noexcept {
    if (size == 0) {
        return;
    }
    const auto *bytes = static_cast<const uint8_t *>(data);
    const auto held = static_cast<size_t>(size_ % 64);
    size_ += size;
    if (held != 0) {
        const size_t taken = std::min(size, 64 - held);
        std::memcpy(rest_ + held, bytes, taken);
        if (held + taken < 64) {
            return;
        }
        block(rest_);
        bytes += taken;
        size -= taken;
    }
    for (; size >= 64; bytes += 64, size -= 64) {
        block(bytes);
    }
    std::memcpy(rest_, bytes, size);
}

void Sha256::finish(uint8_t digest[kBytes]) noexcept {
    const uint64_t bits = size_ * 8;
    uint8_t padding[72] = {0x80};
    // A one, zeros up to 8 bytes short of a block, and the length.
    const auto zeros = static_cast<size_t>((119 - size_ % 64) % 64 + 1);
    write_big_endian(padding + zeros, static_cast<uint32_t>(bits >> 32));
    write_big_endian(padding + zeros + 4, static_cast<uint32_t>(bits));
    update(padding, zeros + 8);
    for (int i = 0; i < 8; ++i) {
        write_big_endian(digest + 4 * i, state_[i]);
    }
}

void to_hex(const uint8_t digest[Sha256::kBytes], char hex[2 * Sha256::kBytes + 1]) noexcept {
    for (size_t i = 0; i < Sha256::kBytes; ++i) {
        hex[2 * i] = "0123456789abcdef"[digest[i] >> 4];
        hex[2 * i + 1] = "0123456789abcdef"[digest[i] & 15];
    }
    hex[2 * Sha256::kBytes] = '\0';
}

}  // namespace affect
