// What the attention kernels share: where a token lies, the tile of queries of a block, and numbers of the softmax.
#ifndef CUPLAMA_ATTENTION_CUH
#define CUPLAMA_ATTENTION_CUH

#include "common.cuh"

constexpr float LOG2_E = 1.44269504f;  // scores, or queries, are scaled by it, so that exponentials are powers of two
constexpr float LN_2 = 0.693147181f;
constexpr float LOWEST = -1e30f;  // of a row that has seen no key: finite, so that LOWEST - LOWEST is 0 and not NaN

// Where token `position` of a sequence begins in k or v. table: the sequence's row of page_table. S = 0: there are no
// pages, and k or v is a column of rows of H heads.
template <int S, int D>
__device__ __forceinline__ i64 token_offset(const i32* table, int position, int head, int H) {
    if constexpr (S == 0)
        return i64(position) * H * D;
    else
        return ((i64(table[position / S]) * H + head) * S + position % S) * D;
}

// Tiles are numbered over the whole batch without knowing the lengths: sequence i has the numbers from
// cu_seqlens[i]*group/rows + i to those of sequence i+1, which are at least as many as its tiles.
__device__ __forceinline__ int first_tile(const i32* cu_seqlens, int i, int group, int rows) {
    return cu_seqlens[i] * group / rows + i;
}

// A tile of up to `rows` (token, head of the group) pairs of one sequence.
struct Tile {
    int sequence, start, old;  // start: row of x of its first new token; old: tokens before the new ones
    int first, end;            // rows of the sequence; empty for numbers beyond its last tile

    // Of sequences that are new as a whole, as in training.
    __device__ __forceinline__ Tile(const i32* cu_seqlens, int b, int group, int rows, int number) {
        sequence = 0;
        for (int last = b; last - sequence > 1;) {
            const int middle = (sequence + last) / 2;
            if (first_tile(cu_seqlens, middle, group, rows) <= number)
                sequence = middle;
            else
                last = middle;
        }
        start = cu_seqlens[sequence];
        old = 0;
        first = (number - first_tile(cu_seqlens, sequence, group, rows)) * rows;
        end = (cu_seqlens[sequence + 1] - start) * group;
    }

    // seq_lens is not looked at where there are no pages: see token_offset.
    template <int S>
    static __device__ __forceinline__ Tile of(const i32* cu_seqlens, const i32* seq_lens, int b, int group, int rows,
                                              int number) {
        Tile tile(cu_seqlens, b, group, rows, number);
        if constexpr (S > 0)
            tile.old = seq_lens[tile.sequence] - (cu_seqlens[tile.sequence + 1] - cu_seqlens[tile.sequence]);
        return tile;
    }
};

// ln of a sum of exponentials: the largest is 2^largest, and sum is relative to it.
__device__ __forceinline__ float log_sum(float largest, float sum) { return (largest + log2f(sum)) * LN_2; }

// The keys low .. high-1 that some row of a tile sees; low is rounded down to a multiple of KEYS.
template <int ROWS, int KEYS>
struct Band {
    int low, high;

    __device__ __forceinline__ Band(const Tile& tile, int group, int window) {
        high = tile.old + (min(tile.first + ROWS, tile.end) - 1) / group + 1;
        const int seen = tile.old + tile.first / group - window + 1;
        low = window > 0 && seen > 0 ? seen / KEYS * KEYS : 0;
    }
};

#endif
