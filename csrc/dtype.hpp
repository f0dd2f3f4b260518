// Element types, named as torch names them, and which of them cast to which.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tandem {

enum class DType : std::uint8_t {
    float32,
    float16,
    bfloat16,
    float64,
    int8,
    uint8,
    int16,
    uint16,
    int32,
    uint32,
    int64,
    uint64,
    boolean,
    float8_e4m3fn,
    float8_e4m3fnuz,
    float8_e5m2,
    float8_e5m2fnuz,
    float8_e8m0fnu,
};

// Throws std::invalid_argument for a name that is not in the list above ("bool" is DType::boolean).
DType parse_dtype(std::string_view name);

std::string_view dtype_name(DType dtype);

std::size_t dtype_size(DType dtype);

// True for the four floats that cast among each other; every other type only copies to itself.
constexpr bool is_castable(DType dtype) {
    return dtype <= DType::float64;
}

}  // namespace tandem
