// Causal grouped-query attention of many new tokens over the paged KV cache, on Hopper's tensor cores (sm_90a alone).
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
// CAPPED and SINKS: as in attention_prefill_fma.cu.
//
//   x, k, v, cu_seqlens, seq_lens, page_table, y, lse    as in attention_prefill_mma.cu; D is 64, 96 or 128
//
// FlashAttention-3's plan (Shah et al., arXiv:2407.08608): one block a multiprocessor. GROUPS warpgroups hold 64 rows
// each, (token, head of the group) pairs; one more, the first, fetches tiles of 128 keys and values, two stages of
// each, and gives its registers to the others. Products are asynchronous (wgmma): the scores of tile j+1 and the sum
// over the values of tile j are under way together, and the softmax of tile j+1 runs beside that sum. As in
// attention_prefill_mma.cu, a row's result does not depend on the batch or on how a prompt is cut. Grid (tiles * H),
// 128 * (GROUPS + 1) threads.
//
// Pages are copied by cp.async, and not by the tensor copy engine, whose maps of the pages would have to be made on the
// host for each cache; four warps are enough to keep up. Layout in shared memory: panels of 64 columns, rows of 128
// bytes, 16-byte vectors exchanged by ^ (row % 8).
//
// Ops: cuplama/ops/attention.py and, with S = 0, cuplama/ops/self_attention.py.
// Tests: the registry's in tests/ops/test_ops.py, tests/ops/test_attention.py, tests/ops/test_self_attention.py.
// Benchmark: `cuplama kernels bench`.
//
// On an H200, bf16, 32 query and 8 KV heads, one causal prompt, TFLOP/s (4 * num_heads * D * pairs), 2026-11-20, in one
// run (benchmarks/results/2026-11-20-h200-attention-prefill.json); beside it the best of torch 2.11:
//
//     tokens           1k    4k   16k
//     D = 128         353   523   569      torch 245  513  571      attention_prefill_mma.cu 225  310  334
//     D = 64          212   419   478      torch 166  371  461      attention_prefill_mma.cu 180  266  293
//
// A run before had 571 and 604 for D = 128 at 4k and 16k, 406 and 505 for D = 64. Lost against it: the warpgroups
// taking turns at the tensor cores by named barriers (D = 128: 558 at 4k and 16k; D = 64: 421 and 483); multiplying the
// sums only when some maximum has moved (D = 128: 557, 556; kept for D = 64, where the exponentials and not the
// products set the pace); two warpgroups for D = 64 (356, 427).
#include "attention.cuh"
#include "mma.cuh"

constexpr int GROUP = 128, MINE = 64;  // threads and rows of a warpgroup
constexpr int KEYS = 128, PANEL = 64;  // keys of a tile, columns of a panel

// ---- per dtype ------------------------------------------------------------------------------------------------------

template <typename T>
struct Product;
template <>
struct Product<f16> {
    static __device__ __forceinline__ void scores(float (&d)[64], u64 a, u64 b, bool add) {
        wgmma_n128_f16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_f16(d, a, b);
    }
};
template <>
struct Product<bf16> {
    static __device__ __forceinline__ void scores(float (&d)[64], u64 a, u64 b, bool add) {
        wgmma_n128_bf16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_bf16(d, a, b);
    }
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// Element of a vector of 8 columns in a matrix of `rows` rows.
__device__ __forceinline__ int place(int rows, int row, int vector) {
    return vector / 8 * (rows * PANEL) + row * PANEL + (vector % 8 ^ row % 8) * 8;
}

struct Barriers {
    u64 k_full[2], k_empty[2], v_full[2], v_empty[2];
};

// Two warps bring one tile after the other of K or of V. Tokens from `high` on are zeros: 0 * v must not be NaN. S = 0:
// from rows of H heads, of which `cache` is a column.
template <typename T, int D, int S>
__device__ __forceinline__ void produce(T* stages, u64* full, u64* empty, const T* cache, const i32* page_table,
                                        int table, int head, int H, int low, int high) {
    constexpr int SIZE = KEYS * ((D + PANEL - 1) / PANEL * PANEL), RUN = S == 0 ? 32 : S < KEYS ? S : KEYS;
    const int next = S == 0 ? H * D : D;  // elements from one token to the next
    const int thread = threadIdx.x % 64, row = thread / 8, vector = thread % 8;
    for (int at = low, j = 0; at < high; at += KEYS, j++) {
        if (j >= 2) mbarrier_wait(empty + j % 2, (j / 2 + 1) % 2);
        T* to = stages + j % 2 * SIZE + place(KEYS, row, vector);
#pragma unroll 2
        for (int r = 0; r < KEYS; r += RUN) {  // tokens of one page
            const int token = at + r, left = high - token - row;
            const T* from = cache + vector * 8;
            if constexpr (S == 0) {
                from += i64(token + row) * next;
            } else {
                const i64 page = token < high ? page_table[table + token / S] * H + head : 0;
                from += page * (S * D) + (token % S + row) * D;
            }
#pragma unroll
            for (int i = 0; i < RUN; i += 8) {
#pragma unroll
                for (int u = 0; u < D / 8; u += 8) {
                    if (D % PANEL == 0 || vector + u < D / 8)
                        cp_async_16(to + (u / 8 * KEYS + r + i) * PANEL, from + (i * next + u * 8), i < left);
                }
            }
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_proxy_async();
        mbarrier_arrive(full + j % 2);
    }
}

// ---- a warpgroup's rows ---------------------------------------------------------------------------------------------

// The 64 rows of a warpgroup, from `mine` of the tile's sequence on. A thread has the rows `here` and here + 8 of them,
// columns 8*j + 2*(lane%4) and the next, of scores and sums.
template <typename T, int D>
struct GroupRows {
    static constexpr int STAGE = KEYS * ((D + PANEL - 1) / PANEL * PANEL);
    const Tile& tile;
    int group, mine, thread, lane, here, position[2], near, far;  // positions: the two rows', the first's, the last's
    float acc[D / 2] = {}, score[KEYS / 2], largest[2] = {LOWEST, LOWEST}, sum[2] = {}, shrink[2];
    u32 p[KEYS / 16][4];

    __device__ __forceinline__ GroupRows(const Tile& tile, int group, int mine)
        : tile(tile), group(group), mine(mine), thread(threadIdx.x % GROUP), lane(threadIdx.x % WARP) {
        here = thread / WARP * 16 + lane / 4;
        position[0] = tile.old + (mine + here) / group, position[1] = tile.old + (mine + here + 8) / group;
        near = tile.old + mine / group, far = tile.old + (mine + MINE - 1) / group;
    }

    // The rows of x to q in shared memory; those beyond the tile's are zeros.
    __device__ __forceinline__ void fetch_queries(T* q, const T* x, int kv_head, int heads) const {
        for (int r = thread / 8; r < MINE; r += GROUP / 8) {
            const int token = (mine + r) / group, head = kv_head * group + (mine + r) % group;
            const T* from = x + (i64(tile.start + token) * heads + head) * D;
            for (int vector = thread % 8; vector < D / 8; vector += 8)
                cp_async_16(q + place(MINE, r, vector), from + vector * 8, mine + r < tile.end);
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_proxy_async();
    }

    // Begins score = q k^T for stage `stage` of the keys.
    __device__ __forceinline__ void multiply_keys(u64 q_matrix, u64 k_matrix, int stage) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {  // 32 bytes further, or a panel; in units of 16 bytes
            const int column = i % 4 * 2;
            Product<T>::scores(score, q_matrix + (i / 4 * (MINE * 8) + column),
                               k_matrix + (stage * (STAGE / 8) + i / 4 * (KEYS * 8) + column), i > 0);
        }
        wgmma_commit();
    }

    // Begins acc += p v for stage `stage` of the values.
    __device__ __forceinline__ void add_values(u64 v_matrix, int stage) {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) Product<T>::sum(acc, p[i], v_matrix + (stage * (STAGE / 8) + i * (16 * 8)));
        wgmma_commit();
    }

    // Shuts out what a row does not see of the keys from `at` on.
    __device__ __forceinline__ void mask(int at, int window) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int ahead = position[half] - at - lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int distance = ahead - (j * 8 + e);
                    if (distance < 0 || (window > 0 && distance >= window)) score[4 * j + 2 * half + e] = -infinity();
                }
            }
        }
    }

    // Scores of the keys from `at` on to weights. shrink: what the sums so far are to be multiplied with.
    template <bool CAPPED>
    __device__ __forceinline__ void softmax(int at, int window, const Scaling<T, CAPPED>& scaling) {
        const float factor = scaling.factor;
        scaling.bend_all(score);
        if (at + KEYS - 1 > near || (window > 0 && at <= far - window)) {
            if (window > 0)
                mask(at, window);
            else
                mask(at, 0);  // a copy that does not look for windows
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float most = largest[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++)
                most = fmaxf(most, fmaxf(score[4 * j + 2 * half], score[4 * j + 2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            shrink[half] = exp2f((largest[half] - most) * factor);
            largest[half] = most;
            const float shift = most * factor;
            float total = sum[half] * shrink[half];
#pragma unroll
            for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float& w = score[4 * j + 2 * half + e];
                    w = exp2f(w * factor - shift);
                    total += w;
                }
            }
            sum[half] = total;
        }
    }

    __device__ __forceinline__ void shrink_sums() {
        if (D > 64 || __any_sync(ALL_LANES, shrink[0] < 1.f || shrink[1] < 1.f)) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) acc[i] *= shrink[i / 2 % 2];
        }
    }

    __device__ __forceinline__ void round_weights() {
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) p[i][e] = pack<T>(score[8 * i + 2 * e], score[8 * i + 2 * e + 1]);
        }
    }

    // Rows of y, through the warp's rows of q, so that whole rows are written.
    template <bool SINKS>
    __device__ __forceinline__ void store_rows(T* q, T* y, f32* lse, float factor, const T* sinks, int kv_head,
                                               int num_heads) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float total = sum[half];
            total += __shfl_xor_sync(ALL_LANES, total, 1);
            total += __shfl_xor_sync(ALL_LANES, total, 2);
            const int row = mine + here + 8 * half;
            total = with_sink<SINKS>(total, largest[half] * factor, sinks, kv_head * group + row % group);
            const float inverse = 1.f / total;
            if (lse != nullptr && lane % 4 == 0 && row < tile.end)
                lse[i64(tile.start + row / group) * num_heads + kv_head * group + row % group] =
                    log_sum(largest[half] * factor, total);
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                *reinterpret_cast<u32*>(q + place(MINE, here + 8 * half, j) + lane % 4 * 2) =
                    pack<T>(acc[4 * j + 2 * half] * inverse, acc[4 * j + 2 * half + 1] * inverse);
        }
        __syncwarp();
        for (int i = lane / 8; i < 16; i += WARP / 8) {
            const int r = thread / WARP * 16 + i, token = (mine + r) / group, head = (mine + r) % group;
            if (mine + r >= tile.end) break;
            T* to = y + (i64(tile.start + token) * num_heads + kv_head * group + head) * D;
            for (int vector = lane % 8; vector < D / 8; vector += 8)
                store<8>(to + vector * 8, load<8>(q + place(MINE, r, vector)));
        }
    }
};

// One warpgroup: its rows' attention to the tiles of keys and values that the others bring. id: of its barrier.
template <typename T, int D, int ROWS, bool CAPPED>
__device__ __forceinline__ void consume(GroupRows<T, D>& rows, Barriers& bar, T* q, const T* keys, const T* values,
                                        const Band<ROWS, KEYS>& band, int window, const Scaling<T, CAPPED>& scaling,
                                        int id) {
    const u64 q_matrix = wgmma_matrix(q, 1), k_matrix = wgmma_matrix(keys, 1);
    const u64 v_matrix = wgmma_matrix(values, KEYS * PANEL * sizeof(T));
    const auto multiply_keys = [&](int j) {
        mbarrier_wait(bar.k_full + j % 2, j / 2 % 2);
        rows.multiply_keys(q_matrix, k_matrix, j % 2);
    };
    const auto add_values = [&](int j) {
        mbarrier_wait(bar.v_full + j % 2, j / 2 % 2);
        rows.add_values(v_matrix, j % 2);
    };
    const auto release = [&](u64* empty) {
        if (rows.lane == 0) mbarrier_arrive(empty);
    };

    const int tiles = (band.high - band.low + KEYS - 1) / KEYS;
    multiply_keys(0);
    wgmma_wait<0>();
    wgmma_done(rows.score);
    release(bar.k_empty);
    rows.softmax(band.low, window, scaling);
    rows.round_weights();
#pragma unroll 1
    for (int j = 1; j < tiles; j++) {
        multiply_keys(j);
        add_values(j - 1);
        wgmma_wait<1>();
        wgmma_done(rows.score);
        release(bar.k_empty + j % 2);
        rows.softmax(band.low + j * KEYS, window, scaling);
        wgmma_wait<0>();
        wgmma_done(rows.acc);
        release(bar.v_empty + (j - 1) % 2);
        rows.shrink_sums();
        rows.round_weights();
    }
    add_values(tiles - 1);
    wgmma_wait<0>();
    wgmma_done(rows.acc);
    // Before q takes the outputs: no product of another warp may still read them.
    bar_sync(id, GROUP);
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D, int S, int GROUPS, bool CAPPED, bool SINKS>
__global__ void __launch_bounds__(GROUPS* GROUP + GROUP, 1)
    attention_prefill_wgmma(const T* __restrict__ x, const T* __restrict__ k, const T* __restrict__ v,
                            const i32* __restrict__ cu_seqlens, const i32* __restrict__ seq_lens,
                            const i32* __restrict__ page_table, T* __restrict__ y, f32* __restrict__ lse, int b,
                            int num_heads, int H, int heads, int M, int window, float scale,
                            const T* __restrict__ sinks, float softcap) {
    constexpr int ROWS = GROUPS * MINE, WIDTH = (D + PANEL - 1) / PANEL * PANEL, STAGE = KEYS * WIDTH;
    DYNAMIC_SHARED(unsigned char, raw);
    T* queries = reinterpret_cast<T*>(raw + (1024 - unsigned(__cvta_generic_to_shared(raw)) % 1024) % 1024);
    T* keys = queries + ROWS * WIDTH;  // queries [GROUPS][WIDTH/64][MINE][64], keys and values [2][WIDTH/64][KEYS][64]
    T* values = keys + 2 * STAGE;
    __shared__ Barriers bar;

    const int group = num_heads / H, kv_head = blockIdx.x % H;
    const int number = (gridDim.x - 1 - blockIdx.x) / H;  // the last tiles see the most keys: start them first
    const Tile tile = Tile::of<S>(cu_seqlens, seq_lens, b, group, ROWS, number);
    if (tile.first >= tile.end) return;
    if (tile.blind()) return store_zeros<D>(y, tile, ROWS, group, kv_head, num_heads);
    const Band<ROWS, KEYS> band(tile, group, window);

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(bar.k_full + i, 64);
            mbarrier_init(bar.v_full + i, 64);
            mbarrier_init(bar.k_empty + i, GROUPS * GROUP / WARP);
            mbarrier_init(bar.v_empty + i, GROUPS * GROUP / WARP);
        }
    }
    __syncthreads();

    if (threadIdx.x / GROUP == 0) {
        registers_fewer<GROUPS == 2 ? 40 : 32>();
        const int table = tile.sequence * M, stored = S == 0 ? heads : H;
        if constexpr (S == 0) {
            k = x + (i64(tile.start) * heads + num_heads + kv_head) * D;
            v = k + H * D;
        }
        if (threadIdx.x < 64)
            produce<T, D, S>(keys, bar.k_full, bar.k_empty, k, page_table, table, kv_head, stored, band.low, band.high);
        else
            produce<T, D, S>(values, bar.v_full, bar.v_empty, v, page_table, table, kv_head, stored, band.low,
                             band.high);
    } else {
        registers_more<GROUPS == 2 ? 232 : 160>();
        const int consumer = threadIdx.x / GROUP - 1;
        T* q = queries + consumer * MINE * WIDTH;
        GroupRows<T, D> rows(tile, group, tile.first + consumer * MINE);
        rows.fetch_queries(q, x, kv_head, heads);
        bar_sync(1 + consumer, GROUP);
        const Scaling<T, CAPPED> scaling(scale, softcap);
        consume(rows, bar, q, keys, values, band, window, scaling, 1 + consumer);
        rows.template store_rows<SINKS>(q, y, S == 0 ? lse : nullptr, scaling.factor, sinks, kv_head, num_heads);
    }
}
