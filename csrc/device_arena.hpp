// Device memory that holds an engine's weights and that another process may map through its descriptor.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_driver.hpp"
#include "fd.hpp"

namespace tandem {

// One allocation of CUDA's virtual memory management, mapped readable and writable for its device. Unmapped
// when destroyed, once the device is idle; the memory itself lives until the last process has let go of it.
//
// The factories throw std::invalid_argument for arguments that cannot be an arena, and std::runtime_error,
// which names the driver's call and error, where the driver refuses.
class DeviceArena {
  public:
    // New memory of at least `size` bytes on the driver's device `device` (an index among those visible).
    static DeviceArena create(int device, std::size_t size);

    // Maps the arena behind `fd`, which the caller keeps and may close. It must be one of `size` bytes on
    // `device`.
    static DeviceArena open(int fd, int device, std::size_t size);

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
    DeviceArena(int device, std::size_t size);
    void map(cuda::Handle handle);

    Fd fd_;
    int device_;
    cuda::Device on_ = 0;  // the driver's number of the device
    std::size_t size_;
    std::size_t mapped_ = 0;  // bytes, a multiple of the device's granularity
    cuda::Address address_ = 0;
};

}  // namespace tandem
