// Cast and scatter, and digest on the way what is written: many pieces at once, each of rows of SOURCE that become rows
// of TARGET. A thread writes 16 bytes at a time.

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// Written out, so that no header of CUDA's is needed where this is compiled. As torch casts: to nearest even.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(bf16 v) { return __uint_as_float(static_cast<unsigned>(v.bits) << 16); }
__device__ __forceinline__ float widen(f16 v) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
    return wide;
}
__device__ __forceinline__ void cast(float v, float& out) { out = v; }
__device__ __forceinline__ void cast(float v, bf16& out) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
__device__ __forceinline__ void cast(float v, f16& out) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v)); }
// One dtype on both sides: its bits, NaN's too.
__device__ __forceinline__ void pass(float v, float& out) { out = v; }
__device__ __forceinline__ void pass(bf16 v, bf16& out) { out = v; }
__device__ __forceinline__ void pass(f16 v, f16& out) { out = v; }
template <typename From, typename To>
__device__ __forceinline__ void pass(From v, To& out) {
    cast(widen(v), out);
}

struct Piece {
    u64 source;         // address of the first element
    u64 target;         // address of its place
    u64 numel;
    u64 row;            // elements of a row, numel if there is one row only
    u64 source_stride;  // elements from one row to the next
    u64 target_stride;
    u64 first_word;     // of the first element in its tensor, counted in the target's bytes
    u64 word_stride;
    u64 tensor;         // index of its tensor's digest sum
    u64 first_block;
};

constexpr int LANES = 16 / sizeof(TARGET);
struct alignas(sizeof(SOURCE) * LANES >= 16 ? 16 : 8) In {
    SOURCE lane[LANES];
};
struct alignas(16) Out {
    TARGET lane[LANES];
};

extern "C" __global__ void write(const Piece* pieces, int count, u64* sums) {
    int low = 0, high = count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (pieces[middle].first_block <= blockIdx.x)
            low = middle;
        else
            high = middle - 1;
    }
    const Piece piece = pieces[low];
    const SOURCE* source = reinterpret_cast<const SOURCE*>(piece.source);
    TARGET* target = reinterpret_cast<TARGET*>(piece.target);
    const u64 begin = (blockIdx.x - piece.first_block) * TILE;
    const u64 end = begin + TILE < piece.numel ? begin + TILE : piece.numel;
    const bool one_row = piece.row == piece.numel;
    u64 sum = 0;
#pragma unroll 4
    for (u64 at = begin + threadIdx.x * LANES; at < end; at += blockDim.x * LANES) {
        const u64 row = one_row ? 0 : at / piece.row;
        const u64 column = at - row * piece.row;
        const In in = *reinterpret_cast<const In*>(source + row * piece.source_stride + column);
        Out out;
#pragma unroll
        for (int i = 0; i < LANES; ++i) pass(in.lane[i], out.lane[i]);
        *reinterpret_cast<Out*>(target + row * piece.target_stride + column) = out;
        const u64 word = piece.first_word + row * piece.word_stride + column * sizeof(TARGET) / 8;
        const ulonglong2 words = *reinterpret_cast<const ulonglong2*>(&out);
        sum += mix(words.x, word) + mix(words.y, word + 1);
    }
    add_up(sum, sums + piece.tensor);
}
