// A decode step's attention: one new token per sequence, over the paged KV cache.
//
//     y = softmax(q k^T * scale) v        per query head, over the sequence's last `window` tokens (all if window is 0)
//
// CAPPED, scores s = q k^T * scale are softcap * tanh(s / softcap); with SINKS each head has one more logit in the sum of
// its softmax, without a value.
//
//   attention_decode  the cache holds the new token already
//   append_attention  first, per head: rms_norm of q and the new k (if there are q_norm and k_norm), rotation of both
//                     by row rope_rows[i] of cos and sin (if there are any; dims 2h .. D stay), and the new k and v go
//                     to slot_mapping[i] of the cache. Each step rounds to T, as the ops do that it stands for.
//
//   x           [b, heads*D] T    query, key and value heads of the new tokens; attention_decode reads the queries alone
//   k, v        [P, H, S, D] C    pages of S tokens; token t of sequence i is on page page_table[i][t / S]
//   seq_lens    [b] i32; page_table [b, M] i32
//   slot_mapping, rope_rows [b] i32; cos, sin [R, h] f32; q_norm, k_norm [D] T
//   sinks       [num_heads] T
//   y           [b, num_heads*D] T
//   partial     [b, num_heads, splits, D] f32    of a split, the sum of p * v
//   stats       [b, num_heads, splits, 2] f32    of a split, the largest score and the sum of p = exp2(score - largest)
//   arrivals    [b, H * parts] u32    zero before and after
//
// Ops and references: cuplama/ops/attention.py (attention), cuplama/ops/fused.py (append_attention). Test: tests/ops/.
// Benchmark: cuplama kernels bench attention append_attention; of many sequences benchmarks/attention_batches.py.
//
// C is T, or e4m3 (e4m3.cuh). D is a multiple of 8 up to 256, or of 16 up to 512. Scores, softmax statistics and sums are
// f32.
//
// Mapping: grid (blocks, H * parts, b). A block takes Q query heads of one key head (groups of more than 8, or 4
// without tensor cores and with D > 256, take several blocks, `parts`) and every gridDim.x-th split of the keys. Up to
// `alone` keys are one split; of more a split has min_keys, or as many as make max_splits splits of the sequence,
// whichever is more. So the device decides how many splits a length deserves, a captured launch serves every length,
// and among launches of the same WARPS, min_keys and `alone`, which the size of the batch decides, a result depends on
// the sequence's own length alone. The block that arrives last adds up the splits, in their order. A sequence of one
// split needs none of this. The block with the last split computes the new k and v, attends to its own copy, and (part
// 0) writes the cache.
//
//   TENSOR   16-bit T, from sm_80 on (attention_decode_mma.cuh): a warp takes 16 keys at a time and keeps
//            a softmax of its own, so the loop has no barrier. Scores are mma of queries (8 of 16 rows) and keys (8
//            columns): which d meets which is free, so a lane reads 16 bytes of a key as its share of two products.
//            Sums are mma of v^T (16 d) and p^T (8 heads); p enters as two 16-bit numbers, p and what rounding it took
//            away, so that it loses nothing that shows.
//            An e4m3 cache is widened to f16 in registers on the way to the products, which then are of f16: from sm_89
//            on by one instruction for two numbers, and values by half as many exchanges of bytes as 16 bits take. A
//            lane reads 16 bytes of a row there too if D allows: 16 elements, so which d meets which is another order.
//            Next tiles are on their way in registers, two of them; or with STAGES > 0 in a ring of each warp in shared
//            memory (attention_decode_ring.cuh), for many sequences (ops/decode_blocks.py has the choice and the times).
//            A lane of D = 128 has 64 registers of a tile and 32 of sums; of D = 256 twice as many, which leaves room for
//            no second tile. So for D > 128 tiles always come through a ring, one of 16 keys is 16 KB of D = 256, and a
//            lane reads a fragment just before its products: 168 registers, and 250 for D = 512. The sums of a warp are
//            stored where its ring was. Rows that are no whole 16 bytes (e4m3, D = 8 modulo 16) take the other way.
//   else     (attention_decode_fma.cuh): LANES lanes hold a row of SHARE*LANES >= D elements, a block reads ROWS keys side
//            by side, and the products of the Q heads are summed over the lanes by a reduce-scatter.
//
// append_attention starts early (programmatic dependent launch) and waits before it reads x. Lengths, tables and the
// old tokens of the cache it reads before: they come from earlier steps. A step must therefore begin with a kernel
// that is launched in the ordinary way (embedding is), and nothing in it but this kernel may write the cache or those
// arrays before its end (advance does). attention_decode, which follows a kernel that writes the cache, waits first.
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
// kept). Tried besides: cp.async.bulk.prefetch.L2 of the next 4 tiles (50 us at 32768 keys instead of 40), of the next
// 2 (41.5). With smaller blocks for large batches (ops/decode_blocks.py) one tile ahead in the L2 gains: 512 sequences
// of 576 keys 366 -> 346 us, 64 of 2048 181 -> 168; two tiles 361 and 175, four 421 and 208.
//
// Wide heads, on an H200 in the decode step of Gemma 3 4B (8 query and 4 key heads of 256), 2026-11-28, take 10.7
// microseconds for one sequence of some 160 keys and 24.6 for 64, waits for the kernel before included; as multiply-adds
// they took 25.3 and 65. Heads of 128 in other models take 10.0 and 18.7.
#include "attention_decode_fma.cuh"
#include "attention_decode_ring.cuh"

// What is done to a new head: norm and rotation, for the lane's share. A warp makes one and uses it for several heads.
template <typename T, int D>
struct Preparation {
    static constexpr int EACH = (D + WARP - 1) / WARP, E = SHARE<D>;
    float c[EACH], s[EACH], eps, offset;
    int turned, half;  // dims that turn; half of them

    template <typename C>
    __device__ __forceinline__ Preparation(const NewToken<T, C>& token)
        : eps(token.eps), offset(token.offset), half(token.h) {
        const int lane = threadIdx.x % WARP;
        turned = token.cos != nullptr ? 2 * half : 0;
        const i64 row = token.cos != nullptr ? i64(token.rope_rows[blockIdx.z]) * half : 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) {
            const int i = lane + j * WARP;
            c[j] = i < turned ? token.cos[row + (i < half ? i : i - half)] : 0.f;
            s[j] = i < turned ? token.sin[row + (i < half ? i : i - half)] : 0.f;
        }
    }

    // One head by one warp: v, the lane's share of it, through norm (if `normed`) and rotation (if `turn`) to
    // `to`, in shared memory.
    __device__ __forceinline__ void operator()(Pack<T, E> v, bool normed, const Pack<T, E>& scale, bool turn,
                                               T* to) const {
        const int lane = threadIdx.x % WARP;
        if (normed) {
            float squares = 0.f;
#pragma unroll
            for (int j = 0; j < E; j++) squares += to_float(v.v[j]) * to_float(v.v[j]);
            const float inverse = 1.f / sqrtf(warp_sum(squares) / D + eps);
#pragma unroll
            for (int j = 0; j < E; j++)
                v.v[j] = from_float<T>(to_float(v.v[j]) * inverse * (offset + to_float(scale.v[j])));
        }
        if (lane * E < D) store<E>(to + lane * E, v);
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

// The block's queries to q [Q][QUERY] and, if it has the newest token, that one's key and value to shared memory and
// (part 0) to the cache. A warp takes every WARPS-th of these heads; all are loaded before one is used. wait: for x.
// M: what products are computed in; queries that are to be something else than T are that, and scaled. rounded_...: the
// new key and value as the cache holds them, if that is not T; the new token attends to itself as others will to it.
template <bool APPEND, int D, int S, int WARPS, int QUERY, typename M, int Q, typename T, typename C, typename Wait>
__device__ __forceinline__ void prepare_heads(const Arguments<T, C>& a, const NewToken<T, C>& token,
                                              const Heads<Q>& heads, bool newest, T* q, T* fresh_key, T* fresh_value,
                                              C* rounded_key, C* rounded_value, Wait wait) {
    constexpr int MINE = (Q + (APPEND ? 2 : 0) + WARPS - 1) / WARPS, E = SHARE<D>;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int here = heads.count, count = here + (newest ? 2 : 0);
    const Preparation<T, D> prepare(token);
    const bool normed = token.q_norm != nullptr;
    Pack<T, E> fetched[MINE] = {}, q_norm = {}, k_norm = {};
    if (normed && lane * E < D) q_norm = load<E>(token.q_norm + lane * E), k_norm = load<E>(token.k_norm + lane * E);
    wait();
    const T* x = a.x + i64(heads.sequence) * a.heads * D + lane * E;
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int j = warp + i * WARPS;
        const int from = j < here ? heads.first + j : a.num_heads + heads.kv_head + (j - here) * a.H;
        if (j < count && lane * E < D) fetched[i] = load<E>(x + from * D);
    }
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int j = warp + i * WARPS;
        if (j >= count) break;
        T* to = j < here ? q + j * QUERY : j == here ? fresh_key : fresh_value;
        Pack<T, E> scale = q_norm;
        if (j >= here) scale = k_norm;
        prepare(fetched[i], normed && j <= here, scale, j <= here, to);
        if constexpr (!same_type<M, T>) {
            if (j < here && lane * E < D) {
#pragma unroll
                for (int n = 0; n < E; n += 8) scale_query<T, C>(to + lane * E + n);
            }
        }
        if constexpr (!same_type<C, T>) {
            if (j >= here && lane * E < D)
                store<E>((j == here ? rounded_key : rounded_value) + lane * E, narrow<C>(load<E>(to + lane * E)));
        }
        if (j >= here && heads.part == 0 && lane * E < D) {
            const int slot = token.slot_mapping[heads.sequence];
            const i64 at = ((i64(slot / S) * a.H + heads.kv_head) * S + slot % S) * D + lane * E;
            store<E>((j == here ? token.k : token.v) + at, narrow<C>(load<E>(to + lane * E)));
        }
    }
}

// Of a new key or value, the copy that the tokens attend to: what the cache holds.
template <typename C>
__device__ __forceinline__ const C* stored(const C* fresh, const C*) {
    return fresh;
}
template <typename T, typename C>
__device__ __forceinline__ const C* stored(const T*, const C* rounded) {
    return rounded;
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <bool APPEND, int D, int S, int Q, int WARPS, bool TENSOR, int STAGES, bool CAPPED, bool SINKS, typename T,
          typename C, typename Wait>
__device__ __forceinline__ void decode(const Arguments<T, C>& a, const NewToken<T, C>& token, Wait wait) {
    using Numbers = Decode<T, C, D, Q, WARPS, TENSOR, STAGES>;
    using Product = Products<T, C>;
    constexpr int THREADS = Numbers::THREADS, PARTS = Numbers::PARTS, STRIDE = Numbers::STRIDE;
    constexpr int QUERY = Numbers::QUERY;
    __shared__ alignas(16) T q[Numbers::QUERIES * QUERY];
    __shared__ alignas(16) T fresh_key[D], fresh_value[D];
    __shared__ alignas(16) C rounded_key[D], rounded_value[D];
    __shared__ float largest[PARTS][Q], sum[PARTS][Q];

    const Heads<Q> heads(a.num_heads, a.H);
    const int warp = threadIdx.x / WARP, here = heads.count;
    T* y = a.y + (i64(heads.sequence) * a.num_heads + heads.first) * D;
    const Span span(a.seq_lens[heads.sequence], a.window, a.min_keys, a.alone, a.max_splits);
    const int taking = min(int(gridDim.x), span.count);  // blocks that have a split
    if (int(blockIdx.x) >= taking) {
        if (span.count == 0 && blockIdx.x == 0) {  // an empty sequence
            wait();
            for (int i = threadIdx.x; i < here * D; i += THREADS) y[i] = from_float<T>(0.f);
        }
        return;
    }
    const int fresh = APPEND ? span.length - 1 : 0x7fffffff;
    const i32* table = a.page_table + i64(heads.sequence) * a.M;
    const C *key = stored(fresh_key, rounded_key), *value = stored(fresh_value, rounded_value);
    const History<C> past{a.k, a.v, table, heads.kv_head, a.H, span.low, fresh, key, value};

    // The first keys are on their way while the queries are prepared.
    typename Tiles<C, D, TENSOR ? S : 1, STAGES>::Type tiles;
    float* room;
    if constexpr (STAGES > 0) {
        DYNAMIC_SHARED(float, rings);
        room = rings;
        tiles.room = reinterpret_cast<unsigned char*>(room + warp * Numbers::PITCH);
    } else {
        __shared__ alignas(16) float sums[Numbers::ROOM];
        room = sums;
    }
    if constexpr (TENSOR) fetch_tiles<WARPS>(tiles, past, span.begin(blockIdx.x), min(span.end(blockIdx.x), fresh));
    const bool newest = APPEND && (span.count - 1) % taking == int(blockIdx.x);
    using Query = typename Choose<TENSOR, typename Product::Type, T>::Type;
    prepare_heads<APPEND, D, S, WARPS, QUERY, Query>(a, token, heads, newest, q, fresh_key, fresh_value, rounded_key,
                                                     rounded_value, wait);
    if constexpr (TENSOR) {
        for (int i = threadIdx.x; i < 8 * QUERY; i += THREADS)
            if (i / QUERY >= here || i % QUERY >= D) q[i] = from_float<T>(0.f);
    }
    __syncthreads();

    for (int split = blockIdx.x; split < span.count; split += gridDim.x) {
        const int begin = span.begin(split), end = span.end(split);
        const Scaling<T, CAPPED> scaling(a.scale, a.softcap, TENSOR ? 1.f / Product::QUERY_SCALE : 1.f);
        if constexpr (TENSOR) {
            if (split != int(blockIdx.x)) fetch_tiles<WARPS>(tiles, past, begin, min(end, fresh));
            attend_warp<QUERY, Q, WARPS, STRIDE, T>(tiles, q, past, begin, end, scaling, room + warp * Numbers::PITCH,
                                                    largest[warp], sum[warp]);
            __syncthreads();
        } else {
            for (int i = threadIdx.x; i < Q * STRIDE; i += THREADS) {
                const int row = i / STRIDE, column = i % STRIDE;
                room[i] = row < here && column < D ? to_float(q[row * QUERY + column]) * scaling.of_query() : 0.f;
            }
            attend_block<D, S, Q, WARPS>(past, begin, end, scaling, room, largest[0], sum[0]);
        }
        store_split<D, Q, Numbers, SINKS>(a, heads, y, split, span.count == 1, room, largest, sum);
        __syncthreads();
    }
    if (span.count == 1) return;
    if (!arrives_last(a.arrivals + i64(heads.sequence) * gridDim.y + blockIdx.y, taking)) return;
    add_up_splits<D, Q, THREADS, Numbers::ROWS, SINKS>(a, heads, y, span.count, room);
}

template <typename T, typename C, int D, int S, int Q, int WARPS, bool TENSOR, int STAGES, int BLOCKS, bool CAPPED,
          bool SINKS>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS)
    attention_decode(const T* x, const C* k, const C* v, const i32* seq_lens, const i32* page_table, T* y, f32* partial,
                     f32* stats, u32* arrivals, int num_heads, int H, int heads, int M, int window, int min_keys,
                     int alone, int max_splits, int splits, float scale, const T* sinks, float softcap) {
    launch_dependents();
    pdl_wait();
    const Arguments<T, C> a{x,     k, v,      seq_lens, page_table, y,          partial, stats, arrivals, num_heads, H,
                            heads, M, window, min_keys, alone,      max_splits, splits,  scale, sinks,    softcap};
    decode<false, D, S, Q, WARPS, TENSOR, STAGES, CAPPED, SINKS>(a, NewToken<T, C>{}, [] {});
}

template <typename T, typename C, int D, int S, int Q, int WARPS, bool TENSOR, int STAGES, int BLOCKS, bool CAPPED,
          bool SINKS>
__global__ void __launch_bounds__(WARPS* WARP, BLOCKS)
    append_attention(const T* x, const i32* slot_mapping, C* k, C* v, const i32* seq_lens, const i32* page_table,
                     const i32* rope_rows, const f32* cos, const f32* sin, const T* q_norm, const T* k_norm, T* y,
                     f32* partial, f32* stats, u32* arrivals, int num_heads, int H, int heads, int M, int h, int window,
                     int min_keys, int alone, int max_splits, int splits, float scale, float eps, float offset,
                     const T* sinks, float softcap) {
    launch_dependents();
    const auto wait = [] { pdl_wait(); };  // for x; the rest is older than the step, see above
    const Arguments<T, C> a{x,     k, v,      seq_lens, page_table, y,          partial, stats, arrivals, num_heads, H,
                            heads, M, window, min_keys, alone,      max_splits, splits,  scale, sinks,    softcap};
    const NewToken<T, C> token{slot_mapping, k, v, rope_rows, cos, sin, q_norm, k_norm, h, eps, offset};
    decode<true, D, S, Q, WARPS, TENSOR, STAGES, CAPPED, SINKS>(a, token, wait);
}
