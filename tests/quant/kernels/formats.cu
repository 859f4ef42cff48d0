// Toy kernels of tests/quant/test_formats_cuh.py: packed weights read in each way that formats.cuh has.
#include "formats.cuh"

template <typename W>
__global__ void __launch_bounds__(32) size(int* __restrict__ y) {
    if (threadIdx.x == 0) y[0] = sizeof(W);
}

template <typename W>
__global__ void __launch_bounds__(32) elements(const u32* __restrict__ data, f32* __restrict__ y, int m, int k) {
    const W* w = reinterpret_cast<const W*>(data);
    const int row = blockIdx.x;
    for (int column = threadIdx.x; column < k; column += WARP) {
        const W& block = w[i64(row / BLOCK_ROWS) * W::columns(k) + column / BLOCK_COLUMNS];
        const float scale = W::ROW_SCALES ? W::row_scales(w, m, k)[row] : 1.f;
        y[i64(row) * k + column] = block.element(row % BLOCK_ROWS, column % BLOCK_COLUMNS, scale);
    }
}

// The fragments of one block as [8 chunks][32 lanes][4][2] of T, and what becomes of their group as [8][32][scale, offset]
// [rows r, r + 8].
template <typename W, typename T>
__global__ void __launch_bounds__(32)
    fragments(const u32* __restrict__ data, T* __restrict__ y, f32* __restrict__ parts) {
    const W& block = *reinterpret_cast<const W*>(data);
    const int lane = threadIdx.x, r = lane / 4;
    const typename W::Words words = block.lane(lane);
#pragma unroll
    for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
        const int group = chunk / W::GROUP_CHUNKS, at = chunk * WARP + lane;
        u32 minus[2];
        block.template minus<T>(group, r, minus);
        u32 a[4];
        W::template fragment<T>(words, chunk, minus, a);
        memcpy(y + 8 * at, a, 16);
        const Two32 scale = block.scales(group, r), offset = block.offsets(group, r);
        for (int half = 0; half < 2; half++)
            parts[4 * at + half] = scale.v[half], parts[4 * at + 2 + half] = offset.v[half];
    }
}

// The same in bf16 with scales, as `folded` has them: [8 chunks][32 lanes][4][2].
template <typename W>
__global__ void __launch_bounds__(32) folded(const u32* __restrict__ data, bf16* __restrict__ y) {
    const W& block = reinterpret_cast<const W*>(data)[blockIdx.x];
    const typename W::Words words = block.lane(threadIdx.x);
#pragma unroll
    for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
        u32 factor[2], a[4];
        block.factors(chunk / W::GROUP_CHUNKS, threadIdx.x / 4, factor);
        W::folded(words, chunk, factor, a);
        memcpy(y + 8 * ((blockIdx.x * BLOCK_CHUNKS + chunk) * WARP + threadIdx.x), a, 16);
    }
}

// The same as floats: [8][32][rows r, r + 8][4].
template <typename W>
__global__ void __launch_bounds__(32) floats(const u32* __restrict__ data, f32* __restrict__ y) {
    const W& block = *reinterpret_cast<const W*>(data);
    const int lane = threadIdx.x;
    const typename W::Words words = block.lane(lane);
#pragma unroll
    for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
        float number[8];
        block.floats(words, chunk, lane / 4, number);
        for (int i = 0; i < 8; i++) y[(chunk * WARP + lane) * 8 + i] = number[i];
    }
}
