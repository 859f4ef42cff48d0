// scale_queries  q = (1 + temperature log(1 + floor(p / context))) q for the query heads of a token at position p; its
//                key and value heads are copied
//                x, y[n,(num_heads+2*num_kv_heads)*D]: T, positions[n]: i32
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its columns, 16 bytes at a time. Sizes or addresses
// that forbid such accesses go element by element.
//
// Op and reference: cuplama/ops/scale_queries.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "common.cuh"

template <typename T>
__global__ void __launch_bounds__(128)
    scale_queries(const T* __restrict__ x, const i32* __restrict__ positions, T* __restrict__ y, int num_heads,
                  int num_kv_heads, int D, f32 temperature, int context) {
    constexpr int W = 16 / sizeof(T);
    const int scaled = num_heads * D, columns = scaled + 2 * num_kv_heads * D;
    const float factor = 1.f + temperature * logf(1.f + positions[blockIdx.x] / context);
    const bool vectorized = columns % W == 0 && aligned(x, y);
    const T* from = x + i64(blockIdx.x) * columns;
    T* to = y + i64(blockIdx.x) * columns;
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * W; at < columns; at += gridDim.y * blockDim.x * W) {
        Pack<T, W> v = load_row<W>(from, at, columns, vectorized);
#pragma unroll
        for (int j = 0; j < W; j++)
            if (at + j < scaled) v.v[j] = from_float<T>(factor * to_float(v.v[j]));
        store_row<W>(to, at, columns, vectorized, v);
    }
}
