// SHA-256, by which a file is recognised. Source: FIPS 180-4, sections 4.1.2, 5.1.1, 5.3.3 and 6.2.
#ifndef AFFECT_SHA256_H
#define AFFECT_SHA256_H

#include <cstddef>
#include <cstdint>

namespace affect {

class Sha256 {
  public:
    static constexpr size_t kBytes = 32;

    void update(const void *data, size_t size) noexcept;
    // Ends the computation; nothing may follow.
    void finish(uint8_t digest[kBytes]) noexcept;

  private:
    void block(const uint8_t *bytes) noexcept;

    uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint64_t size_ = 0;
    uint8_t rest_[64] = {};
};

// In lower-case hex, with a zero at the end.
void to_hex(const uint8_t digest[Sha256::kBytes], char hex[2 * Sha256::kBytes + 1]) noexcept;

}  // namespace affect

#endif
