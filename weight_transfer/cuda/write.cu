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

// The row of a piece that its element `at` is in.
__device__ __forceinline__ u64 row_of(const Piece& piece, u64 at) {
    if (piece.row == piece.numel) return 0;
    // A division of 64 bits takes as long as all else here.
    if (piece.numel >> 32 == 0) return static_cast<unsigned>(at) / static_cast<unsigned>(piece.row);
    return at / piece.row;
}

struct Group {
    In in;
    u64 target;
    u64 word;
};

__device__ __forceinline__ Group load(const Piece& piece, u64 at) {
    const u64 row = row_of(piece, at), column = at - row * piece.row;
    const SOURCE* source = reinterpret_cast<const SOURCE*>(piece.source);
    Group group;
    group.in = *reinterpret_cast<const In*>(source + row * piece.source_stride + column);
    group.target = row * piece.target_stride + column;
    group.word = piece.first_word + row * piece.word_stride + column * sizeof(TARGET) / 8;
    return group;
}

__device__ __forceinline__ u64 store(const Piece& piece, const Group& group) {
    Out out;
#pragma unroll
    for (int i = 0; i < LANES; ++i) pass(group.in.lane[i], out.lane[i]);
    *reinterpret_cast<Out*>(reinterpret_cast<TARGET*>(piece.target) + group.target) = out;
    const ulonglong2 words = *reinterpret_cast<const ulonglong2*>(&out);
    return mix(words.x, group.word) + mix(words.y, group.word + 1);
}

// How many loads a thread has under way before its first store, which the compiler moves no load across.
constexpr int BATCH = 4;

extern "C" __global__ void __launch_bounds__(256) write(const Piece* pieces, const int* piece_of, u64* sums) {
    const Piece piece = pieces[piece_of[blockIdx.x]];
    const u64 begin = (blockIdx.x - piece.first_block) * TILE;
    const u64 end = begin + TILE < piece.numel ? begin + TILE : piece.numel;
    const u64 step = blockDim.x * LANES;
    u64 sum = 0, at = begin + threadIdx.x * LANES;
    for (; at + (BATCH - 1) * step < end; at += BATCH * step) {
        Group groups[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) groups[i] = load(piece, at + i * step);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum += store(piece, groups[i]);
    }
    for (; at < end; at += step) sum += store(piece, load(piece, at));
    add_up(sum, sums + piece.tensor);
}
