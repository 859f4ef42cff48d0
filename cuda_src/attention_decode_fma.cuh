// A decode step's attention without tensor cores (attention_decode.cu): a block takes KEYS keys at a time.
#ifndef CUPLAMA_ATTENTION_DECODE_FMA_CUH
#define CUPLAMA_ATTENTION_DECODE_FMA_CUH

#include "attention_decode.cuh"

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

// A tile of KEYS keys: thread (row, column) holds E elements of every ROWS-th key and value, and of the sums.
template <typename C, int D, int S, int Q, int WARPS>
struct BlockTile {
    static constexpr int THREADS = WARPS * WARP, LANES = Decode<C, C, D, Q, WARPS, false, 0>::LANES;
    static constexpr int E = SHARE<D>, WIDTH = E * LANES;
    static constexpr int ROWS = THREADS / LANES, QP = power_of_two(Q);
    // K and V wait in registers, as do E * Q sums.
    static constexpr int MAX_STEPS = E > 8 ? 2 : sizeof(C) == 4 || Q > 4 ? 4 : 8;
    static constexpr int STEPS = LANES / 2 < MAX_STEPS ? LANES / 2 : MAX_STEPS, KEYS = ROWS * STEPS;
    Pack<C, E> keys[STEPS], values[STEPS];
    int column, row;

    __device__ __forceinline__ BlockTile() : column(threadIdx.x % LANES * E), row(threadIdx.x / LANES) {}

    // Keys outside low .. end-1 are the next of those; their p is zero.
    __device__ __forceinline__ void fetch(const History<C>& past, int tile, int end) {
        const int from = column < D ? column : 0;  // lanes beyond D read what is there; their q is zero
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            const int token = max(past.low, min(tile + u * ROWS + row, end - 1));
            if (token == past.fresh) {
                keys[u] = load<E>(past.key + from);
                values[u] = load<E>(past.value + from);
            } else {
                const i64 at = token_offset<S, D>(past.table, token, past.head, past.H) + from;
                keys[u] = load<E>(past.k + at);
                values[u] = load<E>(past.v + at);
            }
        }
    }

    // Products with the queries q [Q][WIDTH].
    __device__ __forceinline__ void dot(const float* q, float (&score)[KEYS][Q]) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            float dot[QP] = {};
            const auto& key = readable(keys[u]);
#pragma unroll
            for (int i = 0; i < E; i += 4) {
#pragma unroll
                for (int h = 0; h < Q; h++) {
                    const Pack<f32, 4> a = load<4>(q + h * WIDTH + column + i);
#pragma unroll
                    for (int j = 0; j < 4; j++) dot[h] += a.v[j] * to_float(key.v[i + j]);
                }
            }
            const int first = reduce_scatter<QP, LANES>(dot, lane);
            constexpr int SAME = LANES / QP > 1 ? LANES / QP : 1;  // lanes with the same sum
#pragma unroll
            for (int i = 0; i < (QP > LANES ? QP / LANES : 1); i++)
                if (lane % SAME == 0 && first + i < Q) score[u * ROWS + row][first + i] = dot[i];
        }
    }

    // Adds the values with the weights p.
    __device__ __forceinline__ void add(const float (&p)[KEYS][Q], float (&acc)[Q][E]) const {
#pragma unroll
        for (int u = 0; u < STEPS; u++) {
            const auto& held = readable(values[u]);
            float value[E];
#pragma unroll
            for (int i = 0; i < E; i++) value[i] = to_float(held.v[i]);
#pragma unroll
            for (int h = 0; h < Q; h++) {
                const float weight = p[u * ROWS + row][h];
#pragma unroll
                for (int i = 0; i < E; i++) acc[h][i] += weight * value[i];
            }
        }
    }

    // Adds up the sums of all rows into out [Q][WIDTH].
    __device__ __forceinline__ void store_to(float* out, float (&acc)[Q][E]) const {
        const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
#pragma unroll
        for (int h = 0; h < Q; h++) {  // over the rows of a warp, ...
#pragma unroll
            for (int i = 0; i < E; i++) {
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
                    for (int i = 0; i < E; i++) {
                        float& place = out[h * WIDTH + column + i];
                        place = acc[h][i] + (w > 0 ? place : 0.f);
                    }
                }
            }
            __syncthreads();
        }
    }
};

// Scores of the keys from `tile` on to weights. shrink: what the sums so far are to be multiplied with.
template <int WARPS, bool CAPPED, typename T, int KEYS, int Q>
__device__ __forceinline__ void weigh(float (&score)[KEYS][Q], float (&shrink)[Q], int tile, int low, int end,
                                      const Scaling<T, CAPPED>& scaling, float* largest, float* sum) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int h = warp; h < Q; h += WARPS) {
        const float before = largest[h];
        float most = before, total = 0.f;
        for (int j = lane; j < KEYS; j += WARP) {
            if constexpr (CAPPED) score[j][h] = scaling.rest(score[j][h]);
            if (tile + j >= low && tile + j < end) most = fmaxf(most, score[j][h]);
        }
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
}

// The block's share, begin .. end-1. out: [Q][SHARE*LANES], the scaled queries before and the sums after.
template <int D, int S, int Q, int WARPS, typename C, typename T, bool CAPPED>
__device__ __forceinline__ void attend_block(const History<C>& past, int begin, int end,
                                             const Scaling<T, CAPPED>& scaling, float* out, float* largest,
                                             float* sum) {
    BlockTile<C, D, S, Q, WARPS> rows;
    __shared__ float score[rows.KEYS][Q];  // then p
    __shared__ float shrink[Q];
    if (threadIdx.x < Q) largest[threadIdx.x] = LOWEST, sum[threadIdx.x] = 0.f;
    __syncthreads();

    float acc[Q][rows.E] = {};
    for (int tile = begin; tile < end; tile += rows.KEYS) {
        rows.fetch(past, tile, end);
        rows.dot(out, score);
        __syncthreads();
        weigh<WARPS>(score, shrink, tile, past.low, end, scaling, largest, sum);
        __syncthreads();
#pragma unroll
        for (int h = 0; h < Q; h++) {
#pragma unroll
            for (int i = 0; i < rows.E; i++) acc[h][i] *= shrink[h];
        }
        rows.add(score, acc);
        __syncthreads();  // score and shrink may be written again
    }
    rows.store_to(out, acc);
}

#endif
