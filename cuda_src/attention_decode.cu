// A decode step's attention: one new token per sequence, over the paged KV cache.
//
//     y = softmax(q k^T * scale) v        per query head, over the sequence's last `window` tokens (all if window is 0)
//
//   attention_decode  the cache holds the new token already
//   append_attention  first, per head: rms_norm of q and the new k (if there are q_norm and k_norm), rotation of both
//                     by row rows[i] of cos and sin (if there are any; dims 2h .. D stay), and the new k and v go to
//                     slot_mapping[i] of the cache. Each step rounds to T, as the ops do that it stands for.
//
//   x       [b, (num_heads+2H)*D] T    query, key and value heads of the new tokens
//   k, v    [P, H, S, D] T         pages of S tokens; token t of sequence i is on page page_table[i][t / S]
//   seq_lens [b], page_table [b, M], slot_mapping, rows [b] i32; cos, sin [R, h] f32; q_norm, k_norm [D] T
//   y       [b, num_heads*D] T
//   partial [b, heads, splits, D], stats [b, heads, splits, 2] f32: of a split, the sum of p * v, the largest score and
//           the sum of p = exp2(score - largest)
//   arrivals [b, H * parts] u32    zero before and after
//
// D is a multiple of 8, at most 256. Scores, softmax statistics and sums are f32.
//
// Mapping: grid (blocks, H * parts, b). A block takes Q query heads of one key head (groups of more than 8 take several
// blocks, `parts`) and every gridDim.x-th split of the keys: `least` of them, or as many as make `most` splits. So the
// device decides how many splits a length deserves, a recorded launch serves every length, and a result depends on the
// sequence's own length alone: it is the same bit for bit alone, in any batch, and in a table of any width. The block
// that arrives last adds up the splits, in their order. A sequence of one split needs none of this.
// The block with the last split computes the new k and v, attends to its own copy, and (part 0) writes the cache.
//
//   TENSOR   16-bit T and D <= 128, from sm_80 on: a warp takes 16 keys at a time and keeps a softmax of its own, so
//            the loop has no barrier. Scores are mma of queries (8 of 16 rows) and keys (8 columns): which d meets
//            which is free, so a lane reads 16 bytes of a key as its share of two products. Sums are mma of v^T (16 d)
//            and p^T (8 heads); p enters as two 16-bit numbers, p and what rounding it took away, so that it loses
//            nothing that shows.
//   else     LANES lanes hold a row of 8*LANES >= D elements, a block reads ROWS keys side by side, and the products of
//            the Q heads are summed over the lanes by a reduce-scatter.
//
// append_attention starts early (programmatic dependent launch) and waits before it reads x. Lengths, tables and the
// old tokens of the cache it reads before: they come from earlier steps. A step must therefore begin with a kernel
// that is launched in the ordinary way (embedding is), and nothing in it but this kernel may write the cache or those
// arrays before its end (advance does). attention_decode, which follows a kernel that writes the cache, waits first.
//
// Ops: cuplama/ops/attention.py (attention), cuplama/ops/fused.py. Test and benchmark: the registry's.
//
// Measured on an H200, 2026-11-20: microseconds per launch in a graph of early launches over caches of 400 MB; 32 query
// and 8 key heads of 128, bf16, one sequence. Before, as four kernels: 12.6 at 150 keys.
//                                            128     150     256     300    1024    8192   32768 keys
//   8 warps, 2 tiles each, 256 keys a split  3.3     3.7     4.0     5.8     6.0    14.2    39.0 (76% of 4542 GB/s)
//   the same, 128 keys a split               3.3     5.1     5.3     5.2     5.4    14.2    38.9
//   12 warps, 1 tile each, 192 keys          3.5     3.7     5.7     5.6     5.9    13.8    38.2
//   4 warps, 2 tiles each, 128 keys          4.2     5.6     6.2     5.8     6.4    15.0    40.0
//   4 warps, 1 tile each, 64 keys            5.6     5.6             5.8     6.5    15.9    40.4
// 64 sequences of 32768 keys reach 92% with 4 warps, so what is missing is latency: of adding up splits (stores, fence,
// counter, loads), and before the first keys arrive. Reading everything after the wait cost 2 to 4 us (raw output not
// kept). Tried besides: cp.async.bulk.prefetch.L2 of the next 4 tiles (50 us at 32768 keys instead of 40), of the next 2
// (41.5).
#include "attention.cuh"
#include "mma.cuh"

constexpr int TILE = 16;        // keys of a warp's mma; windows begin at a multiple

__host__ __device__ constexpr int power_of_two(int x) { return x <= 1 ? 1 : 2 * power_of_two((x + 1) / 2); }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// The numbers of an instance. Shared memory: queries [Q][QUERY] T, then sums [PARTS][Q][STRIDE] f32.
template <typename T, int D, int Q, int WARPS, bool TENSOR>
struct Decode {
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int LANES = D <= 8 ? 2 : power_of_two(D / 8);
    static constexpr int PARTS = TENSOR ? WARPS : 1;  // sums of a block that are added up at the end
    static constexpr int STRIDE = TENSOR ? D + 4 : 8 * LANES;
    static constexpr int CHUNKS = (D + 31) / 32;  // of 4 lanes x 8 elements
    // Two rows of queries lie 64 bytes apart modulo the 128 of all banks.
    static constexpr int QUERY = !TENSOR ? D : CHUNKS % 2 ? CHUNKS * 32 : CHUNKS * 32 + 32;
    static constexpr int QUERIES = TENSOR ? 8 : Q;
    static constexpr int ROWS = larger(1, THREADS / (Q * D / 4));  // splits that are added up side by side
    static constexpr int ROOM = larger(PARTS * Q * STRIDE, ROWS * Q * D);
    static constexpr int TILES = 2;  // that a warp has on their way, in registers
    // Blocks per multiprocessor: bounds the registers. ops/attention.py makes splits to fill them.
    static constexpr int BLOCKS = TENSOR ? 1 : 2;
};

// The part of a sequence that the query sees, in splits.
struct Span {
    int low, length, first, size, count;  // first: low, rounded down to where a tile begins

    __device__ __forceinline__ Span(int length, int window, int least, int most) : length(length) {
        low = window > 0 && length > window ? length - window : 0;
        first = low / TILE * TILE;
        const int each = (length - first + most - 1) / most;
        size = max(least, (each + 63) / 64 * 64);
        count = (length - first + size - 1) / size;
    }
    __device__ __forceinline__ int begin(int split) const { return first + split * size; }
    __device__ __forceinline__ int end(int split) const { return min(begin(split) + size, length); }
};

// ---- tensor cores ---------------------------------------------------------------------------------------------------

// Two numbers as T in one register, and what the rounding took from them in another.
template <typename T>
__device__ __forceinline__ void split_pair(float a, float b, u32& high, u32& low) {
    Pack<T, 2> x, y;
    x.v[0] = from_float<T>(a), x.v[1] = from_float<T>(b);
    y.v[0] = from_float<T>(a - to_float(x.v[0])), y.v[1] = from_float<T>(b - to_float(x.v[1]));
    high = *reinterpret_cast<u32*>(&x), low = *reinterpret_cast<u32*>(&y);
}

// A warp's tile of 16 keys. Lane (g, t) = (lane / 4, lane % 4) holds of keys g and g + 8 the elements 32*c + 8*t .. +7,
// and of the values of keys 2t, 2t+1, 2t+8, 2t+9 the elements 64*c + 8*g .. +7. Absent ones are zero.
template <typename T, int D, int S>
struct WarpTile {
    static constexpr int CHUNKS = (D + 31) / 32, WIDE = (D + 63) / 64;
    Pack<u32, 4> keys[2][CHUNKS], values[4][WIDE];

    static __device__ __forceinline__ int value_row(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

    // The rows from `at` on that lie in low .. high-1. at is a multiple of TILE.
    __device__ __forceinline__ void fetch_keys(const T* k, const i32* table, int at, int low, int high, int head,
                                               int H) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const T* tile = S % TILE == 0 && at < high ? k + token_offset<S, D>(table, at, head, H) : k;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int token = at + g + 8 * u;
            const bool there = token >= low && token < high;
            const T* row = tile + (g + 8 * u) * D;
            if (S % TILE != 0 && there) row = k + token_offset<S, D>(table, token, head, H);
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                keys[u][c] = {};
                if (there && (D % 32 == 0 || 32 * c + 8 * t < D))
                    keys[u][c] = *reinterpret_cast<const Pack<u32, 4>*>(row + 32 * c + 8 * t);
            }
        }
    }

    __device__ __forceinline__ void fetch_values(const T* v, const i32* table, int at, int low, int high, int head,
                                                 int H) {
        const int g = threadIdx.x % WARP / 4;
        const T* tile = S % TILE == 0 && at < high ? v + token_offset<S, D>(table, at, head, H) : v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = at + value_row(i);
            const bool there = token >= low && token < high;
            const T* row = tile + value_row(i) * D;
            if (S % TILE != 0 && there) row = v + token_offset<S, D>(table, token, head, H);
#pragma unroll
            for (int c = 0; c < WIDE; c++) {
                values[i][c] = {};
                if (there && (D % 64 == 0 || 64 * c + 8 * g < D))
                    values[i][c] = *reinterpret_cast<const Pack<u32, 4>*>(row + 64 * c + 8 * g);
            }
        }
    }

    // The new token, number `number` of the tile, is not read from the cache.
    __device__ __forceinline__ void insert_key(const T* key, int number) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
                if (g + 8 * u == number && 32 * c + 8 * t < D)
                    keys[u][c] = *reinterpret_cast<const Pack<u32, 4>*>(key + 32 * c + 8 * t);
        }
    }

    __device__ __forceinline__ void insert_value(const T* value, int number) {
        const int g = threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int c = 0; c < WIDE; c++)
                if (value_row(i) == number && 64 * c + 8 * g < D)
                    values[i][c] = *reinterpret_cast<const Pack<u32, 4>*>(value + 64 * c + 8 * g);
        }
    }

    // score[u][i]: of head g with key 8*u + 2*t + i. q: [8][QUERY]
    template <int QUERY>
    __device__ __forceinline__ void dot(const T* q, float (&score)[2][2]) const {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const Pack<u32, 4> a = *reinterpret_cast<const Pack<u32, 4>*>(q + g * QUERY + 32 * c + 8 * t);
#pragma unroll
            for (int u = 0; u < 2; u++) {
                multiply(even[u], {a.v[0], 0, a.v[1], 0}, {keys[u][c].v[0], keys[u][c].v[1]}, T());
                multiply(odd[u], {a.v[2], 0, a.v[3], 0}, {keys[u][c].v[2], keys[u][c].v[3]}, T());
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = 0; i < 2; i++) score[u][i] = even[u][i] + odd[u][i];
        }
    }

    // acc[c][w][j]: of column 64*c + 8*g + 2*w + j/2 and head 2*t + j%2. p: of head g, keys as in `dot`
    __device__ __forceinline__ void add(const float (&p)[2][2], float (&acc)[WIDE][4][4]) const {
        u32 high[2], low[2];
#pragma unroll
        for (int u = 0; u < 2; u++) split_pair<T>(p[u][0], p[u][1], high[u], low[u]);
#pragma unroll
        for (int c = 0; c < WIDE; c++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 a[4];
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const u32 x = values[2 * pair][c].v[w], y = values[2 * pair + 1][c].v[w];
                    a[2 * pair] = (x & 0xffffu) | y << 16;
                    a[2 * pair + 1] = x >> 16 | (y & 0xffff0000u);
                }
                multiply(acc[c][w], a, high, T());
                multiply(acc[c][w], a, low, T());
            }
        }
    }
};

// One warp's share of the keys begin .. end-1: sums to out [Q][STRIDE], the softmax's to largest and sum [Q]. `tiles`
// hold the first keys. fresh: the token whose key and value are given.
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, int D, int S, int TILES>
__device__ __forceinline__ void attend_warp(WarpTile<T, D, S> (&tiles)[TILES], const T* q, const T* k, const T* v,
                                            const i32* table, int begin, int end, int low, int head, int H, float scale,
                                            int fresh, const T* key, const T* value, float* out, float* largest,
                                            float* sum) {
    constexpr int WIDE = (D + 63) / 64, STEP = WARPS * TILE;
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4, high = min(end, fresh);
    float acc[WIDE][4][4] = {}, most = LOWEST, total = 0.f;
    for (int next = begin + threadIdx.x / WARP * TILE; next < end; next += TILES * STEP) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int at = next + n * STEP;
            if (at >= end) break;
            WarpTile<T, D, S>& tile = tiles[n];
            const bool newest = fresh - at < TILE && fresh >= at;
            if (newest) tile.insert_key(key, fresh - at);
            float p[2][2];
            tile.template dot<QUERY>(q, p);
            tile.fetch_keys(k, table, at + TILES * STEP, low, high, head, H);
            const float before = most;
#pragma unroll
            for (int u = 0; u < 2; u++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const int token = at + 8 * u + 2 * t + i;
                    p[u][i] = token >= low && token < end ? p[u][i] * scale : -infinity();
                    most = fmaxf(most, p[u][i]);
                }
            }
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
            const float shrink = exp2f(before - most);
            total *= shrink;
#pragma unroll
            for (int u = 0; u < 2; u++) {
#pragma unroll
                for (int i = 0; i < 2; i++) total += p[u][i] = exp2f(p[u][i] - most);
            }
            const float shrinks[2] = {__shfl_sync(ALL_LANES, shrink, 8 * t), __shfl_sync(ALL_LANES, shrink, 8 * t + 4)};
#pragma unroll
            for (int c = 0; c < WIDE; c++) {
#pragma unroll
                for (int w = 0; w < 4; w++) {
#pragma unroll
                    for (int j = 0; j < 4; j++) acc[c][w][j] *= shrinks[j % 2];
                }
            }
            if (newest) tile.insert_value(value, fresh - at);
            tile.add(p, acc);
            tile.fetch_values(v, table, at + TILES * STEP, low, high, head, H);
        }
    }
    total += __shfl_xor_sync(ALL_LANES, total, 1);
    total += __shfl_xor_sync(ALL_LANES, total, 2);
    if (t == 0 && g < Q) largest[g] = most, sum[g] = total;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int c = 0; c < WIDE; c++) {
#pragma unroll
            for (int w = 0; w < 4; w += 2) {
                const int column = 64 * c + 8 * g + 2 * w;
                Pack<f32, 4> four;
                four.v[0] = acc[c][w][j], four.v[1] = acc[c][w][j + 2];
                four.v[2] = acc[c][w + 1][j], four.v[3] = acc[c][w + 1][j + 2];
                if (2 * t + j < Q && column < D) store<4>(out + (2 * t + j) * STRIDE + column, four);
            }
        }
    }
}

// ---- without tensor cores -------------------------------------------------------------------------------------------

// Sum N values over groups of L lanes. Each lane ends with the sums N/L*i .. of its place (one sum if N < L, then
// several lanes hold the same); returns the index of the first. Each step halves the values: a lane sends one half to
// its partner and adds the other half.
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

// The block's share, begin .. end-1. out: [Q][8*LANES], the scaled queries before and the sums after.
template <int Q, int WARPS, typename T, int D, int S>
__device__ __forceinline__ void attend_block(const T* k, const T* v, const i32* table, int begin, int end, int low,
                                             int head, int H, int fresh, const T* key, const T* value, float* out,
                                             float* largest, float* sum) {
    constexpr int THREADS = WARPS * WARP, LANES = Decode<T, D, Q, WARPS, false>::LANES, WIDTH = 8 * LANES;
    constexpr int ROWS = THREADS / LANES, QP = power_of_two(Q);
    constexpr int MOST = sizeof(T) == 4 || Q > 4 ? 4 : 8;  // steps: K and V wait in registers, as do 8 Q sums
    constexpr int STEPS = LANES / 2 < MOST ? LANES / 2 : MOST, KEYS = ROWS * STEPS;
    __shared__ float score[KEYS][Q];  // then p
    __shared__ float shrink[Q];

    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int column = threadIdx.x % LANES * 8, row = threadIdx.x / LANES;
    const int from = column < D ? column : 0;  // lanes beyond D read what is there; their q is zero
    if (threadIdx.x < Q) largest[threadIdx.x] = LOWEST, sum[threadIdx.x] = 0.f;
    __syncthreads();

    float acc[Q][8] = {};
    for (int tile = begin; tile < end; tile += KEYS) {
        Pack<T, 8> keys[STEPS], values[STEPS];
#pragma unroll
        for (int u = 0; u < STEPS; u++) {  // others than low .. end-1 read the next of those; their p is zero
            const int token = max(low, min(tile + u * ROWS + row, end - 1));
            if (token == fresh) {
                keys[u] = load<8>(key + from);
                values[u] = load<8>(value + from);
            } else {
                const i64 at = token_offset<S, D>(table, token, head, H) + from;
                keys[u] = load<8>(k + at);
                values[u] = load<8>(v + at);
            }
        }
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            float dot[QP] = {};
#pragma unroll
            for (int i = 0; i < 8; i += 4) {
#pragma unroll
                for (int h = 0; h < Q; h++) {
                    const Pack<f32, 4> a = load<4>(out + h * WIDTH + column + i);
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
        for (int h = warp; h < Q; h += WARPS) {
            const float before = largest[h];
            float most = before, total = 0.f;
            for (int j = lane; j < KEYS; j += WARP)
                if (tile + j >= low && tile + j < end) most = fmaxf(most, score[j][h]);
            most = warp_max(most);
            for (int j = lane; j < KEYS; j += WARP) {
                const float p = tile + j >= low && tile + j < end ? exp2f(score[j][h] - most) : 0.f;
                score[j][h] = p;
                total += p;
            }
            total = warp_sum(total);
            __syncwarp();  // every lane has read largest[h]
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
            float vectorized[8];
#pragma unroll
            for (int i = 0; i < 8; i++) vectorized[i] = to_float(values[u].v[i]);
#pragma unroll
            for (int h = 0; h < Q; h++) {
                const float p = score[u * ROWS + row][h];
#pragma unroll
                for (int i = 0; i < 8; i++) acc[h][i] += p * vectorized[i];
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
    for (int w = 0; w < WARPS; w++) {  // ... then over the warps, one after the other
        if (warp == w && lane < LANES) {
#pragma unroll
            for (int h = 0; h < Q; h++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    float& place = out[h * WIDTH + column + i];
                    place = acc[h][i] + (w > 0 ? place : 0.f);
                }
            }
        }
        __syncthreads();
    }
}

// ---- the new token --------------------------------------------------------------------------------------------------

// What is done to a new head: norm and rotation, for the lane's share. A warp makes one and uses it for several heads.
template <typename T, int D>
struct Preparation {
    static constexpr int EACH = (D + WARP - 1) / WARP;
    float c[EACH], s[EACH], eps;
    int turned, half;  // dims that turn; half of them

    __device__ __forceinline__ Preparation(const f32* cos, const f32* sin, const i32* rope_rows, int h, float eps)
        : eps(eps) {
        const int lane = threadIdx.x % WARP;
        turned = cos != nullptr ? 2 * h : 0, half = h;
        const i64 row = cos != nullptr ? i64(rows[blockIdx.z]) * h : 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int i = lane + j * WARP;
            c[j] = i < turned ? cos[row + (i < h ? i : i - h)] : 0.f;
            s[j] = i < turned ? sin[row + (i < h ? i : i - h)] : 0.f;
        }
    }

    // One head by one warp: v, the lane's 8 elements of it, through norm (if `normed`) and rotation (if `turn`) to
    // `to`, in shared memory.
    __device__ __forceinline__ void operator()(Pack<T, 8> v, bool normed, const Pack<T, 8>& scale, bool turn,
                                               T* to) const {
        const int lane = threadIdx.x % WARP;
        if (normed) {
            float squares = 0.f;
#pragma unroll
            for (int j = 0; j < 8; j++) squares += to_float(v.v[j]) * to_float(v.v[j]);
            const float inverse = 1.f / sqrtf(warp_sum(squares) / D + eps);
#pragma unroll
            for (int j = 0; j < 8; j++) v.v[j] = from_float<T>(to_float(v.v[j]) * inverse * to_float(scale.v[j]));
        }
        if (lane * 8 < D) store<8>(to + lane * 8, v);
        __syncwarp();
        if (!turn || turned == 0) return;
        T result[EACH];
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int i = lane + j * WARP;
            if (i >= turned) continue;
            const bool low = i < half;
            const float partner = to_float(to[low ? i + half : i - half]), side = low ? -partner : partner;
            result[j] = from_float<T>(to_float(to[i]) * c[j] + side * s[j]);
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < EACH; j++)
            if (lane + j * WARP < turned) to[lane + j * WARP] = result[j];
        __syncwarp();
    }
};

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <bool APPEND, typename T, int D, int S, int Q, int WARPS, bool TENSOR, typename Wait>
__device__ __forceinline__ void decode(const T* x, const i32* slot_mapping, const T* k, const T* v, T* k_out, T* v_out,
                                       const i32* seq_lens, const i32* page_table, const i32* rope_rows, const f32* cos,
                                       const f32* sin, const T* q_norm, const T* k_norm, T* y, f32* partial, f32* stats,
                                       u32* arrivals, int num_heads, int H, int M, int h, int window, int least, int most,
                                       int splits, float scale, float eps, Wait wait) {
    using Numbers = Decode<T, D, Q, WARPS, TENSOR>;
    constexpr int THREADS = Numbers::THREADS, PARTS = Numbers::PARTS, STRIDE = Numbers::STRIDE;
    constexpr int QUERY = Numbers::QUERY;
    __shared__ alignas(16) T q[Numbers::QUERIES * QUERY];
    __shared__ alignas(16) T fresh_key[D], fresh_value[D];
    __shared__ alignas(16) float room[Numbers::ROOM];  // [PARTS][Q][STRIDE]
    __shared__ float largest[PARTS][Q], sum[PARTS][Q];
    __shared__ int last;

    const int sequence = blockIdx.z, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int group = num_heads / H, parts = (group + Q - 1) / Q, kv_head = blockIdx.y / parts;
    const int part = blockIdx.y % parts * Q, here = min(Q, group - part);  // heads of this block
    const int head = kv_head * group + part;                               // the first of them
    const i32* table = page_table + i64(sequence) * M;
    y += (i64(sequence) * num_heads + head) * D;

    const Span span(seq_lens[sequence], window, least, most);
    const int taking = min(int(gridDim.x), span.count);  // blocks that have a split
    if (int(blockIdx.x) >= taking) {
        if (span.count == 0 && blockIdx.x == 0) {  // an empty sequence
            wait();
            for (int i = threadIdx.x; i < here * D; i += THREADS) y[i] = from_float<T>(0.f);
        }
        return;
    }
    const int fresh = APPEND ? span.length - 1 : 0x7fffffff;

    // The first keys are on their way while the queries are prepared.
    constexpr int TILES = Numbers::TILES;
    WarpTile<T, D, TENSOR ? S : 1> tiles[TILES];
    const auto fetch = [&](int split) {
        const int high = min(span.end(split), fresh);
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int at = span.begin(split) + (n * WARPS + warp) * TILE;
            tiles[n].fetch_keys(k, table, at, span.low, high, kv_head, H);
            tiles[n].fetch_values(v, table, at, span.low, high, kv_head, H);
        }
    };
    if constexpr (TENSOR) fetch(blockIdx.x);

    const Preparation<T, D> prepare(cos, sin, rows, h, eps);
    const bool normed = q_norm != nullptr, newest = APPEND && (span.count - 1) % taking == int(blockIdx.x);
    // A warp's heads of the queries, the key and the value, numbers 0 .. here + 1; all are loaded before one is used.
    constexpr int MINE = (Q + (APPEND ? 2 : 0) + WARPS - 1) / WARPS;
    const int count = here + (newest ? 2 : 0);
    Pack<T, 8> fetched[MINE] = {}, scales[MINE] = {};
    if (normed && lane * 8 < D) {
#pragma unroll
        for (int i = 0; i < MINE; i++) scales[i] = load<8>((warp + i * WARPS < here ? q_norm : k_norm) + lane * 8);
    }
    wait();
    x += i64(sequence) * (num_heads + 2 * H) * D + lane * 8;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int j = warp + i * WARPS, from = j < here ? head + j : num_heads + kv_head + (j - here) * H;
        if (j < count && lane * 8 < D) fetched[i] = load<8>(x + from * D);
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int j = warp + i * WARPS;
        if (j >= count) break;
        T* to = j < here ? q + j * QUERY : j == here ? fresh_key : fresh_value;
        prepare(fetched[i], normed && j <= here, scales[i], j <= here, to);
        if (j >= here && part == 0 && lane * 8 < D) {
            const i64 at = ((i64(slot_mapping[sequence] / S) * H + kv_head) * S + slot_mapping[sequence] % S) * D + lane * 8;
            store<8>((j == here ? k_out : v_out) + at, load<8>(to + lane * 8));
        }
    }
    if constexpr (TENSOR) {
        for (int i = threadIdx.x; i < 8 * QUERY; i += THREADS)
            if (i / QUERY >= here || i % QUERY >= D) q[i] = from_float<T>(0.f);
    }
    __syncthreads();

    for (int split = blockIdx.x; split < span.count; split += gridDim.x) {
        const int begin = span.begin(split), end = span.end(split);
        if constexpr (TENSOR) {
            if (split != int(blockIdx.x)) fetch(split);
            attend_warp<QUERY, Q, WARPS, STRIDE>(tiles, q, k, v, table, begin, end, span.low, kv_head, H,
                                                 scale * LOG2_E, fresh, fresh_key, fresh_value,
                                                 room + warp * Q * STRIDE, largest[warp], sum[warp]);
            __syncthreads();
        } else {
            for (int i = threadIdx.x; i < Q * STRIDE; i += THREADS) {
                const int row = i / STRIDE, column = i % STRIDE;
                room[i] = row < here && column < D ? to_float(q[row * QUERY + column]) * (scale * LOG2_E) : 0.f;
            }
            attend_block<Q, WARPS, T, D, S>(k, v, table, begin, end, span.low, kv_head, H, fresh, fresh_key,
                                            fresh_value, room, largest[0], sum[0]);
        }
        for (int i = threadIdx.x; i < here * D; i += THREADS) {
            const int row = i / D, column = i % D;
            float top = largest[0][row], total = 0.f, weights = 0.f;
#pragma unroll
            for (int w = 1; w < PARTS; w++) top = fmaxf(top, largest[w][row]);
#pragma unroll
            for (int w = 0; w < PARTS; w++) {
                const float factor = exp2f(largest[w][row] - top);
                total += room[(w * Q + row) * STRIDE + column] * factor;
                weights += sum[w][row] * factor;
            }
            if (span.count == 1) {
                y[i] = from_float<T>(total / weights);
                continue;
            }
            const i64 at = (i64(sequence) * num_heads + head + row) * splits + split;
            partial[at * D + column] = total;
            if (column == 0) stats[at * 2] = top, stats[at * 2 + 1] = weights;
        }
        __syncthreads();
    }
    if (span.count == 1) return;

    // Who arrives last finds every split written; it leaves the counter as it was for the next launch. The barriers
    // extend the fences of one thread to the block.
    if (threadIdx.x == 0) {
        u32* counter = arrivals + i64(sequence) * gridDim.y + blockIdx.y;
        __threadfence();
        last = atomicAdd(counter, 1u) == u32(taking - 1);
        __threadfence();
        if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;

    // ROWS threads share 4 columns of a head, each with a softmax of its own over every ROWS-th split.
    constexpr int ITEMS = Q * D / 4, ROWS = Numbers::ROWS, BATCH = 8;
    __shared__ float tops[ROWS][Q], totals[ROWS][Q];
    const i64 first = (i64(sequence) * num_heads + head) * splits;
    for (int i = threadIdx.x; i < ITEMS * ROWS; i += THREADS) {
        const int row = i % ITEMS / (D / 4), column = i % (D / 4) * 4, start = i / ITEMS;
        if (row >= here) continue;
        Pack<f32, 4> acc = {};
        float top = LOWEST, total = 0.f;
        for (int s = start; s < span.count; s += ROWS * BATCH) {
            float2 stat[BATCH];
            float4 four[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const bool there = s + j * ROWS < span.count;
                const i64 at = first + row * splits + s + j * ROWS;
                stat[j] = there ? __ldcg(reinterpret_cast<const float2*>(stats + at * 2)) : make_float2(LOWEST, 0.f);
                four[j] = there ? __ldcg(reinterpret_cast<const float4*>(partial + at * D + column))
                                : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            const float before = top;
#pragma unroll
            for (int j = 0; j < BATCH; j++) top = fmaxf(top, stat[j].x);
            const float shrink = exp2f(before - top);
            total *= shrink;
#pragma unroll
            for (int e = 0; e < 4; e++) acc.v[e] *= shrink;
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const float factor = exp2f(stat[j].x - top);
                total += factor * stat[j].y;
                acc.v[0] += factor * four[j].x, acc.v[1] += factor * four[j].y;
                acc.v[2] += factor * four[j].z, acc.v[3] += factor * four[j].w;
            }
        }
        store<4>(room + (start * Q + row) * D + column, acc);
        if (column == 0) tops[start][row] = top, totals[start][row] = total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < here * D; i += THREADS) {
        float top = LOWEST, total = 0.f, weights = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) top = fmaxf(top, tops[r][i / D]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float factor = exp2f(tops[r][i / D] - top);
            total += room[r * Q * D + i] * factor;
            weights += totals[r][i / D] * factor;
        }
        y[i] = from_float<T>(total / weights);
    }
}

template <typename T, int D, int S, int Q, int WARPS, bool TENSOR>
__global__ void __launch_bounds__(WARPS* WARP, Decode<T, D, Q, WARPS, TENSOR>::BLOCKS)
    attention_decode(const T* x, const T* k, const T* v,
                     const i32* seq_lens, const i32* page_table, T* y,
                     f32* partial, f32* stats, u32* arrivals, int num_heads, int H,
                     int M, int window, int least, int most, int splits, float scale) {
    launch_dependents();
    pdl_wait();
    const f32* none = nullptr;
    const T* unscaled = nullptr;
    decode<false, T, D, S, Q, WARPS, TENSOR>(x, nullptr, k, v, nullptr, nullptr, seq_lens, page_table, nullptr, none, none,
                                             unscaled, unscaled, y, partial, stats, arrivals, num_heads, H, M, 0, window,
                                             least, most, splits, scale, 0.f, [] {});
}

template <typename T, int D, int S, int Q, int WARPS, bool TENSOR>
__global__ void __launch_bounds__(WARPS* WARP, Decode<T, D, Q, WARPS, TENSOR>::BLOCKS)
    append_attention(const T* x, const i32* slot_mapping, T* k, T* v,
                     const i32* seq_lens, const i32* page_table, const i32* rope_rows,
                     const f32* cos, const f32* sin, const T* q_norm,
                     const T* k_norm, T* y, f32* partial,
                     f32* stats, u32* arrivals, int num_heads, int H, int M, int h, int window,
                     int least, int most, int splits, float scale, float eps) {
    launch_dependents();
    const auto wait = [] { pdl_wait(); };  // for x; the rest is older than the step, see above
    decode<true, T, D, S, Q, WARPS, TENSOR>(x, slot_mapping, k, v, k, v, seq_lens, page_table, rows, cos, sin, q_norm, k_norm, y,
                                            partial, stats, arrivals, num_heads, H, M, h, window, least, most, splits,
                                            scale, eps, wait);
}
