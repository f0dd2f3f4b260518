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
