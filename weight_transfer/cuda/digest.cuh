// The mix of csrc/digest.hpp, for a device.
#pragma once

typedef unsigned long long u64;

#define KEY_STEP 0x9e3779b97f4a7c15ULL

__device__ __forceinline__ u64 scramble(u64 x) {
    x ^= x >> 27;
    x *= 0x3c79ac492ba7b653ULL;
    x ^= x >> 33;
    x *= 0x1c69b3f74ac4ae35ULL;
    x ^= x >> 27;
    return x;
}

// The word `w` at position `i` of its tensor.
__device__ __forceinline__ u64 mix(u64 w, u64 i) { return scramble(w ^ ((i + 1) * KEY_STEP)); }

// Adds up a block's sums, and the block's to `total`. Every thread of the block must come here.
__device__ __forceinline__ void add_up(u64 sum, u64* total) {
    __shared__ u64 of_warp[32];
    for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
    if ((threadIdx.x & 31) == 0) of_warp[threadIdx.x >> 5] = sum;
    __syncthreads();
    if (threadIdx.x < 32) {
        sum = threadIdx.x < (blockDim.x >> 5) ? of_warp[threadIdx.x] : 0;
        for (int step = 16; step > 0; step >>= 1) sum += __shfl_down_sync(0xffffffffu, sum, step);
        if (threadIdx.x == 0) atomicAdd(total, sum);
    }
}

// The last entry of the ascending `first` that is not above `block`: whose work this block's is.
__device__ __forceinline__ int owner(const u64* first, int count, u64 block) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (first[middle] <= block)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}
