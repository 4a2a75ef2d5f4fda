#include "mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cinttypes>
#include <climits>
#include <cstring>

namespace affect {
namespace {

constexpr size_t kMostName = 255;

// strerror shares one buffer among all threads, and strerror_r has two forms; these are the errors that do happen.
const char *reason(int error) noexcept {
    switch (error) {
        case ENOENT:
            return "it is not there";
        case EACCES:
        case EPERM:
            return "this user has no permission to read it";
        case ENOTDIR:
            return "it is not a folder, or is a symbolic link";
        case EISDIR:
            return "it is a folder";
        case ELOOP:
        case EMLINK:
            return "it is a symbolic link; a bundle holds plain files";
        case EMFILE:
        case ENFILE:
            return "too many files are open";
        case ENAMETOOLONG:
            return "its name is too long";
        case ENOMEM:
            return "there is not enough memory";
        case EIO:
            return "the disk gave an error";
        default:
            return "the system refuses it";
    }
}

affect_status cannot(const char *what, int error) noexcept {
    return fail(AFFECT_ERROR_FILE, "cannot be %s: %s (error %d)", what, reason(error), error);
}

int open_at(int folder, const char *name, int flags) noexcept {
    int found;
    do {
        found = ::openat(folder, name, flags | O_RDONLY | O_CLOEXEC);
    } while (found < 0 && errno == EINTR);
    return found;
}

// Bytes read, 0 at the end of the file, -1 on failure.
ssize_t read_some(int file, void *to, size_t size) noexcept {
    ssize_t found;
    do {
        found = ::read(file, to, size);
    } while (found < 0 && errno == EINTR);
    return found;
}

}  // namespace

Descriptor::~Descriptor() {
    if (value_ >= 0) {
        ::close(value_);
    }
}

affect_status open_folder(const char *path, Descriptor *folder) noexcept {
    *folder = Descriptor(open_at(AT_FDCWD, path, O_DIRECTORY));
    return folder->get() >= 0 ? AFFECT_OK : cannot("opened as a folder", errno);
}

affect_status open_inside(const Descriptor &folder, const char *path, Descriptor *file) noexcept {
    Descriptor parent;
    int inside = folder.get();
    for (;;) {
        char name[kMostName + 1];
        const size_t length = std::strcspn(path, "/");
        if (length > kMostName) {
            return cannot("opened", ENAMETOOLONG);
        }
        std::memcpy(name, path, length);
        name[length] = '\0';
        if (length == 0 || std::strcmp(name, "..") == 0) {
            return fail(AFFECT_ERROR_INTEGRITY, "the path leaves the bundle's folder; export the bundle again");
        }
        if (path[length] == '\0') {
            // Opening a pipe would wait for its other end without O_NONBLOCK, which means nothing for plain files.
            Descriptor found(open_at(inside, name, O_NOFOLLOW | O_NONBLOCK | O_NOCTTY));
            if (found.get() < 0) {
                return cannot("opened", errno);
            }
            struct stat about;
            if (::fstat(found.get(), &about) != 0) {
                return cannot("examined", errno);
            }
            if (!S_ISREG(about.st_mode)) {
                return fail(AFFECT_ERROR_FILE, "is not a plain file; copy or export the bundle again");
            }
            *file = std::move(found);
            return AFFECT_OK;
        }
        Descriptor next(open_at(inside, name, O_NOFOLLOW | O_DIRECTORY));
        if (next.get() < 0) {
            return cannot("opened", errno);
        }
        parent = std::move(next);
        inside = parent.get();
        path += length + 1;
    }
}

affect_status read_whole(const Descriptor &file, size_t most, Array<char> *content) noexcept {
    struct stat about;
    if (::fstat(file.get(), &about) != 0) {
        return cannot("examined", errno);
    }
    if (about.st_size < 0 || static_cast<uint64_t>(about.st_size) > most) {
        return fail(AFFECT_ERROR_BUNDLE, "has %" PRId64 " bytes; at most %zu are read",
                    static_cast<int64_t>(about.st_size), most);
    }
    const auto size = static_cast<size_t>(about.st_size);
    if (!content->allocate(size)) {
        return out_of_memory(size);
    }
    for (size_t at = 0; at < size;) {
        const ssize_t found = read_some(file.get(), content->data() + at, size - at);
        if (found < 0) {
            return cannot("read", errno);
        }
        if (found == 0) {
            return fail(AFFECT_ERROR_INTEGRITY, "was cut short while it was read; copy or export the bundle again");
        }
        at += static_cast<size_t>(found);
    }
    return AFFECT_OK;
}

affect_status hash_file(const Descriptor &file, uint8_t digest[Sha256::kBytes]) noexcept {
    uint8_t piece[16384];
    Sha256 hash;
    for (;;) {
        const ssize_t found = read_some(file.get(), piece, sizeof(piece));
        if (found < 0) {
            return cannot("read", errno);
        }
        if (found == 0) {
            hash.finish(digest);
            return AFFECT_OK;
        }
        hash.update(piece, static_cast<size_t>(found));
    }
}

MappedFile::~MappedFile() {
    if (data_ != nullptr) {
        ::munmap(data_, size_);
    }
}

affect_status MappedFile::map(const Descriptor &file) noexcept {
    struct stat about;
    if (::fstat(file.get(), &about) != 0) {
        return cannot("examined", errno);
    }
    if (about.st_size <= 0) {
        return fail(AFFECT_ERROR_INTEGRITY, "is empty; copy or export the bundle again");
    }
    if (static_cast<uint64_t>(about.st_size) > PTRDIFF_MAX) {
        return fail(AFFECT_ERROR_MEMORY, "has %" PRId64 " bytes, more than fit in memory",
                    static_cast<int64_t>(about.st_size));
    }
    const auto size = static_cast<size_t>(about.st_size);
    void *const found = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file.get(), 0);
    if (found == MAP_FAILED) {
        return cannot("mapped", errno);
    }
    data_ = static_cast<uint8_t *>(found);
    size_ = size;
    return AFFECT_OK;
}

}  // namespace affect
