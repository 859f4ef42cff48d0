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

// Chunks of a row of D elements: of a key 4 lanes x 8 elements, of a value 8 lanes x 8 elements.
template <int D>
constexpr int KEY_CHUNKS = (D + 31) / 32;
template <int D>
constexpr int VALUE_CHUNKS = (D + 63) / 64;

// A warp's tile of 16 keys. Lane (g, t) = (lane / 4, lane % 4) holds of keys g and g + 8 the elements 32*c + 8*t .. +7,
// and of the values of keys 2t, 2t+1, 2t+8, 2t+9 the elements 64*c + 8*g .. +7. Absent ones are zero.
template <typename T, int D, int S>
struct WarpTile {
    Pack<u32, 4> keys[2][KEY_CHUNKS<D>], values[4][VALUE_CHUNKS<D>];

    static __device__ __forceinline__ int value_row(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

    // The rows from `at` on that lie in low .. high-1. at is a multiple of TILE.
    __device__ __forceinline__ void fetch_keys(const History<T>& past, int at, int high) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        const T* tile =
            S % TILE == 0 && at < high ? past.k + token_offset<S, D>(past.table, at, past.head, past.H) : past.k;
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const int token = at + g + 8 * u;
            const bool there = token >= past.low && token < high;
            const T* row = tile + (g + 8 * u) * D;
            if (S % TILE != 0 && there) row = past.k + token_offset<S, D>(past.table, token, past.head, past.H);
#pragma unroll
            for (int c = 0; c < KEY_CHUNKS<D>; c++) {
                keys[u][c] = {};
                if (there && (D % 32 == 0 || 32 * c + 8 * t < D))
                    keys[u][c] = *reinterpret_cast<const Pack<u32, 4>*>(row + 32 * c + 8 * t);
            }
        }
    }

    __device__ __forceinline__ void fetch_values(const History<T>& past, int at, int high) {
        const int g = threadIdx.x % WARP / 4;
        const T* tile =
            S % TILE == 0 && at < high ? past.v + token_offset<S, D>(past.table, at, past.head, past.H) : past.v;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int token = at + value_row(i);
            const bool there = token >= past.low && token < high;
            const T* row = tile + value_row(i) * D;
            if (S % TILE != 0 && there) row = past.v + token_offset<S, D>(past.table, token, past.head, past.H);
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<D>; c++) {
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
            for (int c = 0; c < KEY_CHUNKS<D>; c++)
                if (g + 8 * u == number && 32 * c + 8 * t < D)
                    keys[u][c] = *reinterpret_cast<const Pack<u32, 4>*>(key + 32 * c + 8 * t);
        }
    }

    __device__ __forceinline__ void insert_value(const T* value, int number) {
        const int g = threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<D>; c++)
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
        for (int c = 0; c < KEY_CHUNKS<D>; c++) {
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
};

// A warp's softmax of up to 8 heads and their sums over the values. Lane (g, t) has the statistics of head g, and
// acc[c][w][j] is of column 64*c + 8*g + 2*w + j/2 and head 2*t + j%2.
template <int D>
struct WarpSums {
    float acc[VALUE_CHUNKS<D>][4][4] = {}, most = LOWEST, total = 0.f;

    // Scores of the keys from `at` on, as `dot` gives them, to weights p; the sums so far go with the new maximum.
    __device__ __forceinline__ void weigh(float (&p)[2][2], int at, int low, int end, float scale) {
        const int t = threadIdx.x % 4;
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
        for (int c = 0; c < VALUE_CHUNKS<D>; c++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
#pragma unroll
                for (int j = 0; j < 4; j++) acc[c][w][j] *= shrinks[j % 2];
            }
        }
    }

    // Adds the tile's values with the weights p.
    template <typename T, int S>
    __device__ __forceinline__ void add(const WarpTile<T, D, S>& tile, const float (&p)[2][2]) {
        u32 high[2], low[2];
#pragma unroll
        for (int u = 0; u < 2; u++) split_pair<T>(p[u][0], p[u][1], high[u], low[u]);
#pragma unroll
        for (int c = 0; c < VALUE_CHUNKS<D>; c++) {
#pragma unroll
            for (int w = 0; w < 4; w++) {
                u32 a[4];
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const u32 x = tile.values[2 * pair][c].v[w], y = tile.values[2 * pair + 1][c].v[w];
                    a[2 * pair] = (x & 0xffffu) | y << 16;
                    a[2 * pair + 1] = x >> 16 | (y & 0xffff0000u);
                }
                multiply(acc[c][w], a, high, T());
                multiply(acc[c][w], a, low, T());
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
            for (int c = 0; c < VALUE_CHUNKS<D>; c++) {
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
};

// A warp's first tiles of a split that begins at `begin`: tokens before `high`.
template <int WARPS, typename T, int D, int S, int TILES>
__device__ __forceinline__ void fetch_tiles(WarpTile<T, D, S> (&tiles)[TILES], const History<T>& past, int begin,
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
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, int D, int S, int TILES>
__device__ __forceinline__ void attend_warp(WarpTile<T, D, S> (&tiles)[TILES], const T* q, const History<T>& past,
                                            int begin, int end, float scale, float* out, float* largest, float* sum) {
    constexpr int STEP = WARPS * TILE;
    const int high = min(end, past.fresh);
    WarpSums<D> sums;
    for (int next = begin + threadIdx.x / WARP * TILE; next < end; next += TILES * STEP) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int at = next + n * STEP;
            if (at >= end) break;
            WarpTile<T, D, S>& tile = tiles[n];
            const bool newest = past.fresh - at < TILE && past.fresh >= at;
            if (newest) tile.insert_key(past.key, past.fresh - at);
            float p[2][2];
            tile.template dot<QUERY>(q, p);
            tile.fetch_keys(past, at + TILES * STEP, high);
            sums.weigh(p, at, past.low, end, scale);
            if (newest) tile.insert_value(past.value, past.fresh - at);
            sums.add(tile, p);
            tile.fetch_values(past, at + TILES * STEP, high);
        }
    }
    sums.template store_to<Q, STRIDE>(out, largest, sum);
}

#endif
