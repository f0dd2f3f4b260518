#include "ipc_record.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace tandem {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL;
constexpr auto kSize = static_cast<ssize_t>(sizeof(IpcRecord));

[[noreturn]] void throw_errno(const char* what) {
    throw std::system_error(errno, std::generic_category(), what);
}

}  // namespace

Fd IpcRecord::written() const {
    Fd fd(::memfd_create("tandem-ipc", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (fd.get() < 0) throw_errno("memfd_create");
    if (::pwrite(fd.get(), this, sizeof *this, 0) != kSize) throw_errno("pwrite");
    if (::fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) throw_errno("fcntl(F_ADD_SEALS)");
    return fd;
}

std::optional<IpcRecord> IpcRecord::read(int fd) {
    const int seals = ::fcntl(fd, F_GET_SEALS);
    if (seals < 0 || (seals & kSeals) != kSeals) return std::nullopt;
    IpcRecord record;
    if (::pread(fd, &record, sizeof record, 0) != kSize || record.magic != kMagic) return std::nullopt;
    return record;
}

}  // namespace tandem
