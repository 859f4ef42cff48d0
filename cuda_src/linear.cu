// linear             y[n,m] = x w^T + b                  x[n,k], w[m,k], b[m] (may be null): T; y: U (T or f32)
// linear_add         y[n,m] = a + x w^T + b              a, y: f32 (the residual stream)
// rms_norm_linear    y[n,m] = act(rms_norm(x) w^T + b)   x[n,k]: f32, g[k] (scale): T; norms as in norm.cu
// layer_norm_linear  y[n,m] = act(layer_norm(x) w^T + b)  h[k] (shift, may be null): T
// rms_norm_add_linear  y[n,m] = act(rms_norm(sum) w^T + b) or sum w^T + b, with sum[n,k] = (a + rms_norm(x)) * scalar: f32,
//                    which one block writes; a, x: f32; post[k] (scale of x), g[k] (of the sum), scalar[1] (may be
//                    null): T
//                    act: none, gelu_tanh, gelu_erf, or gated: silu_mul and gelu_tanh_mul, where w has 2m rows and
//                    y = silu(row i) * (row m + i)
//                    Each launch takes the rows first .. first + ROWS - 1 of x, ROWS <= 8. Many rows go to cuBLAS.
//
// The time is that of reading w once. A unit is OUTS adjacent rows of w (of both halves if gated); every warp of
// the grid, which fills the GPU once, takes an equal run of units. Lane l takes the vectors of 16 bytes l, l + 32, ...
// of each row, and streams its own vectors through a ring in shared memory with cp.async: DEPTH batches of OUTS rows x
// WIDTH vectors. Nobody else reads them, so no barrier guards the ring, and it never runs dry at the end of a unit. x
// lies in shared memory, where all warps read it. Sums go over a lane's vectors, then over lanes, in an order that k
// and the shape of a batch decide: a row of y does not depend on the other rows of x. A k or an address that does not
// allow 16-byte accesses goes element by element.
//
// With programmatic dependent launch (ptx.cuh) blocks of the next kernel start where one of this has ended. What does
// not depend on earlier kernels happens before the wait: the ring is filled, the norm's scale is asked for.
//
// What counts in kernels of a few microseconds (on an H200, 2026-11-20; benchmarks/results/README.md has what was
// kept):
// - Instructions are fetched, too, and a kernel runs its prologue once, cold: loops that run once or twice are not
//   unrolled, and the paths for odd addresses are loops over single elements. That alone gave 7% on the 0.5B.
// - The ring is shallow, 64 KB. That keeps the memory busy; with more on its way x waits behind it: 200 KB, 4 us.
// - A block still takes more than half of the shared memory. Where two fit, some multiprocessors get two, others none.
// - All kernels prefer the same division of a multiprocessor's L1 (Gpu.function): it must be empty to be divided anew.
// Tried and worse: the copy engine (cp.async.bulk) for the ring; asking for x before the ring is filled.
//
// A norm behind a sublayer (rms_norm_add_linear) takes one barrier more than the norm before the product alone, in place
// of a launch: on an H200, 2026-11-28, a token of Gemma 3 4B took 2.79 ms with it and 2.97 without.
//
// Launch and tuning: stream_rows in cuplama/ops/linear.py. Ops: there, in fused.py and in added_norm.py. Test: tests/ops/.
#include "activation.cuh"
#include "common.cuh"
#include "ptx.cuh"

constexpr int MAX_THREADS = 512;  // of a block
constexpr int BATCH = 4;          // vectors that a lane asks for at once: OUTS * WIDTH

// Adds the products of W weights of OUTS rows with the W elements at x of ROWS rows.
template <int W, int ROWS, int OUTS, typename T, typename X>
__device__ __forceinline__ void multiply(const Pack<T, W> (&w)[OUTS], const X* x, int k, float (&sum)[ROWS][OUTS]) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const Pack<X, W> a = load<W>(x + r * k);
#pragma unroll
        for (int j = 0; j < W; j++)
#pragma unroll
            for (int o = 0; o < OUTS; o++) sum[r][o] = fmaf(to_float(w[o].v[j]), to_float(a.v[j]), sum[r][o]);
    }
}

// Sums N (a power of two) values over the lanes of a warp with few shuffles: each step halves what a lane still holds.
// Returns value lane / (32 / N). Every value is added up in the same order, whatever N is.
template <int LANES = WARP / 2, int N>
__device__ __forceinline__ float warp_sums(const float (&v)[N], int lane) {
    constexpr int LEFT = N > 1 ? N / 2 : 1;
    float half[LEFT];
#pragma unroll
    for (int i = 0; i < LEFT; i++) {
        const bool upper = N > 1 && lane & LANES;
        half[i] = (upper ? v[N / 2 + i] : v[i]) + __shfl_xor_sync(ALL_LANES, upper ? v[i] : v[N / 2 + i], LANES);
    }
    if constexpr (LANES > 1)
        return warp_sums<LANES / 2>(half, lane);
    else
        return half[0];
}

// Sums over the threads of the block; every thread gets them.
template <int ROWS>
__device__ __forceinline__ void block_sums(float (&v)[ROWS], float (*partial)[WARP]) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        v[r] = warp_sum(v[r]);
        if (lane == 0) partial[r][warp] = v[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROWS; r++) v[r] = warp_sum(lane < warps ? partial[r][lane] : 0.f);
}

// Where fetch_scale puts element `at` of the scale: where the thread that reads it will write W elements of staged.
template <int W, typename T, typename X>
__device__ __forceinline__ T* scale_at(X* staged, int at) {
    return reinterpret_cast<T*>(staged + at / W * W) + at % W;
}

// The scale g of a norm on its way to the first row of staged: it is constant, so it need not wait for earlier kernels.
// Comes before the ring.
template <typename T, typename X>
__device__ __forceinline__ void fetch_scale(const T* g, X* staged, int k, bool vectorized) {
    constexpr int W = 16 / sizeof(T);
    if (vectorized) {
#pragma unroll 1
        for (int at = threadIdx.x * 8; at < k; at += blockDim.x * 8)
#pragma unroll
            for (int i = 0; i < 8; i += W) cp_async_16(scale_at<8, T>(staged, at + i), g + at + i, true);
    } else {
#pragma unroll 1
        for (int at = threadIdx.x; at < k; at += blockDim.x) *scale_at<1, T>(staged, at) = g[at];
    }
    cp_async_commit();
}

// staged[r] = norm(x[r]), W elements at a time; the first row of staged holds the scale g when this begins, see
// fetch_scale.
template <int NORM, int W, int ROWS, typename T, typename X>
__device__ __forceinline__ void normalise(const f32* x, const T* h, X* staged, int k, f32 eps, f32 offset,
                                          float (*partial)[ROWS][WARP]) {
    const int start = threadIdx.x * W, stride = blockDim.x * W;
    float mean[ROWS] = {}, inverse[ROWS] = {};
    if constexpr (NORM == LAYER_NORM) {
#pragma unroll 1
        for (int at = start; at < k; at += stride)
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Pack<f32, W> v = load<W>(x + i64(r) * k + at);
#pragma unroll
                for (int j = 0; j < W; j++) mean[r] += v.v[j];
            }
        block_sums(mean, partial[1]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) mean[r] /= k;
    }
#pragma unroll 1
    for (int at = start; at < k; at += stride)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<f32, W> v = load<W>(x + i64(r) * k + at);
#pragma unroll
            for (int j = 0; j < W; j++) {
                const float d = v.v[j] - mean[r];
                inverse[r] += d * d;
            }
        }
    block_sums(inverse, partial[0]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) inverse[r] = 1.f / sqrtf(inverse[r] / k + eps);
#pragma unroll 1
    for (int at = start; at < k; at += stride) {
        const Pack<T, W> scale = load<W>(scale_at<W, T>(staged, at));
        Pack<T, W> shift = {};
        if (NORM == LAYER_NORM && h != nullptr) shift = load<W>(h + at);
#pragma unroll
        for (int r = ROWS - 1; r >= 0; r--) {
            const Pack<f32, W> v = load<W>(x + i64(r) * k + at);
            Pack<X, W> out;
#pragma unroll
            for (int j = 0; j < W; j++) {
                float value = (v.v[j] - mean[r]) * inverse[r] * (offset + to_float(scale.v[j]));
                if (NORM == LAYER_NORM) value += to_float(shift.v[j]);
                out.v[j] = from_float<X>(value);
            }
            store<W>(staged + r * k + at, out);
        }
    }
    __syncthreads();
}

// The sum (a[r] + rms_norm(x[r])) * factor, with the scale at `by` in shared memory: a norm behind a sublayer, and the
// residual stream, W elements at a time. With ADDED the sum, rounded, is staged[r]; with ADDED_NORM it is kept[r], whose
// norm is staged then. sum: where it goes for later kernels, null in all blocks but one. kept: [2][ROWS][k] in shared
// memory; x waits in the second half, since L1 may be too small for it beside a. Each thread reads again what it has left
// there itself, so that no barrier is needed but that of the squares. All threads of the block call.
template <int NORM, int W, int ROWS, typename T, typename X>
__device__ __forceinline__ void add_normalised(const f32* x, const f32* a, const T* by, f32 factor, f32* kept, f32* sum,
                                               X* staged, int k, f32 eps, f32 offset, float (*partial)[ROWS][WARP]) {
    const int start = threadIdx.x * W, stride = blockDim.x * W;
    float before[ROWS] = {};
#pragma unroll 1
    for (int at = start; at < k; at += stride)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<f32, W> v = load<W>(x + i64(r) * k + at), residual = load<W>(a + i64(r) * k + at);
#pragma unroll
            for (int j = 0; j < W; j++) before[r] += v.v[j] * v.v[j];
            store<W>(kept + r * k + at, residual);
            store<W>(kept + (ROWS + r) * k + at, v);
        }
    block_sums(before, partial[1]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) before[r] = 1.f / sqrtf(before[r] / k + eps);
#pragma unroll 1
    for (int at = start; at < k; at += stride) {
        const Pack<T, W> scale = load<W>(by + at);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const Pack<f32, W> v = load<W>(kept + (ROWS + r) * k + at);
            Pack<f32, W> out = load<W>(kept + r * k + at);
            Pack<X, W> rounded;
#pragma unroll
            for (int j = 0; j < W; j++) {
                out.v[j] = (out.v[j] + v.v[j] * before[r] * (offset + to_float(scale.v[j]))) * factor;
                rounded.v[j] = from_float<X>(out.v[j]);
            }
            if (sum != nullptr) store<W>(sum + i64(r) * k + at, out);
            if constexpr (NORM == ADDED_NORM)
                store<W>(kept + r * k + at, out);
            else
                store<W>(staged + r * k + at, rounded);
        }
    }
    if constexpr (NORM == ADDED_NORM)
        normalise<RMS_NORM, W>(kept, static_cast<const T*>(nullptr), staged, k, eps, offset, partial);
    else
        __syncthreads();
}

// A warp's share of the weights on its way through the ring. Making one starts it; it reads nothing but weights.
// NEW: columns of y in a unit, OUTS or, where each takes two rows of w, OUTS / 2.
template <int NEW, int OUTS, int DEPTH, typename T>
struct Stream {
    static constexpr int W = 16 / sizeof(T), WIDTH = BATCH / OUTS, STEP = WIDTH * WARP * W;  // STEP: elements of a row
    uint4* ring;        // of this lane: a vector every WARP
    const T* from;      // the first of the next vectors
    int row, at, left;  // of the next vectors: column of y, place in the row; batches still to ask for
    int m, k, lane, begin, end, steps;

    __device__ __forceinline__ Stream(const T* w, int m, int k, bool vectorized) : m(m), k(k) {
        DYNAMIC_SHARED(uint4, memory);
        const int warps = blockDim.x / WARP, local = threadIdx.x / WARP;
        const u32 units = (m + NEW - 1) / NEW, warp = blockIdx.x * warps + local, all = gridDim.x * warps;
        lane = threadIdx.x % WARP;
        begin = units * warp / all, end = units * (warp + 1) / all;  // in 32 bits: m is below a million
        steps = vectorized ? (k + STEP - 1) / STEP : 0;
        ring = memory + local * (DEPTH * BATCH * WARP) + lane;
        from = w + i64(begin) * NEW * k + lane * W;
        row = begin * NEW, at = lane * W, left = (end - begin) * steps;
#pragma unroll 1
        for (int slot = 0; slot < DEPTH; slot++) fetch(slot);
        launch_dependents();
    }

    // Asks for the next batch, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch(int slot) {
        if (left > 0) {
#pragma unroll
            for (int o = 0; o < OUTS; o++)
#pragma unroll
                for (int i = 0; i < WIDTH; i++)
                    cp_async_16(ring + (slot * BATCH + o * WIDTH + i) * WARP,
                                from + (i64(o / NEW) * m + o % NEW) * k + i * WARP * W,
                                at + i * WARP * W < k && row + o % NEW < m);
            left--;
            at += STEP;
            from += STEP;
            if (at - lane * W >= k) {
                from += i64(NEW) * k - (at - lane * W);
                at = lane * W;
                row += NEW;
            }
        }
        cp_async_commit();
    }
};

// Columns of y in a unit.
template <int ACT, int OUTS>
constexpr int NEW = GATED<ACT> ? OUTS / 2 : OUTS;

// Shared memory behind the ring.
template <int DEPTH, typename T>
__device__ __forceinline__ T* behind_ring() {
    DYNAMIC_SHARED(uint4, memory);
    return reinterpret_cast<T*>(memory + blockDim.x * (DEPTH * BATCH));
}

// y = a + act(x w^T + b) with the rows x in shared or global memory.
template <int ACT, int ROWS, int OUTS, int DEPTH, typename X, typename T, typename U>
__device__ __forceinline__ void multiply_rows(Stream<NEW<ACT, OUTS>, OUTS, DEPTH, T>& stream, const X* x, const T* w,
                                              const T* b, const f32* a, U* y) {
    constexpr int W = 16 / sizeof(T), WIDTH = BATCH / OUTS, COLUMNS = NEW<ACT, OUTS>;
    constexpr int N = ROWS * OUTS, VALUES = N <= 1 ? 1 : N <= 2 ? 2 : N <= 4 ? 4 : N <= 8 ? 8 : N <= 16 ? 16 : 32;
    const int lane = stream.lane, m = stream.m, k = stream.k, end = stream.end;
    // The lanes that store: lane (r * OUTS + o) * (32 / VALUES) has row r of x and row o of the unit.
    const int value = lane / (WARP / VALUES), r = value / OUTS, o = value % OUTS;
    const bool stores = lane % (WARP / VALUES) == 0 && r < ROWS && o < COLUMNS;
    int slot = 0;
#pragma unroll 1
    for (int unit = stream.begin; unit < end; unit++) {
        const int column = unit * COLUMNS + o % COLUMNS;
        float bias = 0.f, residual = 0.f;
        if (column < m && r < ROWS) {  // asked for now, needed at the end
            if (b != nullptr) bias = to_float(b[o / COLUMNS * m + column]);
            if (a != nullptr) residual = a[i64(r) * m + column];
        }

        float sum[ROWS][OUTS] = {};
#pragma unroll 1
        for (int step = 0; step < stream.steps; step++) {
            cp_async_wait<DEPTH - 1>();
            Pack<T, W> vector[WIDTH][OUTS];
#pragma unroll
            for (int i = 0; i < WIDTH; i++)
#pragma unroll
                for (int p = 0; p < OUTS; p++) {
                    const uint4 bits = stream.ring[(slot * BATCH + p * WIDTH + i) * WARP];
                    memcpy(&vector[i][p], &bits, 16);
                }
            stream.fetch(slot);
            slot = slot + 1 == DEPTH ? 0 : slot + 1;
#pragma unroll
            for (int i = 0; i < WIDTH; i++) {
                const int at = ((step * WIDTH + i) * WARP + lane) * W;
                if (at < k) multiply(vector[i], x + at, k, sum);
            }
        }
        if (stream.steps == 0)
#pragma unroll 1
            for (int at = lane; at < k; at += WARP) {
                Pack<T, 1> vector[OUTS];
#pragma unroll
                for (int p = 0; p < OUTS; p++)
                    vector[p].v[0] = w[(i64(p / COLUMNS) * m + min(unit * COLUMNS + p % COLUMNS, m - 1)) * k + at];
                multiply(vector, x + at, k, sum);
            }

        float values[VALUES] = {};
#pragma unroll
        for (int i = 0; i < N; i++) values[i] = sum[i / OUTS][i % OUTS];
        float total = warp_sums(values, lane) + bias;
        if constexpr (GATED<ACT>)
            total = activated<ACT, T, 2>({total, __shfl_down_sync(ALL_LANES, total, COLUMNS * (WARP / VALUES))});
        else
            total = activated<ACT, T, 1>({total});
        if (stores && column < m) y[i64(r) * m + column] = from_float<U>(residual + total);
    }
}

// The rows of x for multiply_rows: in shared memory if STAGED, else where they are.
template <int ROWS, int DEPTH, bool STAGED, typename T>
__device__ __forceinline__ const T* stage(const T* x, int k) {
    if constexpr (!STAGED) return x;
    constexpr int W = 16 / sizeof(T), MANY = 4;  // loads that a thread has on their way
    T* staged = behind_ring<DEPTH, T>();
    const int size = ROWS * k, stride = blockDim.x * W;
    if (size % W == 0 && aligned(x)) {
#pragma unroll 1
        for (int at = threadIdx.x * W; at < size; at += MANY * stride) {
            Pack<T, W> v[MANY];
#pragma unroll
            for (int i = 0; i < MANY; i++)
                if (at + i * stride < size) v[i] = load<W>(x + at + i * stride);
#pragma unroll
            for (int i = 0; i < MANY; i++)
                if (at + i * stride < size) store<W>(staged + at + i * stride, v[i]);
        }
    } else {
#pragma unroll 1
        for (int at = threadIdx.x; at < size; at += blockDim.x) staged[at] = x[at];
    }
    __syncthreads();
    return staged;
}

// Whether 16-byte accesses fit rows of k elements.
template <typename T>
__device__ __forceinline__ bool vectorized_rows(int k, const T* w, const T* x) {
    return k % (16 / int(sizeof(T))) == 0 && aligned(w, x);
}

template <typename T, typename U, int ROWS, int OUTS, int DEPTH, bool STAGED>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    linear(const T* x, const T* __restrict__ w, const T* __restrict__ b, U* y, int first, int m, int k) {
    Stream<OUTS, OUTS, DEPTH, T> stream(w, m, k, vectorized_rows(k, w, STAGED ? w : x));
    pdl_wait();
    const T* rows = stage<ROWS, DEPTH, STAGED>(x + i64(first) * k, k);
    multiply_rows<NO_ACT, ROWS, OUTS>(stream, rows, w, b, static_cast<const f32*>(nullptr), y + i64(first) * m);
}

template <typename T, int ROWS, int OUTS, int DEPTH, bool STAGED>
__global__ void __launch_bounds__(MAX_THREADS, 1) linear_add(const T* x, const T* __restrict__ w, const f32* a,
                                                             const T* __restrict__ b, f32* y, int first, int m, int k) {
    Stream<OUTS, OUTS, DEPTH, T> stream(w, m, k, vectorized_rows(k, w, STAGED ? w : x));
    pdl_wait();
    const T* rows = stage<ROWS, DEPTH, STAGED>(x + i64(first) * k, k);
    multiply_rows<NO_ACT, ROWS, OUTS>(stream, rows, w, b, a + i64(first) * m, y + i64(first) * m);
}

template <typename T, typename U, int ACT, int ROWS, int OUTS, int DEPTH>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_linear(const f32* x, const T* __restrict__ g, const T* __restrict__ w, const T* __restrict__ b, U* y,
                    int first, int m, int k, f32 eps, f32 offset) {
    __shared__ float partial[2][ROWS][WARP];
    U* rows = behind_ring<DEPTH, U>();  // rounded to the dtype of y, as by the norm alone
    const bool vectorized = k % 8 == 0 && aligned(x, g);
    fetch_scale(g, rows, k, vectorized);
    Stream<NEW<ACT, OUTS>, OUTS, DEPTH, T> stream(w, m, k, vectorized_rows(k, w, w));
    pdl_wait();
    cp_async_wait<DEPTH>();  // the scale came before the ring
    if (vectorized)
        normalise<RMS_NORM, 8, ROWS>(x + i64(first) * k, static_cast<const T*>(nullptr), rows, k, eps, offset, partial);
    else
        normalise<RMS_NORM, 1, ROWS>(x + i64(first) * k, static_cast<const T*>(nullptr), rows, k, eps, offset, partial);
    multiply_rows<ACT, ROWS, OUTS>(stream, rows, w, b, static_cast<const f32*>(nullptr), y + i64(first) * m);
}

template <typename T, typename U, int ACT, int ROWS, int OUTS, int DEPTH>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    layer_norm_linear(const f32* x, const T* __restrict__ g, const T* __restrict__ h, const T* __restrict__ w,
                      const T* __restrict__ b, U* y, int first, int m, int k, f32 eps, f32 offset) {
    __shared__ float partial[2][ROWS][WARP];
    U* rows = behind_ring<DEPTH, U>();
    const bool vectorized = k % 8 == 0 && aligned(x, g, h);
    fetch_scale(g, rows, k, vectorized);
    Stream<NEW<ACT, OUTS>, OUTS, DEPTH, T> stream(w, m, k, vectorized_rows(k, w, w));
    pdl_wait();
    cp_async_wait<DEPTH>();  // the scale came before the ring
    if (vectorized)
        normalise<LAYER_NORM, 8, ROWS>(x + i64(first) * k, h, rows, k, eps, offset, partial);
    else
        normalise<LAYER_NORM, 1, ROWS>(x + i64(first) * k, h, rows, k, eps, offset, partial);
    multiply_rows<ACT, ROWS, OUTS>(stream, rows, w, b, static_cast<const f32*>(nullptr), y + i64(first) * m);
}

template <typename T, typename U, int NORM, int ACT, int ROWS, int OUTS, int DEPTH>
__global__ void __launch_bounds__(MAX_THREADS, 1)
    rms_norm_add_linear(const f32* x, const T* __restrict__ post, const f32* a, const T* __restrict__ scalar,
                        const T* __restrict__ g, const T* __restrict__ w, const T* __restrict__ b, U* y, f32* sum,
                        int first, int m, int k, f32 eps, f32 offset) {
    __shared__ float partial[2][ROWS][WARP];
    f32* kept = behind_ring<DEPTH, f32>();
    U* rows = reinterpret_cast<U*>(kept + 2 * ROWS * k);
    T* by = reinterpret_cast<T*>(rows + ROWS * k);
    const bool vectorized = k % 8 == 0 && aligned(x, post, a, g, sum);
    fetch_scale(post, by, k, vectorized);
    if constexpr (NORM == ADDED_NORM) fetch_scale(g, rows, k, vectorized);
    const f32 factor = scalar != nullptr ? to_float(*scalar) : 1.f;
    Stream<NEW<ACT, OUTS>, OUTS, DEPTH, T> stream(w, m, k, vectorized_rows(k, w, w));
    pdl_wait();
    cp_async_wait<DEPTH>();  // both scales came before the ring
    x += i64(first) * k, a += i64(first) * k;
    sum = blockIdx.x == 0 ? sum + i64(first) * k : nullptr;
    if (vectorized)
        add_normalised<NORM, 8, ROWS>(x, a, by, factor, kept, sum, rows, k, eps, offset, partial);
    else
        add_normalised<NORM, 1, ROWS>(x, a, by, factor, kept, sum, rows, k, eps, offset, partial);
    multiply_rows<ACT, ROWS, OUTS>(stream, rows, w, b, static_cast<const f32*>(nullptr), y + i64(first) * m);
}
