// Causal grouped-query attention of many new tokens over the paged KV cache, on tensor cores (sm_80 and later).
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
//   x, k, v, cu_seqlens, seq_lens, page_table, y    as in attention_prefill_fma.cu; T is f16 or bf16; D is a multiple
//                                                   of 8, at most 256; S is a power of two; x, k, v and y lie on
//                                                   16-byte boundaries
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
// In shared memory a row is D/8 vectors of 16 bytes (D rounded up to 16, filled with zeros), stored at permuted places
// so that the 8 rows of an 8x8 matrix always lie in different banks: see Layout.
//
// A row's result depends neither on the rest of the batch nor on ROWS nor on how a prompt is cut into chunks, bit for
// bit: tiles of keys begin at multiples of KEYS, and a masked tile changes nothing.
//
// Op: cuplama/ops/attention.py, which also chooses ROWS and KEYS. Tests: the registry's in tests/ops/test_ops.py, and
// tests/ops/test_attention.py. Benchmark: `cuplama kernels bench`.
//
// On an H200, bf16, 32 query and 8 KV heads, D = 128, one causal prompt of 1k, 4k, 16k tokens, 2026-11-20: 225, 310 and
// 334 TFLOP/s (4 * num_heads * D * pairs), as benchmarks/results/ has it. Tried, in an earlier run (210, 308, 318): 64
// rows for long prompts (285, 293) and 128 for short ones (164 at 1k); 32 keys a tile (154, 304, 322; for D = 64 at 4k
// and 16k 222 and 233 instead of 262 and 282).
#include "attention.cuh"
#include "mma.cuh"

constexpr int WARPS = 4, THREADS = WARPS * WARP;

// ---- shared memory --------------------------------------------------------------------------------------------------

// Where the 16-byte vectors of a matrix with rows of D elements lie. Eight rows at one column must fall into the eight
// 16-byte groups of the banks. A row is VECTORS = odd * 2^k vectors, so rows already differ in the upper 3-k bits of
// the group; the lower k bits are exchanged by an exclusive or with the row's upper bits. TURNS = 2^k, at most 8,
// vectors change places among themselves; as many threads copy a row, so that a thread's vectors differ by constants.
template <int D>
struct Layout {
    static constexpr int WIDTH = (D + 15) / 16 * 16, VECTORS = WIDTH / 8;
    static constexpr int TURNS = VECTORS % 8 == 0 ? 8 : VECTORS % 4 == 0 ? 4 : 2;

    static __device__ __forceinline__ int turn(int row) { return row / (8 / TURNS) % TURNS; }
    static __device__ __forceinline__ int at(int row, int vector) { return row * WIDTH + (vector ^ turn(row)) * 8; }
};

// The place of a lane's row in an ldmatrix that reads columns 16*i and 16*i + 8 of rows that differ by multiples of 8.
// first: the lane's row; upper: whether the lane reads column 16*i + 8.
template <int D>
struct Lane {
    int base, turned;

    __device__ __forceinline__ Lane(int first, bool upper)
        : base(first * Layout<D>::WIDTH), turned((Layout<D>::turn(first % 8) ^ int(upper)) * 8) {}

    __device__ __forceinline__ int at(int row, int i) const {  // row, i: constants once loops are unrolled
        constexpr int LOW = (Layout<D>::TURNS - 1) * 8;
        return base + (turned ^ (16 * i & LOW)) + (row * Layout<D>::WIDTH + (16 * i & ~LOW));
    }
};

// KEYS tokens of one KV head from the pages into shared memory. Tokens from `high` on are zeros: their scores are
// masked, but 0 * v must not be NaN.
template <typename T, int D, int S, int KEYS>
__device__ __forceinline__ void fetch(T* keys, T* values, const T* k, const T* v, const i32* page_table, int table,
                                      int head, int H, int first, int high) {
    using At = Layout<D>;
    constexpr int PASS = THREADS / At::TURNS;  // rows at once
    const int row = threadIdx.x / At::TURNS, vector = threadIdx.x % At::TURNS, to = At::at(row, vector);
    // A tile lies on one page, or ...
    i64 from =
        S < KEYS ? 0 : i64(page_table[table + first / S] * H + head) * (S * D) + (first % S + row) * D + vector * 8;
#pragma unroll
    for (int r = 0; r < KEYS; r += PASS) {
        if (KEYS % PASS != 0 && row + r >= KEYS) break;
        const bool there = row + r < high - first;
        if (S < KEYS && there) {  // ... each token is looked up
            const int token = first + row + r;
            from = i64(page_table[table + token / S] * H + head) * (S * D) + token % S * D + vector * 8 - r * D;
        }
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const bool valid = there && (At::WIDTH == D || (vector + u) * 8 < D);
            cp_async_16(keys + to + (r * At::WIDTH + u * 8), k + from + (r * D + u * 8), valid);
            cp_async_16(values + to + (r * At::WIDTH + u * 8), v + from + (r * D + u * 8), valid);
        }
    }
}

// ---- a warp's rows --------------------------------------------------------------------------------------------------

// The queries of the block to shared memory, [ROWS][WIDTH]; rows beyond the tile's are zeros.
template <int D, int ROWS, typename T>
__device__ __forceinline__ void fetch_queries(T* queries, const T* x, const Tile& tile, int kv_head, int group,
                                              int heads) {
    using At = Layout<D>;
    for (int r = threadIdx.x / At::TURNS; r < ROWS; r += THREADS / At::TURNS) {
        const int token = (tile.first + r) / group, head = kv_head * group + (tile.first + r) % group;
        const T* from = x + (i64(tile.start + token) * heads + head) * D;
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const int vector = threadIdx.x % At::TURNS + u;
            cp_async_16(queries + At::at(r, vector), from + vector * 8, tile.first + r < tile.end && vector * 8 < D);
        }
    }
}

// MT matrices of 16 rows. A lane has rows lane/4 and lane/4 + 8 of each, of every 8 columns 2*(lane%4) and the next.
template <typename T, int D, int MT, int KEYS>
struct WarpRows {
    static constexpr int WIDTH = Layout<D>::WIDTH;
    // Of a tile; sums over values; statistics. sum: of the lane's own columns. These are arrays of the kernel and not
    // members: held in a struct they cost up to 11 registers on sm_80, and 240 bytes of spills for D = 128.
    typedef float Scores[MT][KEYS / 8][4], Sums[MT][WIDTH / 8][4], Stats[MT][2];

    // score += the rows q times a tile of keys.
    static __device__ __forceinline__ void multiply_keys(Scores& score, const T* q, const T* keys, const Lane<D>& down,
                                                         const Lane<D>& across) {
#pragma unroll
        for (int i = 0; i < WIDTH / 16; i++) {
            u32 a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], q + down.at(16 * m, i));
#pragma unroll
            for (int j = 0; j < KEYS / 16; j++) {
                u32 both[4];
                ldmatrix_x4(both, keys + across.at(16 * j, i));
                const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    multiply(score[m][2 * j], a[m], left, T());
                    multiply(score[m][2 * j + 1], a[m], right, T());
                }
            }
        }
    }

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

    // acc += the weights times a tile of values.
    static __device__ __forceinline__ void add_values(Sums& acc, const Scores& score, const T* values,
                                                      const Lane<D>& down) {
#pragma unroll
        for (int i = 0; i < KEYS / 16; i++) {
            u32 a[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const float (&from)[4] = score[m][2 * i + e / 2];
                    a[m][e] = pack<T>(from[e % 2 * 2], from[e % 2 * 2 + 1]);
                }
            }
#pragma unroll
            for (int j = 0; j < WIDTH / 16; j++) {
                u32 both[4];
                ldmatrix_x4_trans(both, values + down.at(16 * i, j));
                const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    multiply(acc[m][2 * j], a[m], left, T());
                    multiply(acc[m][2 * j + 1], a[m], right, T());
                }
            }
        }
    }

    // The rows of y, to q in shared memory.
    static __device__ __forceinline__ void finish(T* q, const Sums& acc, const Stats& sum) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float total = sum[m][half];
                total += __shfl_xor_sync(ALL_LANES, total, 1);
                total += __shfl_xor_sync(ALL_LANES, total, 2);
                const float inverse = 1.f / total;
                const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
                for (int j = 0; j < WIDTH / 8; j++)
                    *reinterpret_cast<u32*>(q + Layout<D>::at(row, j) + lane % 4 * 2) =
                        pack<T>(acc[m][j][2 * half] * inverse, acc[m][j][2 * half + 1] * inverse);
            }
        }
    }
};

// The SIZE rows of a warp, from `mine` of the tile's sequence on, from q in shared memory to y.
template <int D, int SIZE, typename T>
__device__ __forceinline__ void store_rows(T* y, const T* q, const Tile& tile, int mine, int kv_head, int group,
                                           int num_heads) {
    using At = Layout<D>;
    const int lane = threadIdx.x % WARP;
    for (int r = lane / At::TURNS; r < SIZE && mine + r < tile.end; r += WARP / At::TURNS) {
        const int token = (mine + r) / group, head = kv_head * group + (mine + r) % group;
        T* to = y + (i64(tile.start + token) * num_heads + head) * D;
#pragma unroll
        for (int u = 0; u < At::VECTORS; u += At::TURNS) {
            const int vector = lane % At::TURNS + u;
            if (vector * 8 < D) store<8>(to + vector * 8, load<8>(q + At::at(r, vector)));
        }
    }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

template <typename T, int D, int S, int ROWS, int KEYS>
__global__ void __launch_bounds__(THREADS, 2)
    attention_prefill_mma(const T* __restrict__ x, const T* __restrict__ k, const T* __restrict__ v,
                          const i32* __restrict__ cu_seqlens, const i32* __restrict__ seq_lens,
                          const i32* __restrict__ page_table, T* __restrict__ y, int b, int num_heads, int H, int M,
                          int window, float scale) {
    constexpr int WIDTH = Layout<D>::WIDTH, STAGE = KEYS * WIDTH, SIZE = ROWS / WARPS, MT = SIZE / 16;
    DYNAMIC_SHARED(T, queries);        // [ROWS][WIDTH]; at the end the outputs
    T* keys = queries + ROWS * WIDTH;  // [2][KEYS][WIDTH]
    T* values = keys + 2 * STAGE;      // [2][KEYS][WIDTH]

    const int group = num_heads / H, kv_head = blockIdx.x % H;
    const int number = (gridDim.x - 1 - blockIdx.x) / H;  // the last tiles see the most keys: start them first
    const Tile tile(cu_seqlens, seq_lens, b, group, ROWS, number);
    const int old = tile.old, rows = tile.end, table = tile.sequence * M;
    if (tile.first >= rows) return;
    const Band<ROWS, KEYS> band(tile, group, window);

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Positions of the warp's first and last token; a warp without rows has none.
    const int mine = tile.first + warp * SIZE;
    const int near = old + mine / group, far = mine < rows ? old + (mine + SIZE - 1) / group : -1;
    fetch_queries<D, ROWS>(queries, x, tile, kv_head, group, num_heads + 2 * H);
    fetch<T, D, S, KEYS>(keys, values, k, v, page_table, table, kv_head, H, band.low, band.high);
    cp_async_commit();

    T* q = queries + warp * SIZE * WIDTH;
    const float factor = scale * LOG2_E;
    using Rows = WarpRows<T, D, MT, KEYS>;
    // ldmatrix reads 2x2 matrices: first down and then to the right, or the other way around.
    const Lane<D> down(lane % 16, lane / 16), across(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    float acc[MT][WIDTH / 8][4] = {}, largest[MT][2], sum[MT][2];
#pragma unroll
    for (int m = 0; m < MT; m++) largest[m][0] = largest[m][1] = LOWEST, sum[m][0] = sum[m][1] = 0.f;
    for (int at = band.low, stage = 0; at < band.high; at += KEYS, stage ^= 1) {
        cp_async_wait<0>();
        __syncthreads();  // this tile is there, and nobody reads the one before
        if (at + KEYS < band.high) {
            const int other = (stage ^ 1) * STAGE, next = at + KEYS;
            fetch<T, D, S, KEYS>(keys + other, values + other, k, v, page_table, table, kv_head, H, next, band.high);
            cp_async_commit();
        }
        if (at > far || (window > 0 && at + KEYS <= near - window + 1)) continue;
        float score[MT][KEYS / 8][4] = {};
        Rows::multiply_keys(score, q, keys + stage * STAGE, down, across);
        if (at + KEYS - 1 > near || (window > 0 && at <= far - window)) Rows::mask(score, at, old, mine, group, window);
        Rows::softmax(score, acc, largest, sum, factor);
        Rows::add_values(acc, score, values + stage * STAGE, down);
    }

    // Through the warp's rows of `queries`, so that whole rows are written.
    __syncwarp();  // its last reads of them are done
    Rows::finish(q, acc, sum);
    __syncwarp();
    store_rows<D, SIZE>(y, q, tile, mine, kv_head, group, num_heads);
}
