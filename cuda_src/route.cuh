// How a row's experts are chosen: what the kernels that route have in common.
#ifndef CUPLAMA_ROUTE_CUH
#define CUPLAMA_ROUTE_CUH

#include "common.cuh"

// What experts are chosen by: a number that is larger for a larger key, of equal keys for the lower index, never 0.
__device__ __forceinline__ u64 rank_of(float key, int expert) {
    const u32 bits = __float_as_uint(key + 0.f);  // -0 becomes 0
    const u32 ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
    return u64(key == key ? ordered : 0u) << 32 | (0xffffffffu - expert);
}

__device__ __forceinline__ int expert_of(u64 rank) { return int(0xffffffffu - u32(rank)); }

__device__ __forceinline__ u64 warp_max(u64 x) {
#if __CUDA_ARCH__ >= 800
    // Two instructions for 32 bits each, of some 30 cycles, in place of five rounds of two shuffles.
    const u32 high = __reduce_max_sync(ALL_LANES, u32(x >> 32));
    return u64(high) << 32 | __reduce_max_sync(ALL_LANES, u32(x >> 32) == high ? u32(x) : 0u);
#else
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, x, lanes);
        if (other > x) x = other;
    }
    return x;
#endif
}

// A warp's row: lane l has the experts l + 32 i. What cannot be chosen any more has rank 0.
template <int EACH>
struct Row {
    float logit[EACH];
    u64 rank[EACH];
    int E, lane;

    __device__ __forceinline__ Row(const f32* logits, int E) : E(E), lane(threadIdx.x % WARP) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const int expert = lane + WARP * i;
            logit[i] = expert < E ? logits[expert] : -infinity();
            rank[i] = rank_of(logit[i], expert);
        }
    }

    // The best of the experts first .. first + count - 1, and which it is; 0 if there is none.
    __device__ __forceinline__ u64 best(int first, int count) const {
        u64 most = 0;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (u32(lane + WARP * i - first) < u32(count) && rank[i] > most) most = rank[i];
        return warp_max(most);
    }

    // An expert's value of those that the lanes have.
    __device__ __forceinline__ float value_of(int expert, const float (&values)[EACH]) const {
        float found = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (expert == lane + WARP * i) found = values[i];
        return __shfl_sync(ALL_LANES, found, expert % WARP);
    }

    __device__ __forceinline__ void remove(int first, int count) {
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (u32(lane + WARP * i - first) < u32(count)) rank[i] = 0;
    }

    // Leaves the experts of the `kept` best of the groups. by: what experts are chosen by.
    __device__ __forceinline__ void keep_groups(int groups, int kept, const float (&by)[EACH]) {
        const int size = E / groups;
        u64 mine = 0;  // of group `lane`
        for (int g = 0; g < groups; g++) {
            float sum = 0.f;
            int top = -1;
            for (int i = 0; i < 2; i++) {
                u64 most = 0;
#pragma unroll
                for (int j = 0; j < EACH; j++) {
                    const int expert = lane + WARP * j;
                    if (u32(expert - g * size) < u32(size) && expert != top && rank[j] > most) most = rank[j];
                }
                most = warp_max(most);
                if (most == 0) break;  // a group of one
                top = expert_of(most);
                sum += value_of(top, by);
            }
            if (lane == g) mine = rank_of(sum, g);
        }
        u32 left = 0;
        for (int i = 0; i < kept; i++) {
            const u64 most = warp_max(mine);
            if (mine == most) mine = 0;
            left |= 1u << expert_of(most);
        }
        for (int g = 0; g < groups; g++)
            if (!(left >> g & 1)) remove(g * size, size);
    }
};

// experts[k], weights[k] of a row by its logits[E]; see the op route. A warp calls, and lane l writes those of slot l.
template <int EACH>
__device__ __forceinline__ void choose(const f32* logits, const f32* bias, const f32* scale, i32* experts, f32* weights,
                                       int E, int k, int sigmoid, int groups, int kept, int renormalise, f32 factor) {
    Row<EACH> of(logits, E);
    float score[EACH], by[EACH], largest = -infinity(), sum = 0.f;
#pragma unroll
    for (int i = 0; i < EACH; i++) largest = fmaxf(largest, of.logit[i]);
    largest = warp_max(largest);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        score[i] = sigmoid ? 1.f / (1.f + expf(-of.logit[i])) : expf(of.logit[i] - largest);
        sum += score[i];  // 0 beyond E
    }
    const float whole = sigmoid ? 1.f : warp_sum(sum);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        const int expert = of.lane + WARP * i;
        score[i] /= whole;
        by[i] = score[i];
        if (bias == nullptr || expert >= E) continue;
        by[i] += bias[expert];
        of.rank[i] = rank_of(by[i], expert);
    }
    if (groups > 1) of.keep_groups(groups, kept, by);
    float mine = 0.f;
    int chosen = 0;
    for (int slot = 0; slot < k; slot++) {
        const int expert = expert_of(of.best(0, E));
        const float found = of.value_of(expert, score);
        of.remove(expert, 1);
        if (of.lane == slot) chosen = expert, mine = found;
    }
    const float total = warp_sum(mine) + 1e-20f;  // of scores that are all 0
    if (of.lane >= k) return;
    float weight = (renormalise ? mine / total : mine) * factor;
    if (scale != nullptr) weight *= scale[chosen];
    experts[of.lane] = chosen;
    weights[of.lane] = weight;
}

#endif
