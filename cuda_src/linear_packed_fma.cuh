// linear_packed.cu by multiply-adds on floats: T = f32, and GPUs whose tensor cores have no mma.m16n8k16 (before sm_80).
// The rows of x lie in shared memory, as f32, those of a phase at a time; a lane has the same codes as on tensor cores.
#ifndef CUPLAMA_LINEAR_PACKED_FMA_CUH
#define CUPLAMA_LINEAR_PACKED_FMA_CUH

#include "linear_packed.cuh"

// LEVELS: 1 where a normalised element is rounded to T, as by the norm alone, 2 where y is f32.
template <typename S, int NORM, int LEVELS, typename X>
struct SharedRows {
    typedef typename S::T T;
    const X* x;
    const T *g, *h;
    const i32* order;
    int k, count;
    f32* staged;  // [ROWS][SPAN]
    float mean[S::ROWS], inverse[S::ROWS];

    __device__ __forceinline__ SharedRows(const X* x, const T* g, const T* h, const i32* order, int k, int count,
                                          f32* staged)
        : x(x), g(g), h(h), order(order), k(k), count(count), staged(staged) {}

    __device__ __forceinline__ void measure(f32 eps) {
        if constexpr (NORM != NO_NORM) {
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) {
                const X* from = x + i64(min(row, count - 1)) * k;
                float total = 0.f;
                mean[row] = 0.f;
                if (NORM == LAYER_NORM) {
                    for (int at = threadIdx.x; at < k; at += S::THREADS) total += to_float(from[at]);
                    mean[row] = block_sum(total) / k;
                    total = 0.f;
                }
                for (int at = threadIdx.x; at < k; at += S::THREADS) {
                    const float less = to_float(from[at]) - mean[row];
                    total += less * less;
                }
                inverse[row] = 1.f / sqrtf(block_sum(total) / k + eps);
            }
        }
    }

    __device__ __forceinline__ void operator()(int phase) const {
        if (phase > 0) __syncthreads();  // the phase before is read
        for (int i = threadIdx.x; i < S::SPAN; i += S::THREADS) {
            const int column = phase * S::SPAN + i;
            const bool inside = column < k;
            const int at = S::ORDERED && inside ? order[column] : column;
            const float by = NORM != NO_NORM && inside ? to_float(g[at]) : 0.f;
            const float shift = NORM == LAYER_NORM && inside ? to_float(h[at]) : 0.f;
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) {
                float value = inside && row < count ? to_float(x[i64(row) * k + at]) : 0.f;
                if (NORM != NO_NORM && inside && row < count) {
                    value = normalised<NORM>(value, mean[row], inverse[row], by, shift);
                    if (LEVELS == 1) value = to_float(from_float<T>(value));
                }
                staged[row * S::SPAN + i] = value;
            }
        }
        __syncthreads();
    }
};

template <typename S>
struct FloatFactors {
    typedef typename S::T T;
    const f32* x;  // of this lane's columns

    template <typename Rows>
    __device__ __forceinline__ void fill(const Rows& rows, int phase) {
        rows(phase);
        x = rows.staged + place<S>(0, 0);
    }

    __device__ __forceinline__ void multiply_tile(Stream<S>& stream, int count, f32* partial) const {
        float total[S::ROWS][2] = {};
#pragma unroll 1
        for (int b = 0; b < count; b++) add_block(stream.take(), x + b * BLOCK_COLUMNS, total);
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int row = 0; row < S::ROWS; row++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float& sum = total[row][half];
                sum += __shfl_xor_sync(ALL_LANES, sum, 1);
                sum += __shfl_xor_sync(ALL_LANES, sum, 2);
                if (lane % 4 == 0) partial[(lane / 4 + 8 * half) * S::ROWS + row] = sum;
            }
    }

    static __device__ __forceinline__ void add_block(const typename S::W& block, const f32* x,
                                                     float (&total)[S::ROWS][2]) {
        typedef typename S::W W;
        const int r = lane_row();
        const typename W::Words words = block.lane(threadIdx.x % WARP);
#pragma unroll
        for (int g = 0; g < W::GROUPS; g++) {
            float sum[S::ROWS][2] = {}, plain[S::ROWS] = {};
#pragma unroll
            for (int c = 0; c < W::GROUP_CHUNKS; c++) {
                const int chunk = g * W::GROUP_CHUNKS + c;
                float w[8];
                block.floats(words, chunk, r, w);
#pragma unroll
                for (int row = 0; row < S::ROWS; row++) {
                    const Pack<f32, 4> v = load<4>(x + row * S::SPAN + chunk * CHUNK_COLUMNS);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        sum[row][0] = fmaf(w[j], v.v[j], sum[row][0]);
                        sum[row][1] = fmaf(w[4 + j], v.v[j], sum[row][1]);
                        if (W::OFFSET) plain[row] += v.v[j];
                    }
                }
            }
            Two32 scale = {{1.f, 1.f}}, offset;
            if (W::GROUP > 0) scale = block.scales(g, r);
            if (W::OFFSET) offset = block.offsets(g, r);
#pragma unroll
            for (int row = 0; row < S::ROWS; row++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if (W::OFFSET) total[row][half] = fmaf(offset.v[half], plain[row], total[row][half]);
                    total[row][half] = fmaf(scale.v[half], sum[row][half], total[row][half]);
                }
        }
    }
};

#endif
