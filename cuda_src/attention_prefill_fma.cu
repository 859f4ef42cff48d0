// Causal grouped-query attention of many new tokens over the paged KV cache, without tensor cores: for f32, and for
// GPUs and page sizes that attention_prefill_mma.cu does not take. One new token per sequence: attention_decode.cu.
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
// CAPPED, scores s = q k^T * scale are softcap * tanh(s / softcap); with SINKS each head has one more logit in the sum of
// its softmax, without a value.
//
//   x           [n, heads*D] T    rows cu_seqlens[i] .. cu_seqlens[i+1] are the new tokens of sequence i, the
//                                          last of its seq_lens[i] tokens; the query heads come first in a row
//   k, v        [P, H, S, D] C             pages of S tokens
//   cu_seqlens  [b+1] i32
//   seq_lens    [b] i32
//   page_table  [b, M] i32                 token t of sequence i lies on page page_table[i][t / S]
//   sinks       [num_heads] T
//   y           [n, num_heads*D] T
//
// S = 0 is training's op self_attention: there is no cache, keys and values are columns of x behind the queries, all
// tokens are new, and the logarithm of each softmax's sum is kept for the backward pass:
//   lse         [n, num_heads] f32         ln(sum(exp(q k^T * scale))), with the sink; nullptr for the paged cache
//
// C is T, or e4m3. D is a multiple of 8 up to 256, or of 16 up to 512; k and v lie on 16-byte
// boundaries. Scores, softmax statistics and sums are f32. Exponentials are powers of two: the factor log2(e) is part of the scaled query.
//
// Mapping: grid (tiles, H), 256 threads. The rows of a tile are (token, head of the group) pairs of one sequence, so
// the group shares K and V and a sequence with one token wastes little. Thread (ty, tx) of 16 x 16 computes
// ROWS/16 x KEYS/16 scores and then ROWS/16 x D/16 outputs with FMA, all operands f32 in shared memory; the next tile
// of K or V is on its way in registers meanwhile. Tiles outside the causal band are skipped.
//
// The grid depends on shapes alone (lengths live on the device): tiles beyond a sequence's last row return at once.
//
// Ops: cuplama/ops/attention.py and, with S = 0, cuplama/ops/self_attention.py.
// Tests: the registry's in tests/ops/test_ops.py, tests/ops/test_attention.py, tests/ops/test_self_attention.py.
// Benchmark: `cuplama kernels bench`.
// Tried: scores unrolled by 4, which spilled registers.
#include "attention_fma.cuh"

// ---- a thread's rows ------------------------------------------------------------------------------------------------

// Thread (ty, tx) has the rows R*ty + i, of scores the keys tx + 16*j, of outputs the columns 2*tx + 32*j and the next.
template <int D, int ROWS, int KEYS>
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

    // Scores of the keys from `at` on to weights [ROWS][KEYS + 4]; the sums so far go with the new maximum.
    template <typename T, bool CAPPED>
    __device__ __forceinline__ void softmax(float (&score)[R][C], float* weights, int at, int window,
                                            const Scaling<T, CAPPED>& scaling) {
#pragma unroll
        for (int i = 0; i < R; i++) {
            float most = largest[i];
#pragma unroll
            for (int j = 0; j < C; j++) {
                const int distance = position[i] - (at + tx + 16 * j);
                score[i][j] = scaling.rest(score[i][j]);
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

    // The rows of y, from that of the sequence's first new token on, and of lse, if it is wanted.
    template <bool SINKS, typename T>
    __device__ __forceinline__ void store_rows(const Tile& tile, T* y, f32* lse, const T* sinks, int kv_head, int group,
                                               int num_heads) {
        const int fresh = tile.end / group;
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], lanes);
            const int row = tile.first + R * ty + i, token = row / group, head = kv_head * group + row % group;
            if (token >= fresh) continue;
            const i64 at = i64(tile.start + token) * num_heads + head;
            sum[i] = with_sink<SINKS>(sum[i], largest[i], sinks, head);
            if (lse != nullptr && tx == 0) lse[at] = log_sum(largest[i], sum[i]);
            store_sums<D>(y + at * D, acc[i], [&](float x) { return x / sum[i]; });
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, typename C, int D, int S, int ROWS, int KEYS, bool CAPPED, bool SINKS>
__global__ void __launch_bounds__(THREADS, BLOCKS<D>)
    attention_prefill_fma(const T* __restrict__ x, const C* __restrict__ k, const C* __restrict__ v,
                          const i32* __restrict__ cu_seqlens, const i32* __restrict__ seq_lens,
                          const i32* __restrict__ page_table, T* __restrict__ y, f32* __restrict__ lse, int b,
                          int num_heads, int H, int heads, int M, int window, float scale, const T* __restrict__ sinks,
                          float softcap) {
    DYNAMIC_SHARED(float, q);                // [ROWS][STRIDE], scaled
    float* kv = q + ROWS * STRIDE<D>;        // [KEYS][STRIDE], keys and values in turn
    float* weights = kv + KEYS * STRIDE<D>;  // [ROWS][KEYS + 4]

    const int group = num_heads / H, kv_head = blockIdx.y;
    const int number = gridDim.x - 1 - blockIdx.x;  // the last tiles see the most keys: start them first
    const Tile part = Tile::of<S>(cu_seqlens, seq_lens, b, group, ROWS, number);
    const int fresh = part.end / group;
    if (part.first >= part.end) return;
    if (part.blind()) return store_zeros<D>(y, part, ROWS, group, kv_head, num_heads);

    const i32* table = page_table + i64(part.sequence) * M;
    if constexpr (S == 0) {
        k = x + (i64(part.start) * heads + num_heads + kv_head) * D;
        v = k + H * D;
    }
    ThreadRows<D, ROWS, KEYS> rows(part, group);
    const Band<ROWS, KEYS> band(part, group, window);
    RowTile<C, D, KEYS> tile;
    const auto fetch = [&](const C* from, int at) {
        tile.fetch(at, band.high,
                   [&](int token) { return from + token_offset<S, D>(table, token, kv_head, S == 0 ? heads : H); });
    };
    fetch(k, band.low);
    for (int i = threadIdx.x; i < ROWS * D; i += THREADS) {
        const int row = part.first + i / D, token = row / group, head = kv_head * group + row % group;
        const bool there = token < fresh;
        const i64 at = (i64(part.start + token) * heads + head) * D + i % D;
        const Scaling<T, CAPPED> scaling(scale, softcap);
        q[i / D * STRIDE<D> + i % D] = there ? to_float(x[at]) * scaling.of_query() : 0.f;
    }

    for (int at = band.low; at < band.high; at += KEYS) {
        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        fetch(v, at);
        float score[ROWS / 16][KEYS / 16] = {};
        multiply_rows<D>(score, q, kv);
        rows.softmax(score, weights, at, window, Scaling<T, CAPPED>(scale, softcap));

        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        if (at + KEYS < band.high) fetch(k, at + KEYS);
        add_rows<D, KEYS / 16>(rows.acc, weights, kv);
    }
    rows.template store_rows<SINKS>(part, y, S == 0 ? lse : nullptr, sinks, kv_head, group, num_heads);
}
