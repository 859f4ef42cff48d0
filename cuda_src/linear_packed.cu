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
#include "linear_packed_rows.cuh"

// Where a product goes. y, a (may be null) and b (may be null) begin at the launch's first row of x and first column of
// y.
template <typename T, typename U>
struct Output {
    U* y;
    const f32* a;
    const T* b;
    int count, m, rows;  // rows of x; columns of y in all, and of this launch
    const f32* scales;   // of whole rows of w
    f32* parts;          // with SPLIT, sums [SPLIT][units][PARTS][TILE]
    u32* arrivals;       // and of each group of GPU blocks how many have left theirs
};

// What the warps have of an element of y, added up in four short chains.
template <typename S>
__device__ __forceinline__ float add_warps(const f32* partial) {
    float chains[4] = {};
#pragma unroll
    for (int warp = 0; warp < S::WARPS; warp++) chains[warp % 4] += partial[warp * (S::STEP * S::PARTS * S::TILE)];
    return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// An element of y, whose sums are total.
template <typename S, typename U>
__device__ __forceinline__ void finish(float (&total)[S::PARTS], int row, int column,
                                       const Output<typename S::T, U>& out) {
    const i64 at = i64(row) * out.m + column;
    const float residual = out.a != nullptr ? out.a[at] : 0.f;
#pragma unroll
    for (int p = 0; p < S::PARTS; p++) {
        if (S::W::ROW_SCALES) total[p] *= out.scales[p * out.m + column];
        if (out.b != nullptr) total[p] += to_float(out.b[p * out.m + column]);
    }
    out.y[at] = from_float<U>(residual + activated<S::ACT, typename S::T>(total));
}

// Leaves this GPU block's sums in memory. The last of the SPLIT that share tiles adds them up, in the order of their
// parts of k.
template <typename S, typename U>
__device__ __forceinline__ void add_parts(const Stream<S>& stream, const Output<typename S::T, U>& out) {
    __shared__ u32 arrived;
    constexpr int UNIT = S::PARTS * S::TILE;
    const int units = stream.end - stream.begin;
    const i64 part = i64(stream.units) * UNIT;  // elements
    f32* from = out.parts + i64(stream.begin) * UNIT;
    __syncthreads();
    for (int i = threadIdx.x; i < units * UNIT; i += S::THREADS) {
        const int row = i % S::ROWS, column = (stream.begin + i / UNIT) * BLOCK_ROWS + i % S::TILE / S::ROWS;
        if (row < out.count && column < out.rows) from[blockIdx.x % S::SPLIT * part + i] = stream.sums()[i];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = out.arrivals + blockIdx.x / S::SPLIT;
        arrived = atomicAdd(counter, 1u) + 1;
        if (arrived == S::SPLIT) *counter = 0;
    }
    __syncthreads();
    if (arrived < S::SPLIT) return;
    __threadfence();
    for (int i = threadIdx.x; i < units * S::TILE; i += S::THREADS) {
        const int row = i % S::ROWS, column = stream.begin * BLOCK_ROWS + i / S::ROWS;
        if (row >= out.count || column >= out.rows) continue;
        float total[S::PARTS] = {};
#pragma unroll
        for (int p = 0; p < S::PARTS; p++)
#pragma unroll
            for (int s = 0; s < S::SPLIT; s++)
                total[p] += from[s * part + (i / S::TILE * S::PARTS + p) * S::TILE + i % S::TILE];
        finish<S>(total, row, column, out);
    }
}

// y = a + act(x w^T + b). factors: x of this lane, which `rows` fills.
template <typename S, typename Rows, typename Factors, typename U>
__device__ __forceinline__ void multiply_rows(Stream<S>& stream, const Rows& rows, Factors& factors,
                                              const Output<typename S::T, U>& out) {
    typedef typename S::T T;
    typedef typename S::W W;
    constexpr int OUTS = S::STEP * S::TILE;  // elements of y between two barriers
    constexpr int EACH = (OUTS + S::THREADS - 1) / S::THREADS;
    int turn = 0;
#pragma unroll 1
    for (int phase = stream.first; phase < stream.first + S::PHASES; phase++) {
        const bool whole = S::SPLIT == 1 && phase == S::PHASES - 1;  // sums are, from here on
        factors.fill(stream, rows, phase);
        const int count = stream.blocks_of(phase);
#pragma unroll 1
        for (int first = stream.begin; first < stream.end; first += S::STEP) {
            // What is added to this thread's elements of y: asked for now, needed at the end.
            float bias[EACH][S::PARTS] = {}, scale[EACH][S::PARTS], residual[EACH] = {};
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = threadIdx.x + e * S::THREADS, row = i % S::ROWS,
                          column = first * BLOCK_ROWS + i / S::ROWS;
                if (i >= OUTS || row >= out.count || column >= min(out.rows, stream.end * BLOCK_ROWS)) continue;
                if (!whole) continue;
                if (out.a != nullptr) residual[e] = out.a[i64(row) * out.m + column];
#pragma unroll
                for (int p = 0; p < S::PARTS; p++) {
                    if (out.b != nullptr) bias[e][p] = to_float(out.b[p * out.m + column]);
                    if (W::ROW_SCALES) scale[e][p] = out.scales[p * out.m + column];
                }
            }

            f32* partial = stream.partials() + turn * stream.PARTIAL;
            turn ^= 1;
            f32* mine = partial + threadIdx.x / WARP * (S::STEP * S::PARTS * S::TILE);
#pragma unroll 1
            for (int tile = first * S::PARTS; tile < min(first + S::STEP, stream.end) * S::PARTS; tile++) {
                factors.multiply_tile(stream, count, mine);
                mine += S::TILE;
            }
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = threadIdx.x + e * S::THREADS, row = i % S::ROWS,
                          column = first * BLOCK_ROWS + i / S::ROWS;
                if (i >= OUTS || row >= out.count || column >= min(out.rows, stream.end * BLOCK_ROWS)) continue;
                float total[S::PARTS];
#pragma unroll
                for (int p = 0; p < S::PARTS; p++) {
                    const int at = (i / S::TILE * S::PARTS + p) * S::TILE + i % S::TILE;
                    total[p] = add_warps<S>(partial + at);
                    if constexpr (S::WAITING) {
                        f32& earlier = stream.sums()[(first - stream.begin) * (S::PARTS * S::TILE) + at];
                        if (phase > stream.first) total[p] += earlier;
                        earlier = total[p];
                    }
                    if (W::ROW_SCALES) total[p] *= scale[e][p];
                    total[p] += bias[e][p];
                }
                if (!whole) continue;
                out.y[i64(row) * out.m + column] = from_float<U>(residual[e] + activated<S::ACT, T>(total));
            }
        }
    }
    if constexpr (S::SPLIT > 1) add_parts(stream, out);
}

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
        multiply_rows(stream, rows, factors, out);
    } else {
        SharedRows<S, NORM, LEVELS, false, X, T> rows(x, g, h, order, k, out.count, offset, stream.staged());
        Factors<S, LEVELS> factors;
        wait();
        rows.measure(stream, eps);
        multiply_rows(stream, rows, factors, out);
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
