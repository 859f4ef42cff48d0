// What the kernels for many pairs of experts share (experts_many_mma.cu, experts_many_wgmma.cu): how they divide the
// work, the way of x to shared memory, and that of the sums to y.
//
// A block of the grid has a tile of up to ROWS pairs of one expert, as many as the expert's other tiles, by BAND tiles
// of 16 rows of w, and takes products of STEP columns at a time. w is the A of the products, from registers, plain or
// packed (experts_many_weights.cuh). x is the B, from shared memory, as it lies in global memory: its rows are where the
// pairs say, in 128 bytes with exchanged vectors (Layout<64>).
//
// All columns of y of a tile of pairs are next to each other in the grid, and so are the tiles of an expert, so that
// rows of x and of w are still in L2 when they are read again. How many tiles there are is read on the device; the grid
// has room for the most that there can be, n*s / ROWS + min(E, n*s), and blocks beyond the last tile end at once.
//
// Sums go along k in steps of 16, whatever the tile is: a row of y does not depend on the other pairs, bit for bit.
//
// x comes through a ring of the thread block. A group of copies is made for each step: x for the step AHEAD steps on,
// and of w what the step makes room for.
#ifndef CUPLAMA_EXPERTS_MANY_CUH
#define CUPLAMA_EXPERTS_MANY_CUH

#include "experts.cuh"
#include "mma_tiles.cuh"

constexpr int STEP = 64, BAND = 8, TILE_ROWS = 16, WIDE = BAND * TILE_ROWS;

// DEPTH: stages of x; EARLY: whether the numbers of w are in registers one step before their products.
template <typename T_, int ACT_, int ROWS_, int WARPS_, int DEPTH_, bool EARLY_>
struct Tiling {
    typedef T_ T;
    static constexpr int ACT = ACT_, ROWS = ROWS_, WARPS = WARPS_, DEPTH = DEPTH_;
    static constexpr bool EARLY = EARLY_;
    static constexpr int AHEAD = DEPTH - (EARLY ? 2 : 1);               // steps that x is asked for ahead
    static constexpr int THREADS = WARPS * WARP, TILES = BAND / WARPS;  // TILES: of w, of a warp
    static constexpr int PARTS = HALVES<ACT>, OUTS = WIDE / PARTS;      // OUTS: columns of y of a block
    static constexpr int STAGE = ROWS * STEP;                           // elements of x of a step
    static constexpr int STRIDE = WIDE + 4;                             // floats of a pair's sums: see put_sums
};

// A product as a launch was given it, and the dynamic shared memory: x [DEPTH][ROWS][STEP], then the ring of weights; at
// the end the sums [ROWS][STRIDE] of f32.
template <typename T>
struct Product {
    const T *x, *b;
    T* y;
    int s, m, k;
    f32 alpha, limit;
    unsigned char* memory;

    __device__ __forceinline__ int steps() const { return (k + STEP - 1) / STEP; }
};

// What a block of the grid has: pairs, which `own` lists in shared memory, and columns of y from `column` on.
struct Share {
    PairTile tile;
    const i32* own;
    int column;
};

// The share of this block of the grid, if it has one. own: room for ROWS pairs. All threads of the block call.
template <typename S>
__device__ __forceinline__ bool find_share(Share& share, const PairTiles<S::ROWS>& tiles, const i32* pairs, i32* own,
                                           int m) {
    const int across = (m + S::OUTS - 1) / S::OUTS, number = blockIdx.x / across;
    if (number >= tiles.count()) return false;
    share = {tiles.even(number), own, int(blockIdx.x % across) * S::OUTS};
    for (int i = threadIdx.x; i < S::ROWS; i += S::THREADS)
        own[i] = pairs[share.tile.first + min(i, share.tile.count - 1)];
    __syncthreads();
    return true;
}

// x on its way to shared memory. N: pairs at most. A thread copies vector t % 8 of rows t / 8, t / 8 + APART, ...
template <typename S, int N>
struct PairRows {
    typedef typename S::T T;
    static constexpr int APART = S::THREADS / 8;
    const T* x;
    u32 rows[N / APART];  // first elements of the thread's rows of x, which has less than 2^32
    T* stages;            // where its vector of the first row goes, in the first stage
    int count, k, at, stage = 0;

    __device__ __forceinline__ PairRows(const Product<T>& product, const Share& share)
        : x(product.x), k(product.k), at(threadIdx.x % 8 * 8) {
        const int row = threadIdx.x / 8;
#pragma unroll
        for (int i = 0; i < N / APART; i++) rows[i] = u32(share.own[row + i * APART] / product.s) * k;
        count = share.tile.count - row;
        stages = reinterpret_cast<T*>(product.memory) + Layout<STEP>::at(row, threadIdx.x % 8);
    }

    // Asks for x of the next step; beyond k zeros.
    __device__ __forceinline__ void fetch() {
        const bool inside = at < k;
        T* to = stages + stage * S::STAGE;
#pragma unroll
        for (int i = 0; i < N / APART; i++)
            cp_async_16(to + i * APART * STEP, x + rows[i] + at, inside && i * APART < count);
        at += STEP;
        stage = stage + 1 == S::DEPTH ? 0 : stage + 1;
    }
};

// The first groups of copies.
template <typename S, typename Rows, typename Weights>
__device__ __forceinline__ void begin(Rows& rows, Weights& weights) {
#pragma unroll
    for (int i = 0; i < S::AHEAD; i++) {
        rows.fetch();
        weights.begin(i);
        cp_async_commit();
    }
}

// The block's sums to y, by way of shared memory, which nothing else uses by now: a thread then has 8 columns of a
// pair. total: of (tile, 8 pairs, row half, pair) the sum; scales: of rows of w, of the first part, or null; apart: from
// there to the next part's. With STRIDE the 32 numbers that a warp writes at a time meet all banks.
template <typename S, int N>
__device__ __forceinline__ void put_sums(const float (&total)[S::TILES * N / 2], const Product<typename S::T>& product,
                                         const Share& share, const f32* scales, int apart) {
    typedef typename S::T T;
    constexpr int PARTS = S::PARTS, VECTORS = S::OUTS / 8;
    f32* room = reinterpret_cast<f32*>(product.memory);
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * (S::TILES * TILE_ROWS) + lane / 4;
    f32* mine = room + lane % 4 * 2 * S::STRIDE + first;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::TILES; i++)
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                mine[(j * 8 + e % 2) * S::STRIDE + i * TILE_ROWS + e / 2 * 8] = total[(i * (N / 8) + j) * 4 + e];
    __syncthreads();

    const int m = product.m, vector = threadIdx.x % VECTORS * 8, column = share.column + vector;
    float bias[PARTS][8] = {}, scale[PARTS][8];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const bool there = column + c < m;
            if (product.b != nullptr && there)
                bias[p][c] = to_float(product.b[(i64(share.tile.expert) * PARTS + p) * m + column + c]);
            scale[p][c] = scales != nullptr && there ? scales[p * apart + column + c] : 1.f;
        }
    const bool vectorized = m % 8 == 0 && aligned(product.y);
#pragma unroll 1
    for (int row = threadIdx.x / VECTORS; row < share.tile.count; row += S::THREADS / VECTORS) {
        Pack<f32, 8> sum[PARTS];
        Pack<T, 8> out;
#pragma unroll
        for (int p = 0; p < PARTS; p++) sum[p] = load<8>(room + row * S::STRIDE + p * S::OUTS + vector);
#pragma unroll
        for (int c = 0; c < 8; c++) {
            float of[PARTS];
#pragma unroll
            for (int p = 0; p < PARTS; p++) of[p] = sum[p].v[c] * scale[p][c] + bias[p][c];
            out.v[c] = from_float<T>(gated<S::ACT, T>(of, product.alpha, product.limit));
        }
        store_row<8>(product.y + i64(share.own[row]) * m, column, m, vectorized, out);
    }
}

#endif
