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
