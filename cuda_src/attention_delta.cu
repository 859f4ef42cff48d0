// delta[r] = sum_d y[r,d] dy[r,d]        a row of attention's output times its gradient, per token and head
//
//   y, dy   [rows, D] T; rows are (token, query head) pairs; D is a multiple of 8, at most 256; 16-byte boundaries
//   delta   [rows] f32
//
// The softmax's backward pass needs it: ds = p (dp - delta). Mapping: 256 threads; LANES neighbours take a row, 8
// elements each, so that a warp reads whole lines.
//
// Op: cuplama/ops/self_attention.py. Tests: the registry's in tests/ops/test_ops.py. Benchmark: `cuplama kernels bench
// self_attention_backward`, of which it is the first launch.
// Tried: nothing else yet.
#include "common.cuh"

template <typename T, int D, int LANES>
__global__ void __launch_bounds__(256)
    attention_delta(const T* __restrict__ y, const T* __restrict__ dy, f32* __restrict__ delta, i64 rows) {
    const int lane = threadIdx.x % LANES;
    const i64 row = i64(blockIdx.x) * (256 / LANES) + threadIdx.x / LANES;
    float sum = 0.f;
    if (row < rows && lane * 8 < D) {
        const Pack<T, 8> a = load<8>(y + row * D + lane * 8), c = load<8>(dy + row * D + lane * 8);
#pragma unroll
        for (int i = 0; i < 8; i++) sum += to_float(a.v[i]) * to_float(c.v[i]);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (row < rows && lane == 0) delta[row] = sum;
}
