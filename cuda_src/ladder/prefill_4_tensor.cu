// Rung 4: the products of rung 3 on tensor cores (FlashAttention-2's forward pass: Dao, arXiv:2307.08691).
//
//   q, k, v, y    as in ladder.cuh; T is f16 or bf16; sm_80 and later
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder attention.
//
// What changed: a warp multiplies a 16x16 and a 16x8 matrix with one instruction (mma.sync m16n8k16: 2,048
// multiply-adds, where an instruction of rung 3 does 32). Keys and values lie in shared memory as they are, in 16 bits.
// A warp has 16 queries of the block's 64 and all 64 keys of a tile: so its scores and its sums stay in its registers,
// the softmax needs no other warp, and the weights p go from the first product to the second without touching memory.
//
// A thread has of every 16x8 result the rows lane/4 and lane/4 + 8 and the columns 2*(lane%4) and the next. Of the left
// matrix it has the same places of both 8-column halves: that is why p need not move, it is only rounded to T.
//
// Operations: as rung 3, at up to 989 instead of 67 TFLOP/s (H200, dense bf16, and f32 by multiply-adds). Bytes: as
// rung 3; of shared memory half as many for a number, and each is used for 16 queries at once.
// What is left to gain: this kernel loads a tile, waits, computes, and loads the next. The product's kernel on Hopper
// loads while it computes, and its wgmma reads keys and values from shared memory itself, for four warps at a time.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder attention.
#include "ladder/ladder.cuh"
#include "mma.cuh"

constexpr int ROWS = 64, KEYS = 64, THREADS = 128;

// Keys first .. first + KEYS - 1 into shared memory [KEYS][STRIDE], those from `end` on as zeros.
template <int D, int STRIDE, typename T>
__device__ __forceinline__ void fetch(T* shared, const T* x, int first, int end) {
    for (int i = threadIdx.x; i < KEYS * (D / 8); i += THREADS) {
        const int row = i / (D / 8), at = i % (D / 8) * 8;
        cp_async_16(shared + row * STRIDE + at, x + i64(first + row) * D + at, first + row < end);
    }
}

// The second number of __launch_bounds__, blocks on a multiprocessor, tells the compiler how many registers it may use.
template <typename T, int D>
__global__ void __launch_bounds__(THREADS, 2)
    attention_tensor(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ y,
                     int n, int s, int num_heads, int H, f32 scale) {
    constexpr int STRIDE = D + 8;      // the eight rows of an 8x8 matrix lie in different banks
    DYNAMIC_SHARED(T, keys);           // [KEYS][STRIDE]
    T* values = keys + KEYS * STRIDE;  // [KEYS][STRIDE]
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, head = blockIdx.y;
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS, mine = first + warp * 16 + lane / 4;
    const T *from_k = head_rows<D>(k, head, num_heads, H, s), *from_v = head_rows<D>(v, head, num_heads, H, s);

    u32 queries[D / 16][4];  // 16 x 16 matrices: (rows +0, +8) x (columns +0, +8)
#pragma unroll
    for (int i = 0; i < D / 16 * 4; i++) {
        const int row = mine + i % 2 * 8, column = i / 4 * 16 + i % 4 / 2 * 8 + lane % 4 * 2;
        const T* from = q + (i64(row) * num_heads + head) * D + column;
        queries[i / 4][i % 4] = row < n ? *reinterpret_cast<const u32*>(from) : 0;
    }
    float acc[D / 8][4] = {}, largest[2] = {LOWEST, LOWEST}, sum[2] = {};
    const float factor = scale * LOG2_E;
    const int end = seen(min(first + ROWS, n) - 1, n, s);
    for (int at = 0; at < end; at += KEYS) {
        __syncthreads();  // nobody reads the tiles any more
        fetch<D, STRIDE>(keys, from_k, at, end);
        fetch<D, STRIDE>(values, from_v, at, end);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();

        float score[KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                u32 b[4];  // two 16x8 matrices: keys 16*j .. +7, and the next eight
                ldmatrix_x4(b, keys + (16 * j + lane / 16 * 8 + lane % 8) * STRIDE + 16 * i + lane / 8 % 2 * 8);
                multiply(score[2 * j], queries[i], {b[0], b[1]}, T());
                multiply(score[2 * j + 1], queries[i], {b[2], b[3]}, T());
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {  // the online softmax of rung 3, for the rows `mine` and `mine` + 8
            const int visible = seen(mine + 8 * half, n, s) - at - lane % 4 * 2;
            float most = largest[half];
#pragma unroll
            for (int j = 0; j < KEYS / 4; j++) {
                float& x = score[j / 2][2 * half + j % 2];
                x = j / 2 * 8 + j % 2 < visible ? x * factor : -infinity();
                most = fmaxf(most, x);
            }
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            const float shrink = exp2f(largest[half] - most);
            largest[half] = most, sum[half] *= shrink;
#pragma unroll
            for (int j = 0; j < KEYS / 4; j++) {
                float& p = score[j / 2][2 * half + j % 2];
                p = exp2f(p - most);
                sum[half] += p;  // of this thread's own columns
            }
#pragma unroll
            for (int j = 0; j < D / 8; j++) acc[j][2 * half] *= shrink, acc[j][2 * half + 1] *= shrink;
        }
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            const float (&left)[4] = score[2 * i], (&right)[4] = score[2 * i + 1];
            const u32 p[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                              pack<T>(right[2], right[3])};
#pragma unroll
            for (int j = 0; j < D / 16; j++) {
                u32 b[4];
                ldmatrix_x4_trans(b, values + (16 * i + lane % 16) * STRIDE + 16 * j + lane / 16 * 8);
                multiply(acc[2 * j], p, {b[0], b[1]}, T());
                multiply(acc[2 * j + 1], p, {b[2], b[3]}, T());
            }
        }
    }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        float total = sum[half];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int row = mine + 8 * half;
        T* to = y + (i64(row) * num_heads + head) * D + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < D / 8; j++)
            if (row < n)
                *reinterpret_cast<u32*>(to + 8 * j) = pack<T>(acc[j][2 * half] / total, acc[j][2 * half + 1] / total);
    }
}
