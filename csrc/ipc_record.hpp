// What stands for memory with a handle of classic CUDA IPC, which has no descriptor of its own: one of a few
// bytes of sealed memory that contain the handle. So it is passed on as any other arena is.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "cuda_driver.hpp"
#include "fd.hpp"

namespace tandem {

struct IpcRecord {
    static constexpr std::array<char, 8> kMagic = {'t', 'd', 'm', 'c', 'u', 'i', 'p', 'c'};

    std::array<char, 8> magic = kMagic;
    cuda::IpcHandle handle{};
    std::uint64_t offset = 0;  // bytes from the start of the allocation
    std::uint64_t size = 0;    // bytes

    // A new descriptor, close-on-exec, whose content nobody can change. Throws std::system_error.
    Fd written() const;

    // The record in a descriptor; none in a descriptor of any other kind.
    static std::optional<IpcRecord> read(int fd);
};
static_assert(sizeof(IpcRecord) == 88);

}  // namespace tandem
