#include "cuda_driver.hpp"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <stdexcept>

namespace tandem::cuda {
namespace {

template <typename Function>
void find(void* library, Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    if (function == nullptr) throw std::runtime_error(std::string("the CUDA driver has no ") + name);
}

Driver load() {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw std::runtime_error("this host has no CUDA driver (libcuda.so.1)");
    Driver driver{};
    find(library, driver.init, "cuInit");
    find(library, driver.error_name, "cuGetErrorName");
    find(library, driver.device_get, "cuDeviceGet");
    find(library, driver.primary_retain, "cuDevicePrimaryCtxRetain");
    find(library, driver.push_context, "cuCtxPushCurrent_v2");
    find(library, driver.pop_context, "cuCtxPopCurrent_v2");
    find(library, driver.synchronize, "cuCtxSynchronize");
    find(library, driver.granularity, "cuMemGetAllocationGranularity");
    find(library, driver.create, "cuMemCreate");
    find(library, driver.release, "cuMemRelease");
    find(library, driver.reserve, "cuMemAddressReserve");
    find(library, driver.free, "cuMemAddressFree");
    find(library, driver.map, "cuMemMap");
    find(library, driver.unmap, "cuMemUnmap");
    find(library, driver.set_access, "cuMemSetAccess");
    find(library, driver.export_handle, "cuMemExportToShareableHandle");
    find(library, driver.import_handle, "cuMemImportFromShareableHandle");
    find(library, driver.device_attribute, "cuDeviceGetAttribute");
    find(library, driver.pointer_attribute, "cuPointerGetAttribute");
    find(library, driver.address_range, "cuMemGetAddressRange_v2");
    find(library, driver.allocate, "cuMemAlloc_v2");
    find(library, driver.deallocate, "cuMemFree_v2");
    find(library, driver.ipc_export, "cuIpcGetMemHandle");
    find(library, driver.ipc_open, "cuIpcOpenMemHandle_v2");
    find(library, driver.ipc_close, "cuIpcCloseMemHandle");
    if (const Result result = driver.init(0); result != 0) {
        throw std::runtime_error("cuInit failed with CUDA error " + std::to_string(result));
    }
    return driver;
}

}  // namespace

const Driver& Driver::get() {
    static const Driver driver = load();
    return driver;
}

void check(Result result, const char* call) {
    if (result == 0) return;
    const char* name = nullptr;
    if (Driver::get().error_name(result, &name) != 0 || name == nullptr) name = "unknown";
    throw std::runtime_error(std::string(call) + ": " + name + " (" + std::to_string(result) + ")");
}

namespace {

// A device's primary context, which once retained stays: with its last holder go the memory that was
// allocated in it and what was opened by an IPC handle, and torch becomes a holder only as it first uses the
// device.
Context primary(Device device) {
    static std::mutex mutex;
    static auto* const retained = new std::map<Device, Context>;  // threads may come here as the process ends
    const std::scoped_lock lock(mutex);
    Context& context = (*retained)[device];
    if (context == nullptr) {
        check(Driver::get().primary_retain(&context, device), "cuDevicePrimaryCtxRetain");
    }
    return context;
}

}  // namespace

Scope::Scope(Device device) {
    check(Driver::get().push_context(primary(device)), "cuCtxPushCurrent");
}

Scope::~Scope() {
    Context popped = nullptr;
    Driver::get().pop_context(&popped);
}

}  // namespace tandem::cuda
