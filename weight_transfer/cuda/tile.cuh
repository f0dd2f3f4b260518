// A tile of one tensor's bytes, held by one block: each thread has VECTORS of 16 bytes, THREADS apart.
#pragma once

#ifdef TILE_BYTES
// Bytes of one tensor that lie together, and of what they are compared with.
struct Piece {
    u64 now;         // address of the first byte
    u64 base;        // address of the byte to compare it with
    u64 nbytes;      // even
    u64 first_word;  // of the first byte in its tensor
    u64 tensor;      // index of its tensor's digest sum
    u64 first_tile;
};

constexpr int VECTORS = TILE_BYTES / 16 / THREADS;
static_assert(VECTORS * THREADS * 16 == TILE_BYTES && VECTORS <= 8);

// A block's tile of its piece: where it begins, and how many bytes it has.
struct Range {
    u64 begin;
    unsigned size;
    __device__ __forceinline__ Range(const Piece& piece) {
        begin = (blockIdx.x - piece.first_tile) * static_cast<u64>(TILE_BYTES);
        size = piece.nbytes - begin < TILE_BYTES ? piece.nbytes - begin : TILE_BYTES;
    }
};

// Whether every vector is all there and may be loaded as such.
__device__ __forceinline__ bool is_whole(const unsigned char* data, unsigned size) {
    return size == TILE_BYTES && (reinterpret_cast<u64>(data) & 15) == 0;
}

// 16 bytes from byte `at` of `size` on, unit by unit; zeros behind the end.
__device__ __forceinline__ uint4 gathered(const unsigned char* data, unsigned at, unsigned size) {
    const unsigned short* units = reinterpret_cast<const unsigned short*>(data + at);
    unsigned part[4] = {0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (at + 2 * j < size) part[j / 2] |= static_cast<unsigned>(units[j]) << 16 * (j % 2);
    }
    uint4 vector;
    vector.x = part[0], vector.y = part[1], vector.z = part[2], vector.w = part[3];
    return vector;
}

// This thread's vectors `first` and following.
template <int count>
__device__ __forceinline__ void load(uint4* vectors, const unsigned char* data, unsigned size, int first = 0) {
    const unsigned at = threadIdx.x + first * THREADS;
    if (is_whole(data, size)) {
#pragma unroll
        for (int i = 0; i < count; ++i) vectors[i] = reinterpret_cast<const uint4*>(data)[at + i * THREADS];
    } else {
#pragma unroll
        for (int i = 0; i < count; ++i) vectors[i] = gathered(data, 16 * (at + i * THREADS), size);
    }
}

// The digest sum of this thread's vectors, of a tile whose first word is `first` of its tensor.
__device__ __forceinline__ u64 sum_of(const uint4* vectors, u64 first, unsigned size) {
    u64 key = (first + 2 * threadIdx.x + 1) * KEY_STEP, sum = 0;
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {
        const unsigned at = 16 * (threadIdx.x + i * THREADS);
        const uint4 v = vectors[i];
        if (at < size) sum += scramble((v.x | static_cast<u64>(v.y) << 32) ^ key);
        if (at + 8 < size) sum += scramble((v.z | static_cast<u64>(v.w) << 32) ^ (key + KEY_STEP));
        key += 2 * THREADS * KEY_STEP;
    }
    return sum;
}
#endif
