// What the attention kernels on mma.sync share (attention_prefill_mma.cu, attention_backward_mma.cu): how matrices lie
// in shared memory, and the two products of a warp.
//
// Blocks have four warps. In shared memory a row is D/8 vectors of 16 bytes (D rounded up to 16, filled with zeros),
// stored at permuted places so that the 8 rows of an 8x8 matrix always lie in different banks: see Layout.
#ifndef CUPLAMA_ATTENTION_MMA_CUH
#define CUPLAMA_ATTENTION_MMA_CUH

#include "attention.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// ---- shared memory --------------------------------------------------------------------------------------------------

// Where the 16-byte vectors of a matrix with rows of D elements lie. Eight rows at one column must fall into the eight
// 16-byte groups of the banks. A row is VECTORS = odd * 2^k vectors, so rows already differ in the upper 3-k bits of
// the group; the lower k bits are exchanged by an exclusive or with the row's upper bits. TURNS = 2^k, at most 8,
// vectors change places among themselves; as many threads copy a row, so that a thread's vectors differ by constants.
template <int D>
struct Layout {
    static constexpr int WIDTH = (D + 15) / 16 * 16, VECTORS = WIDTH / 8;
    static constexpr int TURNS = VECTORS % 8 == 0 ? 8 : VECTORS % 4 == 0 ? 4 : 2;

    static __device__ __forceinline__ int turn(int row) { return row / (8 / TURNS) % TURNS; }
    static __device__ __forceinline__ int at(int row, int vector) { return row * WIDTH + (vector ^ turn(row)) * 8; }
};

// The place of a lane's row in an ldmatrix that reads columns 16*i and 16*i + 8 of rows that differ by multiples of 8.
// first: the lane's row; upper: whether the lane reads column 16*i + 8.
template <int D>
struct Lane {
    int base, turned;

    __device__ __forceinline__ Lane(int first, bool upper)
        : base(first * Layout<D>::WIDTH), turned((Layout<D>::turn(first % 8) ^ int(upper)) * 8) {}

    __device__ __forceinline__ int at(int row, int i) const {  // row, i: constants once loops are unrolled
        constexpr int LOW = (Layout<D>::TURNS - 1) * 8;
        return base + (turned ^ (16 * i & LOW)) + (row * Layout<D>::WIDTH + (16 * i & ~LOW));
    }
};

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

// MT matrices of 16 rows. A lane has rows lane/4 and lane/4 + 8 of each, of every 8 columns 2*(lane%4) and the next.
// ldmatrix reads 2x2 matrices: first down and then to the right, or the other way around.

template <int D>
__device__ __forceinline__ Lane<D> lane_down() {
    return Lane<D>(threadIdx.x % 16, threadIdx.x % WARP / 16);
}
template <int D>
__device__ __forceinline__ Lane<D> lane_across() {
    return Lane<D>(threadIdx.x % 8 + threadIdx.x % WARP / 16 * 8, threadIdx.x / 8 % 2);
}

// score += a b^T: rows of a, 16 * MT of the warp's own, times N rows of b. Sums over D.
template <typename T, int D, int MT, int N>
__device__ __forceinline__ void multiply_rows(float (&score)[MT][N][4], const T* a_rows, const T* b_rows,
                                              const Lane<D>& down, const Lane<D>& across) {
#pragma unroll
    for (int i = 0; i < Layout<D>::WIDTH / 16; i++) {
        u32 a[MT][4];
#pragma unroll
        for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], a_rows + down.at(16 * m, i));
#pragma unroll
        for (int j = 0; j < N / 2; j++) {
            u32 both[4];
            ldmatrix_x4(both, b_rows + across.at(16 * j, i));
            const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
            for (int m = 0; m < MT; m++) {
                multiply(score[m][2 * j], a[m], left, T());
                multiply(score[m][2 * j + 1], a[m], right, T());
            }
        }
    }
}

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

// The sums, rounded to T, to rows in shared memory, each row times a factor of its own.
template <int D, typename T, int MT, int C>
__device__ __forceinline__ void stash_rows(T* to, const float (&acc)[MT][C][4], const float (&factor)[MT][2],
                                           int chunks = C / 2) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int m = 0; m < MT; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < C; j++) {
                if (j / 2 >= chunks) break;
                *reinterpret_cast<u32*>(to + Layout<D>::at(m * 16 + half * 8 + lane / 4, j) + lane % 4 * 2) =
                    pack<T>(acc[m][j][2 * half] * factor[m][half], acc[m][j][2 * half + 1] * factor[m][half]);
            }
        }
    }
}

#endif
