// A decode step's attention on tensor cores (attention_decode.cu): a warp takes tiles of 16 keys, by itself.
#ifndef CUPLAMA_ATTENTION_DECODE_MMA_CUH
#define CUPLAMA_ATTENTION_DECODE_MMA_CUH

#include "attention_decode.cuh"
#include "mma.cuh"

// Two numbers as T in one register, and what the rounding took from them in another.
template <typename T>
__device__ __forceinline__ void split_pair(float a, float b, u32& high, u32& low) {
    Pack<T, 2> x, y;
    x.v[0] = from_float<T>(a), x.v[1] = from_float<T>(b);
    y.v[0] = from_float<T>(a - to_float(x.v[0])), y.v[1] = from_float<T>(b - to_float(x.v[1]));
    high = *reinterpret_cast<u32*>(&x), low = *reinterpret_cast<u32*>(&y);
}

// What products are computed in: T; with an e4m3 cache f16, which one instruction makes of two numbers.
template <typename T, typename C>
struct Products {
    typedef T Type;
    static constexpr float QUERY_SCALE = 1.f;
};
// Queries then are multiplied by 2^-6 if they come from bf16, whose range is larger: so f16 holds them up to 4e6, and
// loses no more of a small one than 2^-19.
template <typename T>
struct Products<T, e4m3> {
    typedef f16 Type;
    static constexpr float QUERY_SCALE = same_type<T, bf16> ? 1.f / 64.f : 1.f;
};

// 8 elements of a query, T in shared memory, become what products are computed in, scaled.
template <typename T, typename C>
__device__ __forceinline__ void scale_query(T* q) {
    typedef typename Products<T, C>::Type M;
    const Pack<T, 8> x = load<8>(q);
    Pack<M, 8> out;
#pragma unroll
    for (int i = 0; i < 8; i++) out.v[i] = from_float<M>(to_float(x.v[i]) * Products<T, C>::QUERY_SCALE);
    store<8>(reinterpret_cast<M*>(q), out);
}

// Chunks of a row of D elements: of a key 4 lanes x KEY_EACH elements, of a value 8 lanes x VALUE_EACH elements.
template <typename C, int D>
constexpr int KEY_CHUNKS = (D + 4 * KEY_EACH<C, D> - 1) / (4 * KEY_EACH<C, D>);
template <typename C, int D>
constexpr int VALUE_CHUNKS = (D + 8 * VALUE_EACH<C, D> - 1) / (8 * VALUE_EACH<C, D>);

// The key, of a tile's 16, whose values are a lane's i-th.
__device__ __forceinline__ int value_row(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

// A warp's tile of 16 keys. Lane (g, t) = (lane / 4, lane % 4) holds of keys g and g + 8 the KE elements from
// 4*KE*c + KE*t on, and of the values of keys 2t, 2t+1, 2t+8, 2t+9 the VE elements from 8*VE*c + VE*g on. Absent ones
// are zero.
template <typename C, int D, int S>
struct WarpTile {
    static constexpr int KE = KEY_EACH<C, D>, VE = VALUE_EACH<C, D>;
    typedef Pack<u32, KE * sizeof(C) / 4> KeyPart;
    typedef Pack<u32, VE * sizeof(C) / 4> ValuePart;
    KeyPart keys[2][KEY_CHUNKS<C, D>];
    ValuePart values[4][VALUE_CHUNKS<C, D>];

    // The rows from `at` on that lie in low .. high-1. at is a multiple of TILE.
    __device__ __forceinline__ void fetch_keys(const History<C>& past, int at, int high) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const C* tile =
            S % TILE == 0 && at < high ? past.k + token_offset<S, D>(past.table, at, past.head, past.H) : past.k;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int token = at + g + 8 * u;
            const bool there = token >= past.low && token < high;
            const C* row = tile + (g + 8 * u) * D;
            if (S % TILE != 0 && there) row = past.k + token_offset<S, D>(past.table, token, past.head, past.H);
#pragma unroll
            for (int c = 0; c < KEY_CHUNKS<C, D>; c++) {
                keys[u][c] = {};
                if (there && (D % (4 * KE) == 0 || 4 * KE * c + KE * t < D))
                    keys[u][c] = *reinterpret_cast<const KeyPart*>(row + 4 * KE * c + KE * t);
            }
        }
    }

    __device__ __forceinline__ void fetch_values(const History<C>& past, int at, int high) {
        const int g = threadIdx.x % WARP / 4;
        const C* tile =
            S % TILE == 0 && at < high ? past.v + token_offset<S, D>(past.table, at, past.head, past.H) : past.v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = at + value_row(i);
            const bool there = token >= past.low && token < high;
            const C* row = tile + value_row(i) * D;
            if (S % TILE != 0 && there) row = past.v + token_offset<S, D>(past.table, token, past.head, past.H);
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<C, D>; c++) {
                values[i][c] = {};
                if (there && (D % (8 * VE) == 0 || 8 * VE * c + VE * g < D))
                    values[i][c] = *reinterpret_cast<const ValuePart*>(row + 8 * VE * c + VE * g);
            }
        }
    }

    // The tile from `at` on comes to the L2, for registers have no room for a third one: its keys by one lane, its
    // values by another.
    static __device__ __forceinline__ void prefetch(const History<C>& past, int at, int high) {
        if (S % TILE != 0 || at >= high || threadIdx.x % WARP > 1) return;
        const C* from = threadIdx.x % WARP ? past.v : past.k;
        prefetch_l2(from + token_offset<S, D>(past.table, at, past.head, past.H), TILE * D * sizeof(C));
    }

    // The same of a tile that lies elsewhere.
    template <typename Other>
    __device__ __forceinline__ void read_keys(const Other& tile) {
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int c = 0; c < KEY_CHUNKS<C, D>; c++) keys[u][c] = tile.key(u, c);
        }
    }

    template <typename Other>
    __device__ __forceinline__ void read_values(const Other& tile) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<C, D>; c++) values[i][c] = tile.value(i, c);
        }
    }

    // The new token, number `number` of the tile, is not read from the cache.
    __device__ __forceinline__ void insert_key(const C* key, int number) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int c = 0; c < KEY_CHUNKS<C, D>; c++)
                if (g + 8 * u == number && 4 * KE * c + KE * t < D)
                    keys[u][c] = *reinterpret_cast<const KeyPart*>(key + 4 * KE * c + KE * t);
        }
    }

    __device__ __forceinline__ void insert_value(const C* value, int number) {
        const int g = threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<C, D>; c++)
                if (value_row(i) == number && 8 * VE * c + VE * g < D)
                    values[i][c] = *reinterpret_cast<const ValuePart*>(value + 8 * VE * c + VE * g);
        }
    }

    // The lane's part of chunk c, of its u-th key and of its i-th value.
    __device__ __forceinline__ const KeyPart& key(int u, int c) const { return keys[u][c]; }
    __device__ __forceinline__ const ValuePart& value(int i, int c) const { return values[i][c]; }
};

// Of a lane's part of a key the elements 8*n .. 8*n + 7, two in a register.
template <typename C, int W>
__device__ __forceinline__ void key_pairs(const Pack<u32, W>& part, int n, u32 (&b)[4]) {
    if constexpr (same_type<C, e4m3>) {
#pragma unroll
        for (int i = 0; i < 2; i++) widen_e4m3(part.v[2 * n + i], b[2 * i], b[2 * i + 1]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) b[i] = part.v[i];
    }
}

// Of a lane's parts of values the columns 2*w and 2*w + 1, of all its keys: v^T as the A of mma.m16n8k16.
template <typename C, int W>
__device__ __forceinline__ void value_pairs(const Pack<u32, W> (&parts)[4], int w, u32 (&a)[4]) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
        if constexpr (same_type<C, e4m3>) {
            const u32 x = parts[2 * pair].v[w / 2], y = parts[2 * pair + 1].v[w / 2];
            widen_e4m3(__byte_perm(x, y, w % 2 ? 0x7362 : 0x5140), a[2 * pair], a[2 * pair + 1]);
        } else {
            const u32 x = parts[2 * pair].v[w], y = parts[2 * pair + 1].v[w];
            a[2 * pair] = (x & 0xffffu) | y << 16;
            a[2 * pair + 1] = x >> 16 | (y & 0xffff0000u);
        }
    }
}

// score[u][i]: of head g with key 8*u + 2*t + i of a tile, in registers or elsewhere. q: [8][QUERY]
template <int QUERY, typename C, int D, typename Tile, typename M>
__device__ __forceinline__ void dot(const Tile& tile, const M* q, float (&score)[2][2]) {
    // Chunks at once: a wide tile is not in registers, which have no room for a second chunk of it either.
    constexpr int KE = KEY_EACH<C, D>, AHEAD = D <= 128 ? KEY_CHUNKS<C, D> : 1;
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    float even[2][4] = {}, odd[2][4] = {};
#pragma unroll AHEAD
    for (int c = 0; c < KEY_CHUNKS<C, D>; c++) {
        const Pack<u32, KE * sizeof(C) / 4> keys[2] = {tile.key(0, c), tile.key(1, c)};
#pragma unroll
        for (int n = 0; n < KE / 8; n++) {  // 8 elements of a lane
            const M* from = q + g * QUERY + (4 * KE * c + 8 * n) + KE * t;
            const Pack<u32, 4> a = *reinterpret_cast<const Pack<u32, 4>*>(from);
#pragma unroll
            for (int u = 0; u < 2; u++) {
                u32 b[4];
                key_pairs<C>(keys[u], n, b);
                multiply(even[u], {a.v[0], 0, a.v[1], 0}, {b[0], b[1]}, M());
                multiply(odd[u], {a.v[2], 0, a.v[3], 0}, {b[2], b[3]}, M());
            }
        }
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int i = 0; i < 2; i++) score[u][i] = even[u][i] + odd[u][i];
    }
}

// A warp's softmax of up to 8 heads and their sums over the values. Lane (g, t) has the statistics of head g, and
// acc[c][w][j] is of column 8*VE*c + VE*g + 2*w + j/2 and head 2*t + j%2.
template <typename C, int D>
struct WarpSums {
    static constexpr int VE = VALUE_EACH<C, D>, CHUNKS = VALUE_CHUNKS<C, D>;
    float acc[CHUNKS][VE / 2][4] = {}, most = LOWEST, total = 0.f;

    // Scores of the keys from `at` on, as `dot` gives them, to weights p; the sums so far go with the new maximum.
    template <typename T, bool CAPPED>
    __device__ __forceinline__ void weigh(float (&p)[2][2], int at, int low, int end,
                                          const Scaling<T, CAPPED>& scaling) {
        const int t = threadIdx.x % 4;
        const float before = most;
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int token = at + 8 * u + 2 * t + i;
                p[u][i] = token >= low && token < end ? scaling.score(p[u][i]) : -infinity();
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
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int w = 0; w < VE / 2; w++) {
#pragma unroll
                for (int j = 0; j < 4; j++) acc[c][w][j] *= shrinks[j % 2];
            }
        }
    }

    // Adds a tile's values with the weights p. M: what products are computed in.
    template <typename M, typename Tile>
    __device__ __forceinline__ void add(const Tile& tile, const float (&p)[2][2]) {
        u32 high[2], low[2];
#pragma unroll
        for (int u = 0; u < 2; u++) split_pair<M>(p[u][0], p[u][1], high[u], low[u]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const Pack<u32, VE * sizeof(C) / 4> values[4] = {tile.value(0, c), tile.value(1, c), tile.value(2, c),
                                                             tile.value(3, c)};
#pragma unroll
            for (int w = 0; w < VE / 2; w++) {
                u32 a[4];
                value_pairs<C>(values, w, a);
                multiply(acc[c][w], a, high, M());
                multiply(acc[c][w], a, low, M());
            }
        }
    }

    // Sums to out [Q][STRIDE], the softmax's to largest and sum [Q].
    template <int Q, int STRIDE>
    __device__ __forceinline__ void store_to(float* out, float* largest, float* sum) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (t == 0 && g < Q) largest[g] = most, sum[g] = total;
#pragma unroll
        for (int j = 0; j < 2; j++) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
                for (int w = 0; w < VE / 2; w += 2) {
                    const int column = 8 * VE * c + VE * g + 2 * w;
                    Pack<f32, 4> four;
                    four.v[0] = acc[c][w][j], four.v[1] = acc[c][w][j + 2];
                    four.v[2] = acc[c][w + 1][j], four.v[3] = acc[c][w + 1][j + 2];
                    if (2 * t + j < Q && column < D) store<4>(out + (2 * t + j) * STRIDE + column, four);
                }
            }
        }
    }
};

// A warp's first tiles of a split that begins at `begin`: tokens before `high`.
template <int WARPS, typename C, int D, int S, int TILES>
__device__ __forceinline__ void fetch_tiles(WarpTile<C, D, S> (&tiles)[TILES], const History<C>& past, int begin,
                                            int high) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int at = begin + (n * WARPS + threadIdx.x / WARP) * TILE;
        tiles[n].fetch_keys(past, at, high);
        tiles[n].fetch_values(past, at, high);
    }
}

// One warp's share of the keys begin .. end-1: sums to out [Q][STRIDE], the softmax's to largest and sum [Q]. `tiles`
// hold the first keys.
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, typename C, int D, int S, int TILES, bool CAPPED>
__device__ __forceinline__ void attend_warp(WarpTile<C, D, S> (&tiles)[TILES], const T* rows, const History<C>& past,
                                            int begin, int end, const Scaling<T, CAPPED>& scaling, float* out,
                                            float* largest, float* sum) {
    constexpr int STEP = WARPS * TILE;
    const int high = min(end, past.fresh);
    typedef typename Products<T, C>::Type M;
    const M* q = reinterpret_cast<const M*>(rows);
    WarpSums<C, D> sums;
    for (int next = begin + threadIdx.x / WARP * TILE; next < end; next += TILES * STEP) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int at = next + n * STEP;
            if (at >= end) break;
            WarpTile<C, D, S>& tile = tiles[n];
            const bool newest = past.newest_from(at);
            if (newest) tile.insert_key(past.key, past.fresh - at);
            float p[2][2];
            dot<QUERY, C, D>(tile, q, p);
            tile.fetch_keys(past, at + TILES * STEP, high);
            if constexpr (WARPS < 8) tile.prefetch(past, at + (TILES + 1) * STEP, high);
            sums.weigh(p, at, past.low, end, scaling);
            if (newest) tile.insert_value(past.value, past.fresh - at);
            sums.template add<M>(tile, p);
            tile.fetch_values(past, at + TILES * STEP, high);
        }
    }
    sums.template store_to<Q, STRIDE>(out, largest, sum);
}

#endif
