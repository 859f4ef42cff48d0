// token_mask    y[b,V] = x[b,V] where the mask has the token's bit, else -infinity        x, y: f32
//
//   mask  i32 [b, (V+31)//32]: bit t % 32 of word t / 32 is that of token t
//
// Mapping: a block does 1024 tokens of a row, a thread 4 of them, whose bits lie in one word; 8 threads share that word.
//
// Op and reference: cuplama/ops/token_mask.py. Test: tests/ops/. Benchmark: cuplama kernels bench token_mask.
// Tried: nothing else yet.
#include "common.cuh"

__global__ void __launch_bounds__(256)
    token_mask(const f32* __restrict__ x, const i32* __restrict__ mask, f32* __restrict__ y, int V) {
    const int t = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    if (t >= V) return;
    const i64 row = blockIdx.y, words = (i64(V) + WARP - 1) / WARP;
    const u32 bits = u32(mask[row * words + t / WARP]) >> (t % WARP);
    const f32* from = x + row * V;
    f32* to = y + row * V;
    const bool vectorized = aligned(from, to);
    Pack<f32, 4> v = load_row<4>(from, t, V, vectorized);
#pragma unroll
    for (int j = 0; j < 4; j++)
        if (!(bits >> j & 1)) v.v[j] = -infinity();
    store_row<4>(to, t, V, vectorized, v);
}
