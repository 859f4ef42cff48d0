// linear_packed.cu by multiply-adds on floats: T = f32, and GPUs whose tensor cores have no mma.m16n8k16 (before
// sm_80). The rows of x lie in shared memory, as f32, those of a phase at a time; a lane has the same codes as on
// tensor cores.
#ifndef CUPLAMA_LINEAR_PACKED_FMA_CUH
#define CUPLAMA_LINEAR_PACKED_FMA_CUH

#include "linear_packed_rows.cuh"

template <typename S>
struct FloatFactors {
    typedef typename S::T T;
    const f32* x;  // of this lane's columns

    template <typename Weights, typename Rows>
    __device__ __forceinline__ void fill(Stream<S, Weights>& stream, const Rows& rows, int phase) {
        rows.stage(stream, phase);
        x = rows.staged + threadIdx.x / WARP * (S::BLOCKS * BLOCK_COLUMNS) + threadIdx.x % 4 * 4;
    }

    template <typename Weights>
    __device__ __forceinline__ void multiply_tile(Stream<S, Weights>& stream, int count, f32* partial) const {
        float total[S::ROWS][2] = {};
#pragma unroll 1
        for (int b = 0; b < count; b++) add_block(*stream.take(), x + b * BLOCK_COLUMNS, total);
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
