// From logits to a loss and to the gradient of the logits. A row is a token's logits, f32. In cross_entropy it has V of
// them and M - V more elements, which round its length up: they are not logits, and their gradient is 0.
//
//   cross_entropy    loss[r]:f32     = w (lse - (1 - alpha) logits[t] - alpha sum(mixture logits))
//                    dlogits[r,M]:U  = w (softmax - (1 - alpha) onehot(t) - alpha mixture)
//                    where lse = ln sum exp(logits); t and w: of targets[n]: i32, in [0, V), and weights[n]: f32, that
//                    of the row + first; mixture[r,M]: f32 or absent: probabilities, as of a teacher, that count alpha
//   softmax_mixture  p[n,V]:f32      = a + share softmax(logits)        a[n,V]: f32 or absent
//   add_sum          total[1]:f32   += sum of x[n]:f32
//
// A row of weight 0 is not read: its loss and gradient are zeros whatever its logits are. A NaN makes the loss NaN.
//
// Mapping: a row is a block's. It passes over the logits twice: for their maximum and the sum of exponentials at once
// (online softmax: Milakov & Gimelshein, arXiv:1805.02867), then for what is stored. The first HELD iterations of the
// first pass leave their logits in shared memory, each thread for itself; the others are read again, from L2 where
// the rows in flight fit into it, the last first. ops/loss.py chooses the threads, 8 logits each in an iteration.
//
// A row of 50,257 elements begins anywhere, so a thread's 8 elements are counted from the last multiple of 8 elements
// before the row: accesses of 16 bytes, but at both ends of the row.
//
// Ops and references: cuplama/ops/loss.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "common.cuh"

constexpr int W = 8;  // logits of a thread and an iteration
using Eight = Pack<f32, W>;

// Below every logit but -infinity, whose difference from it is not NaN.
constexpr float LOWEST = -3.402823466e38f;

template <typename T>
__device__ __forceinline__ float exponential(float x) {
    if constexpr (sizeof(T) == 2) return __expf(x);
    return expf(x);
}

// ---- rows that begin anywhere ---------------------------------------------------------------------------------------

// How a row's elements are shared: those of a thread and iteration begin at `at`, of which the first may be negative.
// width: elements from one row to the next; V: those that are read.
struct Share {
    int V, width, offset, stride;
    bool vectorized;

    __device__ __forceinline__ Share(int V, int width, bool vectorized)
        : V(V), width(width), offset(int(i64(blockIdx.x) * width % W)), stride(int(blockDim.x) * W),
          vectorized(vectorized) {}

    __device__ __forceinline__ int iterations() const { return (width + offset + stride - 1) / stride; }
    __device__ __forceinline__ int at(int iteration) const {
        return iteration * stride + int(threadIdx.x) * W - offset;
    }
    __device__ __forceinline__ bool whole(int at, int end) const { return vectorized && at >= 0 && at + W <= end; }
};

// Elements at .. at + 7 of a row; what is not read is `outside`.
__device__ __forceinline__ Eight load_some(const f32* row, int at, const Share& share, float outside) {
    if (share.whole(at, share.V)) return load<W>(row + at);
    Eight x;
#pragma unroll
    for (int i = 0; i < W; i++) x.v[i] = at + i >= 0 && at + i < share.V ? row[at + i] : outside;
    return x;
}

template <typename T>
__device__ __forceinline__ void store_some(T* row, int at, const Share& share, const Eight& x) {
    Pack<T, W> y;
#pragma unroll
    for (int i = 0; i < W; i++) y.v[i] = from_float<T>(x.v[i]);
    if (share.whole(at, share.width)) return store<W>(row + at, y);
#pragma unroll
    for (int i = 0; i < W; i++)
        if (at + i >= 0 && at + i < share.width) row[at + i] = y.v[i];
}

// A thread's logits of the first iterations, in shared memory: 16 bytes of each thread side by side.
struct Held {
    f32* memory;
    int iterations;

    __device__ __forceinline__ f32* place(int iteration, int half) const {
        return memory + ((i64(iteration) * 2 + half) * blockDim.x + threadIdx.x) * 4;
    }
    __device__ __forceinline__ void put(int iteration, const Eight& x) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Pack<f32, 4> four;
#pragma unroll
            for (int i = 0; i < 4; i++) four.v[i] = x.v[half * 4 + i];
            store<4>(place(iteration, half), four);
        }
    }
    __device__ __forceinline__ Eight get(int iteration) const {
        Eight x;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Pack<f32, 4> four = load<4>(place(iteration, half));
#pragma unroll
            for (int i = 0; i < 4; i++) x.v[half * 4 + i] = four.v[i];
        }
        return x;
    }
};

// ---- the first pass -------------------------------------------------------------------------------------------------

struct Softmax {  // of the logits seen: the largest, and the sum of exp(logit - largest)
    float largest, sum;
};

template <typename T>
__device__ __forceinline__ void see(Softmax& seen, const Eight& x) {
    float largest = seen.largest, sum = 0.f;
#pragma unroll
    for (int i = 0; i < W; i++) largest = fmaxf(largest, x.v[i]);
#pragma unroll
    for (int i = 0; i < W; i++) sum += exponential<T>(x.v[i] - largest);
    seen.sum = seen.sum * exponential<T>(seen.largest - largest) + sum;
    seen.largest = largest;
}

// What the block has seen, for every thread. dot: of the row and a row of `mixture`, if there is one.
template <typename T>
__device__ __forceinline__ Softmax see_row(const f32* row, const f32* mixture, const Share& share, const Held& held,
                                           float& dot) {
    constexpr int MANY = 2;  // iterations whose loads are on their way at once
    Softmax seen = {LOWEST, 0.f};
    const int iterations = share.iterations();
    for (int first = 0; first < iterations; first += MANY) {
        Eight x[MANY];
#pragma unroll
        for (int m = 0; m < MANY; m++) x[m] = load_some(row, share.at(first + m), share, LOWEST);
#pragma unroll
        for (int m = 0; m < MANY; m++) {
            if (first + m < held.iterations) held.put(first + m, x[m]);
            see<T>(seen, x[m]);
            if (mixture == nullptr) continue;
            const Eight weight = load_some(mixture, share.at(first + m), share, 0.f);
#pragma unroll
            for (int i = 0; i < W; i++) dot += weight.v[i] * x[m].v[i];
        }
    }
    const float largest = block_max(seen.largest);
    seen.sum = block_sum(seen.sum * exponential<T>(seen.largest - largest));
    seen.largest = largest;
    if (mixture != nullptr) dot = block_sum(dot);
    return seen;
}

// ---- the kernels ----------------------------------------------------------------------------------------------------

template <typename U>
__global__ void __launch_bounds__(1024)
    cross_entropy(const f32* __restrict__ logits, const i32* __restrict__ targets, const f32* __restrict__ weights,
                  const f32* __restrict__ mixture, f32* __restrict__ loss, U* __restrict__ dlogits, int M, int V,
                  f32 alpha, int first, int held) {
    DYNAMIC_SHARED(f32, memory);
    const int target = targets[first + blockIdx.x];
    const float weight = weights[first + blockIdx.x];
    const f32* row = logits + i64(blockIdx.x) * M;
    const f32* other = mixture == nullptr ? nullptr : mixture + i64(blockIdx.x) * M;
    U* out = dlogits + i64(blockIdx.x) * M;
    const Share share(V, M, aligned(logits, mixture, dlogits));
    const Held kept = {memory, held};
    float largest = 0.f, factor = 0.f;
    if (weight != 0.f) {
        float dot = 0.f;
        const Softmax seen = see_row<U>(row, other, share, kept, dot);
        largest = seen.largest;
        factor = weight / seen.sum;
        if (threadIdx.x == 0) {
            const float correct = (1.f - alpha) * row[target] + alpha * dot;
            loss[blockIdx.x] = weight * (largest - correct + logf(seen.sum));
        }
    } else if (threadIdx.x == 0) {
        loss[blockIdx.x] = 0.f;
    }
#pragma unroll 1
    for (int iteration = share.iterations() - 1; iteration >= 0; iteration--) {
        const int at = share.at(iteration);
        Eight x = {};
        if (weight != 0.f) {
            x = iteration < held ? kept.get(iteration) : load_some(row, at, share, LOWEST);
#pragma unroll
            for (int i = 0; i < W; i++) x.v[i] = factor * exponential<U>(x.v[i] - largest);
            if (other != nullptr) {
                const Eight wanted = load_some(other, at, share, 0.f);
#pragma unroll
                for (int i = 0; i < W; i++) x.v[i] -= weight * alpha * wanted.v[i];
            }
            if (target >= at && target < at + W)
#pragma unroll
                for (int i = 0; i < W; i++) x.v[i] -= target == at + i ? weight * (1.f - alpha) : 0.f;
        }
        store_some(out, at, share, x);
    }
}

__global__ void __launch_bounds__(1024) softmax_mixture(const f32* __restrict__ logits, const f32* __restrict__ a,
                                                        f32* __restrict__ p, int V, f32 share, int held) {
    DYNAMIC_SHARED(f32, memory);
    const f32* row = logits + i64(blockIdx.x) * V;
    const f32* others = a == nullptr ? nullptr : a + i64(blockIdx.x) * V;
    const Share part(V, V, aligned(logits, a, p));
    const Held kept = {memory, held};
    float none = 0.f;
    const Softmax seen = see_row<f32>(row, nullptr, part, kept, none);
    const float factor = share / seen.sum;
#pragma unroll 1
    for (int iteration = part.iterations() - 1; iteration >= 0; iteration--) {
        const int at = part.at(iteration);
        Eight x = iteration < held ? kept.get(iteration) : load_some(row, at, part, LOWEST);
#pragma unroll
        for (int i = 0; i < W; i++) x.v[i] = factor * expf(x.v[i] - seen.largest);
        if (others != nullptr) {
            const Eight sum = load_some(others, at, part, 0.f);
#pragma unroll
            for (int i = 0; i < W; i++) x.v[i] += sum.v[i];
        }
        store_some(p + i64(blockIdx.x) * V, at, part, x);
    }
}

// One block: a sum of a few thousand losses is a matter of microseconds.
__global__ void __launch_bounds__(1024) add_sum(f32* __restrict__ total, const f32* __restrict__ x, int n) {
    float sum = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) total[0] += sum;
}
