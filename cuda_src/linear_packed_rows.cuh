// The rows of x of linear_packed.cu in shared memory, behind a norm or as they are.
#ifndef CUPLAMA_LINEAR_PACKED_ROWS_CUH
#define CUPLAMA_LINEAR_PACKED_ROWS_CUH

#include "linear_packed.cuh"

// N times four elements of a row, at first, first + step, ...; zeros from k on. order: where they lie, with ORDERED.
template <bool ORDERED, int N, typename X>
__device__ __forceinline__ void read_fours(Pack<X, 4> (&v)[N], const X* row, const i32* order, int first, int step,
                                           int k, bool vectorized) {
    const X zero = from_float<X>(0.f);
    if (vectorized) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = first + i * step;
            v[i] = {zero, zero, zero, zero};
            if constexpr (ORDERED) {
                const Pack<i32, 4> from = at < k ? load<4>(order + at) : Pack<i32, 4>{};
#pragma unroll
                for (int j = 0; j < 4; j++) v[i].v[j] = at < k ? row[from.v[j]] : zero;
            } else if (at < k) {
                v[i] = load<4>(row + at);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = first + i * step + j;
                v[i].v[j] = at < k ? row[ORDERED ? order[at] : at] : zero;
            }
    }
}

// The GPU block computes the rows of a phase together and leaves them in shared memory, [LEVELS][ROWS][STRIDE] of Y. X:
// of x in memory. Y: T, an element being a number or, where y is f32 and a norm comes first, the sum of two (LEVELS);
// or f32, rounded to T if ROUNDED. The loads of several rows are on their way together. What few registers hold is read
// once (KEPT), and the norm's scale before the wait for earlier kernels.
template <typename S, int NORM, int LEVELS_, bool ROUNDED, typename X, typename Y>
struct SharedRows {
    typedef typename S::T T;
    static constexpr int LEVELS = LEVELS_, EACH = S::BLOCKS;  // EACH: fours of a thread, of a row in a phase
    static constexpr bool NORMED = NORM != NO_NORM, KEPT = NORMED && S::PHASES == 1 && S::ROWS * EACH <= 4;
    static constexpr int SOME = EACH <= 4 ? EACH : 4, ENTRIES = (EACH + SOME - 1) / SOME;  // fours read together
    static constexpr int TOGETHER = SOME * S::ROWS <= 8 ? S::ROWS : 8 / SOME;              // rows
    static constexpr int UNROLLED = NORMED ? S::ROWS / TOGETHER : S::PHASES > 1 ? 1 : 2;   // more would spill
    static constexpr int STRIDE = STRIDE_OF<S, Y>;
    const X* x;
    const T *g, *h;
    const i32* order;
    int k, count;
    float offset;
    bool vectorized;
    Y* staged;
    float mean[S::ROWS], inverse[S::ROWS];
    Pack<X, 4> kept[KEPT ? S::ROWS : 1][SOME];
    Pack<T, 4> scale[SOME];

    __device__ __forceinline__ SharedRows(const X* x, const T* g, const T* h, const i32* order, int k, int count,
                                          f32 offset, f32* staged)
        : x(x), g(g), h(h), order(order), k(k), count(count), offset(offset),
          vectorized(k % 4 == 0 && aligned(x, g, h, order)), staged(reinterpret_cast<Y*>(staged)) {
        if constexpr (KEPT) read(scale, g, 0, 0);
    }

    // This thread's fours first .. first + SOME - 1 of a phase: they lie 4 THREADS columns apart.
    template <typename E>
    __device__ __forceinline__ void read(Pack<E, 4> (&v)[SOME], const E* row, int phase, int first,
                                         bool there = true) const {
        const int end = min(k, (phase + 1) * S::SPAN);
        read_fours<S::ORDERED>(v, row, order, phase * S::SPAN + (first * S::THREADS + int(threadIdx.x)) * 4,
                               S::THREADS * 4, there ? end : 0, vectorized);
    }

    // total[row] = the sum of f(element, row) over each row, by all threads of the block.
    template <typename F>
    __device__ __forceinline__ void sum(float (&total)[S::ROWS], const F& f) const {
        __shared__ float partial[S::ROWS][WARP], whole[S::ROWS];
#pragma unroll
        for (int row = 0; row < S::ROWS; row++) total[row] = 0.f;
#pragma unroll 1
        for (int part = 0; part < S::PHASES * ENTRIES; part++) {
            const int phase = part / ENTRIES, first = part % ENTRIES * SOME;
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) {
                Pack<X, 4> v[SOME];
                if constexpr (!KEPT) read(v, x + i64(row) * k, phase, first, row < count);
#pragma unroll
                for (int e = 0; e < SOME; e++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float element = to_float(KEPT ? kept[KEPT ? row : 0][e].v[j] : v[e].v[j]);
                        const int in = ((first + e) * S::THREADS + int(threadIdx.x)) * 4 + j;
                        total[row] += in < S::SPAN && phase * S::SPAN + in < k ? f(element, row) : 0.f;
                    }
            }
        }
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
        for (int row = 0; row < S::ROWS; row++) {
            total[row] = warp_sum(total[row]);
            if (lane == row) partial[row][warp] = total[row];
        }
        __syncthreads();
        if constexpr (S::ROWS == 1) {
            total[0] = 0.f;
#pragma unroll
            for (int p = 0; p < S::WARPS; p++) total[0] += partial[0][p];
        } else {
            for (int row = warp; row < S::ROWS; row += S::WARPS) {
                const float one = warp_sum(lane < S::WARPS ? partial[row][lane] : 0.f);
                if (lane == 0) whole[row] = one;
            }
            __syncthreads();
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) total[row] = whole[row];
        }
    }

    // Reads x, for what the rows are multiplied with.
    __device__ __forceinline__ void measure(Stream<S>& stream, f32 eps) {
        if constexpr (NORMED) {
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) {
                if constexpr (KEPT) read(kept[KEPT ? row : 0], x + i64(row) * k, 0, 0, row < count);
                mean[row] = 0.f;
            }
            if constexpr (KEPT) stream.fill_rest();
            if constexpr (NORM == LAYER_NORM) {
                sum(mean, [](float v, int) { return v; });
#pragma unroll
                for (int row = 0; row < S::ROWS; row++) mean[row] /= k;
                __syncthreads();  // what lies in shared memory may be written again
            }
            sum(inverse, [this](float v, int row) { return (v - mean[row]) * (v - mean[row]); });
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) inverse[row] = 1.f / sqrtf(inverse[row] / k + eps);
        }
    }

    // Leaves the rows of a phase in shared memory. Whoever reads them there has passed a barrier before the next phase.
    __device__ __forceinline__ void stage(Stream<S>& stream, int phase) const {
#pragma unroll 1
        for (int first = 0; first < EACH; first += SOME) {
            Pack<T, 4> by[SOME], shift[SOME];
            if constexpr (NORMED && !KEPT) read(by, g, phase, first);
            if constexpr (NORM == LAYER_NORM) read(shift, h, phase, first, h != nullptr);
#pragma unroll(UNROLLED)
            for (int base = 0; base < S::ROWS; base += TOGETHER) {
                Pack<X, 4> v[TOGETHER][SOME];
#pragma unroll
                for (int i = 0; i < TOGETHER; i++)
                    if constexpr (!KEPT) read(v[i], x + i64(base + i) * k, phase, first, base + i < count);
                if (!KEPT && phase % S::PHASES == 0 && base + TOGETHER == S::ROWS && first + SOME >= EACH)
                    stream.fill_rest();
#pragma unroll
                for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                    for (int e = 0; e < SOME; e++) {
                        if (EACH % SOME != 0 && first + e >= EACH) continue;
                        leave(base + i, first + e, phase, KEPT ? kept[KEPT ? base + i : 0][e] : v[i][e],
                              KEPT ? scale[e] : by[e], shift[e]);
                    }
            }
        }
        __syncthreads();
    }

    // Four elements of a row, on their way to shared memory.
    __device__ __forceinline__ void leave(int row, int each, int phase, const Pack<X, 4>& v, const Pack<T, 4>& by,
                                          const Pack<T, 4>& shift) const {
        const int at = phase * S::SPAN + (each * S::THREADS + int(threadIdx.x)) * 4;
        Y* to = staged + row * STRIDE + each * (S::THREADS * 4) + staged_at<Y>(threadIdx.x * 4);
        if constexpr (!NORMED && sizeof(X) == sizeof(Y)) {
            store<4>(to, *reinterpret_cast<const Pack<Y, 4>*>(&v));
        } else {
            Pack<Y, 4> high, low;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float value = to_float(v.v[j]);
                if constexpr (NORMED) {
                    // Beyond k x is zero, but less its mean it is not: there the factor has to be.
                    const bool beyond = NORM == LAYER_NORM && at + j >= k;
                    value = (value - mean[row]) * inverse[row] * (beyond ? 0.f : offset + to_float(by.v[j]));
                    if (NORM == LAYER_NORM) value += to_float(shift.v[j]);
                }
                if (ROUNDED) value = to_float(from_float<T>(value));
                high.v[j] = from_float<Y>(value);
                low.v[j] = from_float<Y>(value - to_float(high.v[j]));
            }
            store<4>(to, high);
            if (LEVELS > 1) store<4>(to + S::ROWS * STRIDE, low);
        }
    }
};

#endif
