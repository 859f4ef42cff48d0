// What the rungs of the ladder share: the letters, the mask, and a copy of rows into shared memory.
//
//   q     [n, num_heads, D] T    the new queries: query i is token s-n+i of its sequence and sees the keys 0 .. s-n+i
//   k, v  [H, s, D] T            keys and values of all s tokens; a group of num_heads/H query heads shares a key head
//   y     [n, num_heads, D] T    y = softmax(scale * q k^T) v, per query head
//
// D is 64 or 128. All arrays lie on 16-byte boundaries. Arithmetic is in f32 whatever T is.
#ifndef CUPLAMA_LADDER_CUH
#define CUPLAMA_LADDER_CUH

#include "attention.cuh"  // LOG2_E and LOWEST
#include "common.cuh"

// Keys that query i sees; they are the first ones.
__device__ __forceinline__ int seen(int i, int n, int s) { return s - n + i + 1; }

// The first row of a query head's keys or values.
template <int D, typename T>
__device__ __forceinline__ const T* head_rows(const T* x, int head, int num_heads, int H, int s) {
    return x + i64(head / (num_heads / H)) * s * D;
}

// Columns `column` .. `column` + WIDTH - 1 of rows first .. first + ROWS - 1, times factor, as f32 into shared memory
// [ROWS][STRIDE]. Rows from `end` on are zeros. step: elements from one row of x to the next. All threads call.
template <int ROWS, int WIDTH, int STRIDE, typename T>
__device__ __forceinline__ void copy_rows(float* shared, const T* x, i64 step, int first, int end, int column,
                                          float factor = 1.f) {
    for (int i = threadIdx.x; i < ROWS * (WIDTH / 4); i += blockDim.x) {
        const int row = i / (WIDTH / 4), at = i % (WIDTH / 4) * 4;
#pragma unroll
        for (int e = 0; e < 4; e++) shared[row * STRIDE + at + e] = 0.f;
        if (first + row >= end) continue;
        const Pack<T, 4> four = load<4>(x + (first + row) * step + column + at);
#pragma unroll
        for (int e = 0; e < 4; e++) shared[row * STRIDE + at + e] = to_float(four.v[e]) * factor;
    }
}

#endif
