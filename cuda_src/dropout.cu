// dropout  y[n,d] = word < threshold ? 0 : scale * x        x, y: f32; threshold = p 2^32, scale = 1 / (1 - p)
//          Element e = i * d + j has word e % 4 of Philox 4x32-10 with the counter (e / 4, stream, 0, 0) and the key
//          seed[2]: u32, the low half first. So the gradient is the same kernel on dy: it draws the same words.
//
// Mapping: x is one long row; a thread takes the 4 elements, 16 bytes, of one draw.
//
// Op and reference: cuplama/ops/dropout.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "philox.cuh"

__global__ void __launch_bounds__(256)
    dropout(const f32* __restrict__ x, const u32* __restrict__ seed, f32* __restrict__ y, int n, int d, int stream,
            u32 threshold, f32 scale) {
    const i64 size = i64(n) * d;
    const bool vectorized = aligned(x, y);
    const u64 key = u64(seed[1]) << 32 | seed[0];
    for (i64 i = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; i < size; i += i64(gridDim.x) * blockDim.x * 4) {
        Pack<f32, 4> v = load_row<4>(x, i, size, vectorized);
        u32 word[4];
        philox(u32(i / 4), u32(stream), key, word);
#pragma unroll
        for (int j = 0; j < 4; j++) v.v[j] = word[j] < threshold ? 0.f : scale * v.v[j];
        store_row<4>(y, i, size, vectorized, v);
    }
}
