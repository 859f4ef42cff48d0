// Matrices of 16 bits in shared memory for mma.sync: where their vectors lie, products of a warp's rows with them, and
// sums back to such a place.
#ifndef CUPLAMA_MMA_TILES_CUH
#define CUPLAMA_MMA_TILES_CUH

#include "mma.cuh"

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
