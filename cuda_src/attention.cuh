// What the attention kernels share: where a token lies, and numbers of the softmax.
#ifndef CUPLAMA_ATTENTION_CUH
#define CUPLAMA_ATTENTION_CUH

#include "common.cuh"

constexpr float LOG2_E = 1.44269504f;  // scores, or queries, are scaled by it, so that exponentials are powers of two
constexpr float LOWEST = -1e30f;  // of a row that has seen no key: finite, so that LOWEST - LOWEST is 0 and not NaN

// Where token `position` of a sequence begins in k or v. table: the sequence's row of `blocks`.
template <int S, int D>
__device__ __forceinline__ i64 token_offset(const i32* table, int position, int head, int H) {
    return ((i64(table[position / S]) * H + head) * S + position % S) * D;
}

#endif
