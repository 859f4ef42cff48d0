// Rung 2: the two products in tiles that are held in shared memory. The softmax between them is that of rung 1.
//
//   q, k, v, y    as in ladder.cuh
//   scores        [num_heads, n, s] f32    as in rung 1
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder attention.
//
// What changed: a block of 256 threads computes 64 x 64 scores (64 x D elements of y) together. It copies the rows that
// they need into shared memory once, with neighbouring threads reading neighbouring addresses, and every number copied
// is used at least 64 times. A thread computes 4 x 4 scores (4 x D/16 elements of y), so that of what it reads from
// shared memory each number is used at least 4 times.
//
// Mapping: thread (ty, tx) of 16 x 16 has the rows ty + 16*i and the columns tx + 16*j.
//
// Operations: as before. Bytes loaded for the products: at most 1/64 of before. Reads of shared memory: 8 for 16
// multiply-adds, 12 for 32 in the second product (D = 128). A multiprocessor serves one read of a warp a clock, and does
// four multiply-adds of a warp: so at most a half and two thirds of its speed. The score matrix still goes through
// memory.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder attention.
#include "ladder/ladder.cuh"

constexpr int TILE = 64, STEP = 32;
constexpr int STRIDE = STEP + 1;  // one more than the 32 banks: numbers below each other are in different banks

// The second number of __launch_bounds__, blocks on a multiprocessor, tells the compiler how many registers it may use.
template <typename T, int D>
__global__ void __launch_bounds__(256, 3)
    scores_tiled(const T* __restrict__ q, const T* __restrict__ k, f32* __restrict__ scores, int n, int s,
                 int num_heads, int H, f32 scale) {
    __shared__ float a[TILE * STRIDE], b[TILE * STRIDE];  // STEP columns of 64 queries, and of 64 keys
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.z;
    const int first_key = blockIdx.x * TILE, first = blockIdx.y * TILE;
    const T* keys = head_rows<D>(k, head, num_heads, H, s);
    float sum[4][4] = {};
    for (int column = 0; column < D; column += STEP) {
        copy_rows<TILE, STEP, STRIDE>(a, q + head * D, i64(num_heads) * D, first, n, column);
        copy_rows<TILE, STEP, STRIDE>(b, keys, D, first_key, s, column);
        __syncthreads();
#pragma unroll
        for (int d = 0; d < STEP; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] += a[(ty + 16 * i) * STRIDE + d] * b[(tx + 16 * j) * STRIDE + d];
            }
        }
        __syncthreads();  // the tiles may be written again
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int row = first + ty + 16 * i, key = first_key + tx + 16 * j;
            if (row < n && key < s)
                scores[(i64(head) * n + row) * s + key] = key < seen(row, n, s) ? sum[i][j] * scale : -infinity();
        }
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(256, 3) values_tiled(const f32* __restrict__ scores, const T* __restrict__ v,
                                                       T* __restrict__ y, int n, int s, int num_heads, int H) {
    __shared__ float p[TILE * STRIDE], values[STEP * D];  // of 64 queries the weights of STEP keys, and their values
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, first = blockIdx.x * TILE, head = blockIdx.y;
    const T* rows = head_rows<D>(v, head, num_heads, H, s);
    float sum[4][D / 16] = {};
    for (int key = 0; key < s; key += STEP) {
        for (int i = threadIdx.x; i < TILE * STEP; i += blockDim.x) {
            const int row = first + i / STEP, column = key + i % STEP;
            p[i / STEP * STRIDE + i % STEP] = row < n && column < s ? scores[(i64(head) * n + row) * s + column] : 0.f;
        }
        copy_rows<STEP, D, D>(values, rows, D, key, s, 0);
        __syncthreads();
#pragma unroll 8
        for (int d = 0; d < STEP; d++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < D / 16; j++)
                    sum[i][j] += p[(ty + 16 * i) * STRIDE + d] * values[d * D + tx + 16 * j];
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < D / 16; j++) {
            const int row = first + ty + 16 * i;
            if (row < n) y[(i64(row) * num_heads + head) * D + tx + 16 * j] = from_float<T>(sum[i][j]);
        }
    }
}
