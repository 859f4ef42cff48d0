// Decode, rung 1: one new token, a block for each query head.
//
//   q, k, v, y    as in ladder.cuh, with n = 1
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder decode.
//
// Each element of k and v, 2 bytes, takes part in one multiply-add for each head of its group: with 4 heads that is 4
// operations a byte. An H200 does 14 by plain multiply-adds, and 200 on tensor cores, in the time that a byte takes
// from memory: so what counts is how fast k and v arrive. The least that must be read is 2 * H * s * D elements.
//
// Mapping: grid (num_heads), 8 warps; see decode.cuh.
// Bytes asked for: 2 * num_heads * s * D elements, since each head of a group reads the keys for itself (those of a
// group run together, so most of it comes from the L2 cache).
// What is slow: 32 heads are 32 blocks, on 32 of 132 multiprocessors. A warp has 4 keys and values on their way, a
// block 32: with D = 128 and 16 bits that is 16 KB. Memory answers after some 0.8 us, so a block gets 16 KB / 0.8 us =
// 20 GB/s, and 32 of them 0.6 of 4.8 TB/s.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder decode.
#include "ladder/decode.cuh"

template <typename T, int D>
__global__ void __launch_bounds__(WARPS* WARP)
    decode_block(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ y, int s,
                 int num_heads, int H, f32 scale) {
    const int head = blockIdx.x;
    const T *keys = head_rows<D>(k, head, num_heads, H, s), *values = head_rows<D>(v, head, num_heads, H, s);
    float largest, sum;
    const float element = attend<D>(q + head * D, keys, values, 0, s, scale, largest, sum);
    if (threadIdx.x < D) y[head * D + threadIdx.x] = from_float<T>(element / sum);
}
