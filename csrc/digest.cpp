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

void check(Region region, std::size_t index) {
    if (region.nbytes == 0) return;
    if (region.address == 0)
        throw std::invalid_argument("region " + std::to_string(index) + ": null address");
    if (region.nbytes > std::numeric_limits<std::uintptr_t>::max() - region.address) {
        throw std::invalid_argument("region " + std::to_string(index) + ": address + nbytes overflows");
    }
}

// The sums over each region, words counted from first_word.
std::vector<std::uint64_t> sums(std::span<const Region> regions, std::uint64_t first_word,
                                std::int64_t threads) {
    struct Chunk {
        std::size_t region;
        std::uint64_t offset;
        std::uint64_t sum;
    };
    std::uint64_t total = 0;
    for (std::size_t i = 0; i < regions.size(); ++i) {
        check(regions[i], i);
        total += std::min(regions[i].nbytes, std::numeric_limits<std::uint64_t>::max() - total);
    }
    const std::size_t workers = thread_count(threads, total);
    std::vector<Chunk> chunks;
    for (std::size_t i = 0; i < regions.size(); ++i) {
        for (std::uint64_t at = 0; at < regions[i].nbytes; at += kChunkBytes) chunks.push_back({i, at, 0});
    }
    parallel_for(chunks.size(), workers, [&](std::size_t i) {
        Chunk& chunk = chunks[i];
        const Region& region = regions[chunk.region];
        const auto* data = reinterpret_cast<const std::byte*>(region.address) + chunk.offset;
        const std::uint64_t nbytes = std::min(kChunkBytes, region.nbytes - chunk.offset);
        chunk.sum = sum_bytes(data, nbytes, first_word + chunk.offset / kWord);
    });
    std::vector<std::uint64_t> result(regions.size(), 0);
    for (const Chunk& chunk : chunks) result[chunk.region] += chunk.sum;
    return result;
}

}  // namespace

std::uint64_t digest_partial(Region region, std::uint64_t first_word, std::int64_t threads) {
    return sums({&region, 1}, first_word, threads)[0];
}

std::uint64_t digest_finish(std::uint64_t sum, std::uint64_t nbytes) {
    return scramble((sum ^ nbytes) ^ kKeyStep);
}

std::vector<std::uint64_t> digest_regions(std::span<const Region> regions, std::int64_t threads) {
    std::vector<std::uint64_t> digests = sums(regions, 0, threads);
    for (std::size_t i = 0; i < regions.size(); ++i)
        digests[i] = digest_finish(digests[i], regions[i].nbytes);
    return digests;
}

std::uint64_t digest_combine(std::span<const std::uint64_t> digests) {
    const std::span<const std::byte> bytes = std::as_bytes(digests);
    return digest_finish(sum_bytes(bytes.data(), bytes.size(), 0), bytes.size());
}

}  // namespace tandem
