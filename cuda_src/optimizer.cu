// What a training step does with all gradients at once. Arrays are flat and f32, but p; n has 64 bits.
//
//   square_sum  total[1] = sum of g[n]^2
//   adamw       Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101):
//                   m += (1 - beta1) (g - m);   v = beta2 v + (1 - beta2) g^2
//                   master -= lr weight_decay master + lr c1 m / (sqrt(v c2) + eps);   p[n]:T = master
//               lr, c1 = 1 / (1 - beta1^t), c2 = 1 / (1 - beta2^t) are schedule[3], which a captured graph reads anew.
//               g is scaled by min(1, clip / (sqrt(norm_squared) + 1e-6)) before, if clip is not 0, and 0 afterwards.
//               Nothing but g changes where norm_squared is not finite.
//
// square_sum takes two launches: a number of blocks that depends on n alone leaves a sum each in partial, and one block
// adds those. The order is fixed, and the same on every GPU. A NaN or an infinity reaches the total.
//
// Mapping: 4 elements, 16 bytes of each f32 array, per thread and iteration; the blocks stride over the arrays. Arrays
// may begin anywhere, as the second of two groups of weights does: the fours are counted from the last multiple of 4
// before the array, so all accesses but those at both ends have 16 bytes, if the arrays begin alike. p may be the same
// array as master (that of an f32 model is), so neither is __restrict__.
//
// Ops and references: cuplama/ops/optimizer.py. Tests: tests/ops/, tests/ops/test_optimizer.py. Benchmark: `cuplama
// kernels bench`.
// Tried: nothing else yet. adamw moves 34 bytes an element for a bf16 model and 36 for an f32 one.
#include "common.cuh"

constexpr int W = 4;
using Four = Pack<f32, W>;

// Elements before an array since the last multiple of W.
template <typename T>
__device__ __forceinline__ int offset_of(const T* p) {
    return int(reinterpret_cast<u64>(p) / sizeof(T) % W);
}

// Elements at .. at + W - 1, of which some may be outside of the array: those read as zero.
template <typename T>
__device__ __forceinline__ Pack<T, W> load_some(const T* p, i64 at, i64 n, bool whole) {
    if (whole) return load<W>(p + at);
    Pack<T, W> x;
#pragma unroll
    for (int i = 0; i < W; i++) x.v[i] = at + i >= 0 && at + i < n ? p[at + i] : from_float<T>(0.f);
    return x;
}

template <typename T>
__device__ __forceinline__ void store_some(T* p, i64 at, i64 n, bool whole, const Pack<T, W>& x) {
    if (whole) return store<W>(p + at, x);
#pragma unroll
    for (int i = 0; i < W; i++)
        if (at + i >= 0 && at + i < n) p[at + i] = x.v[i];
}

// ---- the norm -------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(256) square_sum(const f32* __restrict__ g, f32* __restrict__ partial, i64 n) {
    constexpr int MANY = 4;  // loads on their way at once
    const int offset = offset_of(g);
    const i64 stride = i64(gridDim.x) * blockDim.x * W;
    float sum[MANY] = {};
    for (i64 first = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * W - offset; first < n; first += MANY * stride) {
        Four x[MANY];
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            const i64 at = first + m * stride;
            x[m] = load_some(g, at, n, at >= 0 && at + W <= n);
        }
#pragma unroll
        for (int m = 0; m < MANY; m++)
#pragma unroll
            for (int i = 0; i < W; i++) sum[m] += x[m].v[i] * x[m].v[i];
    }
    const float total = block_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

__global__ void __launch_bounds__(1024)
    square_sum_total(const f32* __restrict__ partial, f32* __restrict__ total, int blocks) {
    const float sum = block_sum(int(threadIdx.x) < blocks ? partial[threadIdx.x] : 0.f);
    if (threadIdx.x == 0) total[0] = sum;
}

// ---- the update -----------------------------------------------------------------------------------------------------

struct Rates {  // what all elements have in common
    float scale, decay, step, second, rest1, beta2, rest2, eps;
};

// One element; returns the new master. What is taken from it is summed before: it is small, so master is rounded once.
__device__ __forceinline__ float update(const Rates& r, float g, float& m, float& v, float master) {
    g *= r.scale;
    m += r.rest1 * (g - m);
    v = r.beta2 * v + r.rest2 * g * g;
    return master - (r.decay * master + r.step * m / (sqrtf(v) * r.second + r.eps));
}

// rest1, rest2: 1 - beta1 and 1 - beta2, taken before rounding to f32, which would be wrong by 1e-5 of the second.
template <typename T>
__global__ void __launch_bounds__(256)
    adamw(T* p, f32* __restrict__ g, f32* __restrict__ m, f32* __restrict__ v, f32* master,
          const f32* __restrict__ norm_squared, const f32* __restrict__ schedule, i64 n, f32 rest1, f32 beta2,
          f32 rest2, f32 eps, f32 weight_decay, f32 clip) {
    const float norm = sqrtf(norm_squared[0]), lr = schedule[0];
    const bool usable = norm < infinity();  // not NaN either
    const float scale = clip > 0.f ? fminf(1.f, clip / (norm + 1e-6f)) : 1.f;
    const Rates rates = {scale, lr * weight_decay, lr * schedule[1], sqrtf(schedule[2]), rest1, beta2, rest2, eps};
    const int offset = offset_of(g);
    const bool alike = aligned(g - offset, m - offset, v - offset, master - offset) &&
                       reinterpret_cast<u64>(p - offset) % sizeof(Pack<T, W>) == 0;
    const i64 stride = i64(gridDim.x) * blockDim.x * W;
    for (i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * W - offset; at < n; at += stride) {
        const bool whole = alike && at >= 0 && at + W <= n;
        if (usable) {
            const Four gradient = load_some(g, at, n, whole);
            Four first = load_some(m, at, n, whole), second = load_some(v, at, n, whole);
            Four weight = load_some(static_cast<const f32*>(master), at, n, whole);
            Pack<T, W> rounded;
#pragma unroll
            for (int i = 0; i < W; i++) {
                weight.v[i] = update(rates, gradient.v[i], first.v[i], second.v[i], weight.v[i]);
                rounded.v[i] = from_float<T>(weight.v[i]);
            }
            store_some(m, at, n, whole, first);
            store_some(v, at, n, whole, second);
            store_some(master, at, n, whole, weight);
            if (static_cast<void*>(p) != static_cast<void*>(master)) store_some(p, at, n, whole, rounded);
        }
        store_some(g, at, n, whole, Four{});
    }
}
