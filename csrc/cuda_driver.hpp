// The CUDA driver, found at run time: nothing of CUDA is needed to build this, nor to import it.
//
// Only what the weight plane calls, declared as the driver's ABI has it (cuda.h of CUDA 12 and 13).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace tandem::cuda {

using Result = int;
using Device = int;
using Address = unsigned long long;
using Handle = unsigned long long;
using Context = void*;

struct Location {
    int type;
    int id;
};

struct AllocationProp {
    int type;
    int requested_handle_types;
    Location location;
    void* win32_handle_meta_data;
    unsigned char compression_type;
    unsigned char gpu_direct_rdma_capable;
    unsigned short usage;
    unsigned char reserved[4];
};
static_assert(sizeof(AllocationProp) == 32);

struct AccessDesc {
    Location location;
    int flags;
};
static_assert(sizeof(AccessDesc) == 12);

constexpr int kPinned = 1;           // CU_MEM_ALLOCATION_TYPE_PINNED
constexpr int kOnDevice = 1;         // CU_MEM_LOCATION_TYPE_DEVICE
constexpr int kPosixDescriptor = 1;  // CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
constexpr int kReadWrite = 3;        // CU_MEM_ACCESS_FLAGS_PROT_READWRITE

struct IpcHandle {
    unsigned char bytes[64];
};

constexpr int kHasPosixDescriptors = 103;  // CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED
constexpr int kIpcCapable = 10;            // CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
constexpr unsigned kLazyPeerAccess = 1;    // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS

struct Driver {
    Result (*init)(unsigned);
    Result (*error_name)(Result, const char**);
    Result (*device_get)(Device*, int);
    Result (*primary_retain)(Context*, Device);
    Result (*push_context)(Context);
    Result (*pop_context)(Context*);
    Result (*synchronize)();
    Result (*granularity)(std::size_t*, const AllocationProp*, int);
    Result (*create)(Handle*, std::size_t, const AllocationProp*, unsigned long long);
    Result (*release)(Handle);
    Result (*reserve)(Address*, std::size_t, std::size_t, Address, unsigned long long);
    Result (*free)(Address, std::size_t);
    Result (*map)(Address, std::size_t, std::size_t, Handle, unsigned long long);
    Result (*unmap)(Address, std::size_t);
    Result (*set_access)(Address, std::size_t, const AccessDesc*, std::size_t);
    Result (*export_handle)(void*, Handle, int, unsigned long long);
    Result (*import_handle)(Handle*, void*, int);
    Result (*device_attribute)(int*, int, Device);
    Result (*pointer_attribute)(void*, int, Address);
    Result (*address_range)(Address*, std::size_t*, Address);
    Result (*allocate)(Address*, std::size_t);
    Result (*deallocate)(Address);
    Result (*ipc_export)(IpcHandle*, Address);
    Result (*ipc_open)(Address*, IpcHandle, unsigned);
    Result (*ipc_close)(Address);

    // The driver of this host, initialized. Throws std::runtime_error where there is none.
    static const Driver& get();
};

// Throws std::runtime_error, which names the call and the driver's error, unless `result` is success.
void check(Result result, const char* call);

// Makes a device's primary context, which is the one that torch uses, current while it lives.
class Scope {
  public:
    explicit Scope(Device device);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
};

}  // namespace tandem::cuda
