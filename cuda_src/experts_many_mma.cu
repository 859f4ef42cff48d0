// expert_linear_many_mma    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear (experts.cu), for many
//                           pairs, on tensor cores: x, w, b, y in 16 bits (sm_80 and later) on 16-byte boundaries; k is
//                           a multiple of 8
//
// A block has a tile of up to ROWS pairs of one expert by WIDE rows of its weights: all columns of y of a tile of pairs
// are next to each other in the grid, and so are the tiles of an expert, so that rows of x and of w are still in L2 when
// they are read again. How many tiles there are is read on the device; the grid has room for the most that there can be,
// n*s / ROWS + min(E, n*s), and blocks beyond the last tile end at once.
//
// 128 threads; warp w has rows w/2 * ROWS/2 .. of the pairs and rows w%2 * 64 .. of the weights, and takes products by
// mma.sync m16n8k16 with f32 sums, STEP elements of k after the other. DEPTH stages of cp.async; rows of x come from
// where the pairs say. Where two rows of w make a column of y, eight of the first half and eight of the other take turns
// in the tile, so that a lane has both sums of its columns. y goes out by way of shared memory, in rows.
//
// Sums go along k in steps of 16, whatever ROWS is: a row of y does not depend on the other pairs, bit for bit.
//
// Launch and op: cuplama/ops/experts.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet; no GPU has run it.
#include "experts.cuh"
#include "mma_tiles.cuh"

constexpr int THREADS = 128, STEP = 64, WIDE = 128;

// The elements of k that a block multiplies next, on their way to shared memory: [ROWS][STEP] of x, [WIDE][STEP] of w.
// A thread copies vector t % 8 of rows t / 8, t / 8 + 16, ...
template <int ACT, int ROWS, typename T>
struct Operands {
    static constexpr int STAGE = (ROWS + WIDE) * STEP, APART = THREADS / 8, COLUMNS = APART / HALVES<ACT>;
    const T *x, *w;         // w: the thread's first row
    u32 rows[ROWS / APART];  // first elements of the thread's rows of x, which has less than 2^32
    int count, left, m, k, at, to;

    // own: the pairs of the tile; column: of y, the tile's first.
    __device__ __forceinline__ Operands(const T* x, const T* w, const i32* own, const PairTile& tile, int column, int s,
                                        int m, int k)
        : x(x), m(m), k(k) {
        const int row = threadIdx.x / 8, half = HALVES<ACT> == 2 ? row / 8 : 0, first = column + row - half * 8;
#pragma unroll
        for (int i = 0; i < ROWS / APART; i++) rows[i] = u32(own[row + i * APART] / s) * k;
        this->w = w + (i64(tile.expert) * HALVES<ACT> * m + i64(half) * m + first) * k;
        count = tile.count - row, left = m - first;
        at = threadIdx.x % 8 * 8;
        to = Layout<STEP>::at(row, threadIdx.x % 8);
    }

    __device__ __forceinline__ void fetch(T* stage) {
        const bool inside = at < k;
#pragma unroll
        for (int i = 0; i < ROWS / APART; i++)
            cp_async_16(stage + to + i * APART * STEP, x + rows[i] + at, inside && i * APART < count);
#pragma unroll
        for (int i = 0; i < WIDE / APART; i++)
            cp_async_16(stage + to + (ROWS + i * APART) * STEP, w + i64(i * COLUMNS) * k + at,
                        inside && i * COLUMNS < left);
        at += STEP;
    }
};

// A warp's sums with bias and activation: of each element of y one. column: of y, the lane's first.
template <int ACT, typename T, int MT>
__device__ __forceinline__ void finish(float (&y)[MT][8 / HALVES<ACT>][4], const float (&sum)[MT][8][4], const T* b,
                                       int column, int m, float alpha, float limit) {
    constexpr int PARTS = HALVES<ACT>;
#pragma unroll
    for (int j = 0; j < 8 / PARTS; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int at = column + j * 8 + e;
            float bias[PARTS] = {};
#pragma unroll
            for (int p = 0; p < PARTS; p++)
                if (b != nullptr && at < m) bias[p] = to_float(b[p * m + at]);
#pragma unroll
            for (int i = 0; i < 2 * MT; i++) {
                float total[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; p++) total[p] = sum[i / 2][j * PARTS + p][i % 2 * 2 + e] + bias[p];
                y[i / 2][j][i % 2 * 2 + e] = gated<ACT, T>(total, alpha, limit);
            }
        }
}

template <typename T, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(THREADS, 2)
    expert_linear_many_mma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                           const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    constexpr int MT = ROWS / 32, OUTS = WIDE / HALVES<ACT>, MINE = OUTS / 2;  // columns of y of a block and of a warp
    using Own = Operands<ACT, ROWS, T>;
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
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, steps = (k + STEP - 1) / STEP;
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
    const T* bias = b == nullptr ? nullptr : b + i64(tile.expert) * HALVES<ACT> * m;
    float out[MT][8 / HALVES<ACT>][4];
    finish<ACT, T>(out, sum, bias, first + lane % 4 * 2, m, alpha, limit);
    float whole[MT][2];
#pragma unroll
    for (int i = 0; i < MT; i++) whole[i][0] = whole[i][1] = 1.f;
    T* rows = stages + warp * (ROWS / 2 * MINE);
    stash_rows<MINE>(rows, out, whole);
    __syncwarp();
    const bool vectorized = m % 8 == 0 && aligned(y);
    for (int i = lane; i < ROWS / 2 * (MINE / 8); i += WARP) {
        const int row = i / (MINE / 8), vector = i % (MINE / 8);
        if (mine + row >= tile.count) break;
        store_row<8>(y + i64(own[mine + row]) * m, first + vector * 8, m, vectorized,
                     load<8>(rows + Layout<MINE>::at(row, vector)));
    }
}
