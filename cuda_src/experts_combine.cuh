// What the kernels share that go through all experts of up to 8 rows in one sum (experts_combine_mma.cu,
// experts_combine_packed.cu): which experts were chosen, and by how much each row weighs them.
#ifndef CUPLAMA_EXPERTS_COMBINE_CUH
#define CUPLAMA_EXPERTS_COMBINE_CUH

#include "experts.cuh"

constexpr int MAX_PAIRS = 256;  // 8 rows with 32 experts
constexpr int AHEAD_BYTES =
    192 * 1024;  // of weights that a block asks for before x is there; all blocks: half of an L2

// The experts that have a pair, in their order, each with a place for every row: in shared memory, weights [most][ROWS],
// pairs [most][ROWS] and experts [most], where there are `most` of them at most. A row has an expert once.
template <int ROWS>
struct Chosen {
    f32* weights;  // of each row, 0 where the row did not choose the expert
    i32* pairs;    // -1 there
    i32* experts;
    const i32* found;  // the sorted pairs
    int count;

    // memory: on an 8-byte boundary
    __device__ __forceinline__ Chosen(f32* memory, int most)
        : weights(memory), pairs(reinterpret_cast<i32*>(memory) + most * ROWS), experts(pairs + most * ROWS),
          found(nullptr), count(0) {
        for (int i = threadIdx.x; i < most * ROWS; i += blockDim.x) pairs[i] = -1, weights[i] = 0.f;
    }

    // Reads what was chosen, all of it at once: sorted[n*s] (pairs), offsets[E+1], by[n,s] (weights). places: `pairs` is
    // to have a pair's place among the sorted ones, and not its number. All threads of the block call. Where this comes
    // before the wait for earlier kernels an L1 may hold what an older kernel has read: volatile reads go past it.
    __device__ __forceinline__ void read(const volatile i32* sorted, const volatile i32* offsets,
                                         const volatile f32* by, int size, int s, int E, bool places) {
        __shared__ i32 before[MAX_EXPERTS + 1], starts[MAX_EXPERTS + 1], list[MAX_PAIRS];
        __shared__ f32 weight[MAX_PAIRS];
        found = list;
        // From both ends of the block, so that few threads wait for one load after the other.
        for (int i = threadIdx.x; i <= E; i += blockDim.x) starts[i] = offsets[i];
        for (int i = blockDim.x - 1 - threadIdx.x; i < size; i += blockDim.x) list[i] = sorted[i], weight[i] = by[i];
        __syncthreads();
        running_sums(before, E, [&](int expert) { return starts[expert + 1] > starts[expert]; });
        count = before[E];
        for (int expert = threadIdx.x; expert < E; expert += blockDim.x) {
            const int place = before[expert];
            if (before[expert + 1] == place) continue;
            experts[place] = expert;
            for (int i = starts[expert]; i < starts[expert + 1]; i++) {
                const int pair = list[i], at = place * ROWS + pair / s;
                pairs[at] = places ? i : pair, weights[at] = weight[pair];
            }
        }
        __syncthreads();
    }

    // How many rows chose the expert.
    __device__ __forceinline__ int rows_of(int expert) const {
        int rows = 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) rows += pairs[expert * ROWS + r] >= 0;
        return rows;
    }
};

// What an element of y begins with: a, and the biases of the row's experts by their weights.
template <int ROWS, typename T>
__device__ __forceinline__ float combine_start(const Chosen<ROWS>& chosen, const f32* a, const T* b, int row,
                                               int column, int m) {
    float sum = a != nullptr ? a[i64(row) * m + column] : 0.f;
    if (b != nullptr)
#pragma unroll 4
        for (int e = 0; e < chosen.count; e++)
            sum = fmaf(chosen.weights[e * ROWS + row], to_float(b[i64(chosen.experts[e]) * m + column]), sum);
    return sum;
}

// What the rows of x of a lane's sums, 2 t and 2 t + 1, weigh an expert by.
template <int ROWS>
__device__ __forceinline__ Pack<f32, 2> lane_weights(const Chosen<ROWS>& chosen, int expert) {
    const f32* of = chosen.weights + expert * ROWS;
    if constexpr (ROWS == 1) return {{of[0], 0.f}};
    return load<2>(of + threadIdx.x % 4 * 2 % ROWS);
}

// The columns first .. end - 1 of y: what each begins with, and the WARPS warps' sums of it, in their order. partial:
// tiles of a warp [16][ROWS], those of the next warp `stride` behind them. early: what this thread's first one begins
// with.
template <int ROWS, int WARPS, typename Start>
__device__ __forceinline__ void put_columns(const f32* partial, int stride, f32* y, int n, int first, int end, int m,
                                            float early, const Start& start) {
    for (int i = threadIdx.x; i < (end - first) * ROWS; i += WARPS * WARP) {
        const int row = i % ROWS, column = first + i / ROWS;
        if (row >= n) continue;
        float sum = i < WARPS * WARP ? early : start(row, column);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += partial[warp * stride + i];
        y[i64(row) * m + column] = sum;
    }
}

#endif
