// Causal grouped-query attention over the paged KV cache.
//
//     y = softmax(q k^T * scale) v        per query head; a query at position p sees the keys max(0, p-window+1) .. p
//
//   x       [n, (heads+2H)*D] T    rows starts[i] .. starts[i+1] are the new tokens of sequence i, the last of its
//                                  lengths[i] tokens; the query heads come first in a row
//   k, v    [P, H, S, D] T         pages of S tokens
//   starts  [b+1], lengths [b], blocks [b, M] i32    token t of sequence i lies on page blocks[i][t / S]
//   y       [n, heads*D] T
//
// D is a multiple of 8, at most 256; k and v lie on 16-byte boundaries. Scores, softmax statistics and sums are f32.
// Exponentials are powers of two: the factor log2(e) is part of the scaled query.
//
//   attention_decode    one new token per sequence. The keys are split over blocks, so that one long sequence fills the
//                       GPU. Grid (splits, H * parts, b), 128 threads; the Q query heads of a block share every load
//                       of K and V (groups of more than 8 heads take several blocks, `parts`). LANES lanes hold a row
//                       of 8*LANES >= D elements, 8 each, so a block reads ROWS = 128/LANES keys side by side and
//                       STEPS times as many per tile. The dot products of the Q heads are summed over the lanes by a
//                       reduce-scatter, which takes about Q + log2(LANES) shuffles and not Q * log2(LANES).
//   attention_combine   adds up the splits. Grid (heads, b), 128 threads: 4 columns of D each, several splits at once.
//   attention_prefill   any number of new tokens. Grid (tiles, H), 256 threads. The rows of a tile are (token, head of
//                       the group) pairs of one sequence, so the group shares K and V and a sequence with one token
//                       wastes little. Thread (ty, tx) of 16 x 16 computes ROWS/16 x KEYS/16 scores and then
//                       ROWS/16 x D/16 outputs with FMA, all operands f32 in shared memory; the next tile of K or V is
//                       on its way in registers meanwhile. Tiles outside the causal band are skipped.
//
// The grids depend on shapes alone (lengths live on the device): decode blocks beyond a sequence's last split and
// prefill tiles beyond its last row return at once. How a sequence is split depends on its own length and the window
// alone, so its result is the same bit for bit alone, in any batch, and in a table of any width.
//
// Op: cuplama/ops/attention.py. Tests: the registry's in tests/ops/test_ops.py, and tests/ops/test_attention.py.
// Benchmark: cuplama/bench.py, generic over the registry.
// Not taken: splits of a fixed size, which are too few for one short sequence or, for a wide table, thousands of empty
// blocks; 64 keys a split, doubled until 64 splits suffice, bounds both. Tried: 8 steps per tile for more than 4 heads
// and scores unrolled by 4, which both spilled registers.
#include "common.cuh"

constexpr float LOG2_E = 1.44269504f;

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Where token `position` of a sequence begins in k or v. table: the sequence's row of `blocks`.
template <int S, int D>
__device__ __forceinline__ i64 token_offset(const i32* table, int position, int head, int H) {
    return ((i64(table[position / S]) * H + head) * S + position % S) * D;
}

// ---- decode ----------------------------------------------------------------------------------------------------------

constexpr int DECODE_THREADS = 128;
constexpr int MIN_SPLIT = 64;   // keys; ops/attention.py sizes the grid with the same two numbers
constexpr int MAX_SPLITS = 64;  // per sequence

// Keys per split of a sequence whose query sees `span` keys.
__device__ __forceinline__ int split_size(int span) {
    int size = MIN_SPLIT;
    while (size * MAX_SPLITS < span) size *= 2;
    return size;
}

__host__ __device__ constexpr int power_of_two(int x) { return x <= 1 ? 1 : 2 * power_of_two((x + 1) / 2); }

template <typename T, int D, int Q>
struct DecodeTile {
    static constexpr int LANES = D <= 8 ? 2 : power_of_two(D / 8);
    static constexpr int ROWS = DECODE_THREADS / LANES;
    static constexpr int MOST = sizeof(T) == 4 || Q > 4 ? 4 : 8;  // steps: K and V wait in registers, as do 8 Q sums
    static constexpr int STEPS = LANES / 2 < MOST ? LANES / 2 : MOST;
    static constexpr int KEYS = ROWS * STEPS;
    // Per multiprocessor at least: bounds the registers.
    static constexpr int BLOCKS = sizeof(T) == 4 || (Q > 4 && D > 128) ? 2 : 3;
};

// Sum N values over groups of L lanes. Each lane ends with N/L of the sums in x[0], x[1], ... (one if N < L; then many
// lanes hold the same); returns the index of the first. A step halves the values: a lane sends one half to its partner
// and adds what it receives to the other.
template <int N, int L>
__device__ __forceinline__ int reduce_scatter(float (&x)[N], int lane) {
    int first = 0;
#pragma unroll
    for (int distance = L / 2, count = N; distance > 0; distance /= 2) {
        if (count > 1) {
            count /= 2;
            const bool upper = lane & distance;
#pragma unroll
            for (int i = 0; i < N / 2; i++) {
                if (i < count) {
                    const float away = upper ? x[i] : x[i + count], kept = upper ? x[i + count] : x[i];
                    x[i] = kept + __shfl_xor_sync(ALL_LANES, away, distance);
                }
            }
            if (upper) first += count;
        } else {
            x[0] += __shfl_xor_sync(ALL_LANES, x[0], distance);
        }
    }
    return first;
}

// partial [b, heads, splits, D]: sum of p * v of one split, not normalised; stats [b, heads, splits, 2]: the largest
// score and the sum of p = exp2(score - largest). Only the splits that a sequence has are written.
template <typename T, int D, int S, int Q>
__global__ void __launch_bounds__(DECODE_THREADS, DecodeTile<T, D, Q>::BLOCKS)
    attention_decode(const T* __restrict__ x, const T* __restrict__ k, const T* __restrict__ v,
                     const i32* __restrict__ lengths, const i32* __restrict__ blocks, f32* __restrict__ partial,
                     f32* __restrict__ stats, int heads, int H, int M, int window, float scale) {
    using Tile = DecodeTile<T, D, Q>;
    constexpr int LANES = Tile::LANES, ROWS = Tile::ROWS, STEPS = Tile::STEPS, KEYS = Tile::KEYS, WIDTH = 8 * LANES;
    constexpr int QP = power_of_two(Q);
    __shared__ alignas(16) float q[Q][WIDTH];  // the scaled queries; at the end the sums of the block
    __shared__ float score[KEYS][Q];           // then p
    __shared__ float largest[Q], sum[Q], shrink[Q];

    const int sequence = blockIdx.z, split = blockIdx.x, length = lengths[sequence];
    const int low = window > 0 && length > window ? length - window : 0;
    const int size = split_size(length - low);
    const int begin = low + split * size, end = min(begin + size, length);
    if (begin >= length) return;

    const int group = heads / H, parts = (group + Q - 1) / Q, kv_head = blockIdx.y / parts;
    const int part = blockIdx.y % parts * Q, here = min(Q, group - part);  // heads of this block
    const int head = kv_head * group + part;                               // the first of them
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int column = threadIdx.x % LANES * 8, row = threadIdx.x / LANES;
    const int from = column < D ? column : 0;  // lanes beyond D read what is there; their q is zero
    const i32* table = blocks + i64(sequence) * M;

    const T* query = x + (i64(sequence) * (heads + 2 * H) + head) * D;
    for (int i = threadIdx.x; i < Q * WIDTH; i += DECODE_THREADS) {
        const int h = i / WIDTH, c = i % WIDTH;
        q[h][c] = h < here && c < D ? to_float(query[h * D + c]) * (scale * LOG2_E) : 0.f;
    }
    if (threadIdx.x < Q) largest[threadIdx.x] = -infinity(), sum[threadIdx.x] = 0.f;
    __syncthreads();

    float acc[Q][8] = {};
    for (int tile = begin; tile < end; tile += KEYS) {
        Pack<T, 8> keys[STEPS], values[STEPS];
#pragma unroll
        for (int u = 0; u < STEPS; u++) {  // keys past the end read the last one; their p is zero
            const i64 at = token_offset<S, D>(table, min(tile + u * ROWS + row, end - 1), kv_head, H) + from;
            keys[u] = load<8>(k + at);
            values[u] = load<8>(v + at);
        }
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            float dot[QP] = {};
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
#pragma unroll
                for (int h = 0; h < Q; h++) {
                    const Pack<f32, 4> a = load<4>(&q[h][column + i]);
#pragma unroll
                    for (int j = 0; j < 4; j++) dot[h] += a.v[j] * to_float(keys[u].v[i + j]);
                }
            }
            const int first = reduce_scatter<QP, LANES>(dot, lane);
            constexpr int SAME = LANES / QP > 1 ? LANES / QP : 1;  // lanes with the same sum
#pragma unroll
            for (int i = 0; i < (QP > LANES ? QP / LANES : 1); i++)
                if (lane % SAME == 0 && first + i < Q) score[u * ROWS + row][first + i] = dot[i];
        }
        __syncthreads();
        for (int h = warp; h < Q; h += DECODE_THREADS / WARP) {
            const float before = largest[h];
            float most = before;
            for (int j = lane; j < KEYS; j += WARP)
                if (tile + j < end) most = fmaxf(most, score[j][h]);
            most = warp_max(most);
            float total = 0.f;
            for (int j = lane; j < KEYS; j += WARP) {
                const float p = tile + j < end ? exp2f(score[j][h] - most) : 0.f;
                score[j][h] = p;
                total += p;
            }
            total = warp_sum(total);
            if (lane == 0) {
                shrink[h] = exp2f(before - most);
                sum[h] = sum[h] * shrink[h] + total;
                largest[h] = most;
            }
        }
        __syncthreads();
#pragma unroll
        for (int h = 0; h < Q; h++) {
#pragma unroll
            for (int i = 0; i < 8; i++) acc[h][i] *= shrink[h];
        }
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            float value[8];
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = to_float(values[u].v[i]);
#pragma unroll
            for (int h = 0; h < Q; h++) {
                const float p = score[u * ROWS + row][h];
#pragma unroll
                for (int i = 0; i < 8; i++) acc[h][i] += p * value[i];
            }
        }
        __syncthreads();  // score and shrink may be written again
    }

#pragma unroll
    for (int h = 0; h < Q; h++) {  // over the rows of a warp, ...
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int distance = WARP / 2; distance >= LANES; distance /= 2)
                acc[h][i] += __shfl_xor_sync(ALL_LANES, acc[h][i], distance);
        }
    }
    for (int w = 0; w < DECODE_THREADS / WARP; w++) {  // ... then over the warps, one after the other
        if (warp == w && lane < LANES) {
#pragma unroll
            for (int h = 0; h < Q; h++) {
#pragma unroll
                for (int i = 0; i < 8; i++) q[h][column + i] = acc[h][i] + (w > 0 ? q[h][column + i] : 0.f);
            }
        }
        __syncthreads();
    }
    const i64 out = (i64(sequence) * heads + head) * gridDim.x + split;
    for (int i = threadIdx.x; i < here * D; i += DECODE_THREADS)
        partial[(out + i / D * gridDim.x) * D + i % D] = q[i / D][i % D];
    if (threadIdx.x < here) {
        stats[(out + threadIdx.x * gridDim.x) * 2] = largest[threadIdx.x];
        stats[(out + threadIdx.x * gridDim.x) * 2 + 1] = sum[threadIdx.x];
    }
}

template <typename T, int D>
__global__ void __launch_bounds__(DECODE_THREADS, 4)
    attention_combine(const f32* __restrict__ partial, const f32* __restrict__ stats, const i32* __restrict__ lengths,
                      T* __restrict__ y, int splits, int heads, int window) {
    constexpr int COLUMNS = D / 4, ROWS = DECODE_THREADS / COLUMNS;  // 4 columns per thread, ROWS splits at once
    __shared__ float weight[MAX_SPLITS];
    __shared__ alignas(16) float rows[ROWS][D];

    const int sequence = blockIdx.y, head = blockIdx.x, length = lengths[sequence];
    const int span = window > 0 && length > window ? window : length;
    const int size = split_size(span), count = (span + size - 1) / size;
    const i64 first = (i64(sequence) * heads + head) * splits;

    if (threadIdx.x < WARP) {
        constexpr int EACH = MAX_SPLITS / WARP;
        float mine[EACH], most = -infinity(), total = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int s = threadIdx.x + i * WARP;
            mine[i] = s < count ? stats[(first + s) * 2] : -infinity();
            most = fmaxf(most, mine[i]);
        }
        most = warp_max(most);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int s = threadIdx.x + i * WARP;
            mine[i] = s < count ? exp2f(mine[i] - most) : 0.f;
            if (s < count) total += mine[i] * stats[(first + s) * 2 + 1];
        }
        total = warp_sum(total);
#pragma unroll
        for (int i = 0; i < EACH; i++) weight[threadIdx.x + i * WARP] = mine[i] / total;
    }
    __syncthreads();

    const int row = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS * 4;
    if (row < ROWS) {
        Pack<f32, 4> acc = {};
        for (int s = row; s < count; s += ROWS) {
            const Pack<f32, 4> part = load<4>(partial + (first + s) * D + column);
#pragma unroll
            for (int i = 0; i < 4; i++) acc.v[i] += weight[s] * part.v[i];
        }
        store<4>(&rows[row][column], acc);
    }
    __syncthreads();
    for (int c = threadIdx.x; c < D; c += DECODE_THREADS) {
        float total = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) total += rows[r][c];
        y[(i64(sequence) * heads + head) * D + c] = from_float<T>(total);
    }
}

// ---- prefill ---------------------------------------------------------------------------------------------------------

constexpr int PREFILL_THREADS = 256;
constexpr float LOWEST = -1e30f;  // of a row that has seen no key: finite, so that LOWEST - LOWEST is 0 and not NaN

// A tile of K or V on its way from the pages to shared memory: each thread moves units of 8 elements.
template <typename T, int D, int S, int KEYS, int STRIDE>
struct PageTile {
    static constexpr int COUNT = KEYS * D / 8, UNITS = (COUNT + PREFILL_THREADS - 1) / PREFILL_THREADS;
    Pack<T, 8> held[UNITS];

    // Tokens first .. first+KEYS-1; those from `high` on repeat the last (their scores are masked).
    __device__ __forceinline__ void fetch(const T* cache, const i32* table, int first, int high, int head, int H) {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int unit = threadIdx.x + u * PREFILL_THREADS;
            if (COUNT % PREFILL_THREADS == 0 || unit < COUNT) {
                const int token = min(first + unit / (D / 8), high - 1);
                held[u] = load<8>(cache + token_offset<S, D>(table, token, head, H) + unit % (D / 8) * 8);
            }
        }
    }

    __device__ __forceinline__ void stash(float* tile) const {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const int unit = threadIdx.x + u * PREFILL_THREADS;
            if (COUNT % PREFILL_THREADS == 0 || unit < COUNT) {
#pragma unroll
                for (int half = 0; half < 8; half += 4) {
                    Pack<f32, 4> wide;
#pragma unroll
                    for (int i = 0; i < 4; i++) wide.v[i] = to_float(held[u].v[half + i]);
                    store<4>(tile + unit / (D / 8) * STRIDE + unit % (D / 8) * 8 + half, wide);
                }
            }
        }
    }
};

// Tiles are numbered over the whole batch without knowing the lengths: sequence i has the numbers from
// starts[i]*group/ROWS + i to those of sequence i+1, which are at least as many as its tiles.
__device__ __forceinline__ int first_tile(const i32* starts, int i, int group, int rows) {
    return starts[i] * group / rows + i;
}

template <typename T, int D, int S, int ROWS, int KEYS>
__global__ void __launch_bounds__(PREFILL_THREADS, 2)
    attention_prefill(const T* __restrict__ x, const T* __restrict__ k, const T* __restrict__ v,
                      const i32* __restrict__ starts, const i32* __restrict__ lengths, const i32* __restrict__ blocks,
                      T* __restrict__ y, int b, int heads, int H, int M, int window, float scale) {
    constexpr int STRIDE = (D + 31) / 32 * 32 + 4;  // floats; 4 more than a multiple of 32 banks: no conflicts
    constexpr int R = ROWS / 16, C = KEYS / 16;     // scores per thread: rows R*ty + i, keys tx + 16*j
    constexpr int PAIRS = (D + 31) / 32;            // outputs per thread and row: columns 2*tx + 32*j and the next
    DYNAMIC_SHARED(float, q);                       // [ROWS][STRIDE], scaled
    float* kv = q + ROWS * STRIDE;                  // [KEYS][STRIDE], keys and values in turn
    float* weights = kv + KEYS * STRIDE;            // [ROWS][KEYS + 4]

    const int group = heads / H, kv_head = blockIdx.y;
    const int number = gridDim.x - 1 - blockIdx.x;  // the last tiles see the most keys: start them first
    int sequence = 0;
    for (int end = b; end - sequence > 1;) {
        const int middle = (sequence + end) / 2;
        if (first_tile(starts, middle, group, ROWS) <= number)
            sequence = middle;
        else
            end = middle;
    }
    const int start = starts[sequence], fresh = starts[sequence + 1] - start, length = lengths[sequence];
    const int first = (number - first_tile(starts, sequence, group, ROWS)) * ROWS;  // row of the sequence
    if (first >= fresh * group) return;

    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    const i32* table = blocks + i64(sequence) * M;
    int position[R];  // of each row's token in its sequence
#pragma unroll
    for (int i = 0; i < R; i++) position[i] = length - fresh + (first + R * ty + i) / group;
    const int lowest = length - fresh + first / group;
    const int high = length - fresh + (min(first + ROWS, fresh * group) - 1) / group + 1;
    const int low = window > 0 && lowest >= window ? (lowest - window + 1) / KEYS * KEYS : 0;

    PageTile<T, D, S, KEYS, STRIDE> tile;
    tile.fetch(k, table, low, high, kv_head, H);
    for (int i = threadIdx.x; i < ROWS * D; i += PREFILL_THREADS) {
        const int row = first + i / D, token = row / group, head = kv_head * group + row % group;
        const bool there = token < fresh;
        const i64 at = (i64(start + token) * (heads + 2 * H) + head) * D + i % D;
        q[i / D * STRIDE + i % D] = there ? to_float(x[at]) * (scale * LOG2_E) : 0.f;
    }

    float acc[R][PAIRS][2] = {}, largest[R], sum[R];  // sum: of the thread's own keys
#pragma unroll
    for (int i = 0; i < R; i++) largest[i] = LOWEST, sum[i] = 0.f;

    for (int at = low; at < high; at += KEYS) {
        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        tile.fetch(v, table, at, high, kv_head, H);

        float score[R][C] = {};
#pragma unroll 1
        for (int d = 0; d < D; d += 4) {
            Pack<f32, 4> a[R], c[C];
#pragma unroll
            for (int i = 0; i < R; i++) a[i] = load<4>(q + (R * ty + i) * STRIDE + d);
#pragma unroll
            for (int j = 0; j < C; j++) c[j] = load<4>(kv + (tx + 16 * j) * STRIDE + d);
#pragma unroll
            for (int i = 0; i < R; i++) {
#pragma unroll
                for (int j = 0; j < C; j++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) score[i][j] += a[i].v[e] * c[j].v[e];
                }
            }
        }
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

        __syncthreads();
        tile.stash(kv);
        __syncthreads();
        if (at + KEYS < high) tile.fetch(k, table, at + KEYS, high, kv_head, H);

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
                        const Pack<f32, 2> value = load<2>(kv + (key + e) * STRIDE + column);
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

#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int lanes = 8; lanes > 0; lanes /= 2) sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], lanes);
        const int row = first + R * ty + i, token = row / group, head = kv_head * group + row % group;
        if (token >= fresh) continue;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int column = 2 * tx + 32 * j;
            if (D % 32 == 0 || column < D) {
                Pack<T, 2> out;
                out.v[0] = from_float<T>(acc[i][j][0] / sum[i]);
                out.v[1] = from_float<T>(acc[i][j][1] / sum[i]);
                store<2>(y + (i64(start + token) * heads + head) * D + column, out);
            }
        }
    }
}
