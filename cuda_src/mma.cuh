// What kernels on tensor cores share: products in the dtype at hand, and rounding.
#ifndef CUPLAMA_MMA_CUH
#define CUPLAMA_MMA_CUH

#include "common.cuh"
#include "ptx.cuh"

// d += a b on 16x16 and 16x8 matrices; the last argument gives the dtype.
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], f16) {
    mma_m16n8k16_f16(d, a, b);
}
__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bf16) {
    mma_m16n8k16_bf16(d, a, b);
}

// A lane's sums of such a product with ROWS columns to `to` [16][ROWS]: it has rows r and r + 8, columns 2 t and 2 t + 1.
template <int ROWS>
__device__ __forceinline__ void store_tile(f32* to, const float (&total)[4]) {
    const int r = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    if constexpr (ROWS == 1) {
        if (t == 0) to[r] = total[0], to[r + 8] = total[2];
    } else if (2 * t < ROWS) {
        store<2>(to + r * ROWS + 2 * t, Pack<f32, 2>{total[0], total[1]});
        store<2>(to + (r + 8) * ROWS + 2 * t, Pack<f32, 2>{total[2], total[3]});
    }
}

// Two values rounded to T in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<f16>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const u32*>(&x);
}
template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const u32*>(&x);
}

#endif
