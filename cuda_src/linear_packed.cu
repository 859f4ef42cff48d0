// What linear.cu computes, of a packed weight (formats.cuh), for 1 to 8 rows of x:
//
// linear_packed             y[n,m] = act(x w^T + b)             x[n,k], b[m] (may be null): T; y: U (T or f32); w: W
// linear_add_packed         y[n,m] = a + x w^T + b              a, y: f32 (the residual stream)
// rms_norm_linear_packed    y[n,m] = act(rms_norm(x) w^T + b)   x[n,k]: f32, g[k] (scale): T; norms as in norm.cu
// layer_norm_linear_packed  y[n,m] = act(layer_norm(x) w^T + b)  h[k] (shift, may be null): T
//                           act: none, gelu_tanh, gelu_erf, or gated: silu_mul and gelu_tanh_mul, where w has 2m
//                           rows and y = silu(row i) * (row m + i)
//                           A launch takes the rows first .. first + 7 of x, as far as there are so many, and one
//                           segment of w: `rows` rows, which are the columns of y from `column` on. If gated m is a
//                           multiple of 16, and there is one segment.
//
// The time is that of reading w once, so instructions count: 2048 weights of 4 bits are 1 KB, and a warp should not
// need more than some 150 instructions for them. A tile is 16 rows of w; the WARPS warps of a GPU block share it: k is
// dealt to them in contiguous slices of BLOCKS packed blocks. x lies in shared memory, where all warps read it. Each
// warp has a ring of DEPTH packed blocks, which it fills with cp.async, 16 bytes a lane, and reads without any barrier
// but its own: scales lie in other lanes' copies. It asks for EARLY of them at once, and for the rest behind x, which
// would wait for them otherwise.
//
// Every multiprocessor copies x from L2: eight rows of 14336 columns are 229 KB for each, 30 MB in all, as much as a
// weight of 4 bits. Where they are too long, SPLIT neighbouring GPU blocks share k and have more tiles for it: each
// leaves its sums in memory, and the last one adds them up. Where that is not possible or not enough, k goes in PHASES,
// each through all tiles of the GPU block, whose sums wait in shared memory.
//
// A GPU block has a multiprocessor to itself, so that those of the next kernel are dealt out evenly.
//
// Codes become 16-bit floats, exactly but for nf4; tensor cores add up a group of columns in f32, and only then comes
// the scale: total += scale * sum. An offset takes the sum of x over the group, which is computed once a phase by a
// product with ones. The scale of a whole row comes last of all. With T = f32, or before sm_80, the same goes by
// multiply-adds on floats.
//
// After every STEP units of tiles the warps leave their sums in shared memory, and behind a barrier threads add up
// those of an element of y in a fixed order: results are the same in every run. There are two places for the sums,
// which take turns: one barrier every STEP units. Before the wait for earlier kernels only weights are read.
//
// Tried and worse: slices of several packed blocks as slots of the ring, for all of which a warp then waits; room for a
// GPU block of the next kernel beside this one's (436 instead of 620 tokens a second of an 8B model in 4 bits): blocks
// are dealt out unevenly then, and some multiprocessors get two of one kernel. No gain: x in registers while tiles are
// multiplied (one row in 4 bits: 17.1 us in place of 16.9 for w[28672,4096], 5.6 in place of 5.4 for w[6144,4096]).
//
// order: where the columns of w lie in x (act-order), read with ORDERED only.
//
// Launch and tuning: cuplama/ops/linear_packed.py. Ops: cuplama/ops/linear.py, cuplama/ops/fused.py. Test:
// tests/ops/test_linear_packed.py. Benchmark: benchmarks/packed_decode.py.
#include "linear_packed.cuh"
#include "linear_packed_fma.cuh"
#include "linear_packed_mma.cuh"
#include "linear_packed_rows.cuh"
#include "linear_packed_sums.cuh"

// All of a kernel. x: the launch's first row; wait: pdl_wait, which the kernels themselves call so that they are known
// to be early.
template <typename S, int NORM, typename X, typename U, typename Wait>
__device__ __forceinline__ void product(const X* x, const typename S::T* g, const typename S::T* h, const i32* order,
                                        const typename S::W* w, int k, f32 eps, f32 offset,
                                        Output<typename S::T, U> out, Wait wait) {
    typedef typename S::T T;
    constexpr int LEVELS =
        NORM != NO_NORM && sizeof(U) == 4 && sizeof(T) == 2 ? 2 : 1;  // numbers of T of an element of x
    Stream<S> stream(w, out.rows, k);
    out.scales = S::W::row_scales(w, out.rows * S::PARTS, k);
    if constexpr (!TENSOR<T>) {
        constexpr bool ROUNDED = NORM != NO_NORM && sizeof(U) == sizeof(T);
        SharedRows<S, NORM, 1, ROUNDED, X, f32> rows(x, g, h, order, k, out.count, offset, stream.staged());
        FloatFactors<S> factors;
        wait();
        rows.measure(stream, eps);
        multiply_rows(stream, stream.begin, stream.end, rows, factors, out);
    } else {
        SharedRows<S, NORM, LEVELS, false, X, T> rows(x, g, h, order, k, out.count, offset, stream.staged());
        Factors<S, LEVELS> factors;
        wait();
        rows.measure(stream, eps);
        multiply_rows(stream, stream.begin, stream.end, rows, factors, out);
    }
}

template <typename T, typename U, typename W, int ACT, int ROWS, int WARPS, int BLOCKS, int PHASES, int DEPTH,
          int EARLY, int STEP, int SPLIT, bool ORDERED>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_packed(const T* x, const W* __restrict__ w, const T* __restrict__ b, const i32* __restrict__ order, U* y,
                  f32* parts, u32* arrivals, int n, int first, int m, int rows, int column, int k) {
    const T* g = nullptr;
    const Output<T, U> out = {y + i64(first) * m + column,
                              nullptr,
                              b == nullptr ? b : b + column,
                              min(n - first, 8),
                              m,
                              rows,
                              nullptr,
                              parts,
                              arrivals};
    product<Shape<T, W, ACT, ROWS, WARPS, BLOCKS, PHASES, DEPTH, EARLY, STEP, SPLIT, ORDERED>, NO_NORM>(
        x + i64(first) * k, g, g, order, w, k, 0.f, 0.f, out, [] { pdl_wait(); });
}

template <typename T, typename W, int ROWS, int WARPS, int BLOCKS, int PHASES, int DEPTH, int EARLY, int STEP,
          int SPLIT, bool ORDERED>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_add_packed(const T* x, const W* __restrict__ w, const f32* a, const T* __restrict__ b,
                      const i32* __restrict__ order, f32* y, f32* parts, u32* arrivals, int n, int first, int m,
                      int rows, int column, int k) {
    const T* g = nullptr;
    const i64 at = i64(first) * m + column;
    const Output<T, f32> out = {y + at, a + at,  b == nullptr ? b : b + column, min(n - first, 8), m, rows, nullptr,
                                parts,  arrivals};
    product<Shape<T, W, NO_ACT, ROWS, WARPS, BLOCKS, PHASES, DEPTH, EARLY, STEP, SPLIT, ORDERED>, NO_NORM>(
        x + i64(first) * k, g, g, order, w, k, 0.f, 0.f, out, [] { pdl_wait(); });
}

template <typename T, typename U, typename W, int ACT, int ROWS, int WARPS, int BLOCKS, int PHASES, int DEPTH,
          int EARLY, int STEP, bool ORDERED>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    rms_norm_linear_packed(const f32* x, const T* __restrict__ g, const W* __restrict__ w, const T* __restrict__ b,
                           const i32* __restrict__ order, U* y, int n, int first, int m, int rows, int column, int k,
                           f32 eps, f32 offset) {
    const T* h = nullptr;
    const Output<T, U> out = {y + i64(first) * m + column, nullptr, b == nullptr ? b : b + column,
                              min(n - first, 8),           m,       rows};
    product<Shape<T, W, ACT, ROWS, WARPS, BLOCKS, PHASES, DEPTH, EARLY, STEP, 1, ORDERED>, RMS_NORM>(
        x + i64(first) * k, g, h, order, w, k, eps, offset, out, [] { pdl_wait(); });
}

template <typename T, typename U, typename W, int ACT, int ROWS, int WARPS, int BLOCKS, int PHASES, int DEPTH,
          int EARLY, int STEP, bool ORDERED>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    layer_norm_linear_packed(const f32* x, const T* __restrict__ g, const T* __restrict__ h, const W* __restrict__ w,
                             const T* __restrict__ b, const i32* __restrict__ order, U* y, int n, int first, int m,
                             int rows, int column, int k, f32 eps, f32 offset) {
    const Output<T, U> out = {y + i64(first) * m + column, nullptr, b == nullptr ? b : b + column,
                              min(n - first, 8),           m,       rows};
    product<Shape<T, W, ACT, ROWS, WARPS, BLOCKS, PHASES, DEPTH, EARLY, STEP, 1, ORDERED>, LAYER_NORM>(
        x + i64(first) * k, g, h, order, w, k, eps, offset, out, [] { pdl_wait(); });
}
