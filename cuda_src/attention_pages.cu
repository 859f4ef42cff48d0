// widen_pages  The pages of an e4m3 cache that the sequences use, in the model's dtype and under the same numbers, for
//              the attention of many new tokens (attention_prefill_mma.cu, attention_prefill_wgmma.cu):
//                  wide_k, wide_v[page_table[i, j]] = k, v[page_table[i, j]]      for j * S < seq_lens[i]
//              k, v[P,H,S,D]: C, wide_k, wide_v[P,H,S,D]: T, page_table[b,M]: i32, seq_lens[b]: i32
//
// Those kernels copy 16-bit rows from the pages straight to shared memory, for every tile of queries once more. Here a
// row is converted once for all of them: 1 byte read and 2 written for each number, beside 4 * num_heads / H products
// with every new token. attention_prefill_fma.cu, which has the numbers in registers on their way, converts them there.
//
// Mapping: block (j * H + head, i) takes one head of a page, a thread 8 numbers at a time.
//
// Op: cuplama/ops/attention.py. Test: tests/ops/. Benchmark: `cuplama kernels bench attention --shape new=512,C=e4m3`.
// Tried: nothing else yet. Only the pages that a window shows would be fewer, from a multiple of the tiles' keys on.
#include "e4m3.cuh"

template <int D, int S, typename T, typename C>
__device__ __forceinline__ void widen_rows(const C* from, T* to) {
    for (int at = threadIdx.x * 8; at < S * D; at += blockDim.x * 8) {
        const Pack<C, 8> stored = load<8>(from + at);
        const auto& x = readable(stored);
        Pack<T, 8> out;
#pragma unroll
        for (int i = 0; i < 8; i++) out.v[i] = from_float<T>(to_float(x.v[i]));
        store<8>(to + at, out);
    }
}

template <typename T, typename C, int D, int S>
__global__ void __launch_bounds__(256)
    widen_pages(const C* __restrict__ k, const C* __restrict__ v, const i32* __restrict__ seq_lens,
                const i32* __restrict__ page_table, T* __restrict__ wide_k, T* __restrict__ wide_v, int H, int M) {
    const int sequence = blockIdx.y, number = blockIdx.x / H, head = blockIdx.x % H;
    if (i64(number) * S >= seq_lens[sequence]) return;
    const i64 at = (i64(page_table[i64(sequence) * M + number]) * H + head) * (S * D);
    widen_rows<D, S>(k + at, wide_k + at);
    widen_rows<D, S>(v + at, wide_v + at);
}
