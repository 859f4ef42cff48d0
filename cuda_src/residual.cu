// add          y[n,d] = a[n,d] + b[n,d]       all f32
// select_rows  y[r,d] = x[rows[r]]            x[n,d]: f32, rows: i32
//
// Mapping: 4 elements, 16 bytes, per thread and access. add: one long row of n * d; select_rows: blockIdx.x is the row
// of y, blockIdx.y and the threads share its columns. Sizes or addresses that forbid 16-byte accesses go element by
// element.
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

__global__ void select_rows(const f32* __restrict__ x, const i32* __restrict__ rows, f32* __restrict__ y, int d) {
    const f32* from = x + i64(rows[blockIdx.x]) * d;
    f32* to = y + i64(blockIdx.x) * d;
    const bool vectorized = d % 4 == 0 && aligned(x, y);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 4; i < d; i += gridDim.y * blockDim.x * 4)
        store_row<4>(to, i, d, vectorized, load_row<4>(from, i, d, vectorized));
}
