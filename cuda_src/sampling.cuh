// What the sampling kernels share: integers that order as floats do, 64-bit reductions over a block, and noise.
#ifndef CUPLAMA_SAMPLING_CUH
#define CUPLAMA_SAMPLING_CUH

#include "common.cuh"
#include "philox.cuh"

// ---- keys and ranks -------------------------------------------------------------------------------------------------

// An integer that orders as the float does; 0 for no float but a NaN. Both zeros have the same.
__device__ __forceinline__ u32 key_of(float x) {
    const u32 bits = __float_as_uint(x + 0.f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ __forceinline__ float value_of(u32 key) {
    return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// The larger value first, the lower id first among equals.
__device__ __forceinline__ u64 rank_of(float x, int id) { return u64(key_of(x)) << 32 | ~u32(id); }
__device__ __forceinline__ int id_of(u64 rank) { return int(~u32(rank)); }
constexpr u64 BROKEN = ~u64(0);  // above every rank: the row cannot be drawn from

__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, lanes);
        x = other > x ? other : x;
    }
    return x;
}

__device__ __forceinline__ u64 block_max(u64 x) {
    __shared__ u64 partial[WARP];
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = warp_max(lane < warps ? partial[lane] : 0);
    __syncthreads();
    return x;
}

__device__ __forceinline__ u64 block_sum(u64 x) {
    __shared__ u64 partial[WARP];
    const int lane = threadIdx.x % WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    if (lane == 0) partial[threadIdx.x / WARP] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < warps; i++) x += partial[i];
    __syncthreads();
    return x;
}

// ---- noise ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float gumbel(u32 word) {
    const float u = (float(word) + 0.5f) * 2.3283064365386963e-10f;  // 2^-32; u can be 1, then the noise is -infinity
    return -logf(-log1pf(-u));
}

#endif
