// Device memory that holds an engine's weights and that another process may map through its descriptor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_driver.hpp"
#include "fd.hpp"

namespace tandem {

// Memory of one device, readable and writable. It is an allocation of CUDA's virtual memory management, whose
// memory lives until the last process has let go of it. Where the device has no descriptors of that, and
// where others allocated it, it is memory with a handle of classic CUDA IPC, which the descriptor then
// contains: that lives as long as whoever allocated it keeps it, whoever maps it. Given back when destroyed,
// once the device is idle.
//
// The factories throw std::invalid_argument for arguments that cannot be an arena, and std::runtime_error,
// which names the driver's call and error, where the driver refuses.
class DeviceArena {
  public:
    // New memory of at least `size` bytes on the driver's device `device` (an index among those visible).
    static DeviceArena create(int device, std::size_t size);

    // Maps the arena behind `fd`, which the caller keeps and may close. It must be one of `size` bytes on
    // `device`. What has a handle of classic CUDA IPC is opened by other processes alone.
    static DeviceArena open(int fd, int device, std::size_t size);

    // `size` bytes that others allocated on `device`, and keep for as long as anybody uses them. Virtual
    // memory, as that of torch's expandable segments, has no handle and is refused.
    static DeviceArena adopt(std::uintptr_t address, int device, std::size_t size);

    DeviceArena(DeviceArena&& other) noexcept;
    DeviceArena& operator=(DeviceArena&& other) = delete;
    DeviceArena(const DeviceArena&) = delete;
    DeviceArena& operator=(const DeviceArena&) = delete;
    ~DeviceArena();

    // Open as long as the arena lives; close-on-exec.
    int fd() const { return fd_.get(); }
    int device() const { return device_; }
    std::size_t size() const { return size_; }
    std::uintptr_t address() const { return static_cast<std::uintptr_t>(address_); }

  private:
    enum class Kind { kMapped, kAllocated, kAdopted, kOpened };

    DeviceArena(int device, std::size_t size);
    void map(cuda::Handle handle);
    void describe();  // makes the descriptor of memory that has an IPC handle

    Fd fd_;
    Kind kind_ = Kind::kMapped;
    int device_;
    cuda::Device on_ = 0;  // the driver's number of the device
    std::size_t size_;
    std::size_t mapped_ = 0;  // of virtual memory: bytes, a multiple of the device's granularity
    cuda::Address base_ = 0;  // of memory with an IPC handle: where its allocation begins
    cuda::Address address_ = 0;
};

}  // namespace tandem
