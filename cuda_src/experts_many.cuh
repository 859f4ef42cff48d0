// What the kernels for many pairs of experts share (experts_many_mma.cu, experts_many_wgmma.cu): the way of both
// operands to shared memory, and that of the sums to y.
#ifndef CUPLAMA_EXPERTS_MANY_CUH
#define CUPLAMA_EXPERTS_MANY_CUH

#include "experts.cuh"
#include "mma_tiles.cuh"

constexpr int STEP = 64, WIDE = 128;

// The elements of k that a block multiplies next, on their way to shared memory: [ROWS][STEP] of x, [WIDE][STEP] of w.
// A thread copies vector t % 8 of rows t / 8, t / 8 + APART, ...
template <int ACT, int ROWS, int THREADS, typename T>
struct Operands {
    static constexpr int STAGE = (ROWS + WIDE) * STEP, APART = THREADS / 8, COLUMNS = APART / HALVES<ACT>;
    const T *x, *w;          // w: the thread's first row
    u32 rows[ROWS / APART];  // first elements of the thread's rows of x, which has less than 2^32
    int count, left, m, k, at, to;

    // own: the pairs of the tile; column: of y, the tile's first.
    __device__ __forceinline__ Operands(const T* x, const T* w, const i32* own, const PairTile& tile, int column, int s,
                                        int m, int k)
        : x(x), m(m), k(k) {
        const int row = threadIdx.x / 8, half = HALVES<ACT> == 2 ? row / 8 % 2 : 0;
        const int first = column + (HALVES<ACT> == 2 ? row / 16 * 8 + row % 8 : row);
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
template <int ACT, typename T, int MT, int N>
__device__ __forceinline__ void finish(float (&y)[MT][N / HALVES<ACT>][4], const float (&sum)[MT][N][4], const T* b,
                                       int column, int m, float alpha, float limit) {
    constexpr int PARTS = HALVES<ACT>;
#pragma unroll
    for (int j = 0; j < N / PARTS; j++)
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

// Where a block's rows of y go.
template <typename T>
struct Pairs {
    const i32* own;  // in shared memory
    T* y;
    int count, m;
};

// A warp's sums to y, rows `mine` and on of the tile, by way of shared memory: so a lane has 8 columns side by side.
// column: of y, the warp's first. room: of this warp, [16 MT][8 N / HALVES].
template <int ACT, typename T, int MT, int N>
__device__ __forceinline__ void put_sums(const float (&sum)[MT][N][4], T* room, const Pairs<T>& to, int mine,
                                         int column, const T* b, float alpha, float limit) {
    constexpr int WIDTH = 8 * N / HALVES<ACT>;
    const int lane = threadIdx.x % WARP;
    float out[MT][N / HALVES<ACT>][4], whole[MT][2];
    finish<ACT, T>(out, sum, b, column + lane % 4 * 2, to.m, alpha, limit);
#pragma unroll
    for (int i = 0; i < MT; i++) whole[i][0] = whole[i][1] = 1.f;
    stash_rows<WIDTH>(room, out, whole);
    __syncwarp();
    const bool vectorized = to.m % 8 == 0 && aligned(to.y);
    for (int i = lane; i < 16 * MT * (WIDTH / 8); i += WARP) {
        const int row = i / (WIDTH / 8), vector = i % (WIDTH / 8);
        if (mine + row >= to.count) break;
        store_row<8>(to.y + i64(to.own[mine + row]) * to.m, column + vector * 8, to.m, vectorized,
                     load<8>(room + Layout<WIDTH>::at(row, vector)));
    }
}

#endif
