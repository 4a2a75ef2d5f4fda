// Files of a bundle: opened without ever leaving its folder, read, hashed, and mapped.
#ifndef AFFECT_MAPPED_FILE_H
#define AFFECT_MAPPED_FILE_H

#include "sha256.h"
#include "support.h"

namespace affect {

// An open file or folder; -1 for none.
class Descriptor {
  public:
    explicit Descriptor(int value = -1) noexcept : value_(value) {}
    ~Descriptor();
    Descriptor(Descriptor &&other) noexcept : value_(std::exchange(other.value_, -1)) {}
    Descriptor &operator=(Descriptor &&other) noexcept {
        std::swap(value_, other.value_);
        return *this;
    }
    int get() const noexcept { return value_; }

  private:
    int value_;
};

affect_status open_folder(const char *path, Descriptor *folder) noexcept;
// Opens a plain file by its relative path. No symbolic link is followed and ".." is refused, so that the file is in the
// folder whatever the path says; a pipe or device is refused without waiting for it.
affect_status open_inside(const Descriptor &folder, const char *path, Descriptor *file) noexcept;
// The whole of a file of at most `most` bytes.
affect_status read_whole(const Descriptor &file, size_t most, Array<char> *content) noexcept;
affect_status hash_file(const Descriptor &file, uint8_t digest[Sha256::kBytes]) noexcept;

// A file's bytes in memory, read-only, from a multiple of 64. The file need not stay open.
class MappedFile {
  public:
    MappedFile() = default;
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    affect_status map(const Descriptor &file) noexcept;
    const uint8_t *data() const noexcept { return data_; }
    size_t size() const noexcept { return size_; }

  private:
    uint8_t *data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace affect

#endif
