// What attention_backward_wgmma.cu is made of: which block has which keys, and when it adds to dq.
#ifndef CUPLAMA_ATTENTION_BACKWARD_WGMMA_CUH
#define CUPLAMA_ATTENTION_BACKWARD_WGMMA_CUH

#include "attention.cuh"

constexpr int GROUP = 128, MINE = 64;    // threads and keys of a warpgroup
constexpr int KEYS = 128, PANEL = 64;    // keys of a block, columns of a panel
constexpr int WARPS = 2 * GROUP / WARP;  // that compute

// Tiles of `rows` tokens are numbered over the whole batch as in attention.cuh: sequence i has the numbers from
// cu_seqlens[i] / rows + i on. This finds the sequence of a number, and the tile in it; it may be one past the last.
struct Sequence {
    int number, tile;

    __device__ __forceinline__ Sequence(const i32* cu_seqlens, int b, int rows, int of) {
        number = 0;
        for (int last = b; last - number > 1;) {
            const int middle = (number + last) / 2;
            if (first_tile(cu_seqlens, middle, 1, rows) <= of)
                number = middle;
            else
                last = middle;
        }
        tile = of - first_tile(cu_seqlens, number, 1, rows);
    }
};

// Tiles of keys that a sequence has.
__device__ __forceinline__ int key_tiles(const i32* cu_seqlens, int i) {
    return (cu_seqlens[i + 1] - cu_seqlens[i] + KEYS - 1) / KEYS;
}

// Numbers from .. to-1 without those below `low`.
__device__ __forceinline__ int from_low(int from, int to, int low) { return max(0, to - max(from, low)); }

// The order in which blocks take tiles of keys, and in which they add to dq. Tile j of a sequence of `tiles` tiles has
// the level longest - tiles + j: the lower, the more queries see it. Levels come in rounds, each about what runs at
// once. Tiles of a round that start together go from the highest level down: a block's first tile of queries is one
// that the block before has just left, so nobody waits, and the last ends first. The next round is then started one
// after the other and goes up: all of them end together. Blocks of many sequences come heavy ones first by this.
//
// order[e] = (sequence, tile, longest - tiles, levels of a round) for block e * H and the H - 1 behind it; sequence -1:
// none. One thread an entry.
__device__ __forceinline__ void order_keys(const i32* cu_seqlens, i32* order, int n, int b, int H, int sms) {
    __shared__ int longest_of[8], total_of[8];
    int longest = 0, total = 0;
    for (int i = threadIdx.x; i < b; i += 256) {
        const int tiles = key_tiles(cu_seqlens, i);
        longest = max(longest, tiles), total += tiles;
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        longest = max(longest, __shfl_xor_sync(ALL_LANES, longest, lanes));
        total += __shfl_xor_sync(ALL_LANES, total, lanes);
    }
    if (threadIdx.x % WARP == 0) longest_of[threadIdx.x / WARP] = longest, total_of[threadIdx.x / WARP] = total;
    __syncthreads();
    longest = total = 0;
    for (int i = 0; i < 8; i++) longest = max(longest, longest_of[i]), total += total_of[i];
    const int entry = blockIdx.x * 256 + threadIdx.x, entries = n / KEYS + b;
    if (entry >= entries) return;
    if (entry >= total) store<4>(order + entry * 4, Pack<i32, 4>{{-1, 0, 0, 0}});
    const Sequence mine(cu_seqlens, b, KEYS, entry);
    const int tiles = key_tiles(cu_seqlens, mine.number), tile = mine.tile;
    if (tile >= tiles) return;
    const int round = max(1, int(i64(sms) * longest / (i64(total) * H)));  // total is not 0: it has this tile
    const int level = longest - tiles + tile, begin = level / round * round, end = min(begin + round, longest);
    const bool down = level / round % 2 == 0;
    int place = 0;
    for (int i = 0; i < b; i++) {
        const int low = longest - key_tiles(cu_seqlens, i);
        place += from_low(0, begin, low) + (down ? from_low(level + 1, end, low) : from_low(begin, level, low));
        place += i < mine.number && level >= low;
    }
    store<4>(order + place * 4, Pack<i32, 4>{{mine.number, tile, longest - tiles, round}});
}

// What a block does: its tile of keys, and the tiles first .. last-1 of M queries that see it.
template <int M>
struct Work {
    int start, length;        // of the sequence: its first row, and its tokens
    int key, window;          // the first key; 0: no window
    int first, last, number;  // number: of the sequence's first tile of queries
    int level, shift, round;  // see order_keys

    __device__ __forceinline__ Work(const i32* cu_seqlens, const Pack<i32, 4>& entry, int window_of_all) {
        const int sequence = entry.v[0];
        start = cu_seqlens[sequence], length = cu_seqlens[sequence + 1] - start;
        window = window_of_all < length ? window_of_all : 0;
        key = entry.v[1] * KEYS, shift = entry.v[2], round = entry.v[3], level = entry.v[1] + shift;
        first = key / M;
        last = ((window > 0 ? min(length, key + KEYS - 1 + window) : length) + M - 1) / M;
        number = first_tile(cu_seqlens, sequence, 1, M);
    }

    // How many tiles of keys add to tile t of the queries before this one.
    __device__ __forceinline__ int turn(int t) const {
        const int seen = t * M - window + 1, begin = level / round * round;
        const int low = shift + (window > 0 && seen > 0 ? seen / KEYS : 0);
        const int high = shift + t * M / KEYS;  // a tile of queries lies in one of keys
        const int in_round = level / round % 2 == 0 ? min(high, begin + round - 1) - level : level - max(low, begin);
        return max(0, begin - low) + in_round;
    }
};

#endif
