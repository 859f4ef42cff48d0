// rope  For each query and key head of a token, with (c, s) = (cos, sin)[rope_rows[token]] and i < h:
//           y[i]     = x[i] c[i] - x[i + h] s[i]
//           y[i + h] = x[i + h] c[i] + x[i] s[i]
//       Dims from 2h on (a partial rotation) and value heads are copied.
// rope_pairs  the same with dims 2i and 2i + 1 in the places of i and i + h
// rope_backward, rope_pairs_backward
//       the same by the negative angle, -s for s: dx from dy, which have the shape of y
//       x, y[n,(num_heads+2*num_kv_heads)*D]: T, rope_rows[n]: i32, cos, sin[R,h]: f32, h <= D/2
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its columns, W at a time. Of halves a thread
// computes W results that lie on the same side of a rotation, so it also reads the W partners; L1 serves the second
// reading. Of pairs its W elements are their own partners. W = 8 where D, h and the addresses allow it, else 1.
//
// Ops and references: cuplama/ops/rope.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. One thread for both halves of a pair would halve the reads of L1, but give heads with copied
// dims a second path.
#include "common.cuh"

// What W elements are rotated with: v are those from x on, the others of halves, or of a lone element, are `apart` away.
template <int W, bool PAIRS, typename T>
__device__ __forceinline__ Pack<T, W> partners(const T* x, const Pack<T, W>& v, int apart) {
    if constexpr (PAIRS && W > 1) {
        Pack<T, W> others;
#pragma unroll
        for (int j = 0; j < W; j++) others.v[j] = v.v[j ^ 1];
        return others;
    } else
        return load<W>(x + apart);
}

// cos or sin for W elements, from the rotation of the first one on; of pairs both elements have the same.
template <int W, bool PAIRS>
__device__ __forceinline__ Pack<f32, W> turns(const f32* first) {
    if constexpr (PAIRS && W > 1) {
        const Pack<f32, W / 2> once = load<W / 2>(first);
        Pack<f32, W> twice;
#pragma unroll
        for (int j = 0; j < W; j++) twice.v[j] = once.v[j / 2];
        return twice;
    } else
        return load<W>(first);
}

template <int W, bool PAIRS, bool BACK, typename T>
__device__ void rotate(const T* __restrict__ x, const f32* __restrict__ cos, const f32* __restrict__ sin,
                       T* __restrict__ y, int turned, int columns, int h, int D) {
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * W; at < columns; at += gridDim.y * blockDim.x * W) {
        const int i = at % D;
        Pack<T, W> v = load<W>(x + at);
        if (at < turned && i < 2 * h) {
            const bool low = PAIRS ? i % 2 == 0 : i < h;
            const int apart = PAIRS ? 1 : h, turn = PAIRS ? i / 2 : low ? i : i - h;
            const Pack<T, W> partner = partners<W, PAIRS>(x + at, v, low ? apart : -apart);
            const Pack<f32, W> c = turns<W, PAIRS>(cos + turn), s = turns<W, PAIRS>(sin + turn);
#pragma unroll
            for (int j = 0; j < W; j++) {
                const bool first = PAIRS && j % 2 ? !low : low;
                const float side = first != BACK ? -to_float(partner.v[j]) : to_float(partner.v[j]);
                v.v[j] = from_float<T>(to_float(v.v[j]) * c.v[j] + side * s.v[j]);
            }
        }
        store<W>(y + at, v);
    }
}

// The rows of a block's token.
template <bool PAIRS, bool BACK, typename T>
__device__ __forceinline__ void rotate_token(const T* x, const i32* rope_rows, const f32* cos, const f32* sin, T* y,
                                             int num_heads, int num_kv_heads, int h, int D) {
    const int turned = (num_heads + num_kv_heads) * D, columns = turned + num_kv_heads * D;
    const bool vectorized = D % 8 == 0 && h % (PAIRS ? 4 : 8) == 0 && aligned(x, cos, sin, y);
    x += i64(blockIdx.x) * columns;
    y += i64(blockIdx.x) * columns;
    cos += i64(rope_rows[blockIdx.x]) * h;
    sin += i64(rope_rows[blockIdx.x]) * h;
    if (vectorized)
        rotate<8, PAIRS, BACK>(x, cos, sin, y, turned, columns, h, D);
    else
        rotate<1, PAIRS, BACK>(x, cos, sin, y, turned, columns, h, D);
}

template <typename T>
__global__ void rope(const T* __restrict__ x, const i32* __restrict__ rope_rows, const f32* __restrict__ cos,
                     const f32* __restrict__ sin, T* __restrict__ y, int num_heads, int num_kv_heads, int h, int D) {
    rotate_token<false, false>(x, rope_rows, cos, sin, y, num_heads, num_kv_heads, h, D);
}

template <typename T>
__global__ void rope_backward(const T* __restrict__ dy, const i32* __restrict__ rope_rows, const f32* __restrict__ cos,
                              const f32* __restrict__ sin, T* __restrict__ dx, int num_heads, int num_kv_heads, int h,
                              int D) {
    rotate_token<false, true>(dy, rope_rows, cos, sin, dx, num_heads, num_kv_heads, h, D);
}

template <typename T>
__global__ void rope_pairs(const T* __restrict__ x, const i32* __restrict__ rope_rows, const f32* __restrict__ cos,
                           const f32* __restrict__ sin, T* __restrict__ y, int num_heads, int num_kv_heads, int h,
                           int D) {
    rotate_token<true, false>(x, rope_rows, cos, sin, y, num_heads, num_kv_heads, h, D);
}

template <typename T>
__global__ void rope_pairs_backward(const T* __restrict__ dy, const i32* __restrict__ rope_rows,
                                    const f32* __restrict__ cos, const f32* __restrict__ sin, T* __restrict__ dx,
                                    int num_heads, int num_kv_heads, int h, int D) {
    rotate_token<true, true>(dy, rope_rows, cos, sin, dx, num_heads, num_kv_heads, h, D);
}
