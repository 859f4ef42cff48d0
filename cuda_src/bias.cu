// A bias in every row: y[i,j] = b[j].   b[m]:T   y[n,m]:U
//
// The start of a linear layer with bias whose product cuBLAS adds to y (beta = 1): the bias then costs no pass over y.
// Threads: 256 along j, blockIdx.y strides over the rows; each thread reads its b once and writes a column.
// Launched by cuplama/backends/cuda.py; tested through the op `linear` with more than 8 rows.
#include "common.cuh"

template <typename T, typename U>
__global__ void __launch_bounds__(256) fill_rows(const T* __restrict__ b, U* __restrict__ y, int n, int m) {
    const int j = blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= m) return;
    const U value = from_float<U>(to_float(b[j]));
    for (int i = blockIdx.y; i < n; i += gridDim.y) y[static_cast<i64>(i) * m + j] = value;
}
