// What the kernels of attention's backward pass share: where queries, keys and their gradients lie, and who sees whom.
#ifndef CUPLAMA_ATTENTION_BACKWARD_CUH
#define CUPLAMA_ATTENTION_BACKWARD_CUH

#include "attention.cuh"

// One sequence and one KV head. A row is a (token, head of the group) pair, number token * group + head. Elements of x
// and dx lie at the same places.
template <int D>
struct Head {
    int start, kv_head, group, num_heads, H;  // start: row of x of the sequence's first token

    // Of a row in an array [n, num_heads].
    __device__ __forceinline__ i64 row(int row) const {
        return i64(start + row / group) * num_heads + kv_head * group + row % group;
    }
    // Of a row's query, a token's key and its value in x.
    __device__ __forceinline__ i64 query(int row) const {
        return (i64(start + row / group) * (num_heads + 2 * H) + kv_head * group + row % group) * D;
    }
    __device__ __forceinline__ i64 key(int token) const {
        return (i64(start + token) * (num_heads + 2 * H) + num_heads + kv_head) * D;
    }
    __device__ __forceinline__ i64 value(int token) const { return key(token) + H * D; }

    // Of a row in dy, and of its query in x: both for one division.
    __device__ __forceinline__ void both(int row, i64& out, i64& query) const {
        const int token = row / group;
        const i64 number = i64(start + token) * num_heads + kv_head * group + (row - token * group);
        out = number * D, query = (number + i64(start + token) * 2 * H) * D;
    }
};

// The rows low .. high-1 that see one of the keys of a tile, whose `end` is the sequence's length.
struct Sight {
    int low, high;

    __device__ __forceinline__ Sight(const Tile& tile, int keys, int group, int window) {
        const int last = min(tile.first + keys, tile.end) - 1;
        low = tile.first * group;
        high = (window > 0 && window < tile.end - last ? last + window : tile.end) * group;
    }
};

// Whether a query sees a key that lies that many tokens before it.
__device__ __forceinline__ bool sees(int distance, int window) {
    return distance >= 0 && (window == 0 || distance < window);
}

#endif
