#include "scatter.hpp"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "cast.hpp"
#include "isa.hpp"
#include "layout.hpp"
#include "parallel.hpp"

namespace tandem {
namespace {

// Memory traffic, read and written, that one thread takes at a time.
constexpr std::uint64_t kChunkBytes = 1U << 20;

template <DType From, DType To>
struct Cast {
    using In = typename Element<From>::type;
    using Out = typename Element<To>::type;
    static constexpr bool is_copy = false;
    TANDEM_INLINE static Out apply(In value) { return convert<From, To>(value); }
};

template <class Word>
struct Copy {
    using In = Word;
    using Out = Word;
    static constexpr bool is_copy = true;
    TANDEM_INLINE static Word apply(Word value) { return value; }
};

template <class Op>
struct PatchKernel {
    using In = typename Op::In;
    using Out = typename Op::Out;

    TANDEM_INLINE static void run(const Patch& patch) {
        if (patch.src_row == 1 && patch.dst_col == 1 && patch.rows <= kTransposeTile &&
            patch.cols <= kTransposeTile) {
            transpose(patch);
            return;
        }
        for (std::int64_t row = 0; row < patch.rows; ++row) {
            const In* __restrict src = reinterpret_cast<const In*>(patch.src) + row * patch.src_row;
            Out* __restrict dst = reinterpret_cast<Out*>(patch.dst) + row * patch.dst_row;
            if (patch.src_col != 1 || patch.dst_col != 1) {
                for (std::int64_t i = 0; i < patch.cols; ++i) {
                    dst[i * patch.dst_col] = Op::apply(src[i * patch.src_col]);
                }
            } else if constexpr (Op::is_copy) {
                std::memcpy(dst, src, static_cast<std::size_t>(patch.cols) * sizeof(Out));
            } else {
                for (std::int64_t i = 0; i < patch.cols; ++i) dst[i] = Op::apply(src[i]);
            }
        }
    }

    // Both sides are walked along memory, with a buffer between them: rows that lie a power of two apart
    // would otherwise fall into the same few lines of the cache.
    TANDEM_INLINE static void transpose(const Patch& patch) {
        constexpr std::int64_t kPitch = kTransposeTile + 64 / static_cast<std::int64_t>(sizeof(Out));
        alignas(64) Out buffer[kTransposeTile * kPitch];
        for (std::int64_t col = 0; col < patch.cols; ++col) {
            const In* __restrict src = reinterpret_cast<const In*>(patch.src) + col * patch.src_col;
            for (std::int64_t row = 0; row < patch.rows; ++row)
                buffer[col * kPitch + row] = Op::apply(src[row]);
        }
        for (std::int64_t row = 0; row < patch.rows; ++row) {
            Out* __restrict dst = reinterpret_cast<Out*>(patch.dst) + row * patch.dst_row;
            for (std::int64_t col = 0; col < patch.cols; ++col) dst[col] = buffer[col * kPitch + row];
        }
    }
};

using PatchFn = void (*)(const Patch&);

PatchFn select_copy(DType dtype) {
    switch (dtype_size(dtype)) {
        case 1:
            return select_variant<PatchKernel<Copy<std::uint8_t>>, void, const Patch&>();
        case 2:
            return select_variant<PatchKernel<Copy<std::uint16_t>>, void, const Patch&>();
        case 4:
            return select_variant<PatchKernel<Copy<std::uint32_t>>, void, const Patch&>();
        default:
            return select_variant<PatchKernel<Copy<std::uint64_t>>, void, const Patch&>();
    }
}

template <DType From>
PatchFn select_cast_from(DType to) {
    switch (to) {
        case DType::float32:
            return select_variant<PatchKernel<Cast<From, DType::float32>>, void, const Patch&>();
        case DType::float16:
            return select_variant<PatchKernel<Cast<From, DType::float16>>, void, const Patch&>();
        case DType::bfloat16:
            return select_variant<PatchKernel<Cast<From, DType::bfloat16>>, void, const Patch&>();
        default:
            return select_variant<PatchKernel<Cast<From, DType::float64>>, void, const Patch&>();
    }
}

PatchFn select_kernel(DType from, DType to) {
    if (from == to) return select_copy(from);
    switch (from) {
        case DType::float32:
            return select_cast_from<DType::float32>(to);
        case DType::float16:
            return select_cast_from<DType::float16>(to);
        case DType::bfloat16:
            return select_cast_from<DType::bfloat16>(to);
        default:
            return select_cast_from<DType::float64>(to);
    }
}

struct Work {
    Grid grid;
    PatchFn kernel;
};

// Some cells of one job.
struct Chunk {
    const Work* work;
    std::uint64_t begin;
    std::uint64_t end;
};

Grid make_grid(const ScatterJob& job, std::size_t index) {
    try {
        return Grid(job);
    } catch (const std::invalid_argument& error) {
        throw std::invalid_argument("job " + std::to_string(index) + ": " + error.what());
    }
}

}  // namespace

std::uint64_t scatter(std::span<const ScatterJob> jobs, std::int64_t threads) {
    std::vector<Work> works;
    works.reserve(jobs.size());
    std::uint64_t traffic = 0;
    std::uint64_t written = 0;
    for (std::size_t i = 0; i < jobs.size(); ++i) {
        works.push_back({make_grid(jobs[i], i), select_kernel(jobs[i].src_dtype, jobs[i].dst_dtype)});
        const std::uint64_t elements = works.back().grid.elements();
        written += elements * dtype_size(jobs[i].dst_dtype);
        traffic += elements * (dtype_size(jobs[i].src_dtype) + dtype_size(jobs[i].dst_dtype));
    }
    const std::size_t workers = thread_count(threads, traffic);
    std::vector<Chunk> chunks;
    for (std::size_t i = 0; i < works.size(); ++i) {
        const std::uint64_t bytes = dtype_size(jobs[i].src_dtype) + dtype_size(jobs[i].dst_dtype);
        const Grid& grid = works[i].grid;
        if (grid.cells() == 0) continue;
        const std::uint64_t step = std::max<std::uint64_t>(1, kChunkBytes / (grid.cell_elements() * bytes));
        for (std::uint64_t at = 0; at < grid.cells(); at += step) {
            chunks.push_back({&works[i], at, std::min(at + step, grid.cells())});
        }
    }
    parallel_for(chunks.size(), workers, [&](std::size_t i) {
        const Chunk& chunk = chunks[i];
        for (std::uint64_t at = chunk.begin; at < chunk.end; ++at)
            chunk.work->kernel(chunk.work->grid.cell(at));
    });
    return written;
}

}  // namespace tandem
