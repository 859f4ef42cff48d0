// expert_linear    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert])    for each pair, each of a row and an expert
//                  act: none; silu_mul, gelu_tanh_mul and clamped_swiglu, where w[expert] has 2m rows: y = act(row i,
//                  row m + i)
//                  x[n,k], w[E,m,k], b[E,m] (may be null), y[n*s,m]: T; pairs[n*s], offsets[E+1]: i32, as sort_pairs
//                  gives them (route.cu)
//
// By multiply-adds: for f32, for GPUs without the tensor cores that experts_mma.cu needs, and for odd sizes. A warp has
// a column of y for up to 8 pairs of an expert, and reads the weights of it once for them; its lanes share k. The warps
// of the grid take such units in turn.
//
// Op and reference: cuplama/ops/experts.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. Not timed alone.
#include "activation.cuh"
#include "experts.cuh"
#include "ptx.cuh"

constexpr int ROWS = 8, THREADS = 256;

// Adds the products of elements at, at + step, ... of the weights' rows with those of the pairs' rows.
template <int W, int PARTS, typename T>
__device__ __forceinline__ void add_products(float (&sum)[ROWS][PARTS], const T* x, const u32 (&rows)[ROWS], const T* w,
                                             i64 other, int k) {
    for (int at = threadIdx.x % WARP * W; at < k; at += WARP * W) {
        Pack<T, W> weights[PARTS];
#pragma unroll
        for (int p = 0; p < PARTS; p++) weights[p] = load<W>(w + p * other + at);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<T, W> a = load<W>(x + rows[r] + at);  // what is too much is not stored
#pragma unroll
            for (int p = 0; p < PARTS; p++)
#pragma unroll
                for (int j = 0; j < W; j++) sum[r][p] = fmaf(to_float(weights[p].v[j]), to_float(a.v[j]), sum[r][p]);
        }
    }
}

template <typename T, int ACT>
__global__ void __launch_bounds__(THREADS, 2)
    expert_linear(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets, const T* __restrict__ b,
                  T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    constexpr int W = 16 / sizeof(T), PARTS = HALVES<ACT>;
    __shared__ i32 before[MAX_EXPERTS + 1];
    launch_dependents();
    pdl_wait();
    const PairTiles<ROWS> tiles(offsets, before, E);
    const bool vectorized = k % W == 0 && aligned(x, w);
    const u32 units = u32(tiles.count()) * m;  // below 2^32: 2^13 tiles and 2^19 columns
    for (u32 unit = blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP; unit < units;
         unit += gridDim.x * (THREADS / WARP)) {
        const PairTile tile = tiles.at(unit / u32(m));
        const int column = unit % u32(m);
        u32 rows[ROWS];  // their first elements: x has less than 2^32
#pragma unroll
        for (int r = 0; r < ROWS; r++) rows[r] = u32(pairs[tile.first + min(r, tile.count - 1)] / s) * k;
        const i64 at = (i64(tile.expert) * PARTS) * m + column;  // of the weights' rows
        float sum[ROWS][PARTS] = {};
        if (vectorized)
            add_products<W>(sum, x, rows, w + at * k, i64(m) * k, k);
        else
            add_products<1>(sum, x, rows, w + at * k, i64(m) * k, k);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r >= tile.count) break;
            float total[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                total[p] = warp_sum(sum[r][p]) + (b == nullptr ? 0.f : to_float(b[at + p * m]));
            if (threadIdx.x % WARP == 0)
                y[i64(pairs[tile.first + r]) * m + column] = from_float<T>(gated<ACT, T>(total, alpha, limit));
        }
    }
}
