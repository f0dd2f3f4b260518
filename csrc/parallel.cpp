#include "parallel.hpp"

#include <algorithm>
#include <stdexcept>

namespace tandem {
namespace {

constexpr std::size_t kMostByDefault = 32;
constexpr std::size_t kMost = 256;
// Below this a thread costs more to start than it saves.
constexpr std::uint64_t kBytesPerThread = 2U << 20;

}  // namespace

std::size_t thread_count(std::int64_t requested, std::uint64_t bytes) {
    if (requested < 0) throw std::invalid_argument("threads must not be negative");
    const std::size_t cpus = std::thread::hardware_concurrency();
    const std::size_t wanted =
        requested == 0 ? std::min(cpus, kMostByDefault) : static_cast<std::size_t>(requested);
    const std::uint64_t useful = bytes / kBytesPerThread + 1;
    return static_cast<std::size_t>(
        std::clamp<std::uint64_t>(wanted, 1, std::min<std::uint64_t>(kMost, useful)));
}

}  // namespace tandem
