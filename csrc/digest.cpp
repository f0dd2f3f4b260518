#include "digest.hpp"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>

#include "isa.hpp"
#include "parallel.hpp"

namespace tandem {
namespace {

static_assert(std::endian::native == std::endian::little, "words are read as they lie in memory");

constexpr std::uint64_t kWord = sizeof(std::uint64_t);
constexpr std::uint64_t kKeyStep = 0x9e3779b97f4a7c15U;
constexpr std::uint64_t kChunkBytes = 1U << 20;

TANDEM_INLINE std::uint64_t scramble(std::uint64_t x) {
    x ^= x >> 27;
    x *= 0x3c79ac492ba7b653U;
    x ^= x >> 33;
    x *= 0x1c69b3f74ac4ae35U;
    x ^= x >> 27;
    return x;
}

struct SumWords {
    TANDEM_INLINE static std::uint64_t run(const std::byte* data, std::uint64_t words, std::uint64_t first) {
        std::uint64_t sum = 0;
        std::uint64_t key = first * kKeyStep;
        for (std::uint64_t i = 0; i < words; ++i) {
            std::uint64_t word;
            std::memcpy(&word, data + i * kWord, kWord);
            key += kKeyStep;
            sum += scramble(word ^ key);
        }
        return sum;
    }
};

std::uint64_t sum_bytes(const std::byte* data, std::uint64_t nbytes, std::uint64_t first) {
    static_assert(kChunkBytes % kWord == 0);
    const auto kernel =
        select_variant<SumWords, std::uint64_t, const std::byte*, std::uint64_t, std::uint64_t>();
    const std::uint64_t words = nbytes / kWord;
    std::uint64_t sum = kernel(data, words, first);
    if (const std::uint64_t tail = nbytes % kWord; tail != 0) {
        std::uint64_t word = 0;
        std::memcpy(&word, data + words * kWord, tail);
        sum += scramble(word ^ ((first + words + 1) * kKeyStep));
    }
    return sum;
}

void check(const Rows& part, std::size_t index) {
    if (part.nbytes == 0 || part.rows == 0) return;
    const std::string name = "region " + std::to_string(index);
    if (part.address == 0) throw std::invalid_argument(name + ": null address");
    const std::uint64_t room = std::numeric_limits<std::uintptr_t>::max() - part.address;
    const std::uint64_t steps = part.rows - 1;
    if (part.nbytes > room || (steps != 0 && part.stride > (room - part.nbytes) / steps)) {
        throw std::invalid_argument(name + ": address + nbytes overflows");
    }
}

// The sum over each part.
std::vector<std::uint64_t> sums(std::span<const Rows> parts, std::int64_t threads) {
    struct Chunk {  // some rows, or some of a row's bytes
        std::size_t part;
        std::uint64_t row;
        std::uint64_t rows;
        std::uint64_t offset;
        std::uint64_t sum;
    };
    std::uint64_t total = 0;
    std::vector<Chunk> chunks;
    for (std::size_t i = 0; i < parts.size(); ++i) {
        const Rows& part = parts[i];
        check(part, i);
        if (part.nbytes == 0) continue;
        const std::uint64_t together = std::max<std::uint64_t>(kChunkBytes / part.nbytes, 1);
        for (std::uint64_t row = 0; row < part.rows; row += together) {
            const std::uint64_t rows = std::min(together, part.rows - row);
            for (std::uint64_t at = 0; at < part.nbytes; at += kChunkBytes)
                chunks.push_back({i, row, rows, at, 0});
            total += std::min(part.nbytes * rows, std::numeric_limits<std::uint64_t>::max() - total);
        }
    }
    parallel_for(chunks.size(), thread_count(threads, total), [&](std::size_t i) {
        Chunk& chunk = chunks[i];
        const Rows& part = parts[chunk.part];
        const std::uint64_t nbytes = std::min(kChunkBytes, part.nbytes - chunk.offset);
        for (std::uint64_t row = chunk.row; row < chunk.row + chunk.rows; ++row) {
            const auto* data =
                reinterpret_cast<const std::byte*>(part.address + row * part.stride) + chunk.offset;
            chunk.sum +=
                sum_bytes(data, nbytes, part.first_word + row * part.word_stride + chunk.offset / kWord);
        }
    });
    std::vector<std::uint64_t> result(parts.size(), 0);
    for (const Chunk& chunk : chunks) result[chunk.part] += chunk.sum;
    return result;
}

}  // namespace

std::uint64_t digest_partial(Region region, std::uint64_t first_word, std::int64_t threads) {
    const Rows part{region.address, region.nbytes, 1, 0, first_word, 0};
    return sums({&part, 1}, threads)[0];
}

std::vector<std::uint64_t> digest_rows(std::span<const Rows> parts, std::int64_t threads) {
    return sums(parts, threads);
}

std::uint64_t digest_finish(std::uint64_t sum, std::uint64_t nbytes) {
    return scramble((sum ^ nbytes) ^ kKeyStep);
}

std::vector<std::uint64_t> digest_regions(std::span<const Region> regions, std::int64_t threads) {
    std::vector<Rows> parts;
    parts.reserve(regions.size());
    for (const Region& region : regions) parts.push_back({region.address, region.nbytes, 1, 0, 0, 0});
    std::vector<std::uint64_t> digests = sums(parts, threads);
    for (std::size_t i = 0; i < regions.size(); ++i)
        digests[i] = digest_finish(digests[i], regions[i].nbytes);
    return digests;
}

std::uint64_t digest_combine(std::span<const std::uint64_t> digests) {
    const std::span<const std::byte> bytes = std::as_bytes(digests);
    return digest_finish(sum_bytes(bytes.data(), bytes.size(), 0), bytes.size());
}

}  // namespace tandem
