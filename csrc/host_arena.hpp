// Host memory that holds an engine's weights and that another process may map through its descriptor.
#pragma once

#include <cstddef>
#include <string>

namespace tandem {

// A sealed memfd, mapped shared and writable. Unmapped and closed when destroyed.
//
// Every factory throws std::invalid_argument for arguments or descriptors that cannot be an arena, and
// std::system_error with errno where a system call fails.
class HostArena {
  public:
    // New zeroed memory of `size` bytes. It is sealed against any change of size: a peer that could truncate
    // it would kill this process with SIGBUS. `name` shows in /proc only.
    static HostArena create(const std::string& name, std::size_t size);

    // Maps the arena behind `fd`, which the caller keeps and may close. Refuses a descriptor whose memory
    // somebody could still shrink, or whose size is not `size`.
    static HostArena open(int fd, std::size_t size);

    HostArena(HostArena&& other) noexcept;
    HostArena& operator=(HostArena&& other) = delete;
    HostArena(const HostArena&) = delete;
    HostArena& operator=(const HostArena&) = delete;
    ~HostArena();

    // Open as long as the arena lives; close-on-exec.
    int fd() const { return fd_; }
    std::size_t size() const { return size_; }
    void* address() const { return address_; }

    // Gives the memory back to the system, in all processes that have it mapped: it is zero then, and comes
    // again where it is touched. Takes tenths of a second for each GiB. Throws std::system_error.
    void forget() const;

  private:
    // Takes ownership of fd, also when it throws.
    HostArena(int fd, std::size_t size);

    int fd_;
    std::size_t size_;
    void* address_;
};

}  // namespace tandem
