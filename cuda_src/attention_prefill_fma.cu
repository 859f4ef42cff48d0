// Causal grouped-query attention of many new tokens over the paged KV cache, without tensor cores: for f32, and for
// GPUs and page sizes that attention_prefill_mma.cu does not take. One new token per sequence: attention_decode.cu.
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
//   x           [n, (num_heads+2H)*D] T    rows cu_seqlens[i] .. cu_seqlens[i+1] are the new tokens of sequence i, the
//                                          last of its seq_lens[i] tokens; the query heads come first in a row
//   k, v        [P, H, S, D] C             pages of S tokens
//   cu_seqlens  [b+1] i32
//   seq_lens    [b] i32
//   page_table  [b, M] i32                 token t of sequence i lies on page page_table[i][t / S]
//   y           [n, num_heads*D] T
//
// C is T, or e4m3. D is a multiple of 8, at most 256; k and v lie on 16-byte boundaries. Scores, softmax statistics and
// sums are f32. Exponentials are powers of two: the factor log2(e) is part of the scaled query.
//
// Mapping: grid (tiles, H), 256 threads. The rows of a tile are (token, head of the group) pairs of one sequence, so
// the group shares K and V and a sequence with one token wastes little. Thread (ty, tx) of 16 x 16 computes
// ROWS/16 x KEYS/16 scores and then ROWS/16 x D/16 outputs with FMA, all operands f32 in shared memory; the next tile
// of K or V is on its way in registers meanwhile. Tiles outside the causal band are skipped.
//
// The grid depends on shapes alone (lengths live on the device): tiles beyond a sequence's last row return at once.
//
// Op: cuplama/ops/attention.py. Tests: the registry's in tests/ops/test_ops.py, and tests/ops/test_attention.py.
// Benchmark: `cuplama kernels bench`.
// Tried: scores unrolled by 4, which spilled registers.
#include "attention.cuh"
#include "e4m3.cuh"

constexpr int PREFILL_THREADS = 256;

// A tile of K or V on its way from the pages to shared memory: each thread moves vectors of 8 elements.
template <typename C, int D, int S, int KEYS, int STRIDE>
struct PageTile {
    static constexpr int COUNT = KEYS * D / 8, VECTORS = (COUNT + PREFILL_THREADS - 1) / PREFILL_THREADS;
    Pack<C, 8> held[VECTORS];

    // Tokens first .. first+KEYS-1; those from `high` on repeat the last (their scores are masked).
    __device__ __forceinline__ void fetch(const C* cache, const i32* table, int first, int high, int head, int H) {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            const int vector = threadIdx.x + u * PREFILL_THREADS;
            if (COUNT % PREFILL_THREADS == 0 || vector < COUNT) {
                const int token = min(first + vector / (D / 8), high - 1);
                held[u] = load<8>(cache + token_offset<S, D>(table, token, head, H) + vector % (D / 8) * 8);
            }
        }
    }

    __device__ __forceinline__ void stash(float* tile) const {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            const int vector = threadIdx.x + u * PREFILL_THREADS;
            if (COUNT % PREFILL_THREADS == 0 || vector < COUNT) {
                const auto& x = readable(held[u]);
#pragma unroll
                for (int half = 0; half < 8; half += 4) {
                    Pack<f32, 4> four;
#pragma unroll
                    for (int i = 0; i < 4; i++) four.v[i] = to_float(x.v[half + i]);
                    store<4>(tile + vector / (D / 8) * STRIDE + vector % (D / 8) * 8 + half, four);
                }
            }
        }
    }
};

// ---- a thread's rows ------------------------------------------------------------------------------------------------

// Thread (ty, tx) has the rows R*ty + i, of scores the keys tx + 16*j, of outputs the columns 2*tx + 32*j and the next.
template <int D, int ROWS, int KEYS, int STRIDE>
struct ThreadRows {
    static constexpr int R = ROWS / 16, C = KEYS / 16, PAIRS = (D + 31) / 32;
    int tx, ty, position[R];                          // of each row's token in its sequence
    float acc[R][PAIRS][2] = {}, largest[R], sum[R];  // sum: of the thread's own keys

    __device__ __forceinline__ ThreadRows(const Tile& tile, int group) : tx(threadIdx.x % 16), ty(threadIdx.x / 16) {
#pragma unroll
        for (int i = 0; i < R; i++) {
            position[i] = tile.old + (tile.first + R * ty + i) / group;
            largest[i] = LOWEST, sum[i] = 0.f;
        }
    }

    // score += the rows of q times the keys, both [][STRIDE].
    __device__ __forceinline__ void multiply_keys(float (&score)[R][C], const float* q, const float* keys) const {
#pragma unroll 1
        for (int d = 0; d < D; d += 4) {
            Pack<f32, 4> a[R], c[C];
#pragma unroll
            for (int i = 0; i < R; i++) a[i] = load<4>(q + (R * ty + i) * STRIDE + d);
#pragma unroll
            for (int j = 0; j < C; j++) c[j] = load<4>(keys + (tx + 16 * j) * STRIDE + d);
#pragma unroll
            for (int i = 0; i < R; i++) {
#pragma unroll
                for (int j = 0; j < C; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) score[i][j] += a[i].v[e] * c[j].v[e];
                }
            }
        }
    }

    // Scores of the keys from `at` on to weights [ROWS][KEYS + 4]; the sums so far go with the new maximum.
    __device__ __forceinline__ void softmax(float (&score)[R][C], float* weights, int at, int window) {
#pragma unroll
        for (int i = 0; i < R; i++) {
            float most = largest[i];
#pragma unroll
            for (int j = 0; j < C; j++) {
                const int distance = position[i] - (at + tx + 16 * j);
                if (distance < 0 || (window > 0 && distance >= window)) score[i][j] = -infinity();
                most = fmaxf(most, score[i][j]);
            }
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, lanes));
            const float shrink = exp2f(largest[i] - most);
            largest[i] = most;
            sum[i] *= shrink;
#pragma unroll
            for (int j = 0; j < C; j++) {
                const float p = exp2f(score[i][j] - most);
                sum[i] += p;
                weights[(R * ty + i) * (KEYS + 4) + tx + 16 * j] = p;
            }
#pragma unroll
            for (int j = 0; j < PAIRS; j++) acc[i][j][0] *= shrink, acc[i][j][1] *= shrink;
        }
    }

    // acc += the weights times the values [KEYS][STRIDE].
    __device__ __forceinline__ void add_values(const float* weights, const float* values) {
#pragma unroll 1
        for (int key = 0; key < KEYS; key += 4) {
            Pack<f32, 4> p[R];
#pragma unroll
            for (int i = 0; i < R; i++) p[i] = load<4>(weights + (R * ty + i) * (KEYS + 4) + key);
#pragma unroll
            for (int e = 0; e < 4; e++) {
#pragma unroll
                for (int j = 0; j < PAIRS; j++) {
                    const int column = 2 * tx + 32 * j;
                    if (D % 32 == 0 || column < D) {
                        const Pack<f32, 2> value = load<2>(values + (key + e) * STRIDE + column);
#pragma unroll
                        for (int i = 0; i < R; i++) {
                            acc[i][j][0] += p[i].v[e] * value.v[0];
                            acc[i][j][1] += p[i].v[e] * value.v[1];
                        }
                    }
                }
            }
        }
    }

    // The rows of y, from that of the sequence's first new token on.
    template <typename T>
    __device__ __forceinline__ void store_rows(const Tile& tile, T* y, int kv_head, int group, int num_heads) {
        const int fresh = tile.end / group;
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], lanes);
            const int row = tile.first + R * ty + i, token = row / group, head = kv_head * group + row % group;
            if (token >= fresh) continue;
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                const int column = 2 * tx + 32 * j;
                if (D % 32 == 0 || column < D) {
                    Pack<T, 2> out;
                    out.v[0] = from_float<T>(acc[i][j][0] / sum[i]);
                    out.v[1] = from_float<T>(acc[i][j][1] / sum[i]);
                    store<2>(y + (i64(tile.start + token) * num_heads + head) * D + column, out);
                }
            }
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, typename C, int D, int S, int ROWS, int KEYS>
__global__ void __launch_bounds__(PREFILL_THREADS, 2)
    attention_prefill_fma(const T* __restrict__ x, const C* __restrict__ k, const C* __restrict__ v,
                          const i32* __restrict__ cu_seqlens, const i32* __restrict__ seq_lens,
                          const i32* __restrict__ page_table, T* __restrict__ y, int b, int num_heads, int H, int M,
                          int window, float scale) {
    constexpr int STRIDE = (D + 31) / 32 * 32 + 4;  // floats; 4 more than a multiple of 32 banks: no conflicts
    DYNAMIC_SHARED(float, q);                       // [ROWS][STRIDE], scaled
    float* kv = q + ROWS * STRIDE;                  // [KEYS][STRIDE], keys and values in turn
    float* weights = kv + KEYS * STRIDE;            // [ROWS][KEYS + 4]

    const int group = num_heads / H, kv_head = blockIdx.y;
    const int number = gridDim.x - 1 - blockIdx.x;  // the last tiles see the most keys: start them first
    const Tile part(cu_seqlens, seq_lens, b, group, ROWS, number);
    const int fresh = part.end / group;
    if (part.first >= part.end) return;

    const i32* table = page_table + i64(part.sequence) * M;
    ThreadRows<D, ROWS, KEYS, STRIDE> rows(part, group);
    const Band<ROWS, KEYS> band(part, group, window);
    PageTile<C, D, S, KEYS, STRIDE> tile;
    tile.fetch(k, table, band.low, band.high, kv_head, H);
    for (int i = threadIdx.x; i < ROWS * D; i += PREFILL_THREADS) {
        const int row = part.first + i / D, token = row / group, head = kv_head * group + row % group;
        const bool there = token < fresh;
        const i64 at = (i64(part.start + token) * (num_heads + 2 * H) + head) * D + i % D;
        q[i / D * STRIDE + i % D] = there ? to_float(x[at]) * (scale * LOG2_E) : 0.f;
    }

    for (int at = band.low; at < band.high; at += KEYS) {
        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        tile.fetch(v, table, at, band.high, kv_head, H);
        float score[ROWS / 16][KEYS / 16] = {};
        rows.multiply_keys(score, q, kv);
        rows.softmax(score, weights, at, window);

        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        if (at + KEYS < band.high) tile.fetch(k, table, at + KEYS, band.high, kv_head, H);
        rows.add_values(weights, kv);
    }
    rows.store_rows(part, y, kv_head, group, num_heads);
}
