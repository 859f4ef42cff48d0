// What every kernel shares: type names, conversions, 16-byte accesses, reductions over a warp and over a block.
//
// Conventions: matrices are row-major and contiguous; T is the model's dtype (f32, f16 or bf16); arithmetic is in f32.
// Blocks are one-dimensional and a whole number of warps unless a kernel says otherwise.
#ifndef CUPLAMA_COMMON_CUH
#define CUPLAMA_COMMON_CUH

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef float f32;
typedef __half f16;
typedef __nv_bfloat16 bf16;  // below sm_80 it exists for storage only, and the loader does not use it
typedef unsigned char u8;
typedef int i32;
typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;

// Dynamic shared memory, 16-byte aligned, as an array of `type`. A macro, because an executor that is not a GPU has to
// give it another meaning.
#ifndef DYNAMIC_SHARED
#define DYNAMIC_SHARED(type, name)                                   \
    extern __shared__ __align__(16) unsigned char dynamic_shared_[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared_)
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// ---- conversions ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(f32 x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ f32 from_float<f32>(float x) {
    return x;
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
    return __float2half(x);
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
    return __float2bfloat16(x);
}

// ---- vectorized accesses --------------------------------------------------------------------------------------------

// W consecutive elements, moved with accesses of 16 bytes, or of their own size where they are smaller.
template <typename T, int W>
struct alignas(W * sizeof(T) < 16 ? W * sizeof(T) : 16) Pack {
    T v[W];
};

// The elements of one 16-byte access: 4 f32, 8 f16 or bf16.
template <typename T>
using Vec = Pack<T, 16 / sizeof(T)>;

template <int W, typename T>
__device__ __forceinline__ Pack<T, W> load(const T* p) {
    return *reinterpret_cast<const Pack<T, W>*>(p);
}

template <int W, typename T>
__device__ __forceinline__ void store(T* p, const Pack<T, W>& x) {
    *reinterpret_cast<Pack<T, W>*>(p) = x;
}

// Elements at .. at + W - 1 of a row of `size`. What lies past the end reads as zero and is not written. With
// `vectorized`, `at` must be a multiple of W, and row and size must allow accesses of 16 bytes there; without it they
// may be anything.
template <int W, typename T>
__device__ __forceinline__ Pack<T, W> load_row(const T* row, i64 at, i64 size, bool vectorized) {
    if (vectorized && at + W <= size) return load<W>(row + at);
    Pack<T, W> x;
#pragma unroll
    for (int i = 0; i < W; i++) x.v[i] = at + i < size ? row[at + i] : from_float<T>(0.f);
    return x;
}

template <int W, typename T>
__device__ __forceinline__ void store_row(T* row, i64 at, i64 size, bool vectorized, const Pack<T, W>& x) {
    if (vectorized && at + W <= size) return store<W>(row + at, x);
#pragma unroll
    for (int i = 0; i < W; i++)
        if (at + i < size) row[at + i] = x.v[i];
}

// Whether all pointers lie on 16-byte boundaries.
template <typename... P>
__device__ __forceinline__ bool aligned(const P*... p) {
    return ((reinterpret_cast<u64>(p) | ...) & 15) == 0;
}

// ---- reductions; the order of the additions is fixed, so results repeat bit for bit ---------------------------------

// Over the lanes of a warp; every lane gets the result.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, lanes));
    return x;
}

// Over the threads of a block; every thread gets the result, and every thread must call.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? partial[lane] : 0.f);
    __syncthreads();  // partial may be written again
    return x;
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = warp_max(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_max(partial[lane < warps ? lane : 0]);
    __syncthreads();
    return x;
}

// ---- what blocks leave for the last of them ----------------------------------------------------------------------------

// Whether this block is the last of `blocks` to arrive. Who arrives last finds everything written that others wrote
// before a barrier ahead of this; it leaves the counter as it was for the next launch. The barriers extend the fences of
// one thread to the block.
__device__ __forceinline__ bool arrives_last(u32* counter, int blocks) {
    __shared__ int last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(counter, 1u) == u32(blocks - 1);
        __threadfence();
        if (last) *counter = 0;
    }
    __syncthreads();
    return last;
}

#endif
