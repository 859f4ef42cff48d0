// rms_norm      y[n,d] = x / sqrt(mean(x^2) + eps) * (offset + w)            x[n,d]: f32, w[d]: T, y: T
// rms_norm_f32  the same with y: f32
// rms_norm_add  y[n,m] = (a + rms_norm(x)) * scalar      a, y: f32 (the residual stream); scalar[1] (may be null): T
//               of rows of m = 2 d, 3 d, ... each d elements are normalised by themselves: they are rows to the kernel
// rms_norm_add_norm  sum[n,d] = (a + rms_norm(x)) * scalar with scale post[d], and y = rms_norm(sum) with scale g[d]: a norm
//               behind a sublayer and the next one, of the same row     x, a, sum: f32, post, g, y: T
// layer_norm    y[n,d] = (x - mean(x)) / sqrt(var(x) + eps) * (offset + w) + b    b[d] (may be null): T
// qk_norm       rms_norm of each head, D elements of a row of x      x[n,(num_heads+2*num_kv_heads)*D], y: T
//               weight q_norm[D] for query heads, k_norm[D] for key heads, none for value heads if v_norm, else they
//               are copied
// qk_norm_wide  the same, but of all query heads of a row together, and of all its key heads
//               q_norm[num_heads*D], k_norm[num_kv_heads*D]
// gated_norm    rms_norm of each head, V elements of a row of x, times silu(z)       x, y[n,H*V], w[V], z[n,m]: T
//               z: in the columns from start on
//
// Mapping: qk_norm and gated_norm give a head to a warp; the others give a row to a block, or (qk_norm_wide) its
// queries, keys and values to a block each. A thread holds CHUNKS vectors of 8 elements in registers, so x is read once however many
// passes follow; the vectors of the threads interleave.
// The variance is the mean of the squared differences from the mean, never mean(x^2) - mean(x)^2, which cancels.
// The weights are asked for before the sums, so that the two latencies overlap.
//
// Ops and references: cuplama/ops/norm.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. With one row the time is latency: two round trips to memory and one or two block sums.
#include "activation.cuh"
#include "common.cuh"
#include "ptx.cuh"

// put(c, at, values): 8 elements from `at` on, those of the thread's chunk c, of rms_norm(x) for the block's row of d
// elements, or of (a + rms_norm(x)) * factor if a is not null. wait: pdl_wait, which the kernels themselves call so that
// they are known to be early.
template <int CHUNKS, typename X, typename T, typename Put, typename Wait>
__device__ __forceinline__ void normalise(const X* x, const T* w, const f32* a, f32 factor, Put put, int d, f32 eps,
                                          f32 offset, bool vectorized, Wait wait) {
    Pack<X, 8> v[CHUNKS];
    Pack<T, 8> scale[CHUNKS];
    Pack<f32, 8> residual[CHUNKS] = {};
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) scale[c] = load_row<8>(w, (c * blockDim.x + threadIdx.x) * 8, d, vectorized);
    wait();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x, (c * blockDim.x + threadIdx.x) * 8, d, vectorized);
        if (a != nullptr) residual[c] = load_row<8>(a, (c * blockDim.x + threadIdx.x) * 8, d, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += to_float(v[c].v[j]) * to_float(v[c].v[j]);
    }
    const float inverse = 1.f / sqrtf(block_sum(squares) / d + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        Pack<f32, 8> out;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float value = to_float(v[c].v[j]) * inverse * (offset + to_float(scale[c].v[j]));
            out.v[j] = a != nullptr ? (residual[c].v[j] + value) * factor : value;
        }
        put(c, (c * blockDim.x + threadIdx.x) * 8, out);
    }
}

// What writes them to a row of y.
template <typename Y>
struct ToRow {
    Y* y;
    int d;
    bool vectorized;

    __device__ __forceinline__ void operator()(int, int at, const Pack<f32, 8>& values) const {
        Pack<Y, 8> out;
#pragma unroll
        for (int j = 0; j < 8; j++) out.v[j] = from_float<Y>(values.v[j]);
        store_row<8>(y, at, d, vectorized, out);
    }
};

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    rms_norm(const f32* x, const T* __restrict__ w, T* y, int d, f32 eps, f32 offset) {
    launch_dependents();
    x += i64(blockIdx.x) * d;
    y += i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(x, w, y);
    normalise<CHUNKS>(x, w, nullptr, 1.f, ToRow<T>{y, d, vectorized}, d, eps, offset, vectorized, [] { pdl_wait(); });
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    rms_norm_f32(const f32* x, const T* __restrict__ w, f32* y, int d, f32 eps, f32 offset) {
    launch_dependents();
    x += i64(blockIdx.x) * d;
    y += i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(x, w, y);
    normalise<CHUNKS>(x, w, nullptr, 1.f, ToRow<f32>{y, d, vectorized}, d, eps, offset, vectorized, [] { pdl_wait(); });
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024) rms_norm_add(const f32* x, const T* __restrict__ w, const f32* a,
                                                     const T* __restrict__ scalar, f32* y, int d, f32 eps, f32 offset) {
    launch_dependents();
    const f32 factor = scalar != nullptr ? to_float(*scalar) : 1.f;
    x += i64(blockIdx.x) * d;
    a += i64(blockIdx.x) * d;
    y += i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(x, w, a, y);
    normalise<CHUNKS>(x, w, a, factor, ToRow<f32>{y, d, vectorized}, d, eps, offset, vectorized, [] { pdl_wait(); });
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    rms_norm_add_norm(const f32* x, const T* __restrict__ post, const f32* a, const T* __restrict__ scalar,
                      const T* __restrict__ g, T* y, f32* sum, int d, f32 eps, f32 offset) {
    launch_dependents();
    const i64 row = i64(blockIdx.x) * d;
    const f32 factor = scalar != nullptr ? to_float(*scalar) : 1.f;
    const bool vectorized = d % 8 == 0 && aligned(x, post, a, g, y, sum);
    const ToRow<f32> to_sum{sum + row, d, vectorized};
    const ToRow<T> to_y{y + row, d, vectorized};
    Pack<f32, 8> kept[CHUNKS];
    float squares = 0.f;
    const auto keep_sum = [&](int c, int at, const Pack<f32, 8>& values) {
        kept[c] = values;
#pragma unroll
        for (int j = 0; j < 8; j++) squares += values.v[j] * values.v[j];  // 0 from d on
        to_sum(c, at, values);
    };
    normalise<CHUNKS>(x + row, post, a + row, factor, keep_sum, d, eps, offset, vectorized, [] { pdl_wait(); });
    const float inverse = 1.f / sqrtf(block_sum(squares) / d + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = (c * blockDim.x + threadIdx.x) * 8;
        const Pack<T, 8> scale = load_row<8>(g, at, d, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) kept[c].v[j] *= inverse * (offset + to_float(scale.v[j]));
        to_y(c, at, kept[c]);
    }
}

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    layer_norm(const f32* x, const T* __restrict__ w, const T* __restrict__ b, T* y, int d, f32 eps, f32 offset) {
    launch_dependents();
    x += i64(blockIdx.x) * d;
    y += i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(x, w, b, y);
    Pack<f32, 8> v[CHUNKS];
    float sum = 0.f;
    pdl_wait();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x, (c * blockDim.x + threadIdx.x) * 8, d, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[c].v[j];
    }
    const float mean = block_sum(sum) / d;
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = (c * blockDim.x + threadIdx.x) * 8;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            v[c].v[j] -= mean;
            squares += at + j < d ? v[c].v[j] * v[c].v[j] : 0.f;
        }
    }
    const float inverse = 1.f / sqrtf(block_sum(squares) / d + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = (c * blockDim.x + threadIdx.x) * 8;
        const Pack<T, 8> scale = load_row<8>(w, at, d, vectorized);
        Pack<T, 8> shift = {}, out;
        if (b != nullptr) shift = load_row<8>(b, at, d, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++)
            out.v[j] = from_float<T>(v[c].v[j] * inverse * (offset + to_float(scale.v[j])) + to_float(shift.v[j]));
        store_row<8>(y, at, d, vectorized, out);
    }
}

template <typename T, int CHUNKS>
__global__ void qk_norm(const T* __restrict__ x, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
                        T* __restrict__ y, int n, int num_heads, int num_kv_heads, int D, f32 eps, f32 offset,
                        int v_norm) {
    const int lane = threadIdx.x % WARP;
    const i64 index = i64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;  // of the head, over all tokens
    if (index >= i64(n) * (num_heads + 2 * num_kv_heads)) return;                  // a whole warp
    const int head = index % (num_heads + 2 * num_kv_heads);
    const T* w = head < num_heads ? q_norm : head < num_heads + num_kv_heads ? k_norm : nullptr;
    const bool vectorized = D % 8 == 0 && aligned(x, q_norm, k_norm, y);
    x += index * D;
    y += index * D;
    Pack<T, 8> v[CHUNKS];
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x, (c * WARP + lane) * 8, D, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += to_float(v[c].v[j]) * to_float(v[c].v[j]);
    }
    const float inverse = 1.f / sqrtf(warp_sum(squares) / D + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = (c * WARP + lane) * 8;
        if (w != nullptr) {
            const Pack<T, 8> scale = load_row<8>(w, at, D, vectorized);
#pragma unroll
            for (int j = 0; j < 8; j++)
                v[c].v[j] = from_float<T>(to_float(v[c].v[j]) * inverse * (offset + to_float(scale.v[j])));
        } else if (v_norm) {
#pragma unroll
            for (int j = 0; j < 8; j++) v[c].v[j] = from_float<T>(to_float(v[c].v[j]) * inverse);
        }
        store_row<8>(y, at, D, vectorized, v[c]);
    }
}

// blockIdx.y: queries, keys, values.
template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    qk_norm_wide(const T* x, const T* __restrict__ q_norm, const T* __restrict__ k_norm, T* y, int num_heads,
                 int num_kv_heads, int D, f32 eps, f32 offset) {
    launch_dependents();
    const int part = blockIdx.y, queries = num_heads * D, keys = num_kv_heads * D, d = part == 0 ? queries : keys;
    const i64 from = i64(blockIdx.x) * (queries + 2 * keys) + (part == 0 ? 0 : queries + (part - 1) * keys);
    const bool vectorized = D % 8 == 0 && aligned(x, q_norm, k_norm, y);
    const auto wait = [] { pdl_wait(); };
    if (part == 2) {
        wait();
        for (int at = threadIdx.x * 8; at < d; at += blockDim.x * 8)
            store_row<8>(y + from, at, d, vectorized, load_row<8>(x + from, at, d, vectorized));
        return;
    }
    normalise<CHUNKS>(x + from, part == 0 ? q_norm : k_norm, nullptr, 1.f, ToRow<T>{y + from, d, vectorized}, d, eps,
                      offset, vectorized, wait);
}

template <typename T, int CHUNKS>
__global__ void gated_norm(const T* x, const T* __restrict__ w, const T* z, T* y, int n, int H, int V, int m, int start,
                           f32 eps) {
    launch_dependents();
    const int lane = threadIdx.x % WARP;
    const i64 index = i64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;  // of the head, over all tokens
    if (index >= i64(n) * H) return;                                               // a whole warp
    const bool vectorized = V % 8 == 0 && m % 8 == 0 && start % 8 == 0 && aligned(x, w, z, y);
    const T* opened = z + index / H * m + start + index % H * V;
    Pack<T, 8> v[CHUNKS], gate[CHUNKS], scale[CHUNKS];
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) scale[c] = load_row<8>(w, (c * WARP + lane) * 8, V, vectorized);
    pdl_wait();
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x + index * V, (c * WARP + lane) * 8, V, vectorized);
        gate[c] = load_row<8>(opened, (c * WARP + lane) * 8, V, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += to_float(v[c].v[j]) * to_float(v[c].v[j]);
    }
    const float inverse = 1.f / sqrtf(warp_sum(squares) / V + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        Pack<T, 8> out;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float value = to_float(v[c].v[j]) * inverse * to_float(scale[c].v[j]);
            out.v[j] = from_float<T>(value * silu_of<T>(to_float(gate[c].v[j])));
        }
        store_row<8>(y + index * V, (c * WARP + lane) * 8, V, vectorized, out);
    }
}
