// expert_linear_packed    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear (experts.cu), of a
//                         packed weight (formats.cuh), for few pairs of each expert: x[n,k], b[E,m] (may be null), y: T;
//                         w: W, the row blocks of an expert behind those of the one before it, of which each has the
//                         same number; where two rows of w make a column of y, m is a multiple of 16
//
// linear_packed.cu's way to stream packed blocks, for the weights of several experts: a tile of up to ROWS pairs of one
// expert stands for the rows of x, and only experts that have a pair are read. The units of all tiles (16 columns of y),
// one tile behind the other, are dealt to the GPU blocks in equal shares. So a block goes from one expert to the next
// where its share does; the rings run on meanwhile, because the warps ask for weights ahead of what they multiply. How
// many tiles there are is read on the device: the grid depends on sizes alone.
//
// An expert's weights are read once for each of its tiles, so ROWS is what most experts have no more of: up to 16 on
// tensor cores, where the numbers of a packed block are made once for up to two products with 8 rows. Instructions are
// what this costs: with x of 8 rows a block of MXFP4 takes a warp some 200, with 16 some 211, and a multiprocessor of an
// H200 has time for some 250 while memory brings it one (counted and computed, not measured). So a warp takes the blocks
// of two tiles with the same columns together (TWINS), which halves what it reads of x and what asking and waiting take,
// and scales that are powers of two go into the numbers.
//
// Which weights are read depends on what earlier kernels chose, so the rings are filled behind the wait for them, and
// only in part before x is asked for; or, where it was not the kernel directly ahead that chose (ahead), as a whole
// before the wait for that one, which makes x. A row of x goes through shared memory as a whole: k has one phase, and
// where it is long a tile has fewer rows.
//
// Launch: cuplama/ops/experts_packed.py. Op: cuplama/ops/experts.py. Test: tests/ops/test_experts_packed.py.
// Benchmark: benchmarks/packed_experts.py. Measured on an H200, 2026-11-28: the gate_up of gpt-oss-20b took 130 and 187 us
// for 64 and 128 tokens, its bytes would take 64; with ROWS = 8, one tile at a time and scales apart 160 and 309. With
// ROWS = 32 no more was gained. In tiles of many pairs (experts_many_wgmma.cu) it is 185 and 186. With one sequence rings
// that are filled ahead of the wait took a token from 1.708 to 1.673 ms (2026-11-28-h200-experts-ahead.txt). Tried: for 8
// and 16 rows x in registers in place of shared memory, with 24 warps in place of 12: steps of 8, 32 and 64 sequences
// took 3.050, 5.169 and 6.615 ms in place of 3.147, 5.283 and 6.860, too little for what it added to all files of packed
// products. The same for plain experts (experts_combine_mma.cu): 2.948 ms a token of Qwen3-30B-A3B, as much as without.
#include "experts.cuh"
#include "linear_packed.cuh"
#include "linear_packed_fma.cuh"
#include "linear_packed_mma.cuh"
#include "linear_packed_rows.cuh"
#include "linear_packed_sums.cuh"

constexpr int FOURS = 16;  // of x, that a thread has on their way to shared memory together

// What is left of a block's units: of tile `at / units` of the pairs, unit `at % units`, and so on up to `stop`. The tile
// that was found last is remembered: the stream of weights begins with the same as the product.
template <typename S>
struct Share {
    static constexpr bool MORE = true;
    PairTiles<S::ROWS> tiles;
    u32 at, stop, known;
    PairTile own;

    __device__ __forceinline__ Share(const PairTiles<S::ROWS>& tiles, int units) : tiles(tiles) {
        const u32 all = u32(tiles.count()) * units, each = all / gridDim.x, more = all % gridDim.x;
        at = blockIdx.x * each + min(blockIdx.x, more);
        stop = at + each + (blockIdx.x < more);
        known = at / u32(units);
        own = at < stop ? tiles.at(known) : PairTile{0, 0, 0};
    }

    // The pair that belongs to this thread's number, of the last tile.
    __device__ __forceinline__ int pair(const i32* pairs) const {
        return own.count > 0 ? pairs[own.first + min(int(threadIdx.x % S::ROWS), own.count - 1)] : 0;
    }

    // The next units begin .. end - 1, of one tile.
    __device__ __forceinline__ bool next(int units, int& begin, int& end, PairTile& tile) {
        if (at >= stop) return false;
        const u32 number = at / u32(units);
        if (number != known) known = number, own = tiles.at(number);
        tile = own;
        begin = at % u32(units);
        end = min(begin + int(stop - at), units);
        at += end - begin;
        return true;
    }

    // The same for the stream of weights, as OneWeight has it.
    __device__ __forceinline__ int next(int units, int& begin, int& end) {
        PairTile tile;
        if (next(units, begin, end, tile)) return tile.expert * S::PARTS * units + begin;
        begin = end = 0;
        return 0;
    }
};

// The rows of x of a tile of pairs, as SharedRows leaves rows in shared memory, up to eight at a time.
template <typename S, typename Y>
struct PairRows {
    typedef typename S::T T;
    static constexpr int SOME = S::ROWS < 8 ? S::ROWS : 8;
    static constexpr int TOGETHER = FOURS / SOME < S::BLOCKS ? FOURS / SOME : S::BLOCKS;  // fours of a row
    const T* x;
    int row, k, count;  // row: of x, of the pair with this lane's number
    bool vectorized, filled;
    Y* staged;

    // Fills the ring of weights once the first rows are asked for: behind all of the weights they would come late.
    template <typename Weights>
    __device__ __forceinline__ void stage(Stream<S, Weights>& stream, int) const {
        constexpr int STEP = 4 * S::THREADS;
#pragma unroll 1
        for (int base = 0; base < (S::ROWS > 8 ? 8 * slices_of<S::ROWS>(count) : 1); base += SOME) {
            const T* rows[SOME];
#pragma unroll
            for (int r = 0; r < SOME; r++) rows[r] = x + i64(__shfl_sync(ALL_LANES, row, base + r)) * k;
#pragma unroll 1
            for (int first = 0; first < S::BLOCKS; first += TOGETHER) {
                const int at = first * STEP + threadIdx.x * 4;
                Pack<T, 4> v[SOME][TOGETHER];
#pragma unroll
                for (int r = 0; r < SOME; r++)
                    read_fours<false>(v[r], rows[r], nullptr, at, STEP, base + r < count ? min(k, S::SPAN) : 0,
                                      vectorized);
                if (!filled && base + first == 0) stream.fill_rest();
#pragma unroll
                for (int r = 0; r < SOME; r++)
#pragma unroll
                    for (int i = 0; i < TOGETHER; i++) {
                        if (first + i >= S::BLOCKS) continue;
                        Pack<Y, 4> four;
#pragma unroll
                        for (int j = 0; j < 4; j++) four.v[j] = from_float<Y>(to_float(v[r][i].v[j]));
                        store<4>(staged + (base + r) * STRIDE_OF<S, Y> + staged_at<Y>(at + i * STEP), four);
                    }
            }
        }
        __syncthreads();
    }
};

// What becomes of the sums: rows of y where the pairs are. All elements of a thread are of one row.
template <typename T>
struct PairOutput {
    static constexpr const f32* a = nullptr;
    T* y;  // that row
    const T* b;
    int count, m, rows;  // pairs; columns of y, twice
    const f32* scales;
    f32 alpha, limit;

    __device__ __forceinline__ float residual_of(int, int) const { return 0.f; }
    template <int ACT, int PARTS>
    __device__ __forceinline__ void put(int, int column, float, const float (&total)[PARTS]) const {
        y[column] = from_float<T>(gated<ACT, T>(total, alpha, limit));
    }
};

// The product of one tile after the other. Y: of x in shared memory.
template <typename S, typename Y, typename Sums>
struct Product {
    typedef typename S::T T;
    const T *x, *b;
    const i32* pairs;
    T* y;
    int s, m, k;
    const f32* scales;  // of whole rows of w
    f32 alpha, limit;
    bool full;  // the ring

    // pair: that of this thread's number, of the first tile.
    __device__ __forceinline__ void operator()(Stream<S, Share<S>>& stream, Share<S> share, int pair) const {
        const bool vectorized = k % 4 == 0 && aligned(x);
        Sums sums;
        PairTile tile;
        int begin, end;
        bool filled = false;
        while (share.next(stream.units, begin, end, tile)) {
            static_assert(WARP % S::ROWS == 0, "a thread has elements of one row");
            if (filled) pair = share.pair(pairs);
            Y* staged = reinterpret_cast<Y*>(stream.staged());
            const PairRows<S, Y> rows{x, pair / s, k, tile.count, vectorized, filled || full, staged};
            filled = true;
            const i64 first = i64(tile.expert) * S::PARTS;
            const T* bias = b == nullptr ? b : b + first * m;
            const f32* own_scales = scales + first * (stream.units * BLOCK_ROWS);
            const PairOutput<T> out{y + i64(pair) * m, bias, tile.count, m, m, own_scales, alpha, limit};
            multiply_rows(stream, begin, end, rows, sums, out);
        }
    }
};

// ahead: whether pairs and offsets are known before the wait for earlier kernels.
template <typename T, typename W, int ACT, int ROWS, int WARPS, int BLOCKS, int DEPTH, int EARLY, int STEP, int TWINS>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    expert_linear_packed(const T* x, const W* __restrict__ w, const i32* pairs, const i32* offsets,
                         const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit, int ahead) {
    typedef Shape<T, W, ACT, ROWS, WARPS, BLOCKS, 1, DEPTH, EARLY, STEP, 1, false, TWINS> S;
    __shared__ i32 before[MAX_EXPERTS + 1];
    const auto wait = [] { pdl_wait(); };
    if (ahead)
        fence_gpu();  // an L1 may hold what an older kernel has read at the same addresses
    else
        wait();
    const int units = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const Share<S> share(PairTiles<ROWS>(offsets, before, E), units);
    const int pair = share.pair(pairs);  // asked for ahead of the weights, for it says where x is
    Stream<S, Share<S>> stream(w, m, k, share);
    if (ahead) {
        stream.fill_rest();
        wait();
    }
    launch_dependents();
    const f32* scales = W::row_scales(w, E * S::PARTS * units * BLOCK_ROWS, k);
    if constexpr (TENSOR<T>)
        Product<S, T, Factors<S, 1, true>>{x, b, pairs, y, s, m, k, scales, alpha, limit, ahead != 0}(stream, share,
                                                                                                      pair);
    else
        Product<S, f32, FloatFactors<S>>{x, b, pairs, y, s, m, k, scales, alpha, limit, ahead != 0}(stream, share,
                                                                                                    pair);
}
