// Rung 1: attention as its formula says it, a kernel for each step, a thread for each element of a result.
//
//     scores = scale * q k^T, masked         p = softmax of each row         y = p v         per query head
//
//   q, k, v, y    as in ladder.cuh
//   scores        [num_heads, n, s] f32    written; read and overwritten with p; read again
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder attention.
//
// Mapping: scores_naive has a thread per score, softmax_naive a block per row, values_naive a thread per element of y.
//
// Operations: 4 * num_heads * n * s * D, half of them for keys that the mask hides.
// Bytes of the score matrix: at least 4 * 4 * num_heads * n * s, and it needs 4 * num_heads * n * s of memory.
// What is slow: every multiply-add of scores_naive loads both of its numbers. The 32 threads of a warp have 32 keys,
// whose rows are 2 * D bytes apart, so one load of a warp touches 32 lines of the cache: one multiply-add a clock for a
// multiprocessor that could do 128.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder attention.
#include "ladder/ladder.cuh"

template <typename T, int D>
__global__ void __launch_bounds__(128)
    scores_naive(const T* __restrict__ q, const T* __restrict__ k, f32* __restrict__ scores, int n, int s,
                 int num_heads, int H, f32 scale) {
    const int key = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y, head = blockIdx.z;
    if (key >= s) return;
    const T* query = q + (i64(i) * num_heads + head) * D;
    const T* row = head_rows<D>(k, head, num_heads, H, s) + i64(key) * D;
    float sum = 0.f;
    for (int d = 0; d < D; d++) sum += to_float(query[d]) * to_float(row[d]);
    scores[(i64(head) * n + i) * s + key] = key < seen(i, n, s) ? sum * scale : -infinity();
}

__global__ void __launch_bounds__(256) softmax_naive(f32* __restrict__ scores, int n, int s) {
    f32* row = scores + (i64(blockIdx.y) * n + blockIdx.x) * s;
    float largest = -infinity(), sum = 0.f;
    for (int key = threadIdx.x; key < s; key += blockDim.x) largest = fmaxf(largest, row[key]);
    largest = block_max(largest);
    for (int key = threadIdx.x; key < s; key += blockDim.x) sum += expf(row[key] - largest);
    sum = block_sum(sum);
    for (int key = threadIdx.x; key < s; key += blockDim.x) row[key] = expf(row[key] - largest) / sum;
}

template <typename T, int D>
__global__ void __launch_bounds__(D) values_naive(const f32* __restrict__ scores, const T* __restrict__ v,
                                                  T* __restrict__ y, int n, int s, int num_heads, int H) {
    const int d = threadIdx.x, i = blockIdx.x, head = blockIdx.y;
    const f32* p = scores + (i64(head) * n + i) * s;
    const T* column = head_rows<D>(v, head, num_heads, H, s) + d;
    float sum = 0.f;
    for (int key = 0; key < s; key++) sum += p[key] * to_float(column[i64(key) * D]);
    y[(i64(i) * num_heads + head) * D + d] = from_float<T>(sum);
}
