// What the decode rungs share: one block's attention of one query over a range of keys.
#ifndef CUPLAMA_LADDER_DECODE_CUH
#define CUPLAMA_LADDER_DECODE_CUH

#include "ladder/ladder.cuh"

constexpr int WARPS = 8;  // of a block
constexpr int AHEAD = 4;  // keys that a warp takes at a time: it asks for all of them before it needs the first

// The sum of exp2(score - largest) * value over the keys begin .. end-1, an element for each of the first D threads of
// the block, with the largest score and the sum of the exponentials. q [D]; k, v [s, D].
//
// A warp takes 4 keys at a time: its lanes have D/32 elements of each, so a key is read as one piece, and a score is a
// sum over the lanes. Every warp has an online softmax of its own (see prefill_3_online.cu); at the end the block
// brings the eight to a common largest score and adds them up.
template <int D, typename T>
__device__ __forceinline__ float attend(const T* q, const T* k, const T* v, int begin, int end, float scale,
                                        float& largest, float& sum) {
    constexpr int E = D / WARP;
    __shared__ float parts[WARPS][D], stats[WARPS][2];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Pack<T, E> query = load<E>(q + lane * E);
    float acc[E] = {}, most = LOWEST, total = 0.f;
    for (int at = begin + warp * AHEAD; at < end; at += WARPS * AHEAD) {
        Pack<T, E> key[AHEAD], value[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const i64 row = i64(min(at + j, end - 1)) * D + lane * E;
            key[j] = load<E>(k + row), value[j] = load<E>(v + row);
        }
        float score[AHEAD], before = most;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            float dot = 0.f;
#pragma unroll
            for (int e = 0; e < E; e++) dot += to_float(query.v[e]) * to_float(key[j].v[e]);
            dot = warp_sum(dot);
            score[j] = at + j < end ? dot * (scale * LOG2_E) : -infinity();
            most = fmaxf(most, score[j]);
        }
        const float shrink = exp2f(before - most);
        total *= shrink;
#pragma unroll
        for (int e = 0; e < E; e++) acc[e] *= shrink;
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const float p = exp2f(score[j] - most);
            total += p;
#pragma unroll
            for (int e = 0; e < E; e++) acc[e] += p * to_float(value[j].v[e]);
        }
    }
#pragma unroll
    for (int e = 0; e < E; e++) parts[warp][lane * E + e] = acc[e];
    if (lane == 0) stats[warp][0] = most, stats[warp][1] = total;
    __syncthreads();

    largest = LOWEST, sum = 0.f;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, stats[w][0]);
    float element = 0.f;
    for (int w = 0; w < WARPS; w++) {
        const float weight = exp2f(stats[w][0] - largest);  // 0 for a warp that had no key
        sum += weight * stats[w][1];
        if (threadIdx.x < D) element += weight * parts[w][threadIdx.x];
    }
    return element;
}

#endif
