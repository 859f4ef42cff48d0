// route              experts[n,k], weights[n,k]: the k experts of each row whose score + bias is largest
//                    score: of softmax(logits[n,E]), or with `sigmoid` 1 / (1 + exp(-logit)) of each
//                    weight: score / (sum of the k scores, if `renormalise`) * factor * scale[expert]
// route_sparsemixer  weight: 1 / (sum of exp(logit - largest)) over what is left and at most `threshold` below,
//                    relative to the larger of |logit| and the largest
// sort_pairs         pairs[n*k], offsets[E+1]: the numbers row * k + slot of the places of experts[n,k], by expert
// route_pairs        route and sort_pairs in one, for up to 8 rows
// combine_pairs      y[n,d] = a[n,d] + sum over s of weights[n,s] * x[n*s,d], in the order of the slots
//                    logits, bias[E], scale[E], weights, a, y: f32; bias, scale, a may be null; x: U (T or f32)
//
// Experts come in the order of what they are chosen by, of equal ones the lower index first, NaN last. Without a bias
// that is the logit itself: it has the order of the scores, and tells apart what they round to one number. With groups
// only experts of the `kept` groups are chosen whose two best add up to most; a group is E / groups neighbours.
//
// Mapping: of both routes a warp has a row, and lane l the experts l, l + 32, ...; a choice is a maximum over the warp.
// sort_pairs is one block. Each warp has a run of the pairs and counts its experts; running sums over experts, and over
// the warps of an expert, say where each warp's pairs of an expert begin; then each warp places its pairs, 32 at a
// time, in order. combine_pairs: blockIdx.x is the row, blockIdx.y and the threads share its columns, 8 to a thread.
//
// Ops and references: cuplama/ops/route.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Measured on an H200, 2026-11-28: a token of Qwen3-30B-A3B in 3.57 ms with rms_norm, linear, route and sort_pairs as
// four launches a layer, in 3.71 with one kernel for all four, whose blocks normalised the row each for itself, and of
// which the last chose. With weights in registers ahead of the wait, and no row in shared memory, that kernel took a
// token in 2.996 ms, where rms_norm, linear and route_pairs took 2.944, and route and sort_pairs apart 2.984; of
// gpt-oss-20b 1.706, 1.715 and 1.734 (2026-11-28-h200-route.txt).
#include "common.cuh"
#include "experts.cuh"
#include "ptx.cuh"

constexpr int ROWS = 4;             // of a block of a route
constexpr int MAX_FEW_PAIRS = 256;  // of route_pairs: 8 rows with 32 experts

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

// The row of this thread's warp.
__device__ __forceinline__ int warp_row() { return blockIdx.x * ROWS + threadIdx.x / WARP; }

template <int EACH>
__global__ void route(const f32* logits, const f32* __restrict__ bias, const f32* __restrict__ scale, i32* experts,
                      f32* weights, int n, int E, int k, int sigmoid, int groups, int kept, int renormalise,
                      f32 factor) {
    launch_dependents();
    pdl_wait();
    const int row = warp_row();
    if (row >= n) return;
    choose<EACH>(logits + i64(row) * E, bias, scale, experts + i64(row) * k, weights + i64(row) * k, E, k, sigmoid,
                 groups, kept, renormalise, factor);
}

template <int EACH>
__global__ void route_sparsemixer(const f32* logits, i32* experts, f32* weights, int n, int E, int k, f32 threshold) {
    launch_dependents();
    pdl_wait();
    const int row = warp_row();
    if (row >= n) return;
    Row<EACH> of(logits + i64(row) * E, E);
    for (int slot = 0; slot < k; slot++) {
        const int expert = expert_of(of.best(0, E));
        const float largest = of.value_of(expert, of.logit);
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            const float below = (largest - of.logit[i]) / fmaxf(fabsf(of.logit[i]), largest);
            if (of.rank[i] != 0 && !(below > threshold)) sum += expf(of.logit[i] - largest);
        }
        sum = warp_sum(sum);
        of.remove(expert, 1);
        if (of.lane == 0) experts[i64(row) * k + slot] = expert, weights[i64(row) * k + slot] = 1.f / sum;
    }
}

// ---- pairs by expert ------------------------------------------------------------------------------------------------

// One block; a warp for each row chooses, and then the pairs are placed by comparing each with all.
template <int EACH>
__global__ void __launch_bounds__(256)
    route_pairs(const f32* logits, const f32* __restrict__ bias, const f32* __restrict__ scale, i32* pairs,
                i32* offsets, i32* experts, f32* weights, int n, int E, int k, int sigmoid, int groups, int kept,
                int renormalise, f32 factor) {
    __shared__ i32 chosen[MAX_FEW_PAIRS];
    const int row = threadIdx.x / WARP, size = n * k;
    launch_dependents();
    pdl_wait();
    if (row < n)
        choose<EACH>(logits + i64(row) * E, bias, scale, chosen + row * k, weights + i64(row) * k, E, k, sigmoid,
                     groups, kept, renormalise, factor);
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        experts[i] = chosen[i];
        int ahead = 0;
        for (int j = 0; j < size; j++) ahead += chosen[j] < chosen[i] || (chosen[j] == chosen[i] && j < i);
        pairs[ahead] = i;
    }
    for (int expert = threadIdx.x; expert <= E; expert += blockDim.x) {
        int ahead = 0;
        for (int j = 0; j < size; j++) ahead += chosen[j] < expert;
        offsets[expert] = ahead;
    }
}

__global__ void __launch_bounds__(512) sort_pairs(const i32* experts, i32* pairs, i32* offsets, int n, int k, int E) {
    DYNAMIC_SHARED(i32, places);  // [warps][E]: counts, and then where the next pair goes
    __shared__ i32 before[MAX_EXPERTS + 1];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP, size = n * k;
    const int each = (size + blockDim.x - 1) / blockDim.x * WARP;  // pairs of a warp
    const int begin = warp * each, end = min(begin + each, size);
    launch_dependents();
    for (int i = threadIdx.x; i < warps * E; i += blockDim.x) places[i] = 0;
    __syncthreads();
    pdl_wait();
    i32* own = places + warp * E;
    for (int i = begin + lane; i < end; i += WARP) atomicAdd(own + experts[i], 1);
    __syncthreads();
    running_sums(before, E, [&](int expert) {
        int sum = 0;
        for (int w = 0; w < warps; w++) {
            const int count = places[w * E + expert];
            places[w * E + expert] = sum;
            sum += count;
        }
        return sum;
    });
    for (int i = threadIdx.x; i <= E; i += blockDim.x) offsets[i] = before[i];
    for (int first = begin; first < end; first += WARP) {
        const int i = first + lane, expert = i < end ? experts[i] : -1;
        const u32 same = __match_any_sync(ALL_LANES, expert);
        if (expert < 0) continue;
        const int ahead = __popc(same & ((1u << lane) - 1)), place = own[expert] + ahead;
        __syncwarp(same);
        if (ahead == 0) own[expert] = place + __popc(same);
        pairs[before[expert] + place] = i;
    }
}

// ---- what the experts of a row gave ---------------------------------------------------------------------------------

template <typename U>
__global__ void combine_pairs(const U* x, const f32* weights, const f32* a, f32* y, int d, int s) {
    launch_dependents();
    pdl_wait();
    const bool vectorized = d % 8 == 0 && aligned(x, a, y);
    const i64 row = blockIdx.x;
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8; at < d; at += gridDim.y * blockDim.x * 8) {
        Pack<f32, 8> sum = {};
        if (a != nullptr) sum = load_row<8>(a + row * d, at, d, vectorized);
        for (int slot = 0; slot < s; slot++) {
            const float weight = weights[row * s + slot];
            const Pack<U, 8> part = load_row<8>(x + (row * s + slot) * d, at, d, vectorized);
#pragma unroll
            for (int j = 0; j < 8; j++) sum.v[j] = fmaf(weight, to_float(part.v[j]), sum.v[j]);
        }
        store_row<8>(y + row * d, at, d, vectorized, sum);
    }
}
