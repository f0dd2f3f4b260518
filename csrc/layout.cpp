#include "layout.hpp"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace tandem {
namespace {

// Elements of a patch whose rows run along memory on both sides.
constexpr std::int64_t kRunElements = 1 << 16;
[[noreturn]] void refuse(const std::string& why) {
    throw std::invalid_argument(why);
}

std::int64_t multiply(std::int64_t a, std::int64_t b, const char* what) {
    std::int64_t product = 0;
    if (__builtin_mul_overflow(a, b, &product)) refuse(std::string(what) + " overflows");
    return product;
}

// Checks that the block that starts at `address` lies within the address space.
void check_span(std::uintptr_t address, const std::vector<std::int64_t>& strides,
                const std::vector<std::int64_t>& shape, DType dtype, const char* side) {
    const auto size = static_cast<std::int64_t>(dtype_size(dtype));
    const std::string overflow = std::string(side) + " extent";
    std::int64_t last = 0;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        if (strides[i] < 0) refuse(std::string(side) + " stride " + std::to_string(i) + " is negative");
        const std::int64_t reach = multiply(shape[i] - 1, strides[i], overflow.c_str());
        if (__builtin_add_overflow(last, reach, &last)) refuse(overflow + " overflows");
    }
    if (__builtin_add_overflow(last, std::int64_t{1}, &last)) refuse(overflow + " overflows");
    const std::int64_t nbytes = multiply(last, size, overflow.c_str());
    if (address == 0) refuse(std::string(side) + " address is null");
    if (address % static_cast<std::uintptr_t>(size) != 0) {
        refuse(std::string(side) + " address is not aligned to " + std::string(dtype_name(dtype)));
    }
    if (static_cast<std::uintptr_t>(nbytes) > std::numeric_limits<std::uintptr_t>::max() - address) {
        refuse(overflow + " overflows");
    }
}

void check_job(const ScatterJob& job) {
    if (job.src_strides.size() != job.shape.size() || job.dst_strides.size() != job.shape.size()) {
        refuse("strides and shape differ in length");
    }
    if (job.src_dtype != job.dst_dtype && !(is_castable(job.src_dtype) && is_castable(job.dst_dtype))) {
        refuse("cannot cast " + std::string(dtype_name(job.src_dtype)) + " to " +
               std::string(dtype_name(job.dst_dtype)));
    }
    for (std::size_t i = 0; i < job.shape.size(); ++i) {
        if (job.shape[i] < 0) refuse("shape[" + std::to_string(i) + "] is negative");
    }
}

// Largest steps first; a destination that would write one element twice is refused.
void order(std::vector<Dim>& dims) {
    std::stable_sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) {
        return a.dst != b.dst ? a.dst > b.dst : a.src > b.src;
    });
    std::int64_t reach = 0;  // last element, counted from the first, of the dimensions inside this one
    for (auto dim = dims.rbegin(); dim != dims.rend(); ++dim) {
        if (dim->dst <= reach) refuse("destination may overlap itself");
        reach += (dim->length - 1) * dim->dst;  // cannot overflow: check_span added up the same
    }
}

// Joins neighbours that one longer dimension covers on both sides.
std::vector<Dim> collapse(const std::vector<Dim>& dims) {
    std::vector<Dim> joined;
    for (const Dim& dim : dims) {
        if (!joined.empty()) {
            Dim& last = joined.back();
            std::int64_t src = 0;
            std::int64_t dst = 0;
            if (!__builtin_mul_overflow(dim.src, dim.length, &src) && src == last.src &&
                !__builtin_mul_overflow(dim.dst, dim.length, &dst) && dst == last.dst) {
                last = {last.length * dim.length, dim.src, dim.dst};
                continue;
            }
        }
        joined.push_back(dim);
    }
    return joined;
}

std::int64_t tiles(const Dim& dim, std::int64_t tile) {
    return (dim.length - 1) / tile + 1;
}

}  // namespace

Grid::Grid(const ScatterJob& job)
    : src_(reinterpret_cast<const std::byte*>(job.src)),
      dst_(reinterpret_cast<std::byte*>(job.dst)),
      src_size_(static_cast<std::int64_t>(dtype_size(job.src_dtype))),
      dst_size_(static_cast<std::int64_t>(dtype_size(job.dst_dtype))) {
    check_job(job);
    if (std::ranges::find(job.shape, 0) != job.shape.end()) return;
    std::int64_t elements = 1;
    for (const std::int64_t length : job.shape) elements = multiply(elements, length, "element count");
    multiply(elements, src_size_ + dst_size_, "byte count");
    check_span(job.src, job.src_strides, job.shape, job.src_dtype, "source");
    check_span(job.dst, job.dst_strides, job.shape, job.dst_dtype, "destination");

    std::vector<Dim> dims;
    for (std::size_t i = 0; i < job.shape.size(); ++i) {
        if (job.shape[i] != 1) dims.push_back({job.shape[i], job.src_strides[i], job.dst_strides[i]});
    }
    order(dims);
    outer_ = collapse(dims);
    if (!outer_.empty()) {
        cols_ = outer_.back();
        outer_.pop_back();
    }
    bool transposed = false;
    if (!outer_.empty()) {
        // The rows go along the dimension in which the source is denser than in the columns, if there is one.
        auto rows = outer_.end() - 1;
        for (auto dim = outer_.begin(); dim != outer_.end(); ++dim) {
            if (dim->src != 0 && dim->src < (transposed ? rows->src : cols_.src)) {
                rows = dim;
                transposed = true;
            }
        }
        rows_ = *rows;
        outer_.erase(rows);
    }
    col_tile_ = std::min(cols_.length, transposed ? kTransposeTile : kRunElements);
    row_tile_ = std::min(rows_.length,
                         transposed ? kTransposeTile : std::max<std::int64_t>(1, kRunElements / col_tile_));
    elements_ = static_cast<std::uint64_t>(elements);
    cells_ = static_cast<std::uint64_t>(tiles(rows_, row_tile_) * tiles(cols_, col_tile_));
    for (const Dim& dim : outer_) cells_ *= static_cast<std::uint64_t>(dim.length);
}

std::uint64_t Grid::cell_elements() const {
    return static_cast<std::uint64_t>(row_tile_ * col_tile_);
}

Patch Grid::cell(std::uint64_t index) const {
    auto rest = static_cast<std::int64_t>(index);
    const auto take = [&rest](std::int64_t count) {
        const std::int64_t digit = rest % count;
        rest /= count;
        return digit;
    };
    const std::int64_t col = take(tiles(cols_, col_tile_)) * col_tile_;
    const std::int64_t row = take(tiles(rows_, row_tile_)) * row_tile_;
    std::int64_t src = col * cols_.src + row * rows_.src;
    std::int64_t dst = col * cols_.dst + row * rows_.dst;
    for (auto dim = outer_.rbegin(); dim != outer_.rend(); ++dim) {
        const std::int64_t at = take(dim->length);
        src += at * dim->src;
        dst += at * dim->dst;
    }
    return {src_ + src * src_size_,
            dst_ + dst * dst_size_,
            std::min(row_tile_, rows_.length - row),
            std::min(col_tile_, cols_.length - col),
            rows_.src,
            cols_.src,
            rows_.dst,
            cols_.dst};
}

}  // namespace tandem
