// Casts between float and two dtypes of 16 bits, as torch casts: to nearest even. Written out, so that no header of
// CUDA's is needed where this is compiled.

struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};

// One of the two values in `both`, of the dtype that the last argument stands for.
__device__ __forceinline__ float widen(unsigned both, bool high, bf16) {
    return __uint_as_float(high ? both & 0xffff0000u : both << 16);
}
__device__ __forceinline__ float widen(unsigned both, bool high, f16) {
    const unsigned short bits = high ? both >> 16 : both & 0xffffu;
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
}
// Two values side by side.
__device__ __forceinline__ unsigned narrow(float low, float high, bf16) {
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ unsigned narrow(float low, float high, f16) {
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
