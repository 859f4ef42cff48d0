// cast_bias  bias[m] = b[m]                  b: T   bias: U
// fill_rows  y[i,j] = a[i,j] + b[j]          a[n,m], y[n,m]: U   b: T   a may be absent: 0
//
// What a cuBLAS product with a bias needs before it. cuBLAS adds a bias that has the dtype of y, so one of another
// dtype is converted first; where it cannot add one at all, y starts from the bias and the product is added to it.
//
// Mapping: 256 threads along j. fill_rows: blockIdx.y strides over the rows; a thread reads its b once, for its column.
// Launched by cuplama/backends/cuda/planning.py. Tests: tests/ops/test_bias.py, and on a GPU those of the ops `linear`
// and `linear_add` with more than 8 rows.
#include "common.cuh"

template <typename T, typename U>
__global__ void __launch_bounds__(256) cast_bias(const T* __restrict__ b, U* __restrict__ bias, int m) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j < m) bias[j] = from_float<U>(to_float(b[j]));
}

template <typename T, typename U>
__global__ void __launch_bounds__(256)
    fill_rows(const U* __restrict__ a, const T* __restrict__ b, U* __restrict__ y, int n, int m) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= m) return;
    const f32 value = to_float(b[j]);
    for (i64 i = blockIdx.y; i < n; i += gridDim.y)
        y[i * m + j] = from_float<U>(a ? to_float(a[i * m + j]) + value : value);
}
