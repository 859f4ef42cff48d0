// rope  For each query and key head of a token, with (c, s) = (cos, sin)[rope_rows[token]] and i < h:
//           y[i]     = x[i] c[i] - x[i + h] s[i]
//           y[i + h] = x[i + h] c[i] + x[i] s[i]
//       Dims from 2h on (a partial rotation) and value heads are copied.
// rope_backward  the same by the negative angle, -s for s: dx from dy, which have the shape of y
//       x, y[n,(num_heads+2*num_kv_heads)*D]: T, rope_rows[n]: i32, cos, sin[R,h]: f32, h <= D/2
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its columns, W at a time. A thread computes W
// results that lie on the same side of a rotation, so it also reads the W partners; L1 serves the second reading.
// W = 8 where D, h and the addresses allow it, else 1.
//
// Ops and references: cuplama/ops/rope.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. One thread for both halves of a pair would halve the reads of L1, but give heads with copied
// dims a second path.
#include "common.cuh"

template <int W, bool BACK, typename T>
__device__ void rotate(const T* __restrict__ x, const f32* __restrict__ cos, const f32* __restrict__ sin,
                       T* __restrict__ y, int turned, int columns, int h, int D) {
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * W; at < columns; at += gridDim.y * blockDim.x * W) {
        const int i = at % D;
        Pack<T, W> v = load<W>(x + at);
        if (at < turned && i < 2 * h) {
            const bool low = i < h;
            const Pack<T, W> partner = load<W>(x + (low ? at + h : at - h));
            const Pack<f32, W> c = load<W>(cos + (low ? i : i - h)), s = load<W>(sin + (low ? i : i - h));
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float side = low != BACK ? -to_float(partner.v[j]) : to_float(partner.v[j]);
                v.v[j] = from_float<T>(to_float(v.v[j]) * c.v[j] + side * s.v[j]);
            }
        }
        store<W>(y + at, v);
    }
}

// The rows of a block's token.
template <bool BACK, typename T>
__device__ __forceinline__ void rotate_token(const T* x, const i32* rope_rows, const f32* cos, const f32* sin, T* y,
                                             int num_heads, int num_kv_heads, int h, int D) {
    const int turned = (num_heads + num_kv_heads) * D, columns = turned + num_kv_heads * D;
    const bool vectorized = D % 8 == 0 && h % 8 == 0 && aligned(x, cos, sin, y);
    x += i64(blockIdx.x) * columns;
    y += i64(blockIdx.x) * columns;
    cos += i64(rope_rows[blockIdx.x]) * h;
    sin += i64(rope_rows[blockIdx.x]) * h;
    if (vectorized)
        rotate<8, BACK>(x, cos, sin, y, turned, columns, h, D);
    else
        rotate<1, BACK>(x, cos, sin, y, turned, columns, h, D);
}

template <typename T>
__global__ void rope(const T* __restrict__ x, const i32* __restrict__ rope_rows, const f32* __restrict__ cos,
                     const f32* __restrict__ sin, T* __restrict__ y, int num_heads, int num_kv_heads, int h, int D) {
    rotate_token<false>(x, rope_rows, cos, sin, y, num_heads, num_kv_heads, h, D);
}

template <typename T>
__global__ void rope_backward(const T* __restrict__ dy, const i32* __restrict__ rope_rows, const f32* __restrict__ cos,
                              const f32* __restrict__ sin, T* __restrict__ dx, int num_heads, int num_kv_heads, int h,
                              int D) {
    rotate_token<true>(dy, rope_rows, cos, sin, dx, num_heads, num_kv_heads, h, D);
}
