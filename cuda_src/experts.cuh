// What the kernels of experts share: pairs (row, slot) sorted by expert, and how products divide them into tiles.
#ifndef CUPLAMA_EXPERTS_CUH
#define CUPLAMA_EXPERTS_CUH

#include "common.cuh"

constexpr int MAX_EXPERTS = 512;

// sums[i] = count(0) + ... + count(i - 1) for i = 0 .. size, in shared memory. All threads of the block call, and see
// them when they are back.
template <typename Count>
__device__ __forceinline__ void running_sums(i32* sums, int size, Count count) {
    __shared__ i32 partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int carried = 0;
    for (int first = 0; first < size; first += blockDim.x) {
        const int i = first + threadIdx.x;
        int sum = i < size ? count(i) : 0;
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, lanes);
            if (lane >= lanes) sum += other;
        }
        if (lane == WARP - 1) partial[warp] = sum;
        __syncthreads();
        sum += carried;
        for (int w = 0; w < warps; w++) {
            if (w < warp) sum += partial[w];
            carried += partial[w];
        }
        if (i < size) sums[i + 1] = sum;
        __syncthreads();  // partial is written again
    }
    if (threadIdx.x == 0) sums[0] = 0;
    __syncthreads();
}

#endif
