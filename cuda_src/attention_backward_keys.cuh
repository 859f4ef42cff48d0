// What attention_backward_wgmma.cu is made of: the products and sums of a warpgroup, and how their matrices lie.
#ifndef CUPLAMA_ATTENTION_BACKWARD_KEYS_CUH
#define CUPLAMA_ATTENTION_BACKWARD_KEYS_CUH

#include "attention_backward_wgmma.cuh"
#include "mma.cuh"

// ---- per dtype ------------------------------------------------------------------------------------------------------

template <typename T>
struct Product;
template <>
struct Product<f16> {
    static __device__ __forceinline__ void rows(float (&d)[32], u64 a, u64 b, bool add) { wgmma_n64_f16(d, a, b, add); }
    static __device__ __forceinline__ void columns(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_columns_f16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_f16(d, a, b);
    }
};
template <>
struct Product<bf16> {
    static __device__ __forceinline__ void rows(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_n64_bf16(d, a, b, add);
    }
    static __device__ __forceinline__ void columns(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_columns_bf16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_bf16(d, a, b);
    }
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// Element of a vector of 8 columns in a matrix of `rows` rows.
__device__ __forceinline__ int place(int rows, int row, int vector) {
    return vector / 8 * (rows * PANEL) + row * PANEL + (vector % 8 ^ row % 8) * 8;
}

// Where a block's matrices lie, one behind the other: k and v [D/64][KEYS][64], q and dy [2][D/64][M][64], and ds
// [2][M/64][KEYS][64], transposed.
template <typename T, int D, int M>
struct Shared {
    static constexpr int K = 0, V = KEYS * D, Q = 2 * KEYS * D, DY = Q + 2 * M * D, DS = DY + 2 * M * D;  // elements
    u64 rows;                   // the first as wgmma_matrix has it, with rows across the sum
    u64 key_panel, tile_panel;  // added to it: with rows along the sum, for a matrix of KEYS or of M rows

    __device__ __forceinline__ Shared(const T* first)
        : rows(wgmma_matrix(first, 1)), key_panel(wgmma_matrix(first, KEYS * PANEL * sizeof(T)) - rows),
          tile_panel(wgmma_matrix(first, M * PANEL * sizeof(T)) - rows) {}
    __device__ __forceinline__ u64 matrix(int element) const { return rows + element / 8; }
};

// 64 keys of a block. A thread has the rows `here` and here + 8 of them, and columns 8*j + 2*(lane%4) and the next:
// queries in the scores, dimensions in the sums. Queries are taken by 64.
template <typename T, int D, int M>
struct GroupKeys {
    static constexpr int STAGE = M * D / 8, STEP = 16 * PANEL / 8;  // a stage, 16 rows along a sum; of 16 bytes
    using Sums = float[D / 2];
    using Square = float[32];  // 64 x 64
    using Left = u32[4][4];    // the same rounded, as a left operand
    const int part, thread, lane, here;
    Sums dk = {}, dv = {};

    __device__ __forceinline__ GroupKeys()
        : part(threadIdx.x / GROUP - 1), thread(threadIdx.x % GROUP), lane(threadIdx.x % WARP),
          here(part * MINE + thread / WARP * 16 + lane / 4) {}

    // Begins d = a b^T over D columns: a has the block's keys as rows, b the queries.
    __device__ __forceinline__ void multiply_rows(Square& d, u64 a, u64 b) const {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {  // 32 bytes further, or a panel; in units of 16 bytes
            const int column = i % 4 * 2;
            Product<T>::rows(d, a + (part * (MINE * 8) + i / 4 * (KEYS * 8) + column), b + (i / 4 * (M * 8) + column),
                             i > 0);
        }
        wgmma_commit();
    }

    // Begins sums += left b: left are weights of this warpgroup's keys and the 64 queries of b.
    __device__ __forceinline__ void add_rows(Sums& sums, const Left& left, u64 b) const {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) Product<T>::sum(sums, left[i], b + i * STEP);
        wgmma_commit();
    }

    // Begins this warpgroup's half of dq = ds k: columns of D = 128, rows of D = 64.
    __device__ __forceinline__ void multiply_keys(Square& dq, u64 ds_columns, u64 k_columns) const {
        const int rows = M == 128 ? part : 0, columns = M == 128 ? 0 : part;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            Product<T>::columns(dq, ds_columns + (rows * (KEYS * 8) + i * STEP),
                                k_columns + (columns * (KEYS * 8) + i * STEP), i > 0);
        wgmma_commit();
    }

    // Shuts out the pairs of which the query does not see the key. at: the first query less the block's first key.
    __device__ __forceinline__ void mask(Square& score, int at, int window) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int ahead = at + lane % 4 * 2 - here - 8 * half;
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int distance = ahead + (j * 8 + e);
                    if (distance < 0 || (window > 0 && distance >= window)) score[4 * j + 2 * half + e] = -infinity();
                }
            }
        }
    }

    // Scores to weights. lse: of the queries, in powers of two.
    template <bool CAPPED>
    __device__ __forceinline__ void weigh(Square& score, const float* lse, int at, int window,
                                          const Scaling<T, CAPPED>& scaling) const {
        const float factor = scaling.factor;
        scaling.bend_all(score);
        const int near = at - part * MINE;
        if (near < MINE - 1 || (window > 0 && near + 63 >= window)) {
            if (window > 0)
                mask(score, at, window);
            else
                mask(score, at, 0);  // a copy that does not look for windows
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Pack<float, 2> shift = load<2>(lse + j * 8 + lane % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float& low = score[4 * j + 2 * half];
                float& high = score[4 * j + 2 * half + 1];
                low = exp2f(low * factor - shift.v[0]), high = exp2f(high * factor - shift.v[1]);
            }
        }
    }

    // ds = weights (dp - delta), times the slope of the scores, and p = weights, rounded.
    __device__ __forceinline__ void round_weights(Left& p, const Square& weights) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) p[i][e] = pack<T>(weights[8 * i + 2 * e], weights[8 * i + 2 * e + 1]);
        }
    }
    template <bool CAPPED>
    __device__ __forceinline__ void differ(Left& ds, const Square& weights, const Square& dp, const float* lse,
                                           const Scaling<T, CAPPED>& scaling) const {
        const float* delta = lse + M;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Pack<float, 2> less = load<2>(delta + j * 8 + lane % 4 * 2);
            const Pack<float, 2> shift = CAPPED ? load<2>(lse + j * 8 + lane % 4 * 2) : Pack<float, 2>{};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = 4 * j + 2 * half;
                const float low = weights[i], high = weights[i + 1];
                ds[j / 2][half + j % 2 * 2] =
                    pack<T>(low * (dp[i] - less.v[0]) * scaling.slope(scaling.bent(low, shift.v[0])),
                            high * (dp[i + 1] - less.v[1]) * scaling.slope(scaling.bent(high, shift.v[1])));
            }
        }
    }

    // The differences to shared memory, where the other warpgroup reads them too.
    __device__ __forceinline__ void store_differences(T* to, const Left& ds) const {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<u32*>(to + place(KEYS, here + 8 * half, j) + lane % 4 * 2) =
                    ds[j / 2][half + j % 2 * 2];
        }
    }

    // Adds dq to the sums of a tile and head, or begins them. They lie as the registers do: 8 times 4 of a thread.
    __device__ __forceinline__ void add_queries(const Square& dq, float* sums, bool begin) const {
        float* to = sums + part * (M * D / 2) + thread * 4;
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (begin)
                store<4>(to + i * (GROUP * 4),
                         Pack<float, 4>{{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]}});
        if (begin) return;
#pragma unroll
        for (int i = 0; i < 8; i++)
            red_add_4(to + i * (GROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
    }

    // Rows of dk or dv, through shared memory, so that whole rows are written. left: keys from the block's first on.
    __device__ __forceinline__ void store_rows(T* stage, const Sums& sums, float factor, T* to, int width,
                                               int left) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                *reinterpret_cast<u32*>(stage + place(KEYS, here + 8 * half, j) + lane % 4 * 2) =
                    pack<T>(sums[4 * j + 2 * half] * factor, sums[4 * j + 2 * half + 1] * factor);
        }
        __syncwarp();
        for (int i = lane / 8; i < 16; i += WARP / 8) {
            const int row = part * MINE + thread / WARP * 16 + i;
            if (row >= left) break;
            for (int vector = lane % 8; vector < D / 8; vector += 8)
                store<8>(to + i64(row) * width + vector * 8, load<8>(stage + place(KEYS, row, vector)));
        }
        __syncwarp();
    }
};

#endif
