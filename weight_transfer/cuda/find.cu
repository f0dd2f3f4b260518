// What changed in a window since its base, which becomes what is there now, and the digest sums of that: one pass.
// weight_transfer/tiles.py has the message.

// Which of the eight units differ.
__device__ __forceinline__ unsigned differing(const uint4& a, const uint4& b) {
    const unsigned x[4] = {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w};
    unsigned mask = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        mask |= (x[i] & 0xffffu ? 1u : 0u) << 2 * i;
        mask |= (x[i] >> 16 ? 2u : 0u) << 2 * i;
    }
    return mask;
}

__device__ __forceinline__ unsigned unit_of(const uint4& v, int j) {
    const unsigned both = j < 2 ? v.x : j < 4 ? v.y : j < 6 ? v.z : v.w;
    return j % 2 ? both >> 16 : both & 0xffffu;
}

// Has the base's vector `at` be what is there now.
__device__ __forceinline__ void renew(unsigned char* base, unsigned at, const uint4& is, unsigned mask, bool whole) {
    if (whole) {
        reinterpret_cast<uint4*>(base)[at] = is;
        return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (mask >> j & 1) reinterpret_cast<unsigned short*>(base)[8 * at + j] = unit_of(is, j);
    }
}

constexpr int HALF = VECTORS / 2;

extern "C" __global__ void __launch_bounds__(THREADS, 3)
    find(const Piece* pieces, const int* piece_of, const u64* room, u64* sums, unsigned* message) {
    __shared__ unsigned found, start;
    const Piece piece = pieces[piece_of[blockIdx.x]];
    const Range range(piece);
    const unsigned char* now = reinterpret_cast<const unsigned char*>(piece.now) + range.begin;
    unsigned char* base = reinterpret_cast<unsigned char*>(piece.base) + range.begin;
    uint4 is[VECTORS];
    load<VECTORS>(is, now, range.size);
    if (threadIdx.x == 0) found = 0;

    u64 changed = 0;  // eight bits of each vector
    const bool whole = is_whole(base, range.size);
    // In two halves: the registers of both at once would leave fewer blocks, and fewer loads under way.
#pragma unroll
    for (int half = 0; half < VECTORS; half += HALF) {
        uint4 was[HALF];
        load<HALF>(was, base, range.size, half);
#pragma unroll
        for (int i = half; i < half + HALF; ++i) {
            changed |= static_cast<u64>(differing(is[i], was[i - half])) << 8 * i;
        }
    }
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) {  // behind all loads, which the compiler moves across no store
        const unsigned mask = changed >> 8 * i & 0xff;
        if (mask != 0) renew(base, threadIdx.x + i * THREADS, is[i], mask, whole);
    }

    // Where in the tile's entries this thread's begin: a sum over the warp, and one atomic for it.
    const unsigned lane = threadIdx.x & 31, mine = __popcll(changed);
    unsigned upto = mine;
    for (int step = 1; step < 32; step <<= 1) {
        const unsigned other = __shfl_up_sync(0xffffffffu, upto, step);
        if (lane >= step) upto += other;
    }
    __syncthreads();
    unsigned of_warp = 0;
    if (lane == 31 && upto != 0) of_warp = atomicAdd(&found, upto);
    of_warp = __shfl_sync(0xffffffffu, of_warp, 31);
    __syncthreads();
    if (threadIdx.x == 0) {
        start = found != 0 ? atomicAdd(message, found) : 0;
        message[HEADER + 2 * blockIdx.x] = start;
        message[HEADER + 2 * blockIdx.x + 1] = found;
    }
    __syncthreads();
    if (static_cast<u64>(start) + found <= *room) {
        unsigned* out = message + HEADER + 2 * gridDim.x + start + of_warp + (upto - mine);
#pragma unroll
        for (int i = 0; i < VECTORS; ++i) {
            const unsigned mask = changed >> 8 * i & 0xff;
            if (mask == 0) continue;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const unsigned unit = 8 * (threadIdx.x + i * THREADS) + j;
                if (mask >> j & 1) *out++ = unit << 16 | unit_of(is[i], j);
            }
        }
    }
    add_up(sum_of(is, piece.first_word + range.begin / 8, range.size), sums + piece.tensor);
}
