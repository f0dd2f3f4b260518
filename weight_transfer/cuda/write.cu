// Cast and scatter, and digest on the way what is written: many pieces at once, each of rows of SOURCE that become rows
// of TARGET. A thread reads or writes 16 bytes at a time, whichever is more.

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

// What a thread takes at a time: a unit, in registers of 4 bytes.
constexpr int LANES = 16 / (sizeof(SOURCE) > sizeof(TARGET) ? sizeof(SOURCE) : sizeof(TARGET));
constexpr int WORDS = LANES * sizeof(TARGET) / 8;
template <int bytes>
struct Registers;
template <>
struct Registers<16> {
    typedef uint4 Vector;
    static __device__ __forceinline__ unsigned get(const uint4& v, int i) {
        return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
    }
    static __device__ __forceinline__ void set(uint4& v, int i, unsigned value) {
        (i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w) = value;
    }
};
template <>
struct Registers<8> {
    typedef uint2 Vector;
    static __device__ __forceinline__ unsigned get(const uint2& v, int i) { return i == 0 ? v.x : v.y; }
    static __device__ __forceinline__ void set(uint2& v, int i, unsigned value) { (i == 0 ? v.x : v.y) = value; }
};
typedef Registers<LANES * sizeof(SOURCE)> Source;
typedef Registers<LANES * sizeof(TARGET)> Target;
typedef Source::Vector In;
typedef Target::Vector Out;

// Two neighbours of a unit, cast.
template <typename From, typename To>
struct Two {
    static __device__ __forceinline__ float wide(const In& in, int lane, float) {
        return __uint_as_float(Source::get(in, lane));
    }
    template <typename Half>
    static __device__ __forceinline__ float wide(const In& in, int lane, Half half) {
        return widen(Source::get(in, lane / 2), lane % 2, half);
    }
    static __device__ __forceinline__ void put(Out& out, int lane, float low, float high, float) {
        Target::set(out, lane, __float_as_uint(low));
        Target::set(out, lane + 1, __float_as_uint(high));
    }
    template <typename Half>
    static __device__ __forceinline__ void put(Out& out, int lane, float low, float high, Half half) {
        Target::set(out, lane / 2, narrow(low, high, half));
    }
    static __device__ __forceinline__ void pass(const In& in, Out& out, int lane) {
        put(out, lane, wide(in, lane, From()), wide(in, lane + 1, From()), To());
    }
};
// One dtype on both sides: its bits, NaN's too.
template <typename Same>
struct Two<Same, Same> {
    static __device__ __forceinline__ void pass(const In& in, Out& out, int lane) {
        constexpr int size = sizeof(Same) / 2;  // registers of two lanes
#pragma unroll
        for (int i = 0; i < size; ++i) Target::set(out, lane * size / 2 + i, Source::get(in, lane * size / 2 + i));
    }
};

// Casts a unit, and writes it. `key` is of its first word.
__device__ __forceinline__ u64 store(const In& in, Out* target, u64 key) {
    Out out;
#pragma unroll
    for (int lane = 0; lane < LANES; lane += 2) Two<SOURCE, TARGET>::pass(in, out, lane);
    *target = out;
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const u64 word = Target::get(out, 2 * i) | static_cast<u64>(Target::get(out, 2 * i + 1)) << 32;
        sum += scramble(word ^ (key + i * KEY_STEP));
    }
    return sum;
}

// How many loads a thread has under way before its first store, which the compiler moves no load across.
constexpr int BATCH = 8;

// Units `at` to `end` of a piece that is one row. Addresses and keys only ever grow by constants.
__device__ __forceinline__ u64 write_row(const Piece& piece, unsigned at, unsigned end) {
    const In* source = reinterpret_cast<const In*>(piece.source);
    Out* target = reinterpret_cast<Out*>(piece.target);
    u64 key = (piece.first_word + static_cast<u64>(at) * WORDS + 1) * KEY_STEP;
    u64 sum = 0;
    for (; at + (BATCH - 1) * THREADS < end; at += BATCH * THREADS) {
        In in[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) in[i] = source[at + i * THREADS];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            sum += store(in[i], target + at + i * THREADS, key);
            key += THREADS * WORDS * KEY_STEP;
        }
    }
    for (; at < end; at += THREADS) {
        sum += store(source[at], target + at, key);
        key += THREADS * WORDS * KEY_STEP;
    }
    return sum;
}

// The same of one that has several.
__device__ __forceinline__ u64 write_rows(const Piece& piece, unsigned at, unsigned end) {
    const unsigned row = piece.row / LANES;
    const u64 source_stride = piece.source_stride / LANES, target_stride = piece.target_stride / LANES;
    const In* source = reinterpret_cast<const In*>(piece.source);
    Out* target = reinterpret_cast<Out*>(piece.target);
    u64 sum = 0;
#pragma unroll 4
    for (; at < end; at += THREADS) {
        const unsigned y = at / row, x = at - y * row;
        const u64 word = piece.first_word + y * piece.word_stride + static_cast<u64>(x) * WORDS;
        sum += store(source[y * source_stride + x], target + y * target_stride + x, (word + 1) * KEY_STEP);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) write(const Piece* pieces, const int* piece_of, u64* sums) {
    const Piece piece = pieces[piece_of[blockIdx.x]];
    const unsigned units = piece.numel / LANES;
    const unsigned begin = (blockIdx.x - piece.first_block) * (TILE / LANES);
    const unsigned end = units - begin < TILE / LANES ? units : begin + TILE / LANES;
    const unsigned at = begin + threadIdx.x;
    const u64 sum = piece.row == piece.numel ? write_row(piece, at, end) : write_rows(piece, at, end);
    add_up(sum, sums + piece.tensor);
}
