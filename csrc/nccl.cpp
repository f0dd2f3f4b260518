#include "nccl.hpp"

#include <dlfcn.h>

#include <chrono>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

namespace tandem::nccl {
namespace {

using Result = int;
using Comm = void*;

constexpr Result kSuccess = 0;     // ncclSuccess
constexpr Result kInProgress = 7;  // ncclInProgress
constexpr int kUint8 = 1;          // ncclUint8
constexpr int kUndefined = INT_MIN;
constexpr std::chrono::microseconds kLaunch{500};
constexpr int kAskedAtLeast = 8;  // by a thread that others keep from its processor

struct UniqueId {
    char internal[128];
};

// ncclConfig_t as NCCL 2.18 has it. Later versions read as much as `size` says, and take their defaults for
// the rest.
struct Config {
    std::size_t size = sizeof(Config);
    unsigned magic = 0xcafebeef;
    unsigned version = 21800;
    int blocking = 0;
    int cga_cluster_size = kUndefined;
    int min_ctas = kUndefined;
    int max_ctas = kUndefined;
    const char* net_name = nullptr;
    int split_share = kUndefined;
};
static_assert(sizeof(Config) == 48);

struct Library {
    Result (*get_version)(int*);
    Result (*get_unique_id)(UniqueId*);
    Result (*init_rank_config)(Comm*, int, UniqueId, int, Config*);
    Result (*get_async_error)(Comm, Result*);
    Result (*group_start)();
    Result (*group_end)();
    Result (*broadcast)(const void*, void*, std::size_t, int, int, Comm, void*);
    Result (*abort)(Comm);
    const char* (*get_error_string)(Result);
    const char* (*get_last_error)(Comm);
};

Library library{};
bool loaded = false;

template <typename Function>
void find(void* handle, Function& function, const char* name) {
    function = reinterpret_cast<Function>(::dlsym(handle, name));
    if (function == nullptr) throw std::runtime_error(std::string("this NCCL has no ") + name);
}

const Library& get() {
    if (!loaded) throw std::runtime_error("NCCL is not loaded");
    return library;
}

[[noreturn]] void fail(Result result, const char* call, Comm comm) {
    std::string what = std::string(call) + ": " + get().get_error_string(result);
    if (const char* last = get().get_last_error(comm); last != nullptr && *last != '\0') {
        what += std::string(" (") + last + ")";
    }
    throw std::runtime_error(what);
}

// Throws unless `call` was done, or goes on.
void check(Result result, const char* call, Comm comm) {
    if (result != kSuccess && result != kInProgress) fail(result, call, comm);
}

}  // namespace

int load(const std::string& path) {
    void* handle = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw std::runtime_error(std::string("NCCL cannot be loaded: ") + ::dlerror());
    Library found{};
    find(handle, found.get_version, "ncclGetVersion");
    find(handle, found.get_unique_id, "ncclGetUniqueId");
    find(handle, found.init_rank_config, "ncclCommInitRankConfig");
    find(handle, found.get_async_error, "ncclCommGetAsyncError");
    find(handle, found.group_start, "ncclGroupStart");
    find(handle, found.group_end, "ncclGroupEnd");
    find(handle, found.broadcast, "ncclBroadcast");
    find(handle, found.abort, "ncclCommAbort");
    find(handle, found.get_error_string, "ncclGetErrorString");
    find(handle, found.get_last_error, "ncclGetLastError");
    int version = 0;
    if (found.get_version(&version) != kSuccess || version < 21800) {
        throw std::runtime_error("NCCL is of version " + std::to_string(version) + "; 2.18 is needed");
    }
    library = found;
    loaded = true;
    return version;
}

std::string unique_id() {
    UniqueId id{};
    check(get().get_unique_id(&id), "ncclGetUniqueId", nullptr);
    return {id.internal, sizeof(id.internal)};
}

Communicator::Communicator(const std::string& id, int rank, int size) {
    UniqueId given{};
    if (id.size() != sizeof(given.internal)) throw std::invalid_argument("a unique id has 128 bytes");
    std::memcpy(given.internal, id.data(), id.size());
    Config config;
    const Result result = get().init_rank_config(&communicator_, size, given, rank, &config);
    if (result == kSuccess || result == kInProgress) return;
    const Comm broken = std::exchange(communicator_, nullptr);
    if (broken != nullptr) get().abort(broken);
    fail(result, "ncclCommInitRankConfig", nullptr);
}

bool Communicator::ready() {
    if (communicator_ == nullptr) throw std::runtime_error("the communicator was aborted");
    Result state = kSuccess;
    check(get().get_async_error(communicator_, &state), "ncclCommGetAsyncError", communicator_);
    check(state, "NCCL", communicator_);
    return state == kSuccess;
}

void Communicator::broadcast(const std::vector<Span>& spans, int root, std::uintptr_t stream) {
    if (communicator_ == nullptr) throw std::runtime_error("the communicator was aborted");
    check(get().group_start(), "ncclGroupStart", communicator_);
    Result failed = kSuccess;
    for (const Span& span : spans) {
        void* memory = reinterpret_cast<void*>(span.address);
        const Result result = get().broadcast(memory, memory, span.nbytes, kUint8, root, communicator_,
                                              reinterpret_cast<void*>(stream));
        if (result != kSuccess && result != kInProgress) failed = result;
    }
    check(get().group_end(), "ncclGroupEnd", communicator_);
    check(failed, "ncclBroadcast", communicator_);
    // A thread of NCCL's goes on with it, for less time than any sleep takes. What fails there `ready` tells.
    const auto end = std::chrono::steady_clock::now() + kLaunch;
    Result state = kInProgress;
    for (int asked = 1; state == kInProgress; ++asked) {
        if (get().get_async_error(communicator_, &state) != kSuccess) return;
        if (asked >= kAskedAtLeast && std::chrono::steady_clock::now() > end) return;
        std::this_thread::yield();
    }
}

void Communicator::abort() {
    if (const Comm ended = std::exchange(communicator_, nullptr); ended != nullptr) get().abort(ended);
}

}  // namespace tandem::nccl
