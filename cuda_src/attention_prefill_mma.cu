// Causal grouped-query attention of many new tokens over the paged KV cache, on tensor cores (sm_80 and later).
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
// CAPPED and SINKS: as in attention_prefill_fma.cu.
//
//   x, k, v, cu_seqlens, seq_lens, page_table, y, lse    as in attention_prefill_fma.cu; T is f16 or bf16; D is a
//                                                        multiple of 8, at most 256; S is 0 or a power of two; x, k, v
//                                                        and y lie on 16-byte boundaries
//
// FlashAttention-2's forward pass (Dao, arXiv:2307.08691): a block holds ROWS queries and walks over tiles of KEYS keys
// with an online softmax in f32 (Milakov & Gimelshein, arXiv:1805.02867); products by mma.sync m16n8k16 with f32 sums.
//
// The rows of a block are (token, head of the group) pairs of one sequence: K and V are shared by the group, the causal
// triangle is cut in small steps, and a sequence with few tokens wastes little. Grid (tiles * H), 128 threads; warp w
// has rows w*ROWS/4 .. and all KEYS keys, so that softmax needs no other warp. With 32 rows a warp uses every fragment
// of K or V that it reads from shared memory twice; with 16 rows that memory, and not the tensor cores, sets the pace.
// K and V of the next tile are on their way (cp.async, two stages) while this one is computed. Tiles outside the
// causal band and the window are skipped, by the block or by a warp alone; only tiles on its borders are masked.
//
// How matrices lie in shared memory: attention_mma.cuh.
//
// A row's result depends neither on the rest of the batch nor on ROWS nor on how a prompt is cut into chunks, bit for
// bit: tiles of keys begin at multiples of KEYS, and a masked tile changes nothing.
//
// Ops: cuplama/ops/attention.py and, with S = 0, cuplama/ops/self_attention.py.
// Tests: the registry's in tests/ops/test_ops.py, tests/ops/test_attention.py, tests/ops/test_self_attention.py.
// Benchmark: `cuplama kernels bench`.
//
// On an H200, bf16, 32 query and 8 KV heads, D = 128, one causal prompt of 1k, 4k, 16k tokens, 2026-11-20: 225, 310 and
// 334 TFLOP/s (4 * num_heads * D * pairs), as benchmarks/results/ has it. Tried, in an earlier run (210, 308, 318): 64
// rows for long prompts (285, 293) and 128 for short ones (164 at 1k); 32 keys a tile (154, 304, 322; for D = 64 at 4k
// and 16k 222 and 233 instead of 262 and 282).
#include "attention_mma.cuh"

// KEYS tokens of one KV head from the pages into shared memory. Tokens from `high` on are zeros: their scores are
// masked, but 0 * v must not be NaN. S = 0: from rows of H heads, of which k and v are columns.
template <typename T, int D, int S, int KEYS>
__device__ __forceinline__ void fetch_tile(T* keys, T* values, const T* k, const T* v, const i32* page_table, int table,
                                           int head, int H, int first, int high) {
    using At = Layout<D>;
    constexpr int PASS = THREADS / At::TURNS;  // rows at once
    const int row = threadIdx.x / At::TURNS, vector = threadIdx.x % At::TURNS, to = At::at(row, vector);
    const int next = S == 0 ? H * D : D;  // elements from one token to the next
    i64 from = 0;
    if constexpr (S == 0)
        from = token_offset<S, D>(nullptr, first + row, 0, H) + vector * 8;
    else if constexpr (S >= KEYS)  // a tile lies on one page, or ...
        from = i64(page_table[table + first / S] * H + head) * (S * D) + (first % S + row) * D + vector * 8;
#pragma unroll
    for (int r = 0; r < KEYS; r += PASS) {
        if (KEYS % PASS != 0 && row + r >= KEYS) break;
        const bool there = row + r < high - first;
        if constexpr (S > 0 && S < KEYS) {
            if (there) {  // ... each token is looked up
                const int token = first + row + r;
                from = i64(page_table[table + token / S] * H + head) * (S * D) + token % S * D + vector * 8 - r * D;
            }
        }
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const bool valid = there && (At::WIDTH == D || (vector + u) * 8 < D);
            cp_async_16(keys + to + (r * At::WIDTH + u * 8), k + from + (r * next + u * 8), valid);
            cp_async_16(values + to + (r * At::WIDTH + u * 8), v + from + (r * next + u * 8), valid);
        }
    }
}

// ---- a warp's rows --------------------------------------------------------------------------------------------------

// MT matrices of 16 rows. A lane has rows lane/4 and lane/4 + 8 of each, of every 8 columns 2*(lane%4) and the next.
template <typename T, int D, int MT, int KEYS>
struct WarpRows {
    static constexpr int WIDTH = Layout<D>::WIDTH;
    // Of a tile; sums over values; statistics. sum: of the lane's own columns. These are arrays of the kernel and not
    // members: held in a struct they cost up to 11 registers on sm_80, and 240 bytes of spills for D = 128.
    typedef float Scores[MT][KEYS / 8][4], Sums[MT][WIDTH / 8][4], Stats[MT][2];

    // Shuts out what a row does not see of the keys from `at` on. mine: the warp's first row; old: tokens before them.
    static __device__ __forceinline__ void mask(Scores& score, int at, int old, int mine, int group, int window) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int position = old + (mine + m * 16 + half * 8 + lane / 4) / group;
                const int ahead = position - at - lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int distance = ahead - (j * 8 + e);
                        if (distance < 0 || (window > 0 && distance >= window)) score[m][j][2 * half + e] = -infinity();
                    }
                }
            }
        }
    }

    // Scores to weights; the sums so far go with the new maximum.
    static __device__ __forceinline__ void softmax(Scores& score, Sums& acc, Stats& largest, Stats& sum, float factor) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float most = largest[m][half];
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++)
                    most = fmaxf(most, fmaxf(score[m][j][2 * half], score[m][j][2 * half + 1]));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                const float shrink = exp2f((largest[m][half] - most) * factor), shift = most * factor;
                largest[m][half] = most;
                float total = sum[m][half] * shrink;
#pragma unroll
                for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& p = score[m][j][2 * half + e];
                        p = exp2f(p * factor - shift);
                        total += p;
                    }
                }
                sum[m][half] = total;
                if (__any_sync(ALL_LANES, shrink < 1.f)) {  // soon rare
#pragma unroll
                    for (int j = 0; j < WIDTH / 8; j++)
                        acc[m][j][2 * half] *= shrink, acc[m][j][2 * half + 1] *= shrink;
                }
            }
        }
    }

    // The lane's sums to what its rows are multiplied with; the logarithms to lse, if it is wanted.
    template <bool SINKS, typename At>
    static __device__ __forceinline__ void finish(Stats& sum, const Stats& largest, float factor, f32* lse,
                                                  const T* sinks, int mine, int end, int group, At at_row) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = sum[m][half];
                total += __shfl_xor_sync(ALL_LANES, total, 1);
                total += __shfl_xor_sync(ALL_LANES, total, 2);
                const int row = mine + m * 16 + half * 8 + lane / 4;
                total = with_sink<SINKS>(total, largest[m][half] * factor, sinks, row % group);
                sum[m][half] = 1.f / total;
                if (lse != nullptr && lane % 4 == 0 && row < end)
                    lse[at_row(row)] = log_sum(largest[m][half] * factor, total);
            }
        }
    }
};

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D, int S, int ROWS, int KEYS, bool CAPPED, bool SINKS>
__global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_mma(const T* __restrict__ x, const T* __restrict__ k, const T* __restrict__ v,
                          const i32* __restrict__ cu_seqlens, const i32* __restrict__ seq_lens,
                          const i32* __restrict__ page_table, T* __restrict__ y, f32* __restrict__ lse, int b,
                          int num_heads, int H, int heads, int M, int window, float scale, const T* __restrict__ sinks,
                          float softcap) {
    constexpr int WIDTH = Layout<D>::WIDTH, STAGE = KEYS * WIDTH, SIZE = ROWS / WARPS, MT = SIZE / 16;
    DYNAMIC_SHARED(T, queries);        // [ROWS][WIDTH]; at the end the outputs
    T* keys = queries + ROWS * WIDTH;  // [2][KEYS][WIDTH]
    T* values = keys + 2 * STAGE;      // [2][KEYS][WIDTH]

    const int group = num_heads / H, kv_head = blockIdx.x % H;
    const int number = (gridDim.x - 1 - blockIdx.x) / H;  // the last tiles see the most keys: start them first
    const Tile tile = Tile::of<S>(cu_seqlens, seq_lens, b, group, ROWS, number);
    const int old = tile.old, rows = tile.end, table = tile.sequence * M;
    if (tile.first >= rows) return;
    if (tile.blind()) return store_zeros<D>(y, tile, ROWS, group, kv_head, num_heads);
    const Band<ROWS, KEYS> band(tile, group, window);

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Positions of the warp's first and last token; a warp without rows has none.
    const int mine = tile.first + warp * SIZE;
    const int near = old + mine / group, far = mine < rows ? old + (mine + SIZE - 1) / group : -1;
    if constexpr (S == 0) {
        k = x + (i64(tile.start) * heads + num_heads + kv_head) * D;
        v = k + H * D;
    }
    const auto fetch = [&](int stage, int at) {
        fetch_tile<T, D, S, KEYS>(keys + stage * STAGE, values + stage * STAGE, k, v, page_table, table, kv_head,
                                  S == 0 ? heads : H, at, band.high);
    };
    fetch_rows<D, ROWS>(queries, tile.first, rows, [&](int row) {
        return x + (i64(tile.start + row / group) * heads + kv_head * group + row % group) * D;
    });
    fetch(0, band.low);
    cp_async_commit();

    T* q = queries + warp * SIZE * WIDTH;
    const Scaling<T, CAPPED> scaling(scale, softcap);
    using Rows = WarpRows<T, D, MT, KEYS>;
    const Lane<D> down = lane_down<D>(), across = lane_across<D>();
    float acc[MT][WIDTH / 8][4] = {}, largest[MT][2], sum[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) largest[m][0] = largest[m][1] = LOWEST, sum[m][0] = sum[m][1] = 0.f;
    for (int at = band.low, stage = 0; at < band.high; at += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        if (at + KEYS < band.high) {
            fetch(stage ^ 1, at + KEYS);
            cp_async_commit();
        }
        if (at > far || (window > 0 && at + KEYS <= near - window + 1)) continue;
        float score[MT][KEYS / 8][4] = {};
        multiply_rows<T, D>(score, q, keys + stage * STAGE, down, across);
        bend_scores(score, scaling);
        if (at + KEYS - 1 > near || (window > 0 && at <= far - window)) Rows::mask(score, at, old, mine, group, window);
        Rows::softmax(score, acc, largest, sum, scaling.factor);
        add_rows<T, D>(acc, score, values + stage * STAGE, down);
    }

    const auto at_row = [&](int row) {
        return i64(tile.start + row / group) * num_heads + kv_head * group + row % group;
    };
    Rows::template finish<SINKS>(sum, largest, scaling.factor, S == 0 ? lse : nullptr, sinks + kv_head * group, mine,
                                 rows, group, at_row);
    // Through the warp's rows of `queries`, so that whole rows are written.
    __syncwarp();  // its last reads of them are done
    stash_rows<D>(q, acc, sum);
    __syncwarp();
    store_rows<D, SIZE, WARP>(q, lane, mine, rows, [&](int row) { return y + at_row(row) * D; });
}
