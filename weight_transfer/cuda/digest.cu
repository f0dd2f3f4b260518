// Digest sums of many regions at once. Each block takes CHUNK bytes of one region.

extern "C" __global__ void digest(const u64* address, const u64* nbytes, const u64* first_block, int regions,
                                  u64* sums) {
    const int region = owner(first_block, regions, blockIdx.x);
    const u64 begin = (blockIdx.x - first_block[region]) * CHUNK;
    const u64 size = nbytes[region] - begin < CHUNK ? nbytes[region] - begin : CHUNK;
    const unsigned char* data = reinterpret_cast<const unsigned char*>(address[region]) + begin;
    const u64 words = size / 8, first = begin / 8;
    u64 sum = 0;
    if ((reinterpret_cast<u64>(data) & 15) == 0) {
        const ulonglong2* pairs = reinterpret_cast<const ulonglong2*>(data);
#pragma unroll 4
        for (u64 i = threadIdx.x; i < words / 2; i += blockDim.x) {
            const ulonglong2 two = pairs[i];
            sum += mix(two.x, first + 2 * i) + mix(two.y, first + 2 * i + 1);
        }
        if (words % 2 && threadIdx.x == 0) {
            sum += mix(reinterpret_cast<const u64*>(data)[words - 1], first + words - 1);
        }
    } else {
        for (u64 i = threadIdx.x; i < words; i += blockDim.x) {
            u64 word = 0;
            for (int b = 7; b >= 0; --b) word = word << 8 | data[8 * i + b];
            sum += mix(word, first + i);
        }
    }
    if (size % 8 && threadIdx.x == 0) {
        u64 word = 0;
        for (int b = size % 8 - 1; b >= 0; --b) word = word << 8 | data[8 * words + b];
        sum += mix(word, first + words);
    }
    add_up(sum, sums + region);
}
