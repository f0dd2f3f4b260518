#include "isa.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

constexpr std::array<std::string_view, 3> kNames{"baseline", "avx2", "avx512"};

Isa detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
    return Isa::baseline;
#endif
}

std::atomic<Isa>& active() {
    static std::atomic<Isa> isa{detect()};
    return isa;
}

}  // namespace

Isa active_isa() {
    return active().load(std::memory_order_relaxed);
}

std::string_view limit_isa(std::string_view name) {
    Isa isa = detect();
    if (name != "auto") {
        const auto found = std::find(kNames.begin(), kNames.end(), name);
        if (found == kNames.end()) {
            throw std::invalid_argument("unknown instruction set '" + std::string(name) + "'");
        }
        isa = std::min(isa, static_cast<Isa>(found - kNames.begin()));
    }
    active().store(isa, std::memory_order_relaxed);
    return kNames[static_cast<std::size_t>(isa)];
}

}  // namespace tandem
