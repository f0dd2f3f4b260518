// One portable kernel, compiled for several instruction sets, chosen when the program runs.
//
// A kernel is a struct with a static, always-inlined `run`. The compiler vectorises each instantiation
// for its target, so no kernel needs intrinsics and all variants give the same bits.
#pragma once

#include <string_view>

namespace tandem {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best that this CPU has, unless limited.
Isa active_isa();

// Uses at most `name` ("baseline", "avx2", "avx512", or "auto" for no limit) from now on and returns the
// one now in use. For tests and measurements. Throws std::invalid_argument for another name.
std::string_view limit_isa(std::string_view name);

#define TANDEM_INLINE [[gnu::always_inline]] inline

#if defined(__x86_64__)
#define TANDEM_TARGET_AVX2 [[gnu::target("avx2,bmi2,fma")]]
#if defined(__clang__)
#define TANDEM_TARGET_AVX512 [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,bmi2,fma")]]
#else
// GCC otherwise stays at 256 bits.
#define TANDEM_TARGET_AVX512 \
    [[gnu::target("avx512f,avx512bw,avx512dq,avx512vl,bmi2,fma,prefer-vector-width=512")]]
#endif
#else
#define TANDEM_TARGET_AVX2
#define TANDEM_TARGET_AVX512
#endif

template <class Kernel, class Result, class... Args>
Result run_baseline(Args... args) {
    return Kernel::run(args...);
}

template <class Kernel, class Result, class... Args>
TANDEM_TARGET_AVX2 Result run_avx2(Args... args) {
    return Kernel::run(args...);
}

template <class Kernel, class Result, class... Args>
TANDEM_TARGET_AVX512 Result run_avx512(Args... args) {
    return Kernel::run(args...);
}

// The variant of `Kernel::run(Args...) -> Result` for the active instruction set.
template <class Kernel, class Result, class... Args>
auto select_variant() -> Result (*)(Args...) {
    switch (active_isa()) {
        case Isa::avx512:
            return run_avx512<Kernel, Result, Args...>;
        case Isa::avx2:
            return run_avx2<Kernel, Result, Args...>;
        case Isa::baseline:
            break;
    }
    return run_baseline<Kernel, Result, Args...>;
}

}  // namespace tandem
