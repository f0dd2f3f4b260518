// NCCL, found at run time: one rank's end of a communicator, none of whose calls waits for another rank for
// more than the time of a launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace tandem::nccl {

// Loads the library at `path`, or the one that the process has already where `path` is a bare name. Its
// version, as ncclGetVersion tells it. Throws std::runtime_error where there is none, or one that lacks what
// is called here.
int load(const std::string& path);

// What ranks need to find one another, made by one of them: it listens until all have joined.
std::string unique_id();

// Bytes of device memory.
struct Span {
    std::uintptr_t address;
    std::uint64_t nbytes;
};

// Joins without blocking (ncclConfig_t.blocking = 0), which CuPy's wrapper cannot. The caller's current CUDA
// device is the rank's. Every method throws std::runtime_error with NCCL's words where it failed, and once it
// was aborted.
class Communicator {
  public:
    // Begins to join; `ready` tells when that is done.
    Communicator(const std::string& id, int rank, int size);
    ~Communicator() { abort(); }
    Communicator(const Communicator&) = delete;
    Communicator& operator=(const Communicator&) = delete;

    // Whether what was begun last is done: the communicator joined, or the spans handed to the stream.
    bool ready();

    // Has `stream` bring each span of `root` to all ranks, which name as many bytes, in one group. Where
    // `ready` is false afterwards, more than a launch is to be waited for.
    void broadcast(const std::vector<Span>& spans, int root, std::uintptr_t stream);

    // Ends it, whatever the other ranks do. Kernels of its own that wait for them end too. May be called
    // twice.
    void abort();

  private:
    void* communicator_ = nullptr;
};

}  // namespace tandem::nccl
