// expert_linear_many_wgmma           what expert_linear_many_mma computes (experts_many_mma.cu), on Hopper's tensor cores
//                                    (sm_90a alone); parameters and grid are as there
// expert_linear_packed_many_wgmma    what expert_linear_packed_many_mma computes, likewise
//
// Two warpgroups; each warp has 16 of the block's 128 rows of w, and all pairs of the tile are the N of its products, as
// many as there are, up to a multiple of 32 and at least 64: for fewer the products would take less time than their
// numbers. While products run, the numbers of the next step come to registers: where a tile has more than 128 pairs, and
// a multiprocessor one block, in another set of them; else by the other block. With 256 pairs a step of 64 columns is
// 1024 cycles of the tensor cores, and its numbers in mxfp4 about 120 instructions of each of two warps. What a block
// reads in a step is 32 KB of x and 4.3 KB of codes, or 16 KB of plain numbers, mostly from L2.
//
// A stage of x is filled again two steps after it was multiplied: each warp has then waited for its own products, and
// the barrier of the step in between says so of all warps. So DEPTH - 2 steps are on their way while one is multiplied.
//
// Launch: cuplama/ops/experts_many.py. Op: cuplama/ops/experts.py. Test: tests/ops/test_experts_many.py.
// Benchmark: python -m benchmarks.packed_experts. Measured on an H200, 2026-11-28: gate_up of Qwen3-30B-A3B for 2,048
// tokens in 251 us in int4 (410 TFLOP/s), in 329 in bf16, whose bytes would take 183; for 8,192 in 835 and 906. With pairs
// as the M of the products, in tiles of 64, bf16 took 381 and 1,003. Tiles of up to 128 and 64 pairs: 379 and 441 us for
// 2,048 tokens.
#include "experts_many_weights.cuh"

constexpr int WARPS = 8;
constexpr int LEAST = 64, MORE = 32;  // pairs of a product at least, and by which they grow
constexpr int SHARING = 128;          // pairs of a tile up to which a multiprocessor has two blocks

template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, f16) {
    wgmma_rows_f16(d, a, b, true);
}
template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, bf16) {
    wgmma_rows_bf16(d, a, b, true);
}

// The numbers of a step to registers.
template <typename S, typename Weights>
__device__ __forceinline__ void take(Weights& weights, int half, u32 (&a)[4][S::TILES][4]) {
    const typename Weights::Numbers numbers = weights.take(half);
#pragma unroll
    for (int c = 0; c < 4; c++) numbers.read(c, a[c]);
}

// A tile of at most N pairs.
template <typename S, int N, typename Weights>
__device__ __forceinline__ void multiply_pairs(const Product<typename S::T>& product, const Share& share,
                                               Weights weights) {
    typedef typename S::T T;
    if constexpr (N > LEAST)
        if (share.tile.count <= N - MORE) return multiply_pairs<S, N - MORE>(product, share, weights);
    PairRows<S, N> rows(product, share);
    begin<S>(rows, weights);
    const u64 stages = wgmma_matrix(reinterpret_cast<const T*>(product.memory), 1);
    float total[N / 2] = {};
    constexpr int SETS = S::ROWS > SHARING ? 2 : 1;
    u32 a[SETS][4][S::TILES][4];
    cp_async_wait<S::AHEAD - 1>();
    __syncwarp();
    take<S>(weights, 0, a[0]);
    int stage = 0;
#pragma unroll 1
    for (int left = product.steps(); left > 0; left -= 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == left) break;
            cp_async_wait<S::AHEAD - 1>();
            fence_proxy_async();
            __syncthreads();  // this stage is there, and the weights whose numbers are taken next
            wgmma_fence();
#pragma unroll
            for (int c = 0; c < 4; c++)
                multiply_rows_of(total, a[half % SETS][c][0], stages + stage * (S::STAGE / 8) + 2 * c, T());
            wgmma_commit();
            rows.fetch();
            weights.go_on(half, false);
            cp_async_commit();
            wgmma_wait<SETS - 1>();  // the set that is taken next is free
            stage = stage + 1 == S::DEPTH ? 0 : stage + 1;
            if (half + 1 < left) take<S>(weights, 1 - half, a[(1 - half) % SETS]);
        }
    }
    wgmma_wait<0>();
    wgmma_done(total);
    cp_async_wait<0>();
    put_sums<S, N>(total, product, share, weights.scales(), weights.apart());
}

// Where the shared memory begins that operands of wgmma lie in: on a 1024-byte boundary.
__device__ __forceinline__ unsigned char* aligned_memory(unsigned char* memory) {
    return memory + (1024 - __cvta_generic_to_shared(memory) % 1024) % 1024;
}

template <typename T, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, ROWS > SHARING ? 1 : 2)
    expert_linear_many_wgmma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                             const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    typedef Tiling<T, ACT, ROWS, WARPS, DEPTH, true> S;
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    Share share;
    if (!find_share<S>(share, PairTiles<ROWS>(offsets, before, E), pairs, own, m)) return;
    const Product<T> product{x, b, y, s, m, k, alpha, limit, aligned_memory(memory)};
    multiply_pairs<S, ROWS>(product, share, PlainTiles<S>(w, product, share));
}

template <typename T, typename W, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, ROWS > SHARING ? 1 : 2)
    expert_linear_packed_many_wgmma(const T* x, const W* __restrict__ w, const i32* pairs, const i32* offsets,
                                    const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    typedef Tiling<T, ACT, ROWS, WARPS, DEPTH, true> S;
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    Share share;
    if (!find_share<S>(share, PairTiles<ROWS>(offsets, before, E), pairs, own, m)) return;
    const Product<T> product{x, b, y, s, m, k, alpha, limit, aligned_memory(memory)};
    multiply_pairs<S, ROWS>(product, share, PackedTiles<S, W>(w, product, share, E));
}
