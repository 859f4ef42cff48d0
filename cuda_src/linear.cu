// linear_rows  y[first + r, i] = sum_k x[first + r, k] w[i, k] + b[i]     r < ROWS <= 8, i < m
//              x[n,k], w[m,k], b[m] (may be null): T; y[n,m]: U (T or f32). Products of many rows go to cuBLAS.
//
// The time is that of reading w once; x is small and stays in L1. Mapping: SPLIT warps of a block compute OUTS adjacent
// columns of y for all ROWS. Lane l of warp p takes the pieces l + 32 p (mod 32 SPLIT) of 16 bytes of a weight row, so a
// warp reads 512 contiguous bytes, and asks for OUTS * DEPTH pieces before it uses the first: enough bytes in flight to
// hide the latency of memory. Sums go lane by lane, then over lanes, then over the SPLIT warps, always in one order.
// Past the last row of w the last one is computed again and not stored. A k that is no multiple of 16 bytes, or a
// pointer off a 16-byte boundary, takes the same path element by element.
//
// The second launch bound, blocks per multiprocessor, lets ptxas have the registers that all loads of a batch need: left
// to itself it aims at fewer, moves loads behind the first products, and spills in a few instances.
//
// OUTS, DEPTH and SPLIT are chosen in cuplama/ops/linear.py, which says why.
// Op and reference: cuplama/ops/linear.py. Test and benchmark: tests/ops/, cuplama/bench.py (generic).
// Tried: launch bounds without a number of blocks, see above. Not tried: x in shared memory, whose barrier would also
// hold up the first weights; tensor cores for 2 to 8 rows (mma.sync with the weights as A).
#include "common.cuh"
#include "ptx.cuh"

constexpr int WARPS = 4;  // per block

template <int W, typename T>
__device__ __forceinline__ Pack<T, W> load_weights(const T* w) {
    if constexpr (sizeof(Pack<T, W>) == 16) {
        const uint4 bits = load_streamed(w);
        Pack<T, W> x;
        memcpy(&x, &bits, 16);
        return x;
    } else {
        return load<W>(w);
    }
}

// Adds the products of W weights of OUTS rows with the W elements at x of ROWS rows; adds zeros if x is not there.
template <int W, int ROWS, int OUTS, typename T>
__device__ __forceinline__ void multiply(const Pack<T, W> (&w)[OUTS], const T* x, int k, bool there,
                                         float (&sum)[ROWS][OUTS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        Pack<T, W> a = {};
        if (there) a = load<W>(x + i64(r) * k);
#pragma unroll
        for (int j = 0; j < W; j++)
#pragma unroll
            for (int o = 0; o < OUTS; o++) sum[r][o] = fmaf(to_float(w[o].v[j]), to_float(a.v[j]), sum[r][o]);
    }
}

// This lane's share of the dot products: the elements at, at + STEP, ... in pieces of W.
template <int W, int STEP, int DEPTH, int ROWS, int OUTS, typename T>
__device__ __forceinline__ void accumulate(const T* __restrict__ x, const T* const (&w)[OUTS], int at, int k,
                                           float (&sum)[ROWS][OUTS]) {
    for (; at + (DEPTH - 1) * STEP < k; at += DEPTH * STEP) {
        Pack<T, W> piece[DEPTH][OUTS];
#pragma unroll
        for (int i = 0; i < DEPTH; i++)
#pragma unroll
            for (int o = 0; o < OUTS; o++) piece[i][o] = load_weights<W>(w[o] + at + i * STEP);
#pragma unroll
        for (int i = 0; i < DEPTH; i++) multiply<W>(piece[i], x + at + i * STEP, k, true, sum);
    }
    // The last, shorter batch, without branches: all its loads come first too, and fill registers of their own, or each
    // would have to arrive before it is moved. What is not there is zero.
    Pack<T, W> last[DEPTH - 1][OUTS];
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++)
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            last[i][o] = {};
            if (at + i * STEP < k) last[i][o] = load_weights<W>(w[o] + at + i * STEP);
        }
#pragma unroll
    for (int i = 0; i < DEPTH - 1; i++) multiply<W>(last[i], x + at + i * STEP, k, at + i * STEP < k, sum);
}

template <typename T, typename U, int ROWS, int OUTS, int DEPTH, int SPLIT>
__global__ void __launch_bounds__(128, ROWS == 1 ? 8 : ROWS == 2 ? 6 : ROWS <= 4 ? 4 : 3)
    linear_rows(const T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ b, U* __restrict__ y,
                int first, int m, int k) {
    static_assert(ROWS * OUTS <= WARP, "every lane stores at most one result");
    constexpr int W = 16 / sizeof(T);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, part = warp % SPLIT;
    const int column = (blockIdx.x * (WARPS / SPLIT) + warp / SPLIT) * OUTS;
    const bool wide = k % W == 0 && aligned(x, w);
    x += i64(first) * k;
    y += i64(first) * m;
    const T* rows[OUTS];
#pragma unroll
    for (int o = 0; o < OUTS; o++) rows[o] = w + i64(min(column + o, m - 1)) * k;

    float sum[ROWS][OUTS] = {};
    const int piece = part * WARP + lane;
    if (wide)
        accumulate<W, SPLIT * WARP * W, DEPTH>(x, rows, piece * W, k, sum);
    else
        accumulate<1, SPLIT * WARP, DEPTH>(x, rows, piece, k, sum);

    // Lane r * OUTS + o takes sum[r][o].
    float mine = 0.f;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int o = 0; o < OUTS; o++) {
            const float total = warp_sum(sum[r][o]);
            if (lane == r * OUTS + o) mine = total;
        }
    if constexpr (SPLIT > 1) {
        __shared__ float partial[WARPS][WARP];
        partial[warp][lane] = mine;
        __syncthreads();
        if (part != 0) return;
        for (int p = 1; p < SPLIT; p++) mine += partial[warp + p][lane];
    }
    const int r = lane / OUTS, i = column + lane % OUTS;
    if (r < ROWS && i < m) y[i64(r) * m + i] = from_float<U>(b == nullptr ? mine : mine + to_float(b[i]));
}
