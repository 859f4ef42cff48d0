// expert_linear_many_wgmma    what expert_linear_many_mma computes (experts_many_mma.cu), on Hopper's tensor cores
//                             (sm_90a alone); parameters and grid are as there
//
// A warpgroup has 64 of the ROWS pairs and all WIDE rows of the weights; both operands lie in shared memory as wgmma
// wants them, in rows of 128 bytes with exchanged vectors, which is where cp.async puts them anyway (Layout<64>). A
// stage is filled again two steps after it was multiplied: each warp has then waited for its own products, and the
// barrier of the step in between says so of all warps. So DEPTH - 2 stages are on their way while one is multiplied.
//
// Launch and op: cuplama/ops/experts.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet; no GPU has run it.
#include "experts_many.cuh"

__device__ __forceinline__ void multiply_tile(float (&d)[64], u64 a, u64 b, bool add, f16) {
    wgmma_n128_f16(d, a, b, add);
}
__device__ __forceinline__ void multiply_tile(float (&d)[64], u64 a, u64 b, bool add, bf16) {
    wgmma_n128_bf16(d, a, b, add);
}

template <typename T, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(2 * ROWS, 2)
    expert_linear_many_wgmma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                             const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    constexpr int THREADS = 2 * ROWS, OUTS = WIDE / HALVES<ACT>;  // OUTS: columns of y of a block
    using Own = Operands<ACT, ROWS, THREADS, T>;
    DYNAMIC_SHARED(unsigned char, memory);
    // [DEPTH][ROWS + WIDE][STEP] on a 1024-byte boundary; at the end of each warp the rows of y
    T* stages = reinterpret_cast<T*>(memory + (1024 - __cvta_generic_to_shared(memory) % 1024) % 1024);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    const PairTiles<ROWS> tiles(offsets, before, E);
    const int across = (m + OUTS - 1) / OUTS, number = blockIdx.x / across, column = blockIdx.x % across * OUTS;
    if (number >= tiles.count()) return;
    const PairTile tile = tiles.at(number);
    for (int i = threadIdx.x; i < ROWS; i += THREADS) own[i] = pairs[tile.first + min(i, tile.count - 1)];
    __syncthreads();

    Own operands(x, w, own, tile, column, s, m, k);
    const int warp = threadIdx.x / WARP, steps = (k + STEP - 1) / STEP;
#pragma unroll
    for (int i = 0; i < DEPTH - 2; i++) {
        operands.fetch(stages + i * Own::STAGE);  // beyond k zeros
        cp_async_commit();
    }
    float sum[1][16][4];
    float (&sums)[64] = reinterpret_cast<float (&)[64]>(sum);
    const u64 left = wgmma_matrix(stages + warp / 4 * (64 * STEP), 1), right = wgmma_matrix(stages + ROWS * STEP, 1);
    for (int step = 0, slot = 0; step < steps; step++) {
        cp_async_wait<DEPTH - 3>();
        fence_proxy_async();
        __syncthreads();                         // this stage is there
        const int at = slot * (Own::STAGE / 8);  // in units of 16 bytes
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < STEP / 16; i++)
            multiply_tile(sums, left + at + 2 * i, right + at + 2 * i, step > 0 || i > 0, T());
        wgmma_commit();
        wgmma_wait<1>();
        operands.fetch(stages + (slot + DEPTH - 2) % DEPTH * Own::STAGE);
        cp_async_commit();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    wgmma_wait<0>();
    wgmma_done(sums);
    cp_async_wait<0>();
    __syncthreads();

    const int mine = warp * 16;
    const Pairs<T> to{own, y, tile.count, m};
    const T* bias = b == nullptr ? nullptr : b + i64(tile.expert) * HALVES<ACT> * m;
    put_sums<ACT>(sum, stages + mine * OUTS, to, mine, column, bias, alpha, limit);
}
