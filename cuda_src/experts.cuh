// What the kernels of experts share: pairs of a row and one of its experts, sorted by expert, and how products divide
// them into tiles.
#ifndef CUPLAMA_EXPERTS_CUH
#define CUPLAMA_EXPERTS_CUH

#include "activation.cuh"
#include "common.cuh"

constexpr int MAX_EXPERTS = 512;

// sums[i] = count(0) + ... + count(i - 1) for i = 0 .. size, at least 1, in shared memory. All threads of the block call,
// and see them when they are back.
template <typename Count>
__device__ __forceinline__ void running_sums(i32* sums, int size, Count count) {
    __shared__ i32 partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    int carried = 0;
    if (threadIdx.x == 0) sums[0] = 0;
    for (int first = 0; first < size; first += blockDim.x) {
        const int i = first + threadIdx.x, some = min(warps, (size - first + WARP - 1) / WARP);  // warps with a count
        int sum = i < size ? count(i) : 0;
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const int other = __shfl_up_sync(ALL_LANES, sum, lanes);
            if (lane >= lanes) sum += other;
        }
        if (lane == WARP - 1) partial[warp] = sum;
        __syncthreads();
        sum += carried;
        for (int w = 0; w < some; w++) {
            if (w < warp) sum += partial[w];
            carried += partial[w];
        }
        if (i < size) sums[i + 1] = sum;
        __syncthreads();  // sums are there, and partial may be written again
    }
}

// Pairs of one expert that a product takes together: pairs[first .. first + count - 1].
struct PairTile {
    int expert, first, count;
};

// The tiles of up to ROWS pairs that the experts' pairs make, expert after expert.
template <int ROWS>
struct PairTiles {
    const i32* offsets;
    const i32* before;  // in shared memory: tiles of the experts ahead [E+1]
    int E;

    // All threads of the block call.
    __device__ __forceinline__ PairTiles(const i32* offsets, i32* before, int E)
        : offsets(offsets), before(before), E(E) {
        running_sums(before, E, [&](int expert) { return (offsets[expert + 1] - offsets[expert] + ROWS - 1) / ROWS; });
    }

    __device__ __forceinline__ int count() const { return before[E]; }

    __device__ __forceinline__ PairTile at(int tile) const {
        const int expert = expert_of(tile);
        return cut(expert, tile, ROWS);
    }

    // The same where the tiles of an expert have nearly the same number of pairs, in place of one with the rest.
    __device__ __forceinline__ PairTile even(int tile) const {
        const int expert = expert_of(tile), tiles = before[expert + 1] - before[expert];
        return cut(expert, tile, (offsets[expert + 1] - offsets[expert] + tiles - 1) / tiles);
    }

    __device__ __forceinline__ int expert_of(int tile) const {
        int expert = 0, end = E;  // before[expert] <= tile < before[end]
        while (end - expert > 1) {
            const int middle = (expert + end) / 2;
            if (before[middle] <= tile)
                expert = middle;
            else
                end = middle;
        }
        return expert;
    }

    // A tile of an expert whose tiles have `each` pairs, but for the last.
    __device__ __forceinline__ PairTile cut(int expert, int tile, int each) const {
        const int first = offsets[expert] + (tile - before[expert]) * each;
        return {expert, first, min(each, offsets[expert + 1] - first)};
    }
};

// An element of y of its sums, one or two.
template <int ACT, typename T>
__device__ __forceinline__ float gated(const float (&total)[HALVES<ACT>], float alpha, float limit) {
    if constexpr (ACT == CLAMPED_SWIGLU) return clamped_swiglu_of<T>(total[0], total[1], alpha, limit);
    return activated<ACT, T>(total);
}

#endif
