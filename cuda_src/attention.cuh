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

    // Whether its rows see no key: a decode step has a row for sequences without tokens, too, which fill it up.
    __device__ __forceinline__ bool blind() const { return old < 0; }

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

// Zeros for a tile's rows, `rows` at most, of query heads that share a KV head. All threads of the block share them out.
template <int D, typename T>
__device__ __forceinline__ void store_zeros(T* y, const Tile& tile, int rows, int group, int kv_head, int num_heads) {
    const int count = min(rows, tile.end - tile.first) * D;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int row = tile.first + i / D, head = kv_head * group + row % group;
        y[(i64(tile.start + row / group) * num_heads + head) * D + i % D] = from_float<T>(0.f);
    }
}

// How the product of a query and a key becomes a score, in powers of two: it is multiplied with `factor`. CAPPED, the
// score is softcap * tanh(scale * product / softcap): the product is multiplied with `inner`, bent to -1 .. 1, and then
// multiplied with `factor`. unit: what undoes a factor that the queries have.
//
// tanh x is 1 - 2 / (1 + e^2x), by the fast exponential and division. It is off by some 1e-7, and the score by as much of
// the cap. The hardware's tanh may be off by 2^-11 of the score: a score of 10 by 0.005, and so its weight by 0.5%, more
// than rounding it to bf16 costs. For f32 it is tanhf, whose error is relative to x.
template <typename T, bool CAPPED>
struct Scaling {
    static constexpr float IN_POWERS = sizeof(T) == 4 ? 1.f : 2.f * LOG2_E;
    float inner, factor;

    __device__ __forceinline__ Scaling(float scale, float softcap, float unit = 1.f)
        : inner(CAPPED ? scale / softcap * (unit * IN_POWERS) : 1.f),
          factor(CAPPED ? softcap * LOG2_E : scale * (LOG2_E * unit)) {}

    // tanh(x / IN_POWERS)
    static __device__ __forceinline__ float bend(float x) {
        return sizeof(T) == 4 ? tanhf(x) : 1.f - __fdividef(2.f, 1.f + exp2f(x));
    }

    // Of products all that comes before `factor`.
    template <int N>
    __device__ __forceinline__ void bend_all(float (&products)[N]) const {
        if constexpr (CAPPED) {
#pragma unroll
            for (int i = 0; i < N; i++) products[i] = bend(products[i] * inner);
        }
    }

    __device__ __forceinline__ float score(float product) const {
        return (CAPPED ? bend(product * inner) : product) * factor;
    }

    // The same in two parts: what the query is multiplied with before the product, and what is left to do after it.
    __device__ __forceinline__ float of_query() const { return CAPPED ? inner : factor; }
    __device__ __forceinline__ float rest(float x) const { return CAPPED ? bend(x) * factor : x; }

    // What tanh multiplies a gradient with, by its own value. A pair that is shut out has -infinity there; it gives 0.
    static __device__ __forceinline__ float slope(float bent) { return CAPPED ? fmaxf(0.f, 1.f - bent * bent) : 1.f; }

    // tanh's value again, from a weight 2^(score - shift).
    __device__ __forceinline__ float bent(float weight, float shift) const {
        return __fdividef(log2f(weight) + shift, factor);
    }
};

// A softmax's sum of exponentials relative to 2^largest. With SINKS the head has one more logit, without a value.
template <bool SINKS, typename T>
__device__ __forceinline__ float with_sink(float sum, float largest, const T* sinks, int head) {
    return SINKS ? sum + exp2f(to_float(sinks[head]) * LOG2_E - largest) : sum;
}

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
