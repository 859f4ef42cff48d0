// What linear.cu computes, on tensor cores, for 2 to 8 rows of x in 16 bits (sm_80 and later); k is a multiple of 8:
//
// linear_mma             y[n,m] = x w^T + b                  x[n,k], w[m,k], b[m] (may be null): T; y: U (T or f32)
// linear_add_mma         y[n,m] = a + x w^T + b              a, y: f32 (the residual stream)
// rms_norm_linear_mma    y[n,m] = act(rms_norm(x) w^T + b)   x[n,k]: f32, g[k] (scale): T; norms as in norm.cu
// layer_norm_linear_mma  y[n,m] = act(layer_norm(x) w^T + b)  h[k] (shift, may be null): T
// rms_norm_add_linear_mma  y[n,m] = act(rms_norm(sum) w^T + b) or sum w^T + b, with sum[n,k] = (a + rms_norm(x)) * scalar:
//                        f32, which one block writes; a, x: f32; post[k] (scale of x), g[k] (of the sum), scalar[1] (may
//                        be null): T
//                        act: none, gelu_tanh, gelu_erf, or gated: silu_mul and gelu_tanh_mul, where w has 2m rows
//                        and y = silu(row i) * (row m + i)
//                        A launch takes the rows first .. first + 7 of x, as far as there are so many.
//
// The time is that of reading w once. A tile is 16 rows of w (if gated 8 of each half), and the WARPS warps of a
// block share it: k is dealt to them in contiguous slices, of CHUNKS chunks of 64 elements (128 bytes of a row). So a
// warp meets the same elements of x in every tile and keeps them in registers; x takes no shared memory and no accesses
// to it. Where a slice would be too long for that, k goes in PHASES, each through all tiles of the block, whose sums
// wait in shared memory.
//
// mma.m16n8k16 has the tile as A and x as B. Which k meets which is free as long as both sides agree: lane (r, t) =
// (lane / 4, lane % 4) holds the elements 8t .. 8t+7 and 32 + 8t .. 32 + 8t+7 of a chunk, of row r of x and of rows r
// and r + 8 of the tile. So all accesses are of 16 bytes, and two vectors of each row are the lane's share of four
// products. It sends its own vectors of w through a ring in shared memory with cp.async, DEPTH chunks of a tile deep.
// Nobody else reads them, so no barrier guards the ring, and it never runs dry between tiles.
//
// After a group of up to two tiles the warps leave their sums in shared memory, and behind a barrier each thread adds
// up those of an element of y, in the order of the warps: the result is the same in every run and does not depend on
// the other rows of x. There are two places for the sums, which groups take in turn: one barrier per group. A block
// takes an equal share of the columns of y, to the column: rows of a tile beyond them are not read.
//
// A normalised row is rounded to T, as by the norm alone. Where y is f32 (logits) it is the sum of two numbers of T, so
// that as little is lost as in linear.cu; each takes products of its own.
//
// Where a norm behind a sublayer comes first, x is read before the residual stream, for which registers are short: its
// latency is added to that of x. So this is for little of both alone (cuplama/ops/added_norm.py). Not timed yet.
//
// As in linear.cu, what does not depend on earlier kernels happens before the wait: the ring is filled, scale and shift
// of the norm are read. What does not lie on 16-byte boundaries comes element by element.
//
// H200, 2026-11-20, weights above 16 MB of the 8B and the 1B: 2 rows at 80 to 92%, 8 rows at 74 to 86% of the read
// bandwidth (benchmarks/results/2026-11-20-h200-rows.csv; the norms did not start early then). A ring of more than two
// chunks helps a kernel alone, and costs a step 1 to 6%. x as A would take twice the registers and twice the products.
//
// Launch and tuning: cuplama/ops/linear.py. Ops: there, in fused.py and in added_norm.py. Test: tests/ops/.
#include "linear_mma.cuh"

// Numbers of T that make an element of a normalised row.
template <typename U>
constexpr int NUMBERS = sizeof(U) == 4 ? 2 : 1;

// Whether the residual stream comes first, and vectors of k elements that the norms take.
template <int NORM>
constexpr bool ADDS = NORM == ADDED || NORM == ADDED_NORM;
template <int NORM>
constexpr int VECTORS = NORM == LAYER_NORM || NORM == ADDED_NORM ? 2 : 1;

// Scale g and shift h (zeros if null) of a norm, or the scales of two, on their way to shared memory. They are constant:
// they wait for no earlier kernel.
template <int NORM, int WARPS, typename T>
__device__ __forceinline__ const T* fetch_scales(T* to, const T* g, const T* h, int k) {
    const bool vectorized = aligned(g, h);
#pragma unroll 1
    for (int at = threadIdx.x * 8; at < k; at += WARPS * WARP * 8)
#pragma unroll
        for (int i = 0; i < VECTORS<NORM>; i++) {
            const T* from = (i == 0 ? g : h) + at;
            const bool there = i == 0 || h != nullptr;
            if (vectorized)
                cp_async_16(to + i * k + at, from, there);
            else
                store<4>(reinterpret_cast<u32*>(to + i * k + at), load_vector(from, there, false));
        }
    cp_async_commit();
    return to;
}

// The residual stream, what the sum of it and the norm behind a sublayer is multiplied by, and where that goes for later
// kernels.
struct Residual {
    const f32* a;
    f32 factor;
    f32* sum;
};

// The rows of x of the ops with a norm. LEVELS: 1, rounded to T, as by the norm alone, or 2, where y is f32: T, and
// what the rounding took. Rows that fit into registers beside what becomes of them, and beside the residual stream, are
// read once (KEPT).
template <int NORM, int LEVELS, int WARPS, int CHUNKS, int PHASES, typename T>
struct NormalisedRows {
    static constexpr bool KEPT = PHASES == 1 && LEVELS == 1 && (CHUNKS <= 6 || !ADDS<NORM>);
    // Chunks of the residual stream that a lane has registers for beside x.
    static constexpr int TOGETHER = CHUNKS == 4 ? 2 : 3;
    const f32* x;    // of this lane
    const T* scale;  // in shared memory: g, and h behind it; the scale of the norm behind a sublayer comes last
    Residual added;  // of this lane
    int k;
    bool there, vectorized;
    float mean, inverse, before, offset;  // before: what the first norm multiplies by
    Pack<f32, 8> kept[KEPT ? CHUNKS : 1][2];

    __device__ __forceinline__ NormalisedRows(const f32* x, const T* scale, const Residual& rows, int k, int count,
                                              f32 offset)
        : x(x + i64(lane_row()) * k), scale(scale), added(rows), k(k), there(lane_row() < count),
          vectorized(aligned(x, rows.a, rows.sum)), mean(0.f), before(0.f), offset(offset) {
        if constexpr (ADDS<NORM>) added.a += i64(lane_row()) * k, added.sum += i64(lane_row()) * k;
    }

    // Eight elements of x as they are in memory.
    __device__ __forceinline__ Pack<f32, 8> given(int phase, int c, int i) const {
        const int at = place<WARPS, CHUNKS>(phase, c) + 32 * i;
        return load_row<8>(x, at, there ? k : 0, vectorized);
    }

    // Makes of them the residual stream: (a + rms_norm(x)) * factor.
    __device__ __forceinline__ void add(Pack<f32, 8>& v, int phase, int c, int i) const {
        const int at = place<WARPS, CHUNKS>(phase, c) + 32 * i;
        const Pack<f32, 8> residual = load_row<8>(added.a, at, there ? k : 0, vectorized);
        const Pack<T, 8> by = load<8>(scale + (VECTORS<NORM> - 1) * k + min(at, k - 8));
#pragma unroll
        for (int j = 0; j < 8; j++)
            v.v[j] = (residual.v[j] + v.v[j] * before * (offset + to_float(by.v[j]))) * added.factor;
    }

    // Eight elements of the rows that the norm before the product takes.
    __device__ __forceinline__ Pack<f32, 8> vector(int phase, int c, int i) const {
        Pack<f32, 8> v = given(phase, c, i);
        if constexpr (ADDS<NORM>) add(v, phase, c, i);
        return v;
    }

    // The sum of f(element) over the row of this lane; GIVEN: over x as it is in memory.
    template <bool GIVEN = false, typename F>
    __device__ __forceinline__ float sum(const F& f, float (*partial)[ROWS]) const {
        float total = 0.f;
#pragma unroll 1
        for (int phase = 0; phase < PHASES; phase++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const Pack<f32, 8> v = KEPT    ? kept[KEPT ? c : 0][i]
                                           : GIVEN ? given(phase, c, i)
                                                   : vector(phase, c, i);
                    const bool inside = place<WARPS, CHUNKS>(phase, c) + 32 * i < k;
#pragma unroll
                    for (int j = 0; j < 8; j++) total += inside ? f(v.v[j]) : 0.f;
                }
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        if (threadIdx.x % 4 == 0) partial[threadIdx.x / WARP][lane_row()] = total;
        __syncthreads();
        total = 0.f;
#pragma unroll
        for (int p = 0; p < WARPS; p++) total += partial[p][lane_row()];
        return total;
    }

    // Makes the residual stream of what is in registers.
    __device__ __forceinline__ void add_kept() {
#pragma unroll
        for (int c = 0; KEPT && c < CHUNKS; c++) {
#pragma unroll
            for (int i = 0; i < 2; i++) add(kept[KEPT ? c : 0][i], 0, c, i);
            if (c % TOGETHER == TOGETHER - 1) __syncwarp();  // as below
        }
    }

    // Writes the residual stream.
    __device__ __forceinline__ void leave() const {
#pragma unroll 1
        for (int phase = 0; phase < PHASES; phase++)
#pragma unroll
            for (int c = 0; c < CHUNKS; c++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const Pack<f32, 8> v = KEPT ? kept[KEPT ? c : 0][i] : vector(phase, c, i);
                    store_row<8>(added.sum, place<WARPS, CHUNKS>(phase, c) + 32 * i, there ? k : 0, vectorized, v);
                }
    }

    // Reads x, for what the rows are multiplied with.
    __device__ __forceinline__ void measure(f32 eps) {
        __shared__ float partial[2][WARPS][ROWS];
#pragma unroll
        for (int c = 0; KEPT && c < CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 2; i++) kept[KEPT ? c : 0][i] = given(0, c, i);
        if constexpr (ADDS<NORM>) {
            before = 1.f / sqrtf(sum<true>([](float v) { return v * v; }, partial[1]) / k + eps);
            add_kept();
            if (blockIdx.x == 0) leave();
        }
        if constexpr (NORM == LAYER_NORM) mean = sum([](float v) { return v; }, partial[1]) / k;
        if constexpr (NORM == ADDED) return;
        const float from = mean;
        inverse = 1.f / sqrtf(sum([from](float v) { return (v - from) * (v - from); }, partial[0]) / k + eps);
    }

    __device__ __forceinline__ void operator()(int phase, Vector (&to)[CHUNKS][2][LEVELS]) const {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = min(place<WARPS, CHUNKS>(phase, c) + 32 * i, k - 8);  // w is zero beyond
                const Pack<f32, 8> v = KEPT ? kept[KEPT ? c : 0][i] : vector(phase, c, i);
                Pack<T, 8> by = {}, shift = {}, high, low;
                if (NORM != ADDED) by = load<8>(scale + at);
                if (NORM == LAYER_NORM) shift = load<8>(scale + k + at);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    float value = v.v[j];
                    if (NORM != ADDED) value = (value - mean) * inverse * (offset + to_float(by.v[j]));
                    if (NORM == LAYER_NORM) value += to_float(shift.v[j]);
                    high.v[j] = from_float<T>(value);
                    low.v[j] = from_float<T>(value - to_float(high.v[j]));
                }
                to[c][i][0] = as_vector(high);
                if (LEVELS > 1) to[c][i][LEVELS - 1] = as_vector(low);
                __syncwarp();  // keeps the compiler from asking for too many vectors at once
            }
    }
};

template <typename T, typename U, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_mma(const T* x, const T* __restrict__ w, const T* __restrict__ b, U* y, int n, int first, int m, int k) {
    Stream<COLUMNS<NO_ACT>, WARPS, CHUNKS, PHASES, DEPTH, T> stream(w, m, k);
    Vector vectors[CHUNKS][2][1];
    const int count = min(n - first, ROWS);
    pdl_wait();
    const PlainRows<WARPS, CHUNKS, T> rows(x + i64(first) * k, lane_row(), k, lane_row() < count);
    multiply_rows<NO_ACT>(stream, rows, vectors, b, static_cast<const f32*>(nullptr), y + i64(first) * m, count);
}

template <typename T, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_add_mma(const T* x, const T* __restrict__ w, const f32* a, const T* __restrict__ b, f32* y, int n, int first,
                   int m, int k) {
    Stream<COLUMNS<NO_ACT>, WARPS, CHUNKS, PHASES, DEPTH, T> stream(w, m, k);
    Vector vectors[CHUNKS][2][1];
    const int count = min(n - first, ROWS);
    pdl_wait();
    const PlainRows<WARPS, CHUNKS, T> rows(x + i64(first) * k, lane_row(), k, lane_row() < count);
    multiply_rows<NO_ACT>(stream, rows, vectors, b, a + i64(first) * m, y + i64(first) * m, count);
}

// The ops with a norm. wait: pdl_wait, which the kernels themselves call so that they are known to be early.
template <int NORM, int ACT, int WARPS, int CHUNKS, int PHASES, int DEPTH, typename T, typename U, typename Wait>
__device__ __forceinline__ void norm_linear(const f32* x, const Residual& added, const T* g, const T* h, const T* w,
                                            const T* b, U* y, int n, int first, int m, int k, f32 eps, f32 offset,
                                            Wait wait) {
    using Weights = Stream<COLUMNS<ACT>, WARPS, CHUNKS, PHASES, DEPTH, T>;
    const T* scale = fetch_scales<NORM, WARPS>(Weights::scales(m), g, h, k);
    Weights stream(w, m, k);
    Vector vectors[CHUNKS][2][NUMBERS<U>];
    const int count = min(n - first, ROWS);
    NormalisedRows<NORM, NUMBERS<U>, WARPS, CHUNKS, PHASES, T> rows(x + i64(first) * k, scale, added, k, count, offset);
    wait();
    cp_async_wait<DEPTH>();  // scale and shift came before the ring
    rows.measure(eps);
    multiply_rows<ACT>(stream, rows, vectors, b, static_cast<const f32*>(nullptr), y + i64(first) * m, count);
}

template <typename T, typename U, int ACT, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    rms_norm_linear_mma(const f32* x, const T* __restrict__ g, const T* __restrict__ w, const T* __restrict__ b, U* y,
                        int n, int first, int m, int k, f32 eps, f32 offset) {
    const T* h = nullptr;
    norm_linear<RMS_NORM, ACT, WARPS, CHUNKS, PHASES, DEPTH>(x, {}, g, h, w, b, y, n, first, m, k, eps, offset,
                                                             [] { pdl_wait(); });
}

template <typename T, typename U, int ACT, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    layer_norm_linear_mma(const f32* x, const T* __restrict__ g, const T* __restrict__ h, const T* __restrict__ w,
                          const T* __restrict__ b, U* y, int n, int first, int m, int k, f32 eps, f32 offset) {
    norm_linear<LAYER_NORM, ACT, WARPS, CHUNKS, PHASES, DEPTH>(x, {}, g, h, w, b, y, n, first, m, k, eps, offset,
                                                               [] { pdl_wait(); });
}

template <typename T, typename U, int NORM, int ACT, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    rms_norm_add_linear_mma(const f32* x, const T* __restrict__ post, const f32* a, const T* __restrict__ scalar,
                            const T* __restrict__ g, const T* __restrict__ w, const T* __restrict__ b, U* y, f32* sum,
                            int n, int first, int m, int k, f32 eps, f32 offset) {
    const f32 factor = scalar != nullptr ? to_float(*scalar) : 1.f;
    const Residual added = {a + i64(first) * k, factor, sum + i64(first) * k};
    const T *scale = NORM == ADDED ? post : g, *last = NORM == ADDED ? nullptr : post;
    norm_linear<NORM, ACT, WARPS, CHUNKS, PHASES, DEPTH>(x, added, scale, last, w, b, y, n, first, m, k, eps, offset,
                                                         [] { pdl_wait(); });
}
