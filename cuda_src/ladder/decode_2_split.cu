// Decode, rung 2: the keys of a head are divided over blocks, and a second kernel adds the parts up (Flash-Decoding:
// Dao, Haziza, Massa & Sizov, 2023).
//
//   q, k, v, y    as in ladder.cuh, with n = 1
//   partial       [num_heads, splits, D] f32    of a split, the sum of exp2(score - largest) * value
//   stats         [num_heads, splits, 2] f32    of a split, the largest score, and the sum of the exponentials
//
// Op: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Benchmark: cuplama kernels ladder decode.
//
// What changed: grid (splits, num_heads). An online softmax may be cut anywhere: two parts with largest scores m1 and
// m2 are added as two tiles are, after a factor exp2(m - max(m1, m2)) for each. So every multiprocessor has keys to ask
// for, and several blocks at once.
//
// Bytes: as rung 1, and num_heads * splits * (D + 2) floats written and read again: 0.5 MB for 32 heads and 32 splits,
// beside 2 * H * s * D elements, 67 MB for 16k tokens (8 heads of 128, 16 bits). And one launch more, some 2 us.
//
// Op and reference: cuplama/lab/ladder/ops.py. Test: tests/lab/test_ladder.py. Run: cuplama kernels ladder decode.
#include "ladder/decode.cuh"

template <typename T, int D>
__global__ void __launch_bounds__(WARPS* WARP)
    decode_split(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, f32* __restrict__ partial,
                 f32* __restrict__ stats, int s, int num_heads, int H, int splits, int keys, f32 scale) {
    const int split = blockIdx.x, head = blockIdx.y, begin = split * keys, end = min(s, begin + keys);
    const T *from_k = head_rows<D>(k, head, num_heads, H, s), *from_v = head_rows<D>(v, head, num_heads, H, s);
    float largest, sum;
    const float element = attend<D>(q + head * D, from_k, from_v, begin, end, scale, largest, sum);
    const i64 part = i64(head) * splits + split;
    if (threadIdx.x < D) partial[part * D + threadIdx.x] = element;
    if (threadIdx.x == 0) stats[part * 2] = largest, stats[part * 2 + 1] = sum;
}

template <typename T, int D>
__global__ void __launch_bounds__(D)
    decode_combine(const f32* __restrict__ partial, const f32* __restrict__ stats, T* __restrict__ y, int splits) {
    const i64 first = i64(blockIdx.x) * splits;
    float largest = LOWEST, sum = 0.f, element = 0.f;
    for (int i = 0; i < splits; i++) largest = fmaxf(largest, stats[(first + i) * 2]);
    for (int i = 0; i < splits; i++) {
        const float weight = exp2f(stats[(first + i) * 2] - largest);
        sum += weight * stats[(first + i) * 2 + 1];
        element += weight * partial[(first + i) * D + threadIdx.x];
    }
    y[blockIdx.x * D + threadIdx.x] = from_float<T>(element / sum);
}
