// read_sum    y[block] = sum of the 32-bit words of the block's share of x, modulo 2^32     x[n]: 16-byte vectors
//
// Does nothing but read: its bytes per second is the peak that every other kernel is held against. The sum keeps the
// compiler from dropping the loads, and shows that all of x was read.
//
// Mapping: a block takes runs of UNROLL * blockDim.x vectors, one run after the other; a thread has UNROLL loads of 16
// bytes in flight, a warp's 32 of them in a row. One word per block is written.
//
// Launched, checked and timed by cuplama/lab/peaks.py; tested in tests/lab/test_lab.py.
// Tried: nothing else yet.
#include "common.cuh"

constexpr int UNROLL = 8;

__global__ void __launch_bounds__(256) read_sum(const uint4* __restrict__ x, u32* __restrict__ y, i64 n) {
    u32 sum = 0;
    const i64 run = i64(UNROLL) * blockDim.x;
    for (i64 first = blockIdx.x * run; first < n; first += gridDim.x * run) {
        uint4 v[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; i++) {
            const i64 at = first + i64(i) * blockDim.x + threadIdx.x;
            v[i] = at < n ? x[at] : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < UNROLL; i++) sum += v[i].x + v[i].y + v[i].z + v[i].w;
    }
    __shared__ u32 partial[WARP];
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (threadIdx.x % WARP == 0) partial[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < int(blockDim.x) / WARP; i++) sum += partial[i];
        y[blockIdx.x] = sum;
    }
}
