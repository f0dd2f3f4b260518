// Places what `find` found (WRITES), and digests the window as it then is (SUMS), whether it is written or not. The
// message comes from another process: no unit outside the tile is taken, and the digest tells.

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    patch(const Piece* pieces, const int* piece_of, const u64* room, u64* sums, const unsigned* message) {
    if (message[0] > *room) return;  // the window comes whole
    const Piece piece = pieces[piece_of[blockIdx.x]];
    const Range range(piece);
    unsigned char* live = reinterpret_cast<unsigned char*>(piece.now) + range.begin;
    const unsigned start = message[HEADER + 2 * blockIdx.x], told = message[HEADER + 2 * blockIdx.x + 1];
    const unsigned count = static_cast<u64>(start) + told <= *room ? told : 0;
    const unsigned* entries = message + HEADER + 2 * gridDim.x + start;
#if SUMS
    __shared__ uint4 tile[TILE_BYTES / 16];
    uint4 vectors[VECTORS];
    load<VECTORS>(vectors, live, range.size);
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) tile[threadIdx.x + i * THREADS] = vectors[i];
    __syncthreads();
#endif
    for (unsigned i = threadIdx.x; i < count; i += THREADS) {
        const unsigned entry = entries[i], unit = entry >> 16;
        if (2 * unit >= range.size) continue;
#if SUMS
        reinterpret_cast<unsigned short*>(tile)[unit] = entry;
#endif
#if WRITES
        reinterpret_cast<unsigned short*>(live)[unit] = entry;
#endif
    }
#if SUMS
    __syncthreads();
#pragma unroll
    for (int i = 0; i < VECTORS; ++i) vectors[i] = tile[threadIdx.x + i * THREADS];
    add_up(sum_of(vectors, piece.first_word + range.begin / 8, range.size), sums + piece.tensor);
#endif
}
