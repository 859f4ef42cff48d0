// The gradient of causal grouped-query self-attention, without tensor cores: for f32, and for GPUs that
// attention_backward_mma.cu does not take.
//
//     p = exp(q k^T * scale - lse)   dv = p^T dy   ds = p (dy v^T - delta)   dk = ds^T q * scale   dq = ds k * scale
//
// CAPPED: scores s = softcap * tanh(q k^T * scale / softcap) in place of q k^T * scale, and ds is multiplied with the
// slope 1 - (s / softcap)^2. Where p alone is at hand, s is log p + lse.
//
//   x           [n, (num_heads+2H)*D] T    rows cu_seqlens[i] .. cu_seqlens[i+1] are sequence i; queries, keys, values
//   dy          [n, num_heads*D] T         the gradient of attention's output
//   lse, delta  [n, num_heads] f32         of the forward pass, and of attention_delta.cu
//   cu_seqlens  [b+1] i32
//   dx          [n, (num_heads+2H)*D] T    dq, dk, dv where x has q, k, v; every element is written
//
// D is a multiple of 8 up to 256, or of 16 up to 512; x, dy and dx lie on 16-byte
// boundaries. Weights p are computed again from q, k and lse, as in FlashAttention-2 (Dao, arXiv:2307.08691). Scores, weights and sums are f32.
//
// Two kernels, so that each sum has one owner and its order is fixed: a block of the first has KEYS keys of a KV head
// and goes over the rows that see them, (token, head of the group) pairs; so the heads of a group are summed in turn.
// A block of the second has ROWS such rows and goes over their keys. Both have 256 threads, 16 x 16: what a block keeps
// and the sums' rows along ty, what it goes over along tx. One buffer of shared memory takes the operands of a step in
// turn. Grids (tiles, H).
//
// Op: cuplama/ops/self_attention.py. Tests: the registry's in tests/ops/test_ops.py, tests/ops/test_self_attention.py.
// Benchmark: `cuplama kernels bench self_attention_backward`.
// Tried: nothing else yet.
#include "attention_backward.cuh"
#include "attention_fma.cuh"

// COUNT rows from `first` on to shared memory, for the whole block's life.
template <int D, int COUNT, typename T, typename Where>
__device__ __forceinline__ void keep_rows(float* to, int first, int end, Where where) {
    RowTile<T, D, COUNT> tile;
    tile.fetch(first, end, where);
    tile.stash(to);
}

// A thread's numbers of a tile to weights [16*R][16*C + 4].
template <int R, int C>
__device__ __forceinline__ void put_weights(float* weights, const float (&w)[R][C]) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < C; j++) weights[(R * ty + i) * (16 * C + 4) + tx + 16 * j] = w[i][j];
    }
}

// ---- dk and dv ------------------------------------------------------------------------------------------------------

template <typename T, int D, int KEYS, int ROWS, bool CAPPED>
__global__ void __launch_bounds__(THREADS, BLOCKS<D>)
    attention_backward_keys_fma(const T* __restrict__ x, const T* __restrict__ dy, const f32* __restrict__ lse,
                                const f32* __restrict__ delta, const i32* __restrict__ cu_seqlens, T* __restrict__ dx,
                                int b, int num_heads, int H, int window, float scale, float softcap) {
    constexpr int R = KEYS / 16, C = ROWS / 16, PAIRS = (D + 31) / 32;
    DYNAMIC_SHARED(float, keys);               // [KEYS][STRIDE]
    float* values = keys + KEYS * STRIDE<D>;   // [KEYS][STRIDE]
    float* rows = values + KEYS * STRIDE<D>;   // [ROWS][STRIDE], queries and rows of dy in turn
    float* weights = rows + ROWS * STRIDE<D>;  // [KEYS][ROWS + 4]

    const int group = num_heads / H, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const Tile tile(cu_seqlens, b, 1, KEYS, blockIdx.x);  // the first keys are seen by the most rows: start them first
    if (tile.first >= tile.end) return;
    const Sight sight(tile, KEYS, group, window);
    const Head<D> head{tile.start, int(blockIdx.y), group, num_heads, H};
    RowTile<T, D, ROWS> next;
    const auto fetch_queries = [&](int at) {
        next.fetch(at, sight.high, [&](int row) { return x + head.query(row); });
    };
    keep_rows<D, KEYS, T>(keys, tile.first, tile.end, [&](int token) { return x + head.key(token); });
    keep_rows<D, KEYS, T>(values, tile.first, tile.end, [&](int token) { return x + head.value(token); });
    fetch_queries(sight.low);

    float dk[R][PAIRS][2] = {}, dv[R][PAIRS][2] = {};
    for (int at = sight.low; at < sight.high; at += ROWS) {
        __syncthreads();  // the rows before were read
        next.stash(rows);
        __syncthreads();
        next.fetch(at, sight.high, [&](int row) { return dy + head.row(row) * D; });
        float p[R][C] = {}, ds[R][C] = {}, shift[C], deltas[C];
        multiply_rows<D>(p, keys, rows);
        const Scaling<T, CAPPED> scaling(scale, softcap);
#pragma unroll
        for (int j = 0; j < C; j++) {
            const int row = at + tx + 16 * j;
            const i64 number = head.row(min(row, sight.high - 1));
            shift[j] = lse[number] * LOG2_E, deltas[j] = delta[number];
#pragma unroll
            for (int i = 0; i < R; i++) {
                const bool seen = row < sight.high && sees(row / group - (tile.first + R * ty + i), window);
                p[i][j] = seen ? exp2f(scaling.score(p[i][j]) - shift[j]) : 0.f;
            }
        }
        put_weights(weights, p);

        __syncthreads();
        next.stash(rows);
        __syncthreads();
        fetch_queries(at);
        add_rows<D, C>(dv, weights, rows);
        multiply_rows<D>(ds, values, rows);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < C; j++)
                ds[i][j] = p[i][j] * (ds[i][j] - deltas[j]) * scaling.slope(scaling.bent(p[i][j], shift[j]));
        }

        __syncthreads();
        next.stash(rows);
        put_weights(weights, ds);
        __syncthreads();
        if (at + ROWS < sight.high) fetch_queries(at + ROWS);
        add_rows<D, C>(dk, weights, rows);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int token = tile.first + R * ty + i;
        if (token >= tile.end) break;
        store_sums<D>(dx + head.key(token), dk[i], [&](float sum) { return sum * scale; });
        store_sums<D>(dx + head.value(token), dv[i], [](float sum) { return sum; });
    }
}

// ---- dq -------------------------------------------------------------------------------------------------------------

template <typename T, int D, int ROWS, int KEYS, bool CAPPED>
__global__ void __launch_bounds__(THREADS, BLOCKS<D>)
    attention_backward_queries_fma(const T* __restrict__ x, const T* __restrict__ dy, const f32* __restrict__ lse,
                                   const f32* __restrict__ delta, const i32* __restrict__ cu_seqlens,
                                   T* __restrict__ dx, int b, int num_heads, int H, int window, float scale,
                                   float softcap) {
    constexpr int R = ROWS / 16, C = KEYS / 16, PAIRS = (D + 31) / 32;
    DYNAMIC_SHARED(float, queries);            // [ROWS][STRIDE]
    float* outs = queries + ROWS * STRIDE<D>;  // [ROWS][STRIDE], rows of dy
    float* kv = outs + ROWS * STRIDE<D>;       // [KEYS][STRIDE], values and keys in turn
    float* weights = kv + KEYS * STRIDE<D>;    // [ROWS][KEYS + 4]

    const int group = num_heads / H, tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    // The last tiles see the most keys: start them first.
    const Tile tile(cu_seqlens, b, group, ROWS, gridDim.x - 1 - blockIdx.x);
    if (tile.first >= tile.end) return;
    const Band<ROWS, KEYS> band(tile, group, window);
    const Head<D> head{tile.start, int(blockIdx.y), group, num_heads, H};
    RowTile<T, D, KEYS> next;
    const auto fetch_values = [&](int at) {
        next.fetch(at, band.high, [&](int token) { return x + head.value(token); });
    };
    keep_rows<D, ROWS, T>(queries, tile.first, tile.end, [&](int row) { return x + head.query(row); });
    keep_rows<D, ROWS, T>(outs, tile.first, tile.end, [&](int row) { return dy + head.row(row) * D; });
    fetch_values(band.low);

    float dq[R][PAIRS][2] = {}, shift[R], deltas[R];
#pragma unroll
    for (int i = 0; i < R; i++) {
        const i64 number = head.row(min(tile.first + R * ty + i, tile.end - 1));
        shift[i] = lse[number] * LOG2_E, deltas[i] = delta[number];
    }
    for (int at = band.low; at < band.high; at += KEYS) {
        __syncthreads();  // the keys before were read
        next.stash(kv);
        __syncthreads();
        next.fetch(at, band.high, [&](int token) { return x + head.key(token); });
        float score[R][C] = {}, ds[R][C] = {};
        multiply_rows<D>(ds, outs, kv);

        __syncthreads();
        next.stash(kv);
        __syncthreads();
        if (at + KEYS < band.high) fetch_values(at + KEYS);
        multiply_rows<D>(score, queries, kv);
        const Scaling<T, CAPPED> scaling(scale, softcap);
#pragma unroll
        for (int i = 0; i < R; i++) {
            const int position = (tile.first + R * ty + i) / group;
            scaling.bend_all(score[i]);
#pragma unroll
            for (int j = 0; j < C; j++) {
                const bool seen = sees(position - (at + tx + 16 * j), window);
                const float p = seen ? exp2f(score[i][j] * scaling.factor - shift[i]) : 0.f;
                ds[i][j] = p * (ds[i][j] - deltas[i]) * scaling.slope(score[i][j]);
            }
        }
        put_weights(weights, ds);
        __syncwarp();  // a row of the weights is written and read by half a warp
        add_rows<D, C>(dq, weights, kv);
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
        const int row = tile.first + R * ty + i;
        if (row >= tile.end) break;
        store_sums<D>(dx + head.query(row), dq[i], [&](float sum) { return sum * scale; });
    }
}
