// The gradient of causal grouped-query self-attention on tensor cores (sm_80 and later).
//
//     p = exp(q k^T * scale - lse)   dv = p^T dy   ds = p (dy v^T - delta)   dk = ds^T q * scale   dq = ds k * scale
//
// CAPPED: as in attention_backward_fma.cu.
//
//   x, dy, lse, delta, cu_seqlens, dx    as in attention_backward_fma.cu; T is f16 or bf16
//
// FlashAttention-2's backward pass (Dao, arXiv:2307.08691) in two kernels, so that each sum has one owner and a fixed
// order: the first has a tile of KEYS keys of a KV head and goes over the rows that see them, (token, head of the
// group) pairs, which also sums over the heads of the group; the second has a tile of ROWS such rows and goes over
// their keys. The price is that scores are computed twice: 7 products instead of 5.
//
// A warp has 16 * MT keys (or rows) of its own. The first kernel computes scores transposed, keys by rows: then p^T and
// ds^T are in the registers where the products with dy and q want them, and no warp waits for another. For D > 128 the
// sums of 16 keys are more than a warp's registers hold: SPLIT = 2 warps compute the same scores, and each sums up half
// of the columns. What passes by, queries and dy or keys and values, comes by cp.async in two stages. Tiles that nobody
// sees are skipped, by the block or by a warp alone; only tiles on the borders of the mask are masked. p and ds are
// rounded to T before they are multiplied. Grids (tiles * H), 128 threads. Shared memory: attention_mma.cuh.
//
// Op: cuplama/ops/self_attention.py, which also chooses KEYS and ROWS. Tests: the registry's in tests/ops/test_ops.py,
// and tests/ops/test_self_attention.py. Benchmark: `cuplama kernels bench self_attention_backward`.
// Tried: nothing else yet.
#include "attention_backward.cuh"
#include "attention_mma.cuh"

// What the softmax's backward pass takes of a tile's rows: lse in powers of two, and delta. A row that is not there has
// zeros, here and in dy: it adds nothing.
template <int ROWS>
struct RowStats {
    f32 held;  // of thread i < ROWS lse, of the next ROWS threads delta

    template <typename Where>
    __device__ __forceinline__ void fetch(const f32* lse, const f32* delta, int first, int end, Where where) {
        const int row = first + threadIdx.x % ROWS;
        held = 0.f;
        if (row < end && threadIdx.x < 2 * ROWS)
            held = threadIdx.x < ROWS ? lse[where(row)] * LOG2_E : delta[where(row)];
    }
    __device__ __forceinline__ void stash(f32* stats) const {
        if (threadIdx.x < 2 * ROWS) stats[threadIdx.x] = held;
    }
};

// ---- dk and dv ------------------------------------------------------------------------------------------------------

// Scores [keys][rows] to p^T, and dp^T to ds^T. stats: [2][8*N], of the tile's rows.
template <int MT, int N>
struct Transposed {
    typedef float Scores[MT][N][4];

    // Shuts out pairs of which the row does not see the key. key: the warp's first; row: the tile's first.
    static __device__ __forceinline__ void mask(Scores& score, int key, int row, int group, int window) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int ahead = (row + j * 8 + lane % 4 * 2 + e) / group - key - lane / 4;
#pragma unroll
                for (int m = 0; m < MT; m++) {
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (!sees(ahead - m * 16 - half * 8, window)) score[m][j][2 * half + e] = -infinity();
                }
            }
        }
    }

    static __device__ __forceinline__ void weigh(Scores& score, const f32* stats, float factor) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const Pack<f32, 2> shift = load<2>(stats + j * 8 + threadIdx.x % 4 * 2);
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) score[m][j][e] = exp2f(score[m][j][e] * factor - shift.v[e % 2]);
            }
        }
    }

    template <typename T, bool CAPPED>
    static __device__ __forceinline__ void differ(Scores& ds, const Scores& p, const f32* stats,
                                                  const Scaling<T, CAPPED>& scaling) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const Pack<f32, 2> delta = load<2>(stats + (N + j) * 8 + threadIdx.x % 4 * 2);
            const Pack<f32, 2> shift = CAPPED ? load<2>(stats + j * 8 + threadIdx.x % 4 * 2) : Pack<f32, 2>{};
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++)
                    ds[m][j][e] = p[m][j][e] * (ds[m][j][e] - delta.v[e % 2]) *
                                  scaling.slope(scaling.bent(p[m][j][e], shift.v[e % 2]));
            }
        }
    }
};

// Columns of 16 that one of SPLIT warps sums up. Their first lies where vectors change places as at column 0.
template <int D, int SPLIT>
struct Share {
    static constexpr int ALL = Layout<D>::WIDTH / 16, STEP = Layout<D>::TURNS / 2;
    static constexpr int CHUNKS = SPLIT == 1 ? ALL : (ALL + SPLIT * STEP - 1) / (SPLIT * STEP) * STEP;
};

// Sums of a block's keys, in shared memory [KEYS][WIDTH] by all warps, then to where(key).
template <int D, int KEYS, typename T, int MT, int C, typename Where>
__device__ __forceinline__ void store_keys(T* room, int mine, int column, const float (&acc)[MT][C][4], float factor,
                                           int chunks, const Tile& tile, Where where) {
    float factors[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) factors[m][0] = factors[m][1] = factor;
    __syncthreads();
    stash_rows<D>(room + mine * Layout<D>::WIDTH + column, acc, factors, chunks);
    __syncthreads();
    store_rows<D, KEYS, THREADS>(room, threadIdx.x, tile.first, tile.end, where);
}

template <typename T, int D, int KEYS, int ROWS, int SPLIT, bool CAPPED>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_keys_mma(const T* __restrict__ x, const T* __restrict__ dy, const f32* __restrict__ lse,
                                const f32* __restrict__ delta, const i32* __restrict__ cu_seqlens, T* __restrict__ dx,
                                int b, int num_heads, int H, int window, float scale, float softcap) {
    constexpr int WIDTH = Layout<D>::WIDTH, STAGE = ROWS * WIDTH, SIZE = KEYS / (WARPS / SPLIT), MT = SIZE / 16;
    constexpr int CHUNKS = Share<D, SPLIT>::CHUNKS;
    DYNAMIC_SHARED(T, keys);  // [KEYS][WIDTH], as are the values
    T* values = keys + KEYS * WIDTH;
    T* queries = values + KEYS * WIDTH;  // [2][ROWS][WIDTH], as are the rows of dy
    T* outs = queries + 2 * STAGE;
    __shared__ __align__(16) f32 stats[2][2 * ROWS];

    const int group = num_heads / H, warp = threadIdx.x / WARP;
    // The first keys are seen by the most rows: start them first.
    const Tile tile(cu_seqlens, b, 1, KEYS, blockIdx.x / H);
    if (tile.first >= tile.end) return;
    const Sight sight(tile, KEYS, group, window);
    const Head<D> head{tile.start, int(blockIdx.x % H), group, num_heads, H};
    const int mine = warp / SPLIT * SIZE, key = tile.first + mine, column = warp % SPLIT * CHUNKS * 16;
    const int chunks = min(CHUNKS, WIDTH / 16 - warp % SPLIT * CHUNKS);

    RowStats<ROWS> next;
    const auto fetch = [&](int stage, int at) {
        fetch_both<D, ROWS>(queries + stage * STAGE, outs + stage * STAGE, at, sight.high,
                            [&](int row, const T*& q, const T*& out) {
                                i64 of_out, of_query;
                                head.both(row, of_out, of_query);
                                q = x + of_query, out = dy + of_out;
                            });
        cp_async_commit();
        next.fetch(lse, delta, at, sight.high, [&](int row) { return head.row(row); });
    };
    fetch_both<D, KEYS>(keys, values, tile.first, tile.end,
                        [&](int token, const T*& k, const T*& v) { k = x + head.key(token), v = k + H * D; });
    fetch(0, sight.low);

    using Pairs = Transposed<MT, ROWS / 8>;
    const Lane<D> down = lane_down<D>(), across = lane_across<D>();
    float dk[MT][2 * CHUNKS][4] = {}, dv[MT][2 * CHUNKS][4] = {};
    for (int at = sight.low, stage = 0; at < sight.high; at += ROWS, stage ^= 1) {
        next.stash(stats[stage]);
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        if (at + ROWS < sight.high) fetch(stage ^ 1, at + ROWS);
        const int near = at / group, far = (at + ROWS - 1) / group;  // the tile's first and last token
        if (far < key || (window > 0 && near - (key + SIZE - 1) >= window)) continue;
        const T *q = queries + stage * STAGE, *out = outs + stage * STAGE;
        float p[MT][ROWS / 8][4] = {}, ds[MT][ROWS / 8][4] = {};
        multiply_rows<T, D>(p, keys + mine * WIDTH, q, down, across);
        const Scaling<T, CAPPED> scaling(scale, softcap);
        bend_scores(p, scaling);
        if (near < key + SIZE - 1 || (window > 0 && far - key >= window)) Pairs::mask(p, key, at, group, window);
        multiply_rows<T, D>(ds, values + mine * WIDTH, out, down, across);  // under way while p is computed
        Pairs::weigh(p, stats[stage], scaling.factor);
        add_rows<T, D>(dv, p, out + column, down, chunks);
        Pairs::differ(ds, p, stats[stage], scaling);
        add_rows<T, D>(dk, ds, q + column, down, chunks);
    }
    store_keys<D, KEYS>(keys, mine, column, dk, scale, chunks, tile, [&](int token) { return dx + head.key(token); });
    store_keys<D, KEYS>(values, mine, column, dv, 1.f, chunks, tile, [&](int token) { return dx + head.value(token); });
}

// ---- dq -------------------------------------------------------------------------------------------------------------

// Scores [rows][keys] of a warp to p, and dp to ds. A lane has the rows m*16 + half*8 + lane/4.
template <int MT, int N>
struct Straight {
    typedef float Scores[MT][N][4], Stats[MT][2];

    // Shuts out what a row does not see of the keys from `at` on. mine: the warp's first row.
    static __device__ __forceinline__ void mask(Scores& score, int at, int mine, int group, int window) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int ahead = (mine + m * 16 + half * 8 + lane / 4) / group - at - lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < N; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        if (!sees(ahead - (j * 8 + e), window)) score[m][j][2 * half + e] = -infinity();
                }
            }
        }
    }

    template <typename T, bool CAPPED>
    static __device__ __forceinline__ void differ(Scores& ds, const Scores& score, const Stats& shift,
                                                  const Stats& deltas, const Scaling<T, CAPPED>& scaling) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int j = 0; j < N; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float p = exp2f(score[m][j][e] * scaling.factor - shift[m][e / 2]);
                    ds[m][j][e] = p * (ds[m][j][e] - deltas[m][e / 2]) * scaling.slope(score[m][j][e]);
                }
            }
        }
    }
};

template <typename T, int D, int ROWS, int KEYS, bool CAPPED>
__global__ void __launch_bounds__(THREADS, 2)
    attention_backward_queries_mma(const T* __restrict__ x, const T* __restrict__ dy, const f32* __restrict__ lse,
                                   const f32* __restrict__ delta, const i32* __restrict__ cu_seqlens,
                                   T* __restrict__ dx, int b, int num_heads, int H, int window, float scale,
                                   float softcap) {
    constexpr int WIDTH = Layout<D>::WIDTH, STAGE = KEYS * WIDTH, SIZE = ROWS / WARPS, MT = SIZE / 16;
    DYNAMIC_SHARED(T, queries);  // [ROWS][WIDTH], as are the rows of dy
    T* outs = queries + ROWS * WIDTH;
    T* keys = outs + ROWS * WIDTH;  // [2][KEYS][WIDTH], as are the values
    T* values = keys + 2 * STAGE;

    const int group = num_heads / H, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // The last tiles see the most keys: start them first.
    const Tile tile(cu_seqlens, b, group, ROWS, (gridDim.x - 1 - blockIdx.x) / H);
    if (tile.first >= tile.end) return;
    const Band<ROWS, KEYS> band(tile, group, window);
    const Head<D> head{tile.start, int(blockIdx.x % H), group, num_heads, H};
    const int mine = tile.first + warp * SIZE;
    const int near = mine / group, far = mine < tile.end ? (mine + SIZE - 1) / group : -1;

    const auto fetch = [&](int stage, int at) {
        fetch_both<D, KEYS>(keys + stage * STAGE, values + stage * STAGE, at, band.high,
                            [&](int token, const T*& k, const T*& v) { k = x + head.key(token), v = k + H * D; });
        cp_async_commit();
    };
    fetch_rows<D, ROWS>(queries, tile.first, tile.end, [&](int row) { return x + head.query(row); });
    fetch_rows<D, ROWS>(outs, tile.first, tile.end, [&](int row) { return dy + head.row(row) * D; });
    fetch(0, band.low);

    using Pairs = Straight<MT, KEYS / 8>;
    const Lane<D> down = lane_down<D>(), across = lane_across<D>();
    float dq[MT][WIDTH / 8][4] = {}, shift[MT][2], deltas[MT][2];
#pragma unroll
    for (int i = 0; i < 2 * MT; i++) {
        const i64 number = head.row(min(mine + i * 8 + lane / 4, tile.end - 1));
        shift[i / 2][i % 2] = lse[number] * LOG2_E, deltas[i / 2][i % 2] = delta[number];
    }
    T* q = queries + warp * SIZE * WIDTH;
    for (int at = band.low, stage = 0; at < band.high; at += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        if (at + KEYS < band.high) fetch(stage ^ 1, at + KEYS);
        if (at > far || (window > 0 && at + KEYS <= near - window + 1)) continue;
        float score[MT][KEYS / 8][4] = {}, ds[MT][KEYS / 8][4] = {};
        multiply_rows<T, D>(score, q, keys + stage * STAGE, down, across);
        const Scaling<T, CAPPED> scaling(scale, softcap);
        bend_scores(score, scaling);
        if (at + KEYS - 1 > near || (window > 0 && at <= far - window)) Pairs::mask(score, at, mine, group, window);
        multiply_rows<T, D>(ds, outs + warp * SIZE * WIDTH, values + stage * STAGE, down, across);
        Pairs::differ(ds, score, shift, deltas, scaling);
        add_rows<T, D>(dq, ds, keys + stage * STAGE, down);
    }

    // Through the warp's rows of `queries`, so that whole rows are written.
    float factors[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) factors[m][0] = factors[m][1] = scale;
    __syncwarp();  // its last reads of them are done
    stash_rows<D>(q, dq, factors);
    __syncwarp();
    store_rows<D, SIZE, WARP>(q, lane, mine, tile.end, [&](int row) { return dx + head.query(row); });
}
