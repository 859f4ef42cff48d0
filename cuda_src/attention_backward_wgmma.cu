// The backward of causal grouped-query attention over ragged sequences, on Hopper's tensor cores (sm_90a alone).
//
//     delta = rowsum(dy y)                per token and query head
//     p  = exp(scale q k^T - lse)         per query head; a query at position i sees the keys max(0, i-window+1) .. i
//     dv = p^T dy                         summed over the query heads of the key/value head
//     ds = p (dy v^T - delta)
//     dq = scale ds k,  dk = scale ds^T q
//
// CAPPED: as in attention_backward_fma.cu.
//
//   x     [n, (num_heads + 2*H) * D]:T  rows of queries, keys and values;  dx: the same of their gradients
//   y, dy [n, num_heads * D]:T          the outputs, and their gradient
//   lse [n, num_heads]:f32
//   cu_seqlens [b + 1]:i32              sequence i has the rows cu_seqlens[i] .. cu_seqlens[i+1]-1; it may be empty
//   T is f16 or bf16, D is 64 or 128
//
// FlashAttention-3's backward (Shah et al., arXiv:2407.08608) in its order that repeats: a block has KEYS keys of one
// key/value head, whose dk and dv stay in registers, and goes over the tiles of M queries that see them, head after
// head of the group. Two warpgroups have 64 keys each; one more, the first, fetches q and dy, two stages of each. The
// scores are computed with keys as rows, so that p and ds are the left operands of dv and dk from registers; ds also
// goes through shared memory for dq. The scores of the next tile run beside this tile's dk.
//
// dq is summed over the blocks in `sums` (f32), in an order that never changes: a counter for each tile of queries and
// head says how many tiles of keys have added their part. One warp waits for this block's turn, another passes it on. A
// block waits only for blocks of smaller numbers, which are running or done. The sums lie as the registers of the
// products do. prepare_backward sorts the tiles of keys, see order_keys, and makes delta; convert_dq makes rows of dx of
// the sums, and the counters zero again.
//
// The warps that fetch have 24 registers with D = 128 (the two warpgroups that compute take 240): places are 32-bit
// numbers of vectors of 8, and what a block does lies in shared memory.
//
// Grid ((n / KEYS + b) * H), 384 threads.
//
// Op: cuplama/ops/self_attention.py. Tests: the registry's in tests/ops/test_ops.py, and
// tests/ops/test_self_attention_hopper.py. Benchmark: benchmarks/attention_backward.py.
//
// On an H200, bf16, causal, TFLOP/s (10 * num_heads * D * pairs, 2.5 times the forward's), 2026-11-27, in one run
// (benchmarks/results/2026-11-27-h200-attention-backward.json); beside it torch's two:
//
//     sequences, heads            here    torch's flash    cuDNN
//     1 x 4096,  32/8 of 128       403              224      415
//     1 x 16384, 32/8 of 128       430              308      509
//     8 x 1024,  32/8 of 128       300              152      282
//     16 x 1024, 12/12 of 64       219              136      204
//     4 x 1024,  32/8 of 64        266              121      186
//
// prepare_backward takes 6 to 64 us of it, convert_dq 19 to 132 us.
//
// Lost: rows of dx written by whoever adds the last part of dq, instead of convert_dq (benchmarks/results/
// 2026-11-27-h200-attention-backward-dq.txt: 295 instead of 443 for the first line, 266 instead of 312 for the third,
// nothing gained with D = 64: the block that writes is late for the next tile of queries). The next tile's scores begun
// early with D = 128 too, for which the compiler has too few registers: it then runs all products one after the other
// (C7512 in its log).
#include "attention_backward_keys.cuh"

// What the blocks need: their order, by the first blocks of the grid, and of each tile of queries and head, one a block,
// stats = (lse in powers of two, delta) [2][M]; zeros past the sequence. D / 8 threads take a row.
template <typename T, int D, int M>
__global__ void __launch_bounds__(256)
    prepare_backward(const T* __restrict__ y, const T* __restrict__ dy, const float* __restrict__ lse,
                     const i32* __restrict__ cu_seqlens, float* __restrict__ stats, i32* __restrict__ order, int n,
                     int b, int num_heads, int H, int sms) {
    constexpr int LANES = D / 8;
    const int ordering = (n / KEYS + b + 255) / 256, block = blockIdx.x - ordering;
    if (block < 0) return order_keys(cu_seqlens, order, n, b, H, sms);
    const int head = block % num_heads, vector = threadIdx.x % LANES;
    const Sequence sequence(cu_seqlens, b, M, block / num_heads);
    const int start = cu_seqlens[sequence.number], left = cu_seqlens[sequence.number + 1] - start - sequence.tile * M;
    if (left <= 0) return;
    const i64 first = i64(start + sequence.tile * M) * num_heads + head;
#pragma unroll 2
    for (int row = threadIdx.x / LANES; row < M; row += 256 / LANES) {
        const i64 at = first + i64(row) * num_heads;
        float sum = 0.f;
        if (row < left) {
            const Pack<T, 8> a = load<8>(y + at * D + vector * 8), c = load<8>(dy + at * D + vector * 8);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += to_float(a.v[i]) * to_float(c.v[i]);
        }
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        if (vector < 2) stats[(i64(block) * 2 + vector) * M + row] = vector ? sum : row < left ? lse[at] * LOG2_E : 0.f;
    }
}

struct Barriers {
    u64 q_full[2], q_empty[2], dy_full[2], dy_empty[2], turn[2], added[2], passed[2];
    float* sums[2];  // where to add this block's part of dq
    int begin[2];    // nothing is there yet
};

// One warp brings the tiles of q or of dy; rows past the sequence are zeros. With q comes what `stats` has of its rows.
// from, width: where the first tile and the group's first head begin, and a row's length, in vectors of 8, which 32 bits
// hold. first_stats: where theirs begin in stats, null for none. Registers are few.
template <typename T, int D, int M, bool STATS>
__device__ __forceinline__ void produce(T* stages, float* stats_of, u64* full, u64* empty, const T* rows, unsigned from,
                                        int width, const float* stats, unsigned first_stats, int num_heads, int group,
                                        const Work<M>& work) {
    const int lane = threadIdx.x % WARP;
    const int low = place(M, lane / 8, lane % 8);           // of the row lane / 8
    const int further = 4 * PANEL + (low & 32 ? -32 : 32);  // to 4 rows further
    from += lane / 8 * width + lane % 8;
    unsigned at = first_stats + lane * 4;
#pragma unroll 1
    for (int step = 0, tile = work.first; step < (work.last - work.first) * group; step++) {
        const int left = work.length - tile * M - lane / 8;
        if (step >= 2) mbarrier_wait(empty + step % 2, (step / 2 + 1) % 2);
        T* to = stages + int(hidden(step % 2 * (M * D) + low));  // hidden, else many sums of it are kept
#pragma unroll 1
        for (int r = 0; r < M; r += 8, to += 8 * PANEL) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const T* row = rows + i64(from) * 8;
#pragma unroll
                for (int u = 0; u < D / PANEL; u++)
                    cp_async_16(to + half * further + u * (M * PANEL), row + u * PANEL, r + half * 4 < left);
                from += 4 * width;
            }
        }
        if (STATS) {
#pragma unroll
            for (int i = 0; i < 2 * M; i += WARP * 4)
                cp_async_16(stats_of + (step % 2 * (2 * M) + lane * 4 + i), stats + (at + i), true);
            at += 2 * M * num_heads;
        }
        cp_async_commit();
        if (++tile == work.last) {  // the next head
            tile = work.first;
            from += D / 8 - (work.last - tile) * (M * width);
            at += 2 * M * (1 - (work.last - tile) * num_heads);
        }
        cp_async_wait<0>();
        fence_proxy_async();
        mbarrier_arrive(full + step % 2);
    }
}

// One thread waits for the block's turns to add to dq, one after the other; another (`pass`) gives them to the next.
// sums, turns: those of the group's first head.
template <int D, int M>
__device__ __forceinline__ void take_turns(Barriers& bar, float* sums, u32* turns, int num_heads, int group,
                                           const Work<M>& work, bool pass) {
    int step = 0;
    for (int head = 0; head < group; head++) {
#pragma unroll 1
        for (int t = work.first; t < work.last; t++, step++) {
            const i64 tile = i64(work.number + t) * num_heads + head;
            const u32 mine = work.turn(t);
            const int stage = step % 2, phase = step / 2 % 2;
            if (pass) {
                mbarrier_wait(bar.added + stage, phase);
                fence_gpu();
                atomicExch(turns + tile, mine + 1);
                mbarrier_arrive(bar.passed + stage);
            } else {
                if (step >= 2) mbarrier_wait(bar.passed + stage, phase ^ 1);
                while (ld_acquire(turns + tile) != mine) {
                }
                bar.sums[stage] = sums + tile * (M * D), bar.begin[stage] = mine == 0;
                mbarrier_arrive(bar.turn + stage);
            }
        }
    }
}

// One warpgroup's part of all steps, tile after tile and head after head.
template <typename T, int D, int M, bool CAPPED>
__device__ __forceinline__ void consume(GroupKeys<T, D, M>& keys, Barriers& bar, T* first, const float* stats,
                                        const Work<M>& work, int group, const Scaling<T, CAPPED>& scaling) {
    using S = Shared<T, D, M>;
    constexpr int HALF = 64 * PANEL, PARTS = M / 64;  // HALF: elements to 64 rows further
    constexpr bool AHEAD = D == 64;  // the next tile's scores beside this one's dk, where registers allow it
    const S shared(first);
    const auto release = [&](u64* empty) {
        __syncwarp();
        if (keys.lane == 0) mbarrier_arrive(empty);
    };
    const int near = work.first * M - work.key, far = work.last * M - work.key;
    const int steps = (work.last - work.first) * group;
    float score[PARTS][32];
    const auto multiply_queries = [&](int stage) {
#pragma unroll
        for (int i = 0; i < PARTS; i++)
            keys.multiply_rows(score[i], shared.matrix(S::K), shared.matrix(S::Q + stage * (M * D) + i * HALF));
    };
    const auto scores_done = [&] {
#pragma unroll
        for (int i = 0; i < PARTS; i++) wgmma_done(score[i]);
    };
    if (AHEAD) {
        mbarrier_wait(bar.q_full, 0);
        multiply_queries(0);
        wgmma_wait<0>();
        scores_done();
    }
#pragma unroll 1
    for (int step = 0, at = near; step < steps; step++) {
        const int stage = step % 2, phase = step / 2 % 2;
        const u64 q = shared.matrix(S::Q + stage * (M * D)) + shared.tile_panel;
        float dq[32];
        u32 p[4][4], ds[4][4];
        if (!AHEAD) {
            mbarrier_wait(bar.q_full + stage, phase);
            multiply_queries(stage);
        }
        mbarrier_wait(bar.dy_full + stage, phase);
#pragma unroll
        for (int i = 0; i < PARTS; i++) {
            float dp[32];
            const float* lse = stats + stage * (2 * M) + i * 64;
            const u64 dy = shared.matrix(S::DY + stage * (M * D) + i * HALF);
            keys.multiply_rows(dp, shared.matrix(S::V), dy);
            if (!AHEAD) {
                wgmma_wait<1>();
                scores_done();
            }
            keys.weigh(score[i], lse, at + i * 64, work.window, scaling);
            keys.round_weights(p, score[i]);
            keys.add_rows(keys.dv, p, dy + shared.tile_panel);
            wgmma_wait<1>();
            wgmma_done(dp);
            keys.differ(ds, score[i], dp, lse, scaling);
            keys.store_differences(first + S::DS + (stage * M + i * 64) * KEYS, ds);
            if (i + 1 < PARTS) keys.add_rows(keys.dk, ds, q + i * (HALF / 8));
        }
        fence_proxy_async();
        bar_sync(1, 2 * GROUP);
        keys.multiply_keys(dq, shared.matrix(S::DS + stage * (KEYS * M)) + shared.key_panel,
                           shared.matrix(S::K) + shared.key_panel);
        keys.add_rows(keys.dk, ds, q + (PARTS - 1) * (HALF / 8));
        if (AHEAD) {
            const int next = step + 1 < steps ? stage ^ 1 : stage;  // past the last step nobody reads the scores
            if (next != stage) mbarrier_wait(bar.q_full + next, (step + 1) / 2 % 2);
            wgmma_wait<2>();  // p is free
            multiply_queries(next);
            wgmma_wait<PARTS + 1>();
        } else {
            wgmma_wait<1>();
        }
        wgmma_done(dq);
        release(bar.dy_empty + stage);
        mbarrier_wait(bar.turn + stage, phase);
        keys.add_queries(dq, bar.sums[stage], bar.begin[stage]);
        release(bar.added + stage);
        wgmma_wait<0>();
        if (AHEAD) scores_done();
        release(bar.q_empty + stage);
        at = at + M == far ? near : at + M;
    }
    wgmma_done(keys.dk);
    wgmma_done(keys.dv);
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// The keys and values of a block to shared memory, by the two warpgroups that compute; zeros past the sequence.
template <typename T, int D>
__device__ __forceinline__ void fetch_keys(T* k, T* v, const T* keys, const T* values, int width, int left) {
    const int thread = threadIdx.x - GROUP;
    for (int row = thread / 8; row < KEYS; row += 2 * GROUP / 8) {
        for (int vector = thread % 8; vector < D / 8; vector += 8) {
            cp_async_16(k + place(KEYS, row, vector), keys + i64(row) * width + vector * 8, row < left);
            cp_async_16(v + place(KEYS, row, vector), values + i64(row) * width + vector * 8, row < left);
        }
    }
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();
}

template <typename T, int D, int M, bool CAPPED>
__global__ void __launch_bounds__(3 * GROUP, 1)
    attention_backward_wgmma(const T* __restrict__ x, const T* __restrict__ dy, const float* __restrict__ stats,
                             const i32* __restrict__ cu_seqlens, const i32* __restrict__ order, T* __restrict__ dx,
                             float* sums, u32* turns, int num_heads, int H, int window, float scale, float softcap) {
    using S = Shared<T, D, M>;
    DYNAMIC_SHARED(unsigned char, raw);
    T* first = reinterpret_cast<T*>(raw + (1024 - unsigned(__cvta_generic_to_shared(raw)) % 1024) % 1024);
    __shared__ __align__(16) float stats_of[2 * 2 * M];  // [2][lse or delta][M]
    __shared__ Barriers bar;

    const Pack<i32, 4> entry = load<4>(order + blockIdx.x / H * 4);
    if (entry.v[0] < 0) return;
    const Work<M> work(cu_seqlens, entry, window);
    const int kv_head = blockIdx.x % H, group = num_heads / H, first_head = kv_head * group;
    const int width = (num_heads + 2 * H) * D;

    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(bar.q_full + i, WARP), mbarrier_init(bar.dy_full + i, WARP);
            mbarrier_init(bar.q_empty + i, WARPS), mbarrier_init(bar.dy_empty + i, WARPS);
            mbarrier_init(bar.turn + i, 1), mbarrier_init(bar.added + i, WARPS), mbarrier_init(bar.passed + i, 1);
        }
    }
    __syncthreads();

    if (threadIdx.x / GROUP == 0) {
        registers_fewer<D == 64 ? 40 : 24>();
        const int warp = threadIdx.x / WARP;
        const unsigned row = work.start + work.first * M;
        if (warp == 0)
            produce<T, D, M, true>(
                first + S::Q, stats_of, bar.q_full, bar.q_empty, x, row * (width / 8) + first_head * (D / 8), width / 8,
                stats, ((work.number + work.first) * num_heads + first_head) * (2 * M), num_heads, group, work);
        else if (warp == 1)
            produce<T, D, M, false>(first + S::DY, nullptr, bar.dy_full, bar.dy_empty, dy,
                                    (row * num_heads + first_head) * (D / 8), num_heads * (D / 8), nullptr, 0, 0, group,
                                    work);
        else if (threadIdx.x % WARP == 0)
            take_turns<D>(bar, sums + i64(first_head) * (M * D), turns + first_head, num_heads, group, work, warp == 3);
    } else {
        registers_more<D == 64 ? 232 : 240>();
        const i64 at = i64(work.start + work.key) * width + (num_heads + kv_head) * D;
        fetch_keys<T, D>(first + S::K, first + S::V, x + at, x + (at + H * D), width, work.length - work.key);
        bar_sync(1, 2 * GROUP);
        GroupKeys<T, D, M> keys;
        consume(keys, bar, first, stats_of, work, group, Scaling<T, CAPPED>(scale, softcap));
        bar_sync(2 + keys.part, GROUP);  // no product of another warp may still read v, which takes the results
        keys.store_rows(first + S::V, keys.dv, 1.f, dx + (at + H * D), width, work.length - work.key);
        keys.store_rows(first + S::V, keys.dk, scale, dx + at, width, work.length - work.key);
    }
}

// dx = sums * scale for the queries: a block has one tile and one head. It leaves `turns` zero.
template <typename T, int D, int M>
__global__ void __launch_bounds__(256)
    convert_dq(const float* __restrict__ sums, const i32* __restrict__ cu_seqlens, T* __restrict__ dx, u32* turns,
               int b, int num_heads, int H, float scale) {
    constexpr int ROWS = M == 128 ? 64 : M, COLUMNS = M == 128 ? D : D / 2, GROUPS = COLUMNS / 8;  // of a warpgroup
    const int head = blockIdx.y;
    const Sequence sequence(cu_seqlens, b, M, blockIdx.x);
    const int start = cu_seqlens[sequence.number], length = cu_seqlens[sequence.number + 1] - start;
    const int begin = sequence.tile * M;
    if (begin >= length) return;
    const i64 tile = i64(blockIdx.x) * num_heads + head;
    if (threadIdx.x == 0) turns[tile] = 0;
    for (int i = threadIdx.x; i < M * D / 16; i += 256) {  // 8 columns of two rows
        const int columns = i % GROUPS, row = i / GROUPS % 8, warp = i / (GROUPS * 8) % 4, part = i / (GROUPS * 32);
        const float* from = sums + tile * (M * D) + ((part * GROUPS + columns) * GROUP + warp * WARP + row * 4) * 4;
        Pack<T, 8> low, high;
#pragma unroll
        for (int lane = 0; lane < 4; lane++) {
            const Pack<float, 4> four = load<4>(from + lane * 4);
            low.v[2 * lane] = from_float<T>(four.v[0] * scale), low.v[2 * lane + 1] = from_float<T>(four.v[1] * scale);
            high.v[2 * lane] = from_float<T>(four.v[2] * scale),
                       high.v[2 * lane + 1] = from_float<T>(four.v[3] * scale);
        }
        const int r = begin + (M == 128 ? part * ROWS : 0) + warp * 16 + row;
        const int column = (M == 128 ? 0 : part * COLUMNS) + columns * 8;
        T* to = dx + i64(start + r) * (num_heads + 2 * H) * D + head * D + column;
        if (r < length) store<8>(to, low);
        if (r + 8 < length) store<8>(to + i64(8) * (num_heads + 2 * H) * D, high);
    }
}
