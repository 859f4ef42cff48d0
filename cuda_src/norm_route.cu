// rms_norm_route  a norm, a router, its choice, and the pairs by expert: rms_norm, linear, route and sort_pairs in one,
//                 for up to 8 rows
//                 normed[n,d] = rms_norm(x) with scale g[d]                  x: f32, g, normed: T
//                 logits = normed w[E,d]^T + b[E]                            w, b (may be null): T
//                 experts[n,k], weights[n,k], pairs[n*k], offsets[E+1]: of the logits, as route and sort_pairs make them
//
// In a decode step of few sequences these four take a few microseconds each, and nearly all of that is the time that a
// kernel takes to begin and to reach memory.
//
// Mapping: a block has WARPS experts, one for each warp. Every block normalises all rows into shared memory, as many at a
// time as it has room for, so that none waits for another; the first block writes them. Its experts' weights are constant: they come to the L2 before the block
// waits for x. The block that counts last finds all logits, gives a row to each warp, which chooses as route does, and
// places the pairs by comparing each with all: there are 256 at most.
//
// Op and reference: cuplama/ops/norm_route.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet; no GPU has run this.
#include "common.cuh"
#include "ptx.cuh"
#include "route.cuh"

constexpr int WARPS = 8;
constexpr int TOGETHER = 2;     // vectors of a row that a thread asks for before it adds up the first
constexpr int MAX_PAIRS = 256;  // 8 rows with 32 experts

// rows[n][width] = rms_norm(x), rounded to T, and 0 from d on. All threads of the block call.
template <typename T>
__device__ __forceinline__ void normalise(const f32* x, const T* g, T* rows, T* normed, int n, int d, int width,
                                          f32 eps, f32 offset, bool vectorized) {
    const int stride = blockDim.x * 8;
    for (int r = 0; r < n; r++) {
        const f32* row = x + i64(r) * d;
        float squares = 0.f;
        for (int first = threadIdx.x * 8; first < d; first += TOGETHER * stride) {
            Pack<f32, 8> v[TOGETHER];
#pragma unroll
            for (int i = 0; i < TOGETHER; i++) v[i] = load_row<8>(row, first + i * stride, d, vectorized);
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) squares += v[i].v[j] * v[i].v[j];
        }
        const float inverse = 1.f / sqrtf(block_sum(squares) / d + eps);
        for (int at = threadIdx.x * 8; at < width; at += stride) {
            const Pack<f32, 8> v = load_row<8>(row, at, d, vectorized);
            const Pack<T, 8> scale = load_row<8>(g, at, d, vectorized);
            Pack<T, 8> out;
#pragma unroll
            for (int j = 0; j < 8; j++) out.v[j] = from_float<T>(v.v[j] * inverse * (offset + to_float(scale.v[j])));
            store<8>(rows + r * width + at, out);
            if (normed != nullptr) store_row<8>(normed + i64(r) * d, at, d, vectorized, out);
        }
    }
    __syncthreads();
}

// logits[r][expert] for a warp's expert, of n rows, ROWS at most.
template <typename T, int ROWS>
__device__ __forceinline__ void multiply(const T* rows, const T* w, float b, f32* logits, int n, int d, int width,
                                         int E, bool vectorized) {
    const int lane = threadIdx.x % WARP;
    float sum[ROWS] = {};
#pragma unroll 8
    for (int at = lane * 8; at < d; at += WARP * 8) {
        const Pack<T, 8> weight = load_row<8>(w, at, d, vectorized);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<T, 8> v = load<8>(rows + min(r, n - 1) * width + at);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[r] = fmaf(to_float(weight.v[j]), to_float(v.v[j]), sum[r]);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        sum[r] = warp_sum(sum[r]);
        if (lane == 0 && r < n) logits[i64(r) * E] = sum[r] + b;
    }
}

// experts[size], pairs[size] and offsets[E+1] of what was chosen, in shared memory. All threads of the block call.
__device__ __forceinline__ void place(const i32* chosen, i32* experts, i32* pairs, i32* offsets, int size, int E) {
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

// ROWS: that are in shared memory at a time. logits[n,E]: scratch; finished: counts blocks, 0 before and after.
template <typename T, int EACH, int ROWS>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    rms_norm_route(const f32* x, const T* __restrict__ g, const T* __restrict__ w, const T* __restrict__ b,
                   const f32* __restrict__ bias, const f32* __restrict__ scale, i32* pairs, i32* offsets, T* normed,
                   i32* experts, f32* weights, f32* logits, u32* finished, int n, int d, int E, int k, f32 eps,
                   f32 offset, int sigmoid, int groups, int kept, int renormalise, f32 factor) {
    DYNAMIC_SHARED(T, rows);
    __shared__ i32 chosen[MAX_PAIRS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, expert = blockIdx.x * WARPS + warp;
    const int width = (d + 7) / 8 * 8;
    const bool vectorized = d % 8 == 0 && aligned(x, g, w, normed);
    launch_dependents();
    if (vectorized && expert < E && lane == 0) prefetch_l2(w + i64(expert) * d, d * sizeof(T));
    pdl_wait();
    const float added = b != nullptr && expert < E ? to_float(b[expert]) : 0.f;
    for (int first = 0; first < n; first += ROWS) {
        const int count = min(ROWS, n - first);
        normalise(x + i64(first) * d, g, rows, blockIdx.x == 0 ? normed + i64(first) * d : nullptr, count, d, width,
                  eps, offset, vectorized);
        if (expert < E)
            multiply<T, ROWS>(rows, w + i64(expert) * d, added, logits + i64(first) * E + expert, count, d, width, E,
                              vectorized);
        __syncthreads();
    }
    if (!arrives_last(finished, gridDim.x)) return;
    for (int row = warp; row < n; row += WARPS)
        choose<EACH>(logits + i64(row) * E, bias, scale, chosen + row * k, weights + i64(row) * k, E, k, sigmoid,
                     groups, kept, renormalise, factor);
    __syncthreads();
    place(chosen, experts, pairs, offsets, n * k, E);
}
