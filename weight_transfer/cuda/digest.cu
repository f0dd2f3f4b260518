// Digest sums of many regions at once. Each block takes CHUNK bytes of one region.

struct Region {
    u64 address;
    u64 nbytes;
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

extern "C" __global__ void __launch_bounds__(THREADS, 4) digest(const Region* regions, const int* region_of, u64* sums) {
    const int index = region_of[blockIdx.x];
    const Region region = regions[index];
    const u64 begin = (blockIdx.x - region.first_block) * CHUNK;
    const u64 size = region.nbytes - begin < CHUNK ? region.nbytes - begin : CHUNK;
    const unsigned char* data = reinterpret_cast<const unsigned char*>(region.address) + begin;
    const u64 words = size / 8, first = begin / 8;
    u64 sum = 0;
    if ((reinterpret_cast<u64>(data) & 15) == 0) {
        sum = sum_of(reinterpret_cast<const ulonglong2*>(data), words / 2, first);
        if (words % 2 && threadIdx.x == 0) sum += mix(word_at(data + 8 * (words - 1), 8), first + words - 1);
    } else {
        for (u64 i = threadIdx.x; i < words; i += THREADS) sum += mix(word_at(data + 8 * i, 8), first + i);
    }
    if (size % 8 && threadIdx.x == 0) sum += mix(word_at(data + 8 * words, size % 8), first + words);
    add_up(sum, sums + index);
}
