// The order-aware 64-bit digest of tensors, the same function on every device.
//
// A tensor's bytes, in row-major order, are little-endian 64-bit words w[0..n), the last one padded with
// zeros.
//
//     key(i)   = (i + 1) * 0x9e3779b97f4a7c15
//     mix(w,i) = scramble(w ^ key(i))        scramble: x ^= x >> 27; x *= 0x3c79ac492ba7b653;
//                                                      x ^= x >> 33; x *= 0x1c69b3f74ac4ae35; x ^= x >> 27
//     sum      = mix(w[0], 0) + mix(w[1], 1) + ...          modulo 2^64
//     digest   = mix(sum ^ nbytes, 0)
//
// Each step of scramble is a bijection, so a change of any one word always changes the digest. Two
// multiplies, not one: with one, two flipped sign bits cancel in the sum far more often than chance. The sum
// is over words, so ranks, threads or GPU blocks may each take some range of words and add up. It guards
// against faults, not against an adversary.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace tandem {

struct Region {
    std::uintptr_t address;
    std::uint64_t nbytes;
};

// Rows of one part of a tensor: bytes that follow one another in the tensor too. `nbytes` is a row's,
// `stride` the bytes from one row to the next where they lie, and the words of row r are first_word + r *
// word_stride and the next ones.
struct Rows {
    std::uintptr_t address;
    std::uint64_t nbytes;
    std::uint64_t rows;
    std::uint64_t stride;
    std::uint64_t first_word;
    std::uint64_t word_stride;
};

// The sum's part over one contiguous range that starts at word `first_word` of its tensor; add the parts
// modulo 2^64. Unless it is the tensor's end, nbytes must be a multiple of 8. `threads` as in thread_count.
// Throws std::invalid_argument when the region is null or wraps around the address space.
std::uint64_t digest_partial(Region region, std::uint64_t first_word, std::int64_t threads);

// The sum's part over each of these, as digest_partial has it of one row.
std::vector<std::uint64_t> digest_rows(std::span<const Rows> parts, std::int64_t threads);

// The digest of a tensor of `nbytes` bytes whose parts add up to `sum`.
std::uint64_t digest_finish(std::uint64_t sum, std::uint64_t nbytes);

// The digest of each region, in order.
std::vector<std::uint64_t> digest_regions(std::span<const Region> regions, std::int64_t threads);

// The digest of an ordered list of digests: that of a tensor which holds them as words.
std::uint64_t digest_combine(std::span<const std::uint64_t> digests);

}  // namespace tandem
