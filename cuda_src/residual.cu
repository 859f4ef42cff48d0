// add          y[n,d] = a[n,d] + b[n,d]       all f32
// scale        y[n,d] = factor * x[n,d]       all f32
// select_rows  y[r,d] = x[rows[r]]            x[n,d], y: U, rows: i32
// cast         y[n,d] = x[n,d]                x: f32, y: U
// cast_backward
//              dx[n,d] = dy[n,d] + a[n,d]     dy: T, a, dx: f32; without a: dx = dy
// slice_rows   y[r,d] = x[first+r]            x[n,d], y: T
// place_rows   y[first+r] = x[r,d]            x, y[n,d]: T; the other rows of y stay
//
// Mapping: 16 bytes per thread and access; cast and its gradient: 8 elements. select_rows: blockIdx.x is the row of y, blockIdx.y and the
// threads share its columns. For the others an array is one long row, over which the grid strides: rows that are
// neighbours lie one behind the other. Sizes or addresses that forbid 16-byte accesses go element by element.
//
// Ops and references: cuplama/ops/residual.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "common.cuh"

__global__ void add(const f32* __restrict__ a, const f32* __restrict__ b, f32* __restrict__ y, int n, int d) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(a, b, y);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < size; i += i64(gridDim.x) * blockDim.x * 4) {
        Pack<f32, 4> sum = load_row<4>(a, i, size, vectorized);
        const Pack<f32, 4> other = load_row<4>(b, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 4; j++) sum.v[j] += other.v[j];
        store_row<4>(y, i, size, vectorized, sum);
    }
}

__global__ void scale(const f32* __restrict__ x, f32* __restrict__ y, int n, int d, f32 factor) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(x, y);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < size; i += i64(gridDim.x) * blockDim.x * 4) {
        Pack<f32, 4> v = load_row<4>(x, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 4; j++) v.v[j] *= factor;
        store_row<4>(y, i, size, vectorized, v);
    }
}

template <typename U>
__global__ void select_rows(const U* __restrict__ x, const i32* __restrict__ rows, U* __restrict__ y, int d) {
    constexpr int W = 16 / sizeof(U);
    const U* from = x + i64(rows[blockIdx.x]) * d;
    U* to = y + i64(blockIdx.x) * d;
    const bool vectorized = d % W == 0 && aligned(x, y);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * W; i < d; i += gridDim.y * blockDim.x * W)
        store_row<W>(to, i, d, vectorized, load_row<W>(from, i, d, vectorized));
}

template <typename U>
__global__ void cast(const f32* __restrict__ x, U* __restrict__ y, int n, int d) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(x, y);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        const Pack<f32, 8> from = load_row<8>(x, i, size, vectorized);
        Pack<U, 8> to;
#pragma unroll
        for (int j = 0; j < 8; j++) to.v[j] = from_float<U>(from.v[j]);
        store_row<8>(y, i, size, vectorized, to);
    }
}

template <typename T>
__global__ void cast_backward(const T* __restrict__ dy, const f32* __restrict__ a, f32* __restrict__ dx, int n, int d) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(dy, a, dx);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < size; i += i64(gridDim.x) * blockDim.x * 8) {
        const Pack<T, 8> from = load_row<8>(dy, i, size, vectorized);
        Pack<f32, 8> to;
        if (a != nullptr) to = load_row<8>(a, i, size, vectorized);
#pragma unroll
        for (int j = 0; j < 8; j++) to.v[j] = to_float(from.v[j]) + (a != nullptr ? to.v[j] : 0.f);
        store_row<8>(dx, i, size, vectorized, to);
    }
}

template <typename T>
__device__ __forceinline__ void copy(const T* from, T* to, i64 size) {
    constexpr int W = 16 / sizeof(T);
    const bool vectorized = aligned(from, to);
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * W; i < size; i += i64(gridDim.x) * blockDim.x * W)
        store_row<W>(to, i, size, vectorized, load_row<W>(from, i, size, vectorized));
}

template <typename T>
__global__ void slice_rows(const T* __restrict__ x, T* __restrict__ y, int first, int r, int d) {
    copy(x + i64(first) * d, y, i64(r) * d);
}

template <typename T>
__global__ void place_rows(const T* __restrict__ x, T* __restrict__ y, int first, int r, int d) {
    copy(x, y + i64(first) * d, i64(r) * d);
}
