// Reduces a strided block copy to a grid of two-dimensional patches that suit the cache.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "scatter.hpp"

namespace tandem {

// Largest side of a patch for a transposition: both of its sides stay in the first-level cache.
constexpr std::int64_t kTransposeTile = 64;

// One dimension: its length and how far, in elements, a step goes on either side.
struct Dim {
    std::int64_t length;
    std::int64_t src;
    std::int64_t dst;
};

// rows x cols elements; strides in elements.
struct Patch {
    const std::byte* src;
    std::byte* dst;
    std::int64_t rows;
    std::int64_t cols;
    std::int64_t src_row;
    std::int64_t src_col;
    std::int64_t dst_row;
    std::int64_t dst_col;
};

// A checked job: `cells()` patches that together cover it once.
class Grid {
  public:
    // Throws std::invalid_argument where the job cannot be run (see scatter()).
    explicit Grid(const ScatterJob& job);

    std::uint64_t elements() const { return elements_; }
    std::uint64_t cells() const { return cells_; }
    // About how many elements a cell holds; at least one.
    std::uint64_t cell_elements() const;
    Patch cell(std::uint64_t index) const;

  private:
    const std::byte* src_;
    std::byte* dst_;
    std::int64_t src_size_;
    std::int64_t dst_size_;
    std::vector<Dim> outer_;  // everything that neither rows nor cols cover
    Dim rows_{1, 0, 0};
    Dim cols_{1, 1, 1};
    std::int64_t row_tile_ = 1;
    std::int64_t col_tile_ = 1;
    std::uint64_t elements_ = 0;
    std::uint64_t cells_ = 0;
};

}  // namespace tandem
