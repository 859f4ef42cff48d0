// silu_mul       y[n,f] = g / (1 + exp(-g)) * u,  [g, u] = x[n,2f]
// gelu_tanh      y[n,f] = x/2 (1 + tanh(a)),      a = sqrt(2/pi) (x + 0.044715 x^3)
// gelu_erf       y[n,f] = x/2 (1 + erf(x / sqrt(2)))
// gelu_tanh_mul, gelu_erf_mul
//                y[n,f] = gelu(g) * u,            [g, u] = x[n,2f], with the gelu of that name
// gelu_tanh_mul_part
//                y[n,f] = gelu_tanh(x) * u[n,first:first+f],    x[n,f], u[n,m]: f32
// relu_squared   y[n,f] = max(x, 0)^2
// xielu          y[n,f] = beta x + above x^2 where x > 0, beta x + below (exp(min(x, eps)) - 1 - x) elsewhere,
//                above = log(1 + exp(alpha_p)), below = beta + log(1 + exp(alpha_n))
// sigmoid_mul    y[n,m] = x / (1 + exp(-gate)),   x, gate[n,m]
//                all x, y, gate, alpha_p[1], alpha_n[1]: T
//
// Where x is very negative, 1 + tanh and 1 + erf cancel to a few bits. The same values without the cancellation are
// x / (1 + exp(-2a)) and x/2 erfc(-x / sqrt(2)), so these are computed.
//
// Mapping: 8 elements per thread. Gated (_mul): blockIdx.x is the row, blockIdx.y and the threads share its f columns;
// others: x is one long row. Sizes or addresses that forbid 16-byte accesses go element by element.
//
// Ops and references: cuplama/ops/activation.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: full-precision exp and division for 16 bits too; they bind then, not memory.
#include "activation.cuh"
#include "common.cuh"
#include "ptx.cuh"

// The activation of f gates times as many other numbers, for the row of a block.
template <float (*FUNCTION)(float), typename U, typename T>
__device__ __forceinline__ void map_gates(const T* gate, const U* up, T* y, int f, bool vectorized) {
    T* out = y + i64(blockIdx.x) * f;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < f; i += gridDim.y * blockDim.x * 8) {
        const Pack<T, 8> g = load_row<8>(gate, i, f, vectorized);
        const Pack<U, 8> u = load_row<8>(up, i, f, vectorized);
        Pack<T, 8> v;
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = from_float<T>(FUNCTION(to_float(g.v[j])) * to_float(u.v[j]));
        store_row<8>(out, i, f, vectorized, v);
    }
}

// The same where gates and the others are the two halves of a row of x.
template <float (*FUNCTION)(float), typename T>
__device__ __forceinline__ void map_halves(const T* x, T* y, int f) {
    const T* gate = x + i64(blockIdx.x) * 2 * f;
    map_gates<FUNCTION>(gate, gate + f, y, f, f % 8 == 0 && aligned(x, y));
}

template <typename T>
__global__ void silu_mul(const T* __restrict__ x, T* __restrict__ y, int f) {
    map_halves<silu_of<T>>(x, y, f);
}

template <typename T>
__global__ void gelu_tanh_mul(const T* __restrict__ x, T* __restrict__ y, int f) {
    map_halves<gelu_tanh_of<T>>(x, y, f);
}

template <typename T>
__global__ void gelu_erf_mul(const T* __restrict__ x, T* __restrict__ y, int f) {
    map_halves<gelu_erf_of<T>>(x, y, f);
}

template <typename T>
__global__ void gelu_tanh_mul_part(const T* __restrict__ x, const f32* __restrict__ u, T* __restrict__ y, int f, int m,
                                   int first) {
    const bool vectorized = f % 8 == 0 && m % 8 == 0 && first % 8 == 0 && aligned(x, u, y);
    map_gates<gelu_tanh_of<T>>(x + i64(blockIdx.x) * f, u + i64(blockIdx.x) * m + first, y, f, vectorized);
}

// One activation over all n * f elements.
template <typename F, typename T>
__device__ __forceinline__ void map_elements(F function, const T* x, T* y, i64 size) {
    const bool vectorized = aligned(x, y);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        Pack<T, 8> v = load_row<8>(x, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = from_float<T>(function(to_float(v.v[j])));
        store_row<8>(y, i, size, vectorized, v);
    }
}

template <typename T>
__global__ void gelu_tanh(const T* __restrict__ x, T* __restrict__ y, int n, int f) {
    map_elements(gelu_tanh_of<T>, x, y, i64(n) * f);
}

template <typename T>
__global__ void gelu_erf(const T* __restrict__ x, T* __restrict__ y, int n, int f) {
    map_elements(gelu_erf_of<T>, x, y, i64(n) * f);
}

template <typename T>
__global__ void relu_squared(const T* __restrict__ x, T* __restrict__ y, int n, int f) {
    map_elements(relu_squared_of, x, y, i64(n) * f);
}

// log(1 + exp(x)); exp of a number that is not positive cannot overflow.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + log1pf(expf(-fabsf(x))); }

template <typename T>
__global__ void xielu(const T* __restrict__ x, const T* __restrict__ alpha_p, const T* __restrict__ alpha_n,
                      T* __restrict__ y, int n, int f, f32 beta, f32 eps) {
    const float above = softplus(to_float(*alpha_p)), below = beta + softplus(to_float(*alpha_n));
    const auto of = [=](float v) { return beta * v + (v > 0.f ? above * v * v : below * (expm1f(fminf(v, eps)) - v)); };
    map_elements(of, x, y, i64(n) * f);
}

template <typename T>
__global__ void sigmoid_mul(const T* x, const T* gate, T* y, int n, int m) {
    launch_dependents();
    const i64 size = i64(n) * m, at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    const bool vectorized = aligned(x, gate, y);
    if (at >= size) return;
    pdl_wait();
    Pack<T, 8> v = load_row<8>(x, at, size, vectorized);
    const Pack<T, 8> g = load_row<8>(gate, at, size, vectorized);
#pragma unroll
    for (int j = 0; j < 8; j++) v.v[j] = from_float<T>(over_one_plus_exp<T>(to_float(v.v[j]), to_float(g.v[j])));
    store_row<8>(y, at, size, vectorized, v);
}
