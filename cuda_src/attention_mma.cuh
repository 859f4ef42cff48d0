// What the attention kernels on mma.sync share (attention_prefill_mma.cu, attention_backward_mma.cu): how matrices lie
// in shared memory, and the two products of a warp.
//
// Blocks have four warps. In shared memory a row is D/8 vectors of 16 bytes (D rounded up to 16, filled with zeros), at
// the places that Layout says (mma_tiles.cuh).
#ifndef CUPLAMA_ATTENTION_MMA_CUH
#define CUPLAMA_ATTENTION_MMA_CUH

#include "attention.cuh"
#include "mma_tiles.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// ---- shared memory --------------------------------------------------------------------------------------------------

// Rows first .. first+COUNT-1 of a matrix to shared memory, [COUNT][WIDTH]; those from `end` on are zeros. where(row):
// the address of a row's D elements, which may lie anywhere for a row that is not there.
template <int D, int COUNT, typename T, typename Where>
__device__ __forceinline__ void fetch_rows(T* to, int first, int end, Where where) {
    using At = Layout<D>;
    for (int r = threadIdx.x / At::TURNS; r < COUNT; r += THREADS / At::TURNS) {
        const T* from = where(first + r);
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const int vector = threadIdx.x % At::TURNS + u;
            cp_async_16(to + At::at(r, vector), from + vector * 8, first + r < end && vector * 8 < D);
        }
    }
}

// The same of two matrices. where(row, from, other): sets the addresses of a row of each.
template <int D, int COUNT, typename T, typename Where>
__device__ __forceinline__ void fetch_both(T* to, T* to_other, int first, int end, Where where) {
    using At = Layout<D>;
    for (int r = threadIdx.x / At::TURNS; r < COUNT; r += THREADS / At::TURNS) {
        const T *from, *other;
        where(first + r, from, other);
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const int vector = threadIdx.x % At::TURNS + u;
            const bool valid = first + r < end && vector * 8 < D;
            cp_async_16(to + At::at(r, vector), from + vector * 8, valid);
            cp_async_16(to_other + At::at(r, vector), other + vector * 8, valid);
        }
    }
}

// Back from shared memory, by LANES threads of which this is number `thread`: up to COUNT rows before `end`.
template <int D, int COUNT, int LANES, typename T, typename Where>
__device__ __forceinline__ void store_rows(const T* from, int thread, int first, int end, Where where) {
    using At = Layout<D>;
    for (int r = thread / At::TURNS; r < COUNT && first + r < end; r += LANES / At::TURNS) {
        T* to = where(first + r);
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const int vector = thread % At::TURNS + u;
            if (vector * 8 < D) store<8>(to + vector * 8, load<8>(from + At::at(r, vector)));
        }
    }
}

// ---- products of a warp ---------------------------------------------------------------------------------------------

// Products to scores, but for the last factor: see Scaling.
template <int MT, int N, typename T, bool CAPPED>
__device__ __forceinline__ void bend_scores(float (&score)[MT][N][4], const Scaling<T, CAPPED>& scaling) {
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int j = 0; j < N; j++) scaling.bend_all(score[m][j]);
    }
}

// acc += weights b: the weights, rounded to T, times 8*N rows of b, of which the first 16 * chunks columns.
template <typename T, int D, int MT, int N, int C>
__device__ __forceinline__ void add_rows(float (&acc)[MT][C][4], const float (&weights)[MT][N][4], const T* b_rows,
                                         const Lane<D>& down, int chunks = C / 2) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float (&from)[4] = weights[m][2 * i + e / 2];
                a[m][e] = pack<T>(from[e % 2 * 2], from[e % 2 * 2 + 1]);
            }
        }
#pragma unroll
        for (int j = 0; j < C / 2; j++) {
            if (j >= chunks) break;
            u32 both[4];
            ldmatrix_x4_trans(both, b_rows + down.at(16 * i, j));
            const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply(acc[m][2 * j], a[m], left, T());
                multiply(acc[m][2 * j + 1], a[m], right, T());
            }
        }
    }
}

#endif
