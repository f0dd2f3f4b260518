#include "host_arena.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "fd.hpp"

namespace tandem {
namespace {

// The kernel's limit for a memfd's name, without the terminator.
constexpr std::size_t kMaxName = 249;

[[noreturn]] void throw_errno(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
}

void check_size(std::size_t size) {
    if (size == 0) throw std::invalid_argument("arena size must be positive");
    if (size > static_cast<std::size_t>(std::numeric_limits<off_t>::max())) {
        throw std::invalid_argument("arena size " + std::to_string(size) + " is too large");
    }
}

}  // namespace

HostArena HostArena::create(const std::string& name, std::size_t size) {
    check_size(size);
    if (name.empty() || name.size() > kMaxName || name.find('\0') != std::string::npos) {
        throw std::invalid_argument("arena name must have 1 to " + std::to_string(kMaxName) +
                                    " bytes and no NUL");
    }
    Fd fd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd.get() < 0) throw_errno("memfd_create");
    if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) throw_errno("ftruncate");
    if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
        throw_errno("fcntl(F_ADD_SEALS)");
    }
    return HostArena(fd.release(), size);
}

HostArena HostArena::open(int fd, std::size_t size) {
    check_size(size);
    if (fd < 0) throw std::invalid_argument("fd " + std::to_string(fd) + " is not a file descriptor");
    Fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
    if (own.get() < 0) throw_errno("fcntl(F_DUPFD_CLOEXEC)");
    const int seals = ::fcntl(own.get(), F_GET_SEALS);
    if (seals < 0) {
        if (errno != EINVAL) throw_errno("fcntl(F_GET_SEALS)");
        throw std::invalid_argument("fd " + std::to_string(fd) + " is not arena memory (no memfd)");
    }
    if ((seals & F_SEAL_SHRINK) == 0) {
        throw std::invalid_argument("fd " + std::to_string(fd) +
                                    " is not sealed against shrinking: its owner could truncate it under us");
    }
    struct stat status{};
    if (::fstat(own.get(), &status) != 0) throw_errno("fstat");
    if (static_cast<std::size_t>(status.st_size) != size) {
        throw std::invalid_argument("arena has " + std::to_string(status.st_size) + " bytes, expected " +
                                    std::to_string(size));
    }
    return HostArena(own.release(), size);
}

HostArena::HostArena(int fd, std::size_t size) : fd_(fd), size_(size), address_(nullptr) {
    void* mapped = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (mapped == MAP_FAILED) {
        const int error = errno;
        ::close(fd);
        throw std::system_error(error, std::generic_category(), "mmap");
    }
    address_ = mapped;
    // A hint that helps where shmem huge pages are set to "advise"; refusal changes nothing.
    ::madvise(address_, size_, MADV_HUGEPAGE);
}

HostArena::HostArena(HostArena&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      size_(std::exchange(other.size_, 0)),
      address_(std::exchange(other.address_, nullptr)) {}

void HostArena::forget() const {
    if (::madvise(address_, size_, MADV_REMOVE) != 0) throw_errno("madvise(MADV_REMOVE)");
}

HostArena::~HostArena() {
    if (address_ != nullptr) ::munmap(address_, size_);
    if (fd_ >= 0) ::close(fd_);
}

}  // namespace tandem
