// route              experts[n,k], weights[n,k]: the k experts of each row whose score + bias is largest
//                    score: of softmax(logits[n,E]), or with `sigmoid` 1 / (1 + exp(-logit)) of each
//                    weight: score / (sum of the k scores, if `renormalise`) * factor * scale[expert]
// route_sparsemixer  weight: 1 / (sum of exp(logit - largest)) over what is left and at most `threshold` below,
//                    relative to the larger of |logit| and the largest
// sort_pairs         pairs[n*k], offsets[E+1]: the numbers row * k + slot of the places of experts[n,k], by expert
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
// Tried: nothing else yet; no GPU has run these.
#include "common.cuh"
#include "experts.cuh"
#include "ptx.cuh"
#include "route.cuh"

constexpr int ROWS = 4;  // of a block of a route

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
