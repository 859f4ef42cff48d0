// expert_linear_mma    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear (experts.cu), for few
//                      pairs of each expert, on tensor cores: x, w, b, y in 16 bits (sm_80 and later); k is a multiple
//                      of 8
//
// linear_mma.cu's way to stream weights once through tensor cores, for the weights of several experts: a tile of up to
// 8 pairs of one expert stands for the 8 rows of x, and only experts that have a pair are read. The columns of y of all
// tiles, one tile behind the other, are dealt to the blocks in equal shares, to the column. So a block goes from one
// expert to the next where its share does; the ring runs on meanwhile, because the warps ask for weights ahead of what
// they multiply. How many tiles there are is read on the device: the grid depends on sizes alone.
//
// Which weights are read depends on what earlier kernels chose, so the ring is filled behind the wait for them. Where k
// goes in phases, a share is cut into runs of RUN tiles of columns, whose sums wait in shared memory.
//
// Launch and op: cuplama/ops/experts.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Measured on an H200, 2026-11-28, one row of Qwen3-30B-A3B: gate_up 19.9 us, down 12.7, whose bytes would take 11.4 and
// 5.7. Tried: rings of 160 KB in place of 64 (19.7 and 13.6; of 64 rows 240.5 for 239.9, and 127.6 for 122.7). From two
// rows on tiles are faster (cuplama/ops/experts.py).
#include "experts.cuh"
#include "linear_mma.cuh"

constexpr int RUN = 8;

// What is left of a block's columns: of tile `at / m` of the pairs, column `at % m`, and so on up to `stop`.
template <int ACT, int PHASES, typename T>
struct Share {
    const T* all;  // w
    PairTiles<ROWS> tiles;
    u32 at, stop;
    int m, k;

    __device__ __forceinline__ Share(const T* w, const PairTiles<ROWS>& tiles, int m, int k)
        : all(w), tiles(tiles), m(m), k(k) {
        const u32 columns = u32(tiles.count()) * m, each = columns / gridDim.x, more = columns % gridDim.x;
        at = blockIdx.x * each + min(blockIdx.x, more);
        stop = at + each + (blockIdx.x < more);
    }

    // The next columns begin .. end - 1, of one tile.
    __device__ __forceinline__ bool next(PairTile& tile, int& begin, int& end) {
        if (at >= stop) return false;
        tile = tiles.at(at / u32(m));
        begin = at % u32(m);
        end = min(begin + int(stop - at), m);
        if (PHASES > 1) end = min(end, begin + RUN * COLUMNS<ACT>);
        at += end - begin;
        return true;
    }

    // The same for the stream of weights.
    __device__ __forceinline__ bool next(const T*& w, int& begin, int& end) {
        PairTile tile;
        if (!next(tile, begin, end)) return false;
        w = all + i64(tile.expert) * HALVES<ACT> * m * k;
        return true;
    }
};

// What becomes of the sums: rows of y where the pairs are.
template <int ACT, typename T>
struct PairRows {
    static constexpr const f32* a = nullptr;
    const i32* pairs;
    T* y;
    int m;
    f32 alpha, limit;

    __device__ __forceinline__ float residual(int, int) const { return 0.f; }
    __device__ __forceinline__ void put(int r, int column, float, const float (&total)[HALVES<ACT>]) const {
        y[i64(pairs[r]) * m + column] = from_float<T>(gated<ACT, T>(total, alpha, limit));
    }
};

template <typename T, int ACT, int WARPS, int CHUNKS, int PHASES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    expert_linear_mma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                      const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    using Own = Share<ACT, PHASES, T>;
    __shared__ i32 before[MAX_EXPERTS + 1];
    pdl_wait();
    Own share(w, PairTiles<ROWS>(offsets, before, E), m, k), ahead = share;
    const T* from = w;
    int begin = 0, end = 0;
    ahead.next(from, begin, end);
    Stream<COLUMNS<ACT>, WARPS, CHUNKS, PHASES, DEPTH, T, Own> stream(from, m, k, begin, end, ahead);
    Vector vectors[CHUNKS][2][1];
    Turn turn;
    PairTile tile;
    while (share.next(tile, begin, end)) {
        const i32* own = pairs + tile.first;
        const int row = own[min(lane_row(), tile.count - 1)] / s;
        const PlainRows<WARPS, CHUNKS, T> rows(x, row, k, lane_row() < tile.count);
        const T* bias = b == nullptr ? nullptr : b + i64(tile.expert) * HALVES<ACT> * m;
        const PairRows<ACT, T> out{own, y, m, alpha, limit};
        multiply_columns<ACT>(stream, turn, begin, end, rows, vectors, bias, out, tile.count);
    }
}
