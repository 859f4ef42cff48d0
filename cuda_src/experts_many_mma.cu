// expert_linear_many_mma    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear (experts.cu), for
//                           many pairs, on tensor cores: x, w, b, y in 16 bits (sm_80 and later) on 16-byte boundaries;
//                           k is a multiple of 8
//
// A block has a tile of up to ROWS pairs of one expert by WIDE rows of its weights: all columns of y of a tile of pairs
// are next to each other in the grid, and so are the tiles of an expert, so that rows of x and of w are still in L2
// when they are read again. How many tiles there are is read on the device; the grid has room for the most that there
// can be, n*s / ROWS + min(E, n*s), and blocks beyond the last tile end at once.
//
// 128 threads; warp w has rows w/2 * ROWS/2 .. of the pairs and rows w%2 * 64 .. of the weights, and takes products by
// mma.sync m16n8k16 with f32 sums, STEP elements of k after the other. DEPTH stages of cp.async; rows of x come from
// where the pairs say. Where two rows of w make a column of y, eight of the first half and eight of the other take
// turns in the tile, so that a lane has both sums of its columns. y goes out by way of shared memory, in rows.
//
// Sums go along k in steps of 16, whatever ROWS is: a row of y does not depend on the other pairs, bit for bit.
//
// Launch and op: cuplama/ops/experts.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet; no GPU has run it.
#include "experts_many.cuh"

constexpr int THREADS = 128;

template <typename T, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(THREADS, 2)
    expert_linear_many_mma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                           const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    constexpr int MT = ROWS / 32, OUTS = WIDE / HALVES<ACT>, MINE = OUTS / 2;  // columns of y: a block's, a warp's
    using Own = Operands<ACT, ROWS, THREADS, T>;
    DYNAMIC_SHARED(T, stages);  // [DEPTH][ROWS + WIDE][STEP]; at the end of each warp the rows of y
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
    const int mine = warp / 2 * (ROWS / 2);
    const Lane<STEP> down = lane_down<STEP>(), to_right = lane_across<STEP>();
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) {
        operands.fetch(stages + i * Own::STAGE);  // beyond k zeros
        cp_async_commit();
    }
    float sum[MT][8][4] = {};
    for (int step = 0, slot = 0; step < steps; step++) {
        cp_async_wait<DEPTH - 2>();
        __syncthreads();  // this stage is there, and nobody reads the one before
        operands.fetch(stages + (slot == 0 ? DEPTH - 1 : slot - 1) * Own::STAGE);
        cp_async_commit();
        const T* stage = stages + slot * Own::STAGE;
        multiply_rows<T, STEP>(sum, stage + mine * STEP, stage + (ROWS + warp % 2 * 64) * STEP, down, to_right);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncthreads();

    const int first = column + warp % 2 * MINE;
    const Pairs<T> to{own, y, tile.count, m};
    const T* bias = b == nullptr ? nullptr : b + i64(tile.expert) * HALVES<ACT> * m;
    put_sums<ACT>(sum, stages + warp * (ROWS / 2 * MINE), to, mine, first, bias, alpha, limit);
}
