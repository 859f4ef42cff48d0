// What the prefill kernels on tensor cores share: the tile of queries of a block, and rounding.
#ifndef CUPLAMA_ATTENTION_PREFILL_CUH
#define CUPLAMA_ATTENTION_PREFILL_CUH

#include "attention.cuh"
#include "ptx.cuh"

// Two values rounded to T in one register, the first in the lower half.
template <typename T>
__device__ __forceinline__ u32 pack(float low, float high);
template <>
__device__ __forceinline__ u32 pack<f16>(float low, float high) {
    const __half2 x = __floats2half2_rn(low, high);
    return *reinterpret_cast<const u32*>(&x);
}
template <>
__device__ __forceinline__ u32 pack<bf16>(float low, float high) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const u32*>(&x);
}

// Tiles are numbered over the whole batch without knowing the lengths: sequence i has the numbers from
// starts[i]*group/rows + i to those of sequence i+1, which are at least as many as its tiles.
__device__ __forceinline__ int first_tile(const i32* starts, int i, int group, int rows) {
    return starts[i] * group / rows + i;
}

// A tile of up to `rows` (token, head of the group) pairs of one sequence.
struct Tile {
    int sequence, start, old;  // start: row of x of its first new token; old: tokens before the new ones
    int first, end;            // rows of the sequence; empty for numbers beyond its last tile

    __device__ __forceinline__ Tile(const i32* starts, const i32* lengths, int b, int group, int rows, int number) {
        sequence = 0;
        for (int last = b; last - sequence > 1;) {
            const int middle = (sequence + last) / 2;
            if (first_tile(starts, middle, group, rows) <= number)
                sequence = middle;
            else
                last = middle;
        }
        start = starts[sequence];
        const int fresh = starts[sequence + 1] - start;
        old = lengths[sequence] - fresh;
        first = (number - first_tile(starts, sequence, group, rows)) * rows;
        end = fresh * group;
    }
};

#endif
