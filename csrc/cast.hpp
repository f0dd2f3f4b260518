// Conversions between float formats on their bits: round to nearest even, branch-free so that they vectorise.
//
// NaN stays NaN: float16, float32 and float64 keep sign and the payload's top bits and become quiet, as the
// hardware does; bfloat16 becomes the one pattern 0x7fc0 (torch itself gives 0x7fc0 or 0xffff by code path).
#pragma once

#include <bit>
#include <cstdint>

#include "dtype.hpp"
#include "isa.hpp"

namespace tandem {

TANDEM_INLINE float bfloat16_to_float(std::uint16_t bits) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

TANDEM_INLINE std::uint16_t float_to_bfloat16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
    return static_cast<std::uint16_t>(nan ? 0x7fc0U : rounded);
}

TANDEM_INLINE float float16_to_float(std::uint16_t half) {
    const std::uint32_t magnitude = (half & 0x7fffU) << 13;
    const std::uint32_t exponent = magnitude & 0x0f800000U;
    const std::uint32_t normal = magnitude + 0x38000000U;  // exponent bias 15 -> 127
    const std::uint32_t quiet = (magnitude & 0x007fffffU) != 0 ? 0x00400000U : 0U;
    const std::uint32_t special = (magnitude + 0x70000000U) | quiet;
    // A subnormal is mantissa * 2^-24: place it under exponent 2^-14 and take 2^-14 away.
    const float small = std::bit_cast<float>(magnitude + 0x38800000U) - std::bit_cast<float>(0x38800000U);
    std::uint32_t bits = exponent == 0x0f800000U ? special : normal;
    bits = exponent == 0 ? std::bit_cast<std::uint32_t>(small) : bits;
    return std::bit_cast<float>(bits | ((half & 0x8000U) << 16));
}

TANDEM_INLINE std::uint16_t float_to_float16(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = bits & 0x7fffffffU;
    const std::uint32_t normal = (magnitude + 0xc8000fffU + ((magnitude >> 13) & 1U)) >> 13;
    // Adding 0.5 leaves the sum's last bit worth 2^-24, float16's smallest step: the adder does the rounding.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
    const std::uint32_t small = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000U;
    const std::uint32_t nan = 0x7e00U | ((magnitude >> 13) & 0x3ffU);
    std::uint32_t half = magnitude < 0x38800000U ? small : normal;  // 2^-14, the smallest normal float16
    half = magnitude >= 0x47800000U ? 0x7c00U : half;               // 2^16 and above
    half = magnitude > 0x7f800000U ? nan : half;
    return static_cast<std::uint16_t>(half | ((bits >> 16) & 0x8000U));
}

template <DType>
struct Element;  // the C++ type an array of DType is read and written as

template <>
struct Element<DType::float32> {
    using type = float;
};
template <>
struct Element<DType::float64> {
    using type = double;
};
template <>
struct Element<DType::float16> {
    using type = std::uint16_t;
};
template <>
struct Element<DType::bfloat16> {
    using type = std::uint16_t;
};

// Everything but float32 <-> float64 goes through float32, as in torch: float64 -> 16 bits rounds twice.
template <DType From, DType To>
TANDEM_INLINE typename Element<To>::type convert(typename Element<From>::type value) {
    float single = 0;
    if constexpr (From == DType::float16) {
        single = float16_to_float(value);
    } else if constexpr (From == DType::bfloat16) {
        single = bfloat16_to_float(value);
    } else {
        single = static_cast<float>(value);
    }
    if constexpr (To == DType::float16) {
        return float_to_float16(single);
    } else if constexpr (To == DType::bfloat16) {
        return float_to_bfloat16(single);
    } else {
        return single;
    }
}

}  // namespace tandem
