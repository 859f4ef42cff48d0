// With S(a) = 1 / (1 + exp(-a)):
// silu_mul_backward   [dg, du][n,2f] = [dy u S(g) (1 + g (1 - S(g))), dy g S(g)],  [g, u] = x[n,2f], dy[n,f]
// gelu_tanh_backward  dx[n,f] = dy (S(a) + x S(a) (1 - S(a)) a'),     a = 2 sqrt(2/pi) (x + 0.044715 x^3)
// gelu_erf_backward   dx[n,f] = dy (erfc(-x / sqrt(2)) / 2 + x exp(-x^2 / 2) / sqrt(2 pi))
// gelu_tanh_mul_backward, gelu_erf_mul_backward
//                     [dg, du][n,2f] = [dy u gelu'(g), dy gelu(g)],  [g, u] = x[n,2f], dy[n,f], gelu' as above
// relu_squared_backward
//                     dx[n,f] = 2 dy max(x, 0)
//                     all x, dy, dx: T
//
// gelu_tanh is x S(a), because (1 + tanh(b)) / 2 = S(2b).
//
// Mapping: as in activation.cu, 8 elements per thread. Gated (_mul_backward): blockIdx.x is the row, blockIdx.y and the
// threads share its f columns; others: x is one long row, over which the grid strides.
//
// Ops and references: cuplama/ops/activation_backward.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "activation.cuh"
#include "common.cuh"

template <typename T>
__device__ __forceinline__ float gelu_tanh_slope(float x) {
    const float share = over_one_plus_exp<T>(1.f, 1.5957691216f * (x + 0.044715f * x * x * x));
    return share + x * share * (1.f - share) * 1.5957691216f * (1.f + 0.134145f * x * x);
}

template <typename T>
__device__ __forceinline__ float gelu_erf_slope(float x) {
    const float half = -0.5f * x * x;
    return 0.5f * erfcf(x * -0.7071067812f) + 0.3989422804f * x * (sizeof(T) == 2 ? __expf(half) : expf(half));
}

__device__ __forceinline__ float relu_squared_slope(float x) { return x < 0.f ? 0.f : 2.f * x; }

// The gradients of a gate and of what it is multiplied with.
struct Gated {
    float gate, up;
};

template <typename T>
__device__ __forceinline__ Gated silu_mul_slopes(float gate, float up, float gradient) {
    const float share = over_one_plus_exp<T>(1.f, gate);
    return {gradient * up * share * (1.f + gate * (1.f - share)), gradient * gate * share};
}

template <float (*FUNCTION)(float), float (*SLOPE)(float)>
__device__ __forceinline__ Gated mul_slopes(float gate, float up, float gradient) {
    return {gradient * up * SLOPE(gate), gradient * FUNCTION(gate)};
}

// The gradients of gates and of the other half, for the row of a block.
template <Gated (*SLOPES)(float, float, float), typename T>
__device__ __forceinline__ void map_gate_slopes(const T* x, const T* dy, T* dx, int f) {
    const T* gates = x + i64(blockIdx.x) * 2 * f;
    T* out = dx + i64(blockIdx.x) * 2 * f;
    const T* from = dy + i64(blockIdx.x) * f;
    const bool vectorized = f % 8 == 0 && aligned(x, dy, dx);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < f; i += gridDim.y * blockDim.x * 8) {
        Pack<T, 8> g = load_row<8>(gates, i, f, vectorized), u = load_row<8>(gates + f, i, f, vectorized);
        const Pack<T, 8> d = load_row<8>(from, i, f, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const Gated both = SLOPES(to_float(g.v[j]), to_float(u.v[j]), to_float(d.v[j]));
            g.v[j] = from_float<T>(both.gate);
            u.v[j] = from_float<T>(both.up);
        }
        store_row<8>(out, i, f, vectorized, g);
        store_row<8>(out + f, i, f, vectorized, u);
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    silu_mul_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int f) {
    map_gate_slopes<silu_mul_slopes<T>>(x, dy, dx, f);
}

template <typename T>
__global__ void __launch_bounds__(256)
    gelu_tanh_mul_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int f) {
    map_gate_slopes<mul_slopes<gelu_tanh_of<T>, gelu_tanh_slope<T>>>(x, dy, dx, f);
}

template <typename T>
__global__ void __launch_bounds__(256)
    gelu_erf_mul_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int f) {
    map_gate_slopes<mul_slopes<gelu_erf_of<T>, gelu_erf_slope<T>>>(x, dy, dx, f);
}

// dx = dy SLOPE(x) over all n * f elements.
template <float (*SLOPE)(float), typename T>
__device__ __forceinline__ void map_slopes(const T* x, const T* dy, T* dx, i64 size) {
    const bool vectorized = aligned(x, dy, dx);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        const Pack<T, 8> v = load_row<8>(x, i, size, vectorized);
        Pack<T, 8> d = load_row<8>(dy, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) d.v[j] = from_float<T>(to_float(d.v[j]) * SLOPE(to_float(v.v[j])));
        store_row<8>(dx, i, size, vectorized, d);
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    gelu_tanh_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int n, int f) {
    map_slopes<gelu_tanh_slope<T>>(x, dy, dx, i64(n) * f);
}

template <typename T>
__global__ void __launch_bounds__(256)
    gelu_erf_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int n, int f) {
    map_slopes<gelu_erf_slope<T>>(x, dy, dx, i64(n) * f);
}

template <typename T>
__global__ void __launch_bounds__(256)
    relu_squared_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int n, int f) {
    map_slopes<relu_squared_slope>(x, dy, dx, i64(n) * f);
}
