// The backward of causal grouped-query attention over ragged sequences, on Hopper's tensor cores (sm_90a alone).
//
//     delta = rowsum(dy y)                per token and query head
//     p  = exp(scale q k^T - lse)         per query head; a query at position i sees the keys max(0, i-window+1) .. i
//     dv = p^T dy                         summed over the query heads of the key/value head
//     ds = p (dy v^T - delta)
//     dq = scale ds k,  dk = scale ds^T q
//
//   x     [n, (num_heads + 2*H) * D]:T  rows of queries, keys and values;  dx: the same of their gradients
//   y, dy [n, num_heads * D]:T          the outputs, and their gradient
//   lse, delta [n, num_heads]:f32
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
// products do; convert_dq makes rows of them. prepare_backward sorts the tiles of keys, see
// order_keys, and computes delta.
//
// Grid ((n / KEYS + b) * H), 384 threads.
//
// Op: cuplama/ops/self_attention.py. Tests: the registry's in tests/ops/test_ops.py, and
// tests/ops/test_self_attention_hopper.py. Benchmark: benchmarks/attention_backward.py.
#include "attention.cuh"
#include "mma.cuh"

constexpr int GROUP = 128, MINE = 64;  // threads and keys of a warpgroup
constexpr int KEYS = 128, PANEL = 64;  // keys of a block, columns of a panel
constexpr int WARPS = 2 * GROUP / WARP;  // that compute

// ---- per dtype ------------------------------------------------------------------------------------------------------

template <typename T>
struct Product;
template <>
struct Product<f16> {
    static __device__ __forceinline__ void rows(float (&d)[32], u64 a, u64 b, bool add) { wgmma_n64_f16(d, a, b, add); }
    static __device__ __forceinline__ void columns(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_columns_f16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_f16(d, a, b);
    }
};
template <>
struct Product<bf16> {
    static __device__ __forceinline__ void rows(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_n64_bf16(d, a, b, add);
    }
    static __device__ __forceinline__ void columns(float (&d)[32], u64 a, u64 b, bool add) {
        wgmma_columns_bf16(d, a, b, add);
    }
    template <int N>
    static __device__ __forceinline__ void sum(float (&d)[N], const u32 (&a)[4], u64 b) {
        wgmma_bf16(d, a, b);
    }
};

// ---- which block has which keys -------------------------------------------------------------------------------------

// Tiles of `rows` tokens are numbered over the whole batch as in attention.cuh: sequence i has the numbers from
// cu_seqlens[i] / rows + i on. This finds the sequence of a number, and the tile in it; it may be one past the last.
struct Sequence {
    int number, tile;

    __device__ __forceinline__ Sequence(const i32* cu_seqlens, int b, int rows, int of) {
        number = 0;
        for (int last = b; last - number > 1;) {
            const int middle = (number + last) / 2;
            if (first_tile(cu_seqlens, middle, 1, rows) <= of)
                number = middle;
            else
                last = middle;
        }
        tile = of - first_tile(cu_seqlens, number, 1, rows);
    }
};

// Tiles of keys that a sequence has.
__device__ __forceinline__ int key_tiles(const i32* cu_seqlens, int i) {
    return (cu_seqlens[i + 1] - cu_seqlens[i] + KEYS - 1) / KEYS;
}

// Numbers from .. to-1 without those below `low`.
__device__ __forceinline__ int from_low(int from, int to, int low) { return max(0, to - max(from, low)); }

// The order in which blocks take tiles of keys, and in which they add to dq. Tile j of a sequence of `tiles` tiles has
// the level longest - tiles + j: the lower, the more queries see it. Levels come in rounds, each about what runs at
// once. Tiles of a round that start together go from the highest level down: a block's first tile of queries is one
// that the block before has just left, so nobody waits, and the last ends first. The next round is then started one
// after the other and goes up: all of them end together. Blocks of many sequences come heavy ones first by this.
//
// order[e] = (sequence, tile, longest - tiles, levels of a round) for block e * H and the H - 1 behind it; sequence -1: none. One thread an
// entry.
__device__ __forceinline__ void order_keys(const i32* cu_seqlens, i32* order, int n, int b, int H, int sms) {
    __shared__ int longest_of[8], total_of[8];
    int longest = 0, total = 0;
    for (int i = threadIdx.x; i < b; i += 256) {
        const int tiles = key_tiles(cu_seqlens, i);
        longest = max(longest, tiles), total += tiles;
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        longest = max(longest, __shfl_xor_sync(ALL_LANES, longest, lanes));
        total += __shfl_xor_sync(ALL_LANES, total, lanes);
    }
    if (threadIdx.x % WARP == 0) longest_of[threadIdx.x / WARP] = longest, total_of[threadIdx.x / WARP] = total;
    __syncthreads();
    longest = total = 0;
    for (int i = 0; i < 8; i++) longest = max(longest, longest_of[i]), total += total_of[i];
    const int entry = blockIdx.x * 256 + threadIdx.x, entries = n / KEYS + b;
    if (entry >= entries) return;
    if (entry >= total) store<4>(order + entry * 4, Pack<i32, 4>{{-1, 0, 0, 0}});
    const Sequence mine(cu_seqlens, b, KEYS, entry);
    const int tiles = key_tiles(cu_seqlens, mine.number), tile = mine.tile;
    if (tile >= tiles) return;
    const int round = max(1, int(i64(sms) * longest / (i64(total) * H)));  // total is not 0: it has this tile
    const int level = longest - tiles + tile, begin = level / round * round, end = min(begin + round, longest);
    const bool down = level / round % 2 == 0;
    int place = 0;
    for (int i = 0; i < b; i++) {
        const int low = longest - key_tiles(cu_seqlens, i);
        place += from_low(0, begin, low) + (down ? from_low(level + 1, end, low) : from_low(begin, level, low));
        place += i < mine.number && level >= low;
    }
    store<4>(order + place * 4, Pack<i32, 4>{{mine.number, tile, longest - tiles, round}});
}

// What the blocks need: their order, by the first n / 256 / KEYS + 1 blocks or more, and delta, D / 8 threads a row.
template <typename T, int D>
__global__ void __launch_bounds__(256)
    prepare_backward(const T* __restrict__ y, const T* __restrict__ dy, const i32* __restrict__ cu_seqlens,
                     float* __restrict__ delta, i32* __restrict__ order, int n, int b, int num_heads, int H, int sms) {
    constexpr int LANES = D / 8;
    const int ordering = (n / KEYS + b + 255) / 256;
    if (blockIdx.x < ordering) return order_keys(cu_seqlens, order, n, b, H, sms);
    const i64 row = i64(blockIdx.x - ordering) * (256 / LANES) + threadIdx.x / LANES;
    const int vector = threadIdx.x % LANES;
    float sum = 0.f;
    if (row < i64(n) * num_heads) {
        const Pack<T, 8> a = load<8>(y + row * D + vector * 8), c = load<8>(dy + row * D + vector * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(a.v[i]) * to_float(c.v[i]);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (row < i64(n) * num_heads && vector == 0) delta[row] = sum;
}

// What a block does: its tile of keys, and the tiles first .. last-1 of M queries that see it.
template <int M>
struct Work {
    int start, length;        // of the sequence: its first row, and its tokens
    int key, window;          // the first key; 0: no window
    int first, last, number;  // number: of the sequence's first tile of queries
    int level, shift, round;  // see order_keys

    __device__ __forceinline__ Work(const i32* cu_seqlens, const Pack<i32, 4>& entry, int window_of_all) {
        const int sequence = entry.v[0];
        start = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - start;
        window = window_of_all < length ? window_of_all : 0;
        key = entry.v[1] * KEYS, shift = entry.v[2], round = entry.v[3], level = entry.v[1] + shift;
        first = key / M;
        last = ((window > 0 ? min(length, key + KEYS - 1 + window) : length) + M - 1) / M;
        number = first_tile(cu_seqlens, sequence, 1, M);
    }

    // How many tiles of keys add to tile t of the queries before this one.
    __device__ __forceinline__ int turn(int t) const {
        const int seen = t * M - window + 1, begin = level / round * round;
        const int low = shift + (window > 0 && seen > 0 ? seen / KEYS : 0);
        const int high = shift + (min(t * M + M, length) - 1) / KEYS;
        const int in_round =
            level / round % 2 == 0 ? min(high, begin + round - 1) - level : level - max(low, begin);
        return max(0, begin - low) + in_round;
    }
};

// ---- shared memory --------------------------------------------------------------------------------------------------

// Element of a vector of 8 columns in a matrix of `rows` rows.
__device__ __forceinline__ int place(int rows, int row, int vector) {
    return vector / 8 * (rows * PANEL) + row * PANEL + (vector % 8 ^ row % 8) * 8;
}

struct Barriers {
    u64 q_full[2], q_empty[2], dy_full[2], dy_empty[2], turn[2], added[2], passed[2];
    float* sums[2];  // where to add this block's part of dq
    int begin[2];    // nothing is there yet
};

// One warp brings the tiles of q or of dy, each with a number for each of its rows: times `factor`; `beyond` for rows
// past the sequence, which are zeros. rows, numbers: those of the sequence's first token and the group's first head.
template <typename T, int D, int M>
__device__ __forceinline__ void produce(T* stages, float* numbers_of, u64* full, u64* empty, const T* rows, int width,
                                        const float* numbers, int num_heads, int group, const Work<M>& work,
                                        float factor, float beyond) {
    const int lane = threadIdx.x % WARP, row = lane / 8, vector = lane % 8;
    int step = 0;
    for (int head = 0; head < group; head++) {
#pragma unroll 1
        for (int t = work.first; t < work.last; t++, step++) {
            if (step >= 2) mbarrier_wait(empty + step % 2, (step / 2 + 1) % 2);
            const int left = work.length - t * M;
            float number[M / WARP];
#pragma unroll
            for (int i = 0; i < M / WARP; i++) {
                const int r = lane + i * WARP;
                number[i] = beyond;
                if (r < left) number[i] = numbers[i64(t * M + r) * num_heads + head] * factor;
            }
            T* to = stages + step % 2 * (M * D);
            const T* from = rows + i64(t * M + row) * width + head * D + vector * 8;
#pragma unroll 4
            for (int r = 0; r < M; r += 4) {
#pragma unroll
                for (int u = 0; u < D / PANEL; u++)
                    cp_async_16(to + place(M, row + r, vector + u * 8), from + i64(r) * width + u * PANEL,
                                row + r < left);
            }
            cp_async_commit();
#pragma unroll
            for (int i = 0; i < M / WARP; i++) numbers_of[step % 2 * M + lane + i * WARP] = number[i];
            cp_async_wait<0>();
            fence_proxy_async();
            mbarrier_arrive(full + step % 2);
        }
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

// ---- a warpgroup's keys ---------------------------------------------------------------------------------------------

// Where a block's matrices lie, one behind the other: k and v [D/64][KEYS][64], q and dy [2][D/64][M][64], and ds
// [2][M/64][KEYS][64], transposed.
template <typename T, int D, int M>
struct Shared {
    static constexpr int K = 0, V = KEYS * D, Q = 2 * KEYS * D, DY = Q + 2 * M * D, DS = DY + 2 * M * D;  // elements
    u64 rows;                   // the first as wgmma_matrix has it, with rows across the sum
    u64 key_panel, tile_panel;  // added to it: with rows along the sum, for a matrix of KEYS or of M rows

    __device__ __forceinline__ Shared(const T* first)
        : rows(wgmma_matrix(first, 1)),
          key_panel(wgmma_matrix(first, KEYS * PANEL * sizeof(T)) - rows),
          tile_panel(wgmma_matrix(first, M * PANEL * sizeof(T)) - rows) {}
    __device__ __forceinline__ u64 matrix(int element) const { return rows + element / 8; }
};

// 64 keys of a block. A thread has the rows `here` and here + 8 of them, and columns 8*j + 2*(lane%4) and the next:
// queries in the scores, dimensions in the sums. Queries are taken by 64.
template <typename T, int D, int M>
struct GroupKeys {
    static constexpr int STAGE = M * D / 8, STEP = 16 * PANEL / 8;  // a stage, 16 rows along a sum; of 16 bytes
    using Sums = float[D / 2];
    using Square = float[32];  // 64 x 64
    using Left = u32[4][4];    // the same rounded, as a left operand
    const int part, thread, lane, here;
    Sums dk = {}, dv = {};

    __device__ __forceinline__ GroupKeys()
        : part(threadIdx.x / GROUP - 1),
          thread(threadIdx.x % GROUP),
          lane(threadIdx.x % WARP),
          here(part * MINE + thread / WARP * 16 + lane / 4) {}

    // Begins d = a b^T over D columns: a has the block's keys as rows, b the queries.
    __device__ __forceinline__ void multiply_rows(Square& d, u64 a, u64 b) const {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < D / 16; i++) {  // 32 bytes further, or a panel; in units of 16 bytes
            const int column = i % 4 * 2;
            Product<T>::rows(d, a + (part * (MINE * 8) + i / 4 * (KEYS * 8) + column), b + (i / 4 * (M * 8) + column),
                             i > 0);
        }
        wgmma_commit();
    }

    // Begins sums += left b: left are weights of this warpgroup's keys and the 64 queries of b.
    __device__ __forceinline__ void add_rows(Sums& sums, const Left& left, u64 b) const {
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) Product<T>::sum(sums, left[i], b + i * STEP);
        wgmma_commit();
    }

    // Begins this warpgroup's half of dq = ds k: columns of D = 128, rows of D = 64.
    __device__ __forceinline__ void multiply_keys(Square& dq, u64 ds_columns, u64 k_columns) const {
        const int rows = M == 128 ? part : 0, columns = M == 128 ? 0 : part;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++)
            Product<T>::columns(dq, ds_columns + (rows * (KEYS * 8) + i * STEP),
                                k_columns + (columns * (KEYS * 8) + i * STEP), i > 0);
        wgmma_commit();
    }

    // Shuts out the pairs of which the query does not see the key. at: the first query less the block's first key.
    __device__ __forceinline__ void mask(Square& score, int at, int window) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int ahead = at + lane % 4 * 2 - here - 8 * half;
#pragma unroll
            for (int j = 0; j < 8; j++) {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int distance = ahead + (j * 8 + e);
                    if (distance < 0 || (window > 0 && distance >= window)) score[4 * j + 2 * half + e] = -infinity();
                }
            }
        }
    }

    // Scores to weights. lse: of the queries, in powers of two; infinite for those past the sequence.
    __device__ __forceinline__ void weigh(Square& score, const float* lse, int at, int window, float factor) const {
        const int near = at - part * MINE;
        if (near < MINE - 1 || (window > 0 && near + 63 >= window)) {
            if (window > 0)
                mask(score, at, window);
            else
                mask(score, at, 0);  // a copy that does not look for windows
        }
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Pack<float, 2> shift = load<2>(lse + j * 8 + lane % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float& low = score[4 * j + 2 * half];
                float& high = score[4 * j + 2 * half + 1];
                low = exp2f(low * factor - shift.v[0]), high = exp2f(high * factor - shift.v[1]);
            }
        }
    }

    // ds = weights (dp - delta), and p = weights, rounded.
    __device__ __forceinline__ void differ(Left& p, Left& ds, const Square& weights, const Square& dp,
                                           const float* delta) const {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Pack<float, 2> less = load<2>(delta + j * 8 + lane % 4 * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int i = 4 * j + 2 * half;
                const float low = weights[i], high = weights[i + 1];
                p[j / 2][half + j % 2 * 2] = pack<T>(low, high);
                ds[j / 2][half + j % 2 * 2] = pack<T>(low * (dp[i] - less.v[0]), high * (dp[i + 1] - less.v[1]));
            }
        }
    }

    // The differences to shared memory, where the other warpgroup reads them too.
    __device__ __forceinline__ void store_differences(T* to, const Left& ds) const {
#pragma unroll
        for (int j = 0; j < 8; j++) {
#pragma unroll
            for (int half = 0; half < 2; half++)
                *reinterpret_cast<u32*>(to + place(KEYS, here + 8 * half, j) + lane % 4 * 2) =
                    ds[j / 2][half + j % 2 * 2];
        }
    }

    // Adds dq to the sums of a tile and head, or begins them. They lie as the registers do: 8 times 4 of a thread.
    __device__ __forceinline__ void add_queries(const Square& dq, float* sums, bool begin) const {
        float* to = sums + part * (M * D / 2) + thread * 4;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (begin)
                store<4>(to + i * (GROUP * 4), Pack<float, 4>{{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]}});
            else
                red_add_4(to + i * (GROUP * 4), dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
        }
    }

    // Rows of dk or dv, through shared memory, so that whole rows are written. left: keys from the block's first on.
    __device__ __forceinline__ void store_rows(T* stage, const Sums& sums, float factor, T* to, int width,
                                               int left) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int j = 0; j < D / 8; j++)
                *reinterpret_cast<u32*>(stage + place(KEYS, here + 8 * half, j) + lane % 4 * 2) =
                    pack<T>(sums[4 * j + 2 * half] * factor, sums[4 * j + 2 * half + 1] * factor);
        }
        __syncwarp();
        for (int i = lane / 8; i < 16; i += WARP / 8) {
            const int row = part * MINE + thread / WARP * 16 + i;
            if (row >= left) break;
            for (int vector = lane % 8; vector < D / 8; vector += 8)
                store<8>(to + i64(row) * width + vector * 8, load<8>(stage + place(KEYS, row, vector)));
        }
        __syncwarp();
    }
};

// One warpgroup's part of all steps, tile after tile and head after head.
template <typename T, int D, int M>
__device__ __forceinline__ void consume(GroupKeys<T, D, M>& keys, Barriers& bar, T* first, const float* lse,
                                        const float* delta, const Work<M>& work, int group, float factor) {
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
            const int row = stage * M + i * 64;
            const u64 dy = shared.matrix(S::DY + stage * (M * D) + i * HALF);
            keys.multiply_rows(dp, shared.matrix(S::V), dy);
            if (!AHEAD) {
                wgmma_wait<1>();
                scores_done();
            }
            keys.weigh(score[i], lse + row, at + i * 64, work.window, factor);
            wgmma_wait<0>();
            wgmma_done(dp);
            keys.differ(p, ds, score[i], dp, delta + row);
            keys.add_rows(keys.dv, p, dy + shared.tile_panel);
            keys.store_differences(first + S::DS + row * KEYS, ds);
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

template <typename T, int D, int M>
__global__ void __launch_bounds__(3 * GROUP, 1)
    attention_backward_wgmma(const T* __restrict__ x, const float* __restrict__ lse, const float* __restrict__ delta,
                             const T* __restrict__ dy, const i32* __restrict__ cu_seqlens,
                             const i32* __restrict__ order, T* __restrict__ dx, float* sums, u32* turns, int num_heads,
                             int H, int window, float scale) {
    using S = Shared<T, D, M>;
    DYNAMIC_SHARED(unsigned char, raw);
    T* first = reinterpret_cast<T*>(raw + (1024 - unsigned(__cvta_generic_to_shared(raw)) % 1024) % 1024);
    __shared__ __align__(16) float lse_of[2 * M], delta_of[2 * M];
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
        registers_fewer<40>();
        const int warp = threadIdx.x / WARP;
        const i64 numbers = i64(work.start) * num_heads + first_head;
        if (warp == 0)
            produce<T, D>(first + S::Q, lse_of, bar.q_full, bar.q_empty, x + (i64(work.start) * width + first_head * D), width,
                          lse + numbers, num_heads, group, work, LOG2_E, infinity());
        else if (warp == 1)
            produce<T, D>(first + S::DY, delta_of, bar.dy_full, bar.dy_empty, dy + numbers * D, num_heads * D, delta + numbers,
                          num_heads, group, work, 1.f, 0.f);
        else if (threadIdx.x % WARP == 0)
            take_turns<D>(bar, sums + i64(first_head) * (M * D), turns + first_head, num_heads, group, work, warp == 3);
    } else {
        registers_more<232>();
        const i64 at = i64(work.start + work.key) * width + (num_heads + kv_head) * D;
        fetch_keys<T, D>(first + S::K, first + S::V, x + at, x + (at + H * D), width, work.length - work.key);
        bar_sync(1, 2 * GROUP);
        GroupKeys<T, D, M> keys;
        consume(keys, bar, first, lse_of, delta_of, work, group, scale * LOG2_E);
        bar_sync(2 + keys.part, GROUP);  // no product of another warp may still read v, which takes the results
        keys.store_rows(first + S::V, keys.dv, 1.f, dx + (at + H * D), width, work.length - work.key);
        keys.store_rows(first + S::V, keys.dk, scale, dx + at, width, work.length - work.key);
    }
}

// dx = sums * scale for the queries: a block has one tile and one head. It leaves `turns` zero.
template <typename T, int D, int M>
__global__ void __launch_bounds__(256)
    convert_dq(const float* __restrict__ sums, const i32* __restrict__ cu_seqlens, T* __restrict__ dx, u32* turns, int b,
               int num_heads, int H, float scale) {
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
            high.v[2 * lane] = from_float<T>(four.v[2] * scale), high.v[2 * lane + 1] = from_float<T>(four.v[3] * scale);
        }
        const int r = begin + (M == 128 ? part * ROWS : 0) + warp * 16 + row;
        const int column = (M == 128 ? 0 : part * COLUMNS) + columns * 8;
        T* to = dx + i64(start + r) * (num_heads + 2 * H) * D + head * D + column;
        if (r < length) store<8>(to, low);
        if (r + 8 < length) store<8>(to + i64(8) * (num_heads + 2 * H) * D, high);
    }
}
