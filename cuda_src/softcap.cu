// softcap           y[n,d] = cap tanh(x / cap)
// softcap_backward  dx[n,d] = dy (1 - tanh(x / cap)^2)
//                   all x, y, dy, dx: T
//
// 1 - tanh^2 cancels where |x| is large; the same without the cancellation is 4 e / (1 + e)^2 with e = exp(-2 |x| / cap).
//
// Mapping: x is one long row; 8 elements per thread, and the grid strides over it.
//
// Ops and references: cuplama/ops/softcap.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "common.cuh"

template <typename T>
__global__ void __launch_bounds__(256) softcap(const T* __restrict__ x, T* __restrict__ y, int n, int d, f32 cap) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(x, y);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        Pack<T, 8> v = load_row<8>(x, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) v.v[j] = from_float<T>(cap * tanhf(to_float(v.v[j]) / cap));
        store_row<8>(y, i, size, vectorized, v);
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    softcap_backward(const T* __restrict__ x, const T* __restrict__ dy, T* __restrict__ dx, int n, int d, f32 cap) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(x, dy, dx);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        const Pack<T, 8> v = load_row<8>(x, i, size, vectorized);
        Pack<T, 8> g = load_row<8>(dy, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const float e = expf(-2.f * fabsf(to_float(v.v[j])) / cap);
            g.v[j] = from_float<T>(to_float(g.v[j]) * (4.f * e / ((1.f + e) * (1.f + e))));
        }
        store_row<8>(dx, i, size, vectorized, g);
    }
}
