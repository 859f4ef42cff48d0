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

// A warp's tile of 16 keys. Lane (g, t) = (lane / 4, lane % 4) holds of keys g and g + 8 the KE elements from
// 4*KE*c + KE*t on, and of the values of keys 2t, 2t+1, 2t+8, 2t+9 the VE elements from 8*VE*c + VE*g on. Absent ones
// are zero.
template <typename T, typename C, int D, int S>
struct WarpTile {
    typedef typename Products<T, C>::Type M;
    static constexpr int KE = KEY_EACH<C, D>, VE = VALUE_EACH<C, D>;
    typedef Pack<u32, KE * sizeof(C) / 4> KeyPart;
    typedef Pack<u32, VE * sizeof(C) / 4> ValuePart;
    KeyPart keys[2][KEY_CHUNKS<C, D>];
    ValuePart values[4][VALUE_CHUNKS<C, D>];

    static __device__ __forceinline__ int value_row(int i) { return threadIdx.x % 4 * 2 + i % 2 + i / 2 * 8; }

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

    // The same of a stage of a WarpRing, where all 16 rows are.
    template <typename Ring>
    __device__ __forceinline__ void read_keys(const Ring& ring, int stage) {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int c = 0; c < KEY_CHUNKS<C, D>; c++) {
                keys[u][c] = {};
                if (D % (4 * KE) == 0 || 4 * KE * c + KE * t < D)
                    keys[u][c] = *reinterpret_cast<const KeyPart*>(
                        ring.template at<false>(stage, g + 8 * u, (4 * KE * c + KE * t) * sizeof(C)));
            }
        }
    }

    template <typename Ring>
    __device__ __forceinline__ void read_values(const Ring& ring, int stage) {
        const int g = threadIdx.x % WARP / 4;
#pragma unroll
        for (int i = 0; i < 4; i++) {
#pragma unroll
            for (int c = 0; c < VALUE_CHUNKS<C, D>; c++) {
                values[i][c] = {};
                if (D % (8 * VE) == 0 || 8 * VE * c + VE * g < D)
                    values[i][c] = *reinterpret_cast<const ValuePart*>(
                        ring.template at<true>(stage, value_row(i), (8 * VE * c + VE * g) * sizeof(C)));
            }
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

    // The lane's elements 8*c .. 8*c + 7 of key g + 8*u, two in a register.
    __device__ __forceinline__ void key_pairs(int u, int c, u32 (&b)[4]) const {
        if constexpr (same_type<C, e4m3>) {
            const KeyPart& part = keys[u][c / (KE / 8)];
#pragma unroll
            for (int i = 0; i < 2; i++) widen_e4m3(part.v[c % (KE / 8) * 2 + i], b[2 * i], b[2 * i + 1]);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) b[i] = keys[u][c].v[i];
        }
    }

    // Of the lane's columns 2*w and 2*w + 1 of chunk c the values of all its keys: v^T as the A of mma.m16n8k16.
    __device__ __forceinline__ void value_pairs(int c, int w, u32 (&a)[4]) const {
#pragma unroll
        for (int pair = 0; pair < 2; pair++) {
            if constexpr (same_type<C, e4m3>) {
                const u32 x = values[2 * pair][c].v[w / 2], y = values[2 * pair + 1][c].v[w / 2];
                widen_e4m3(__byte_perm(x, y, w % 2 ? 0x7362 : 0x5140), a[2 * pair], a[2 * pair + 1]);
            } else {
                const u32 x = values[2 * pair][c].v[w], y = values[2 * pair + 1][c].v[w];
                a[2 * pair] = (x & 0xffffu) | y << 16;
                a[2 * pair + 1] = x >> 16 | (y & 0xffff0000u);
            }
        }
    }

    // score[u][i]: of head g with key 8*u + 2*t + i. q: [8][QUERY]
    template <int QUERY>
    __device__ __forceinline__ void dot(const M* q, float (&score)[2][2]) const {
        const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
        float even[2][4] = {}, odd[2][4] = {};
#pragma unroll
        for (int c = 0; c < KEY_CHUNKS<C, D> * (KE / 8); c++) {  // 8 elements of a lane
            const int chunk = c / (KE / 8), part = c % (KE / 8);
            const M* from = q + g * QUERY + (4 * KE * chunk + 8 * part) + KE * t;
            const Pack<u32, 4> a = *reinterpret_cast<const Pack<u32, 4>*>(from);
#pragma unroll
            for (int u = 0; u < 2; u++) {
                u32 b[4];
                key_pairs(u, c, b);
                multiply(even[u], {a.v[0], 0, a.v[1], 0}, {b[0], b[1]}, M());
                multiply(odd[u], {a.v[2], 0, a.v[3], 0}, {b[2], b[3]}, M());
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int i = 0; i < 2; i++) score[u][i] = even[u][i] + odd[u][i];
        }
    }
};

// A warp's next tiles on their way through shared memory, STAGES of keys and as many of values, which its lanes ask for
// without waiting for them. Rows of whole 128 bytes have their 16-byte parts exchanged, so that the eight lanes that are
// served together meet eight different ones: of keys 2 rows x 4 parts, of values 4 rows (every second) x 2 parts.
template <typename C, int D, int S, int STAGES>
struct WarpRing {
    static constexpr int ROW = D * sizeof(C), PARTS = ROW / 16, BYTES = 2 * STAGES * TILE * ROW;
    unsigned char* room;

    template <bool VALUES>
    __device__ __forceinline__ unsigned char* at(int stage, int row, int byte) const {
        const int moved = PARTS % 8 != 0 ? 0 : VALUES ? row / 2 % 4 * 32 : row % 2 * 64;
        return room + ((VALUES ? STAGES : 0) + stage) * TILE * ROW + row * ROW + (byte ^ moved);
    }

    // The rows from `from` on that lie in low .. high-1; others become zeros. Closes a group of copies.
    template <bool VALUES>
    __device__ __forceinline__ void request(const History<C>& past, int stage, int from, int high) const {
        const C* cache = VALUES ? past.v : past.k;
        const bool whole = S % TILE == 0;
        const C* tile = whole && from < high ? cache + token_offset<S, D>(past.table, from, past.head, past.H) : cache;
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = lane; i < TILE * PARTS; i += WARP) {
            const int row = i / PARTS, byte = i % PARTS * 16, token = from + row;
            const bool there = token >= past.low && token < high;
            const C* start = whole   ? tile + row * D
                             : there ? cache + token_offset<S, D>(past.table, token, past.head, past.H)
                                     : cache;
            cp_async_16(at<VALUES>(stage, row, byte), reinterpret_cast<const unsigned char*>(start) + byte, there);
        }
        cp_async_commit();
    }

    // The oldest group of the lane's 2 * STAGES has arrived, for all lanes to read.
    __device__ __forceinline__ void wait() const {
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
    }
};

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

    // Adds the tile's values with the weights p.
    template <typename T, int S>
    __device__ __forceinline__ void add(const WarpTile<T, C, D, S>& tile, const float (&p)[2][2]) {
        typedef typename Products<T, C>::Type M;
        u32 high[2], low[2];
#pragma unroll
        for (int u = 0; u < 2; u++) split_pair<M>(p[u][0], p[u][1], high[u], low[u]);
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int w = 0; w < VE / 2; w++) {
                u32 a[4];
                tile.value_pairs(c, w, a);
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

// What a warp has its next tiles in: registers, or a ring in shared memory.
template <typename T, typename C, int D, int S, int STAGES>
struct Tiles {
    typedef WarpRing<C, D, S, STAGES> Type;
};
template <typename T, typename C, int D, int S>
struct Tiles<T, C, D, S, 0> {
    typedef WarpTile<T, C, D, S> Type[2];
};

// A warp's first tiles of a split that begins at `begin`: tokens before `high`.
template <int WARPS, typename T, typename C, int D, int S, int TILES>
__device__ __forceinline__ void fetch_tiles(WarpTile<T, C, D, S> (&tiles)[TILES], const History<C>& past, int begin,
                                            int high) {
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const int at = begin + (n * WARPS + threadIdx.x / WARP) * TILE;
        tiles[n].fetch_keys(past, at, high);
        tiles[n].fetch_values(past, at, high);
    }
}

// The same as groups of copies to the warp's ring.
template <int WARPS, typename C, int D, int S, int STAGES>
__device__ __forceinline__ void fetch_tiles(const WarpRing<C, D, S, STAGES>& ring, const History<C>& past, int begin,
                                            int high) {
#pragma unroll
    for (int n = 0; n < STAGES; n++) {
        const int at = begin + (n * WARPS + threadIdx.x / WARP) * TILE;
        ring.template request<false>(past, n, at, high);
        ring.template request<true>(past, n, at, high);
    }
}

// One warp's share of the keys begin .. end-1: sums to out [Q][STRIDE], the softmax's to largest and sum [Q]. `tiles`
// hold the first keys.
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, typename C, int D, int S, int TILES, bool CAPPED>
__device__ __forceinline__ void attend_warp(WarpTile<T, C, D, S> (&tiles)[TILES], const T* rows, const History<C>& past,
                                            int begin, int end, const Scaling<T, CAPPED>& scaling, float* out,
                                            float* largest, float* sum) {
    constexpr int STEP = WARPS * TILE;
    const int high = min(end, past.fresh);
    const auto* q = reinterpret_cast<const typename Products<T, C>::Type*>(rows);
    WarpSums<C, D> sums;
    for (int next = begin + threadIdx.x / WARP * TILE; next < end; next += TILES * STEP) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
            const int at = next + n * STEP;
            if (at >= end) break;
            WarpTile<T, C, D, S>& tile = tiles[n];
            const bool newest = past.newest_from(at);
            if (newest) tile.insert_key(past.key, past.fresh - at);
            float p[2][2];
            tile.template dot<QUERY>(q, p);
            tile.fetch_keys(past, at + TILES * STEP, high);
            if constexpr (WARPS < 8) tile.prefetch(past, at + (TILES + 1) * STEP, high);
            sums.weigh(p, at, past.low, end, scaling);
            if (newest) tile.insert_value(past.value, past.fresh - at);
            sums.add(tile, p);
            tile.fetch_values(past, at + TILES * STEP, high);
        }
    }
    sums.template store_to<Q, STRIDE>(out, largest, sum);
}

// The same with tiles that come through the ring: a stage is asked for again as soon as registers have what is in it.
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, typename C, int D, int S, int STAGES, bool CAPPED>
__device__ __forceinline__ void attend_warp(const WarpRing<C, D, S, STAGES>& ring, const T* rows,
                                            const History<C>& past, int begin, int end,
                                            const Scaling<T, CAPPED>& scaling, float* out, float* largest, float* sum) {
    constexpr int STEP = WARPS * TILE;
    const int high = min(end, past.fresh);
    const auto* q = reinterpret_cast<const typename Products<T, C>::Type*>(rows);
    WarpSums<C, D> sums;
    WarpTile<T, C, D, S> tile;
    int stage = 0;
    for (int at = begin + threadIdx.x / WARP * TILE; at < end; at += STEP) {
        const bool newest = past.newest_from(at);
        ring.wait();
        tile.read_keys(ring, stage);
        if (newest) tile.insert_key(past.key, past.fresh - at);
        __syncwarp();
        ring.template request<false>(past, stage, at + STAGES * STEP, high);
        float p[2][2];
        tile.template dot<QUERY>(q, p);
        sums.weigh(p, at, past.low, end, scaling);
        ring.wait();
        tile.read_values(ring, stage);
        if (newest) tile.insert_value(past.value, past.fresh - at);
        __syncwarp();
        ring.template request<true>(past, stage, at + STAGES * STEP, high);
        sums.add(tile, p);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    sums.template store_to<Q, STRIDE>(out, largest, sum);
}

#endif
