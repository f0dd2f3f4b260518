#include "device_arena.hpp"

#include <fcntl.h>

#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "ipc_record.hpp"

namespace tandem {
namespace {

cuda::AllocationProp properties(cuda::Device device) {
    cuda::AllocationProp prop{};
    prop.type = cuda::kPinned;
    prop.requested_handle_types = cuda::kPosixDescriptor;
    prop.location = {cuda::kOnDevice, device};
    return prop;
}

// `size` rounded up to what the device maps at once.
std::size_t whole_units(cuda::Device device, std::size_t size) {
    std::size_t unit = 0;
    const cuda::AllocationProp prop = properties(device);
    cuda::check(cuda::Driver::get().granularity(&unit, &prop, 0), "cuMemGetAllocationGranularity");
    if (size > SIZE_MAX - unit) throw std::invalid_argument("arena size is too large");
    return (size + unit - 1) / unit * unit;
}

// Gives a handle back on the way out: a mapping keeps the memory alive by itself.
class HandleGuard {
  public:
    explicit HandleGuard(cuda::Handle handle) : handle_(handle) {}
    ~HandleGuard() { cuda::Driver::get().release(handle_); }
    HandleGuard(const HandleGuard&) = delete;
    HandleGuard& operator=(const HandleGuard&) = delete;

  private:
    cuda::Handle handle_;
};

}  // namespace

DeviceArena::DeviceArena(int device, std::size_t size) : device_(device), size_(size) {
    if (size == 0) throw std::invalid_argument("arena size must be positive");
    cuda::check(cuda::Driver::get().device_get(&on_, device), "cuDeviceGet");
}

DeviceArena DeviceArena::create(int device, std::size_t size) {
    DeviceArena arena(device, size);
    const cuda::Driver& driver = cuda::Driver::get();
    const cuda::Scope scope(arena.on_);
    int descriptors = 0;
    cuda::check(driver.device_attribute(&descriptors, cuda::kHasPosixDescriptors, arena.on_),
                "cuDeviceGetAttribute");
    if (descriptors == 0) {
        cuda::check(driver.allocate(&arena.address_, size), "cuMemAlloc");
        arena.kind_ = Kind::kAllocated;
        arena.describe();
        return arena;
    }
    arena.mapped_ = whole_units(arena.on_, size);
    const cuda::AllocationProp prop = properties(arena.on_);
    cuda::Handle handle = 0;
    cuda::check(driver.create(&handle, arena.mapped_, &prop, 0), "cuMemCreate");
    const HandleGuard guard(handle);
    int fd = -1;
    cuda::check(driver.export_handle(&fd, handle, cuda::kPosixDescriptor, 0), "cuMemExportToShareableHandle");
    arena.fd_ = Fd(fd);
    if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) {
        throw std::system_error(errno, std::generic_category(), "fcntl(F_SETFD)");
    }
    arena.map(handle);
    return arena;
}

DeviceArena DeviceArena::adopt(std::uintptr_t address, int device, std::size_t size) {
    DeviceArena arena(device, size);
    const cuda::Scope scope(arena.on_);
    arena.kind_ = Kind::kAdopted;
    arena.address_ = address;
    arena.describe();
    return arena;
}

DeviceArena DeviceArena::open(int fd, int device, std::size_t size) {
    if (fd < 0) throw std::invalid_argument("fd " + std::to_string(fd) + " is not a file descriptor");
    DeviceArena arena(device, size);
    arena.fd_ = Fd(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
    if (arena.fd() < 0) throw std::system_error(errno, std::generic_category(), "fcntl(F_DUPFD_CLOEXEC)");
    const cuda::Driver& driver = cuda::Driver::get();
    const cuda::Scope scope(arena.on_);
    if (const auto record = IpcRecord::read(arena.fd())) {
        if (record->size != size) {
            throw std::invalid_argument("arena has " + std::to_string(record->size) + " bytes, expected " +
                                        std::to_string(size));
        }
        cuda::check(driver.ipc_open(&arena.base_, record->handle, cuda::kLazyPeerAccess),
                    "cuIpcOpenMemHandle");
        arena.kind_ = Kind::kOpened;
        arena.address_ = arena.base_ + record->offset;
        return arena;
    }
    arena.mapped_ = whole_units(arena.on_, size);
    cuda::Handle handle = 0;
    void* shared = reinterpret_cast<void*>(static_cast<std::intptr_t>(arena.fd()));
    cuda::check(driver.import_handle(&handle, shared, cuda::kPosixDescriptor),
                "cuMemImportFromShareableHandle");
    const HandleGuard guard(handle);
    arena.map(handle);
    return arena;
}

void DeviceArena::describe() {
    const cuda::Driver& driver = cuda::Driver::get();
    int capable = 0;
    cuda::check(driver.pointer_attribute(&capable, cuda::kIpcCapable, address_), "cuPointerGetAttribute");
    if (capable == 0) {
        throw std::invalid_argument(
            "the memory has no handle of classic CUDA IPC: it is virtual memory, as expandable segments are");
    }
    std::size_t whole = 0;
    cuda::check(driver.address_range(&base_, &whole, address_), "cuMemGetAddressRange");
    IpcRecord record{};
    record.offset = address_ - base_;
    record.size = size_;
    if (size_ > whole - record.offset) {
        throw std::invalid_argument("the memory's allocation ends after " +
                                    std::to_string(whole - record.offset) + " bytes, not " +
                                    std::to_string(size_));
    }
    cuda::check(driver.ipc_export(&record.handle, base_), "cuIpcGetMemHandle");
    fd_ = record.written();
}

void DeviceArena::map(cuda::Handle handle) {
    const cuda::Driver& driver = cuda::Driver::get();
    cuda::Address address = 0;
    cuda::check(driver.reserve(&address, mapped_, 0, 0, 0), "cuMemAddressReserve");
    if (const cuda::Result result = driver.map(address, mapped_, 0, handle, 0); result != 0) {
        driver.free(address, mapped_);
        cuda::check(result, "cuMemMap");
    }
    const cuda::AccessDesc access{{cuda::kOnDevice, on_}, cuda::kReadWrite};
    if (const cuda::Result result = driver.set_access(address, mapped_, &access, 1); result != 0) {
        driver.unmap(address, mapped_);
        driver.free(address, mapped_);
        cuda::check(result, "cuMemSetAccess");
    }
    address_ = address;
}

DeviceArena::DeviceArena(DeviceArena&& other) noexcept
    : fd_(std::move(other.fd_)),
      kind_(other.kind_),
      device_(other.device_),
      on_(other.on_),
      size_(other.size_),
      mapped_(other.mapped_),
      base_(other.base_),
      address_(std::exchange(other.address_, 0)) {}

DeviceArena::~DeviceArena() {
    if (address_ == 0 || kind_ == Kind::kAdopted) return;
    const cuda::Driver& driver = cuda::Driver::get();
    // Kernels that still read it must be done. At a process's end the driver may be gone: it cleans up
    // itself.
    try {
        const cuda::Scope scope(on_);
        driver.synchronize();
        switch (kind_) {
            case Kind::kMapped:
                driver.unmap(address_, mapped_);
                driver.free(address_, mapped_);
                break;
            case Kind::kAllocated:
                driver.deallocate(address_);
                break;
            case Kind::kOpened:
                driver.ipc_close(base_);
                break;
            case Kind::kAdopted:
                break;
        }
    } catch (const std::exception&) {
    }
}

}  // namespace tandem
