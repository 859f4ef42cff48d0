// Rung 3: one kernel and no score matrix, by an online softmax (the idea of FlashAttention: Dao et al.,
// arXiv:2205.14135; the softmax: Milakov & Gimelshein, arXiv:1805.02867).
//
//   q, k, v, y    as in ladder.cuh
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder attention.
//
// What changed: a block keeps 64 queries, walks over the keys in tiles of 32, and uses up the scores of a tile at once.
// A softmax seems to need the whole row first. It does not: with the largest score m so far, the sum l of
// exp(score - m) and the sum acc of exp(score - m) * value, a tile whose largest score is m' > m asks for nothing but a
// factor:
//
//     l, acc *= exp(m - m');    then add the tile's exp(score - m') and exp(score - m') * value
//     y = acc / l               at the end
//
// And a block ends with the last key that one of its queries sees: half of the square is never computed.
//
// Operations: 4 * num_heads * D * pairs; pairs are what the mask lets through, n * s / 2 of a whole prompt.
// Bytes: q and y once, k and v once for every 64 queries, and those mostly from the L2 cache; no score matrix, so
// 16 * num_heads * n * s bytes fewer than rung 2. The scratch memory of 4 * num_heads * n * s bytes is gone as well.
//
// Mapping: grid (tiles of queries, num_heads); thread (ty, tx) of 16 x 16 has the queries ty + 16*i, of a tile the keys
// tx + 16*j, and of y the columns 64*j + 4*tx .. +3. The queries are scaled by log2(e) too, so that
// exponentials are powers of two.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder attention.
#include "ladder/ladder.cuh"

constexpr int ROWS = 64, KEYS = 32, WEIGHTS = KEYS + 4;

// The second number of __launch_bounds__, blocks on a multiprocessor, tells the compiler how many registers it may use.
template <typename T, int D>
__global__ void __launch_bounds__(256, 2)
    attention_online(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ y,
                     int n, int s, int num_heads, int H, f32 scale) {
    constexpr int STRIDE = D + 4;           // rows of 16-byte vectors begin in different banks
    DYNAMIC_SHARED(float, queries);         // [ROWS][STRIDE]
    float* tile = queries + ROWS * STRIDE;  // [KEYS][STRIDE], keys and values in turn
    float* weights = tile + KEYS * STRIDE;  // [ROWS][WEIGHTS]
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16, head = blockIdx.y;
    const int first = (gridDim.x - 1 - blockIdx.x) * ROWS;  // the last queries see the most keys: they start first
    const T *keys = head_rows<D>(k, head, num_heads, H, s), *values = head_rows<D>(v, head, num_heads, H, s);

    copy_rows<ROWS, D, STRIDE>(queries, q + head * D, i64(num_heads) * D, first, n, 0, scale * LOG2_E);
    float acc[4][D / 64][4] = {}, largest[4] = {LOWEST, LOWEST, LOWEST, LOWEST}, sum[4] = {};
    const int end = seen(min(first + ROWS, n) - 1, n, s);
    for (int at = 0; at < end; at += KEYS) {
        __syncthreads();  // nobody reads the tile any more
        copy_rows<KEYS, D, STRIDE>(tile, keys, D, at, end, 0);
        __syncthreads();
        float score[4][2] = {};
#pragma unroll 4
        for (int d = 0; d < D; d += 4) {
            Pack<f32, 4> a[4], b[2];
#pragma unroll
            for (int i = 0; i < 4; i++) a[i] = load<4>(queries + (ty + 16 * i) * STRIDE + d);
#pragma unroll
            for (int j = 0; j < 2; j++) b[j] = load<4>(tile + (tx + 16 * j) * STRIDE + d);
#pragma unroll
            for (int e = 0; e < 4; e++) {
#pragma unroll
                for (int i = 0; i < 4; i++) score[i][0] += a[i].v[e] * b[0].v[e], score[i][1] += a[i].v[e] * b[1].v[e];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {  // the online softmax; the 16 threads of a query are neighbours in a warp
            const int visible = seen(first + ty + 16 * i, n, s) - at;
            float most = largest[i];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (tx + 16 * j >= visible) score[i][j] = -infinity();
                most = fmaxf(most, score[i][j]);
            }
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, lanes));
            const float shrink = exp2f(largest[i] - most);
            largest[i] = most, sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float p = exp2f(score[i][j] - most);
                sum[i] += p;  // of this thread's own keys
                weights[(ty + 16 * i) * WEIGHTS + tx + 16 * j] = p;
            }
#pragma unroll
            for (int j = 0; j < D / 16; j++) acc[i][j / 4][j % 4] *= shrink;
        }
        __syncthreads();
        copy_rows<KEYS, D, STRIDE>(tile, values, D, at, end, 0);
        __syncthreads();
#pragma unroll 4
        for (int key = 0; key < KEYS; key++) {
#pragma unroll
            for (int j = 0; j < D / 64; j++) {
                const Pack<f32, 4> value = load<4>(tile + key * STRIDE + 64 * j + 4 * tx);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float p = weights[(ty + 16 * i) * WEIGHTS + key];
#pragma unroll
                    for (int e = 0; e < 4; e++) acc[i][j][e] += p * value.v[e];
                }
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], lanes);
        const int row = first + ty + 16 * i;
        if (row >= n) continue;
#pragma unroll
        for (int j = 0; j < D / 64; j++) {
            Pack<T, 4> four;
#pragma unroll
            for (int e = 0; e < 4; e++) four.v[e] = from_float<T>(acc[i][j][e] / sum[i]);
            store<4>(y + (i64(row) * num_heads + head) * D + 64 * j + 4 * tx, four);
        }
    }
}
