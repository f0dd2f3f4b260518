// Digest sums of many regions at once. Each block takes CHUNK bytes of one region.

// Rows of bytes, as csrc/digest.hpp has them.
struct Region {
    u64 address;
    u64 nbytes;  // of a row
    u64 rows;
    u64 stride;  // bytes from one row to the next
    u64 first_word;
    u64 word_stride;
    u64 owner;  // whose sum it is
    u64 first_block;
};

// How many loads a thread has under way before it uses the first.
constexpr int BATCH = 8;

// The word of `count` bytes at `data`, wherever that is.
__device__ __forceinline__ u64 word_at(const unsigned char* data, int count) {
    u64 word = 0;
    for (int b = count - 1; b >= 0; --b) word = word << 8 | data[b];
    return word;
}

// Pairs of words, of which the first of all has the number `first`.
__device__ __forceinline__ u64 sum_of(const ulonglong2* pairs, unsigned count, u64 first) {
    unsigned at = threadIdx.x;
    u64 key = (first + 2 * at + 1) * KEY_STEP, sum = 0;
    for (; at + (BATCH - 1) * THREADS < count; at += BATCH * THREADS) {
        ulonglong2 two[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) two[i] = pairs[at + i * THREADS];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            sum += scramble(two[i].x ^ key) + scramble(two[i].y ^ (key + KEY_STEP));
            key += 2 * THREADS * KEY_STEP;
        }
    }
    for (; at < count; at += THREADS) {
        const ulonglong2 two = pairs[at];
        sum += scramble(two.x ^ key) + scramble(two.y ^ (key + KEY_STEP));
        key += 2 * THREADS * KEY_STEP;
    }
    return sum;
}

// `size` bytes that follow one another, of which the first word has the number `first`.
__device__ __forceinline__ u64 sum_of_row(const unsigned char* data, u64 size, u64 first) {
    const u64 words = size / 8;
    u64 sum = 0;
    if ((reinterpret_cast<u64>(data) & 15) == 0) {
        sum = sum_of(reinterpret_cast<const ulonglong2*>(data), words / 2, first);
        if (words % 2 && threadIdx.x == 0) sum += mix(word_at(data + 8 * (words - 1), 8), first + words - 1);
    } else {
        for (u64 i = threadIdx.x; i < words; i += THREADS) sum += mix(word_at(data + 8 * i, 8), first + i);
    }
    if (size % 8 && threadIdx.x == 0) sum += mix(word_at(data + 8 * words, size % 8), first + words);
    return sum;
}

// Bytes `begin` to `begin + size` of several rows, counted through all of them: whole words.
__device__ __forceinline__ u64 sum_of_rows(const Region& region, u64 begin, u64 size) {
    const unsigned char* data = reinterpret_cast<const unsigned char*>(region.address);
    u64 sum = 0;
    if (((region.address | region.stride | region.nbytes) & 15) == 0) {
        const unsigned row = region.nbytes / 16, end = (begin + size) / 16;
        for (unsigned at = begin / 16 + threadIdx.x; at < end; at += THREADS) {
            const unsigned y = at / row, x = at - y * row;
            const ulonglong2 two = *reinterpret_cast<const ulonglong2*>(data + y * region.stride + x * 16ULL);
            const u64 word = region.first_word + y * region.word_stride + x * 2ULL;
            sum += mix(two.x, word) + mix(two.y, word + 1);
        }
    } else {
        const unsigned row = region.nbytes / 8, end = (begin + size) / 8;
        for (unsigned at = begin / 8 + threadIdx.x; at < end; at += THREADS) {
            const unsigned y = at / row, x = at - y * row;
            sum += mix(word_at(data + y * region.stride + x * 8ULL, 8), region.first_word + y * region.word_stride + x);
        }
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) digest(const Region* regions, const int* region_of, u64* sums) {
    const Region region = regions[region_of[blockIdx.x]];
    const u64 begin = (blockIdx.x - region.first_block) * CHUNK, all = region.nbytes * region.rows;
    const u64 size = all - begin < CHUNK ? all - begin : CHUNK;
    u64 sum = 0;
    if (region.rows == 1) {
        const unsigned char* data = reinterpret_cast<const unsigned char*>(region.address) + begin;
        sum = sum_of_row(data, size, region.first_word + begin / 8);
    } else {
        sum = sum_of_rows(region, begin, size);
    }
    add_up(sum, sums + region.owner);
}
