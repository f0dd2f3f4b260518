// Work sharing over short-lived threads: no pool outlives a call, so fork and interpreter exit stay simple.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace tandem {

// Threads to use for `bytes` of memory traffic. `requested` 0 means one for each CPU this process may use,
// up to the number that saturates a socket's memory. Throws std::invalid_argument when it is negative.
std::size_t thread_count(std::int64_t requested, std::uint64_t bytes);

// Calls fn(0) .. fn(count - 1), each once, on up to `threads` threads including the caller's.
// fn must not throw.
template <class Fn>
void parallel_for(std::size_t count, std::size_t threads, const Fn& fn) {
    std::atomic<std::size_t> next{0};
    const auto drain = [&] {
        for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i);
    };
    std::vector<std::jthread> helpers;
    helpers.reserve(threads);
    try {
        while (helpers.size() + 1 < threads && helpers.size() + 1 < count) helpers.emplace_back(drain);
    } catch (const std::system_error&) {
        // No more threads to be had: those that started, and this one, do the work.
    }
    drain();
}

}  // namespace tandem
