// delta[r] = sum_d y[r,d] dy[r,d]        a row of attention's output times its gradient, per token and head
//
//   y, dy   [rows, D] T; rows are (token, query head) pairs; D is a multiple of 8 up to 256, or of 16 up to 512; they lie
//           on 16-byte boundaries
//   delta   [rows] f32
//
// The softmax's backward pass needs it: ds = p (dp - delta). Mapping: 256 threads; LANES neighbours take a row, E
// elements each, so that a warp reads whole lines.
//
// Op: cuplama/ops/self_attention.py. Tests: the registry's in tests/ops/test_ops.py. Benchmark: `cuplama kernels bench
// self_attention_backward`, of which it is the first launch.
// Tried: nothing else yet.
#include "common.cuh"

template <typename T, int D, int LANES>
__global__ void __launch_bounds__(256)
    attention_delta(const T* __restrict__ y, const T* __restrict__ dy, f32* __restrict__ delta, i64 rows) {
    constexpr int E = D > 256 ? 16 : 8;
    const int lane = threadIdx.x % LANES;
    const i64 row = i64(blockIdx.x) * (256 / LANES) + threadIdx.x / LANES;
    float sum = 0.f;
    if (row < rows && lane * E < D) {
        const Pack<T, E> a = load<E>(y + row * D + lane * E), c = load<E>(dy + row * D + lane * E);
#pragma unroll
        for (int i = 0; i < E; i++) sum += to_float(a.v[i]) * to_float(c.v[i]);
    }
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
    if (row < rows && lane == 0) delta[row] = sum;
}
