// Batched cast-and-scatter: strided N-d blocks copied between host tensors, with a change of dtype.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dtype.hpp"

namespace tandem {

// One block. Strides are in elements and as long as the shape; 0 repeats a source element.
struct ScatterJob {
    std::uintptr_t src;
    DType src_dtype;
    std::vector<std::int64_t> src_strides;
    std::uintptr_t dst;
    DType dst_dtype;
    std::vector<std::int64_t> dst_strides;
    std::vector<std::int64_t> shape;
};

// Runs all jobs and returns the bytes written. Floats cast among each other (see cast.hpp), any other dtype
// copies to itself only. Jobs run in no order, so that no job may write what another one reads or writes.
//
// Before anything is written every job is checked: std::invalid_argument, naming the job, for null or
// misaligned addresses, negative shapes or strides, sizes that overflow, dtypes that do not cast, or a
// destination that overlaps itself. `threads` as in thread_count.
std::uint64_t scatter(std::span<const ScatterJob> jobs, std::int64_t threads);

}  // namespace tandem
