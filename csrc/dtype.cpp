#include "dtype.hpp"

#include <array>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

struct Entry {
    std::string_view name;
    std::size_t size;
};

// Indexed by DType.
constexpr std::array<Entry, 18> kEntries{{
    {"float32", 4},
    {"float16", 2},
    {"bfloat16", 2},
    {"float64", 8},
    {"int8", 1},
    {"uint8", 1},
    {"int16", 2},
    {"uint16", 2},
    {"int32", 4},
    {"uint32", 4},
    {"int64", 8},
    {"uint64", 8},
    {"bool", 1},
    {"float8_e4m3fn", 1},
    {"float8_e4m3fnuz", 1},
    {"float8_e5m2", 1},
    {"float8_e5m2fnuz", 1},
    {"float8_e8m0fnu", 1},
}};
static_assert(kEntries.size() == static_cast<std::size_t>(DType::float8_e8m0fnu) + 1);

}  // namespace

DType parse_dtype(std::string_view name) {
    for (std::size_t i = 0; i < kEntries.size(); ++i) {
        if (kEntries[i].name == name) return static_cast<DType>(i);
    }
    throw std::invalid_argument("unknown dtype '" + std::string(name) + "'");
}

std::string_view dtype_name(DType dtype) {
    return kEntries[static_cast<std::size_t>(dtype)].name;
}

std::size_t dtype_size(DType dtype) {
    return kEntries[static_cast<std::size_t>(dtype)].size;
}

}  // namespace tandem
