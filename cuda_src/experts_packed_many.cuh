// What the kernels for many pairs of experts with packed weights share (experts_packed_many_mma.cu,
// experts_packed_many_wgmma.cu): how codes and rows of x come, codes as numbers in the order of the products, and the
// way of the sums to y.
//
// A block of the grid has a tile of up to ROWS pairs of one expert, as many as the expert's other tiles, by BAND tiles
// of 16 rows of w, and takes products of STEP columns at a time, half a packed block. w is the A of the products, from
// registers: so a code becomes a number once for all pairs of the tile, and no number of w is ever stored. x is the B,
// from shared memory, as it lies in global memory: its rows are where the pairs say, in 128 bytes with exchanged
// vectors (Layout<64>).
//
// Packed blocks have the codes in an order of k that suits an x which is read by lanes. Tensor cores read x in its own
// order, so here the codes change places instead. A lane 4 r + t has columns 4 t .. 4 t + 3 of a chunk of 16 and must
// have 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: it reads the words of two lanes, t / 2 and t / 2 + 2 of the same r, and takes
// of each the same pair. That is one permutation of bytes for 8 codes of 4 bits, or 4 of 8.
//
// Codes come through a ring of each warp, whole packed blocks, x through one of the thread block. A group of copies is
// made for each step: x for the step AHEAD steps on, and in every second step the warp's next packed blocks.
#ifndef CUPLAMA_EXPERTS_PACKED_MANY_CUH
#define CUPLAMA_EXPERTS_PACKED_MANY_CUH

#include "experts.cuh"
#include "linear_packed_many.cuh"
#include "mma_tiles.cuh"

constexpr int STEP = BLOCK_COLUMNS / 2, BAND = 8, WIDE = BAND * BLOCK_ROWS;

// DEPTH: stages of x; AHEAD: how many steps ahead it is asked for.
template <typename T_, typename W_, int ACT_, int ROWS_, int WARPS_, int DEPTH_, int AHEAD_>
struct Tiling {
    typedef T_ T;
    typedef W_ W;
    static constexpr int ACT = ACT_, ROWS = ROWS_, WARPS = WARPS_, DEPTH = DEPTH_, AHEAD = AHEAD_;
    static constexpr int THREADS = WARPS * WARP, TILES = BAND / WARPS;  // TILES: of w, of a warp
    static constexpr int PARTS = HALVES<ACT>, OUTS = WIDE / PARTS;      // OUTS: columns of y of a block
    static constexpr int BLOCKS = (AHEAD + 3) / 2;                      // in the ring of a warp's tile
    static constexpr int STAGE = ROWS * STEP;                           // elements of x of a step
    static constexpr int STRIDE = WIDE + 4;                             // floats of a pair's sums: see put_sums
    static_assert(BLOCKS <= AHEAD, "the first groups have a packed block each");
};

// The parameters of a launch that all of its blocks share, and the dynamic shared memory: x [DEPTH][ROWS][STEP], then
// the codes [BLOCKS][BAND]; at the end the sums [ROWS][STRIDE] of f32.
template <typename S>
struct Product {
    typedef typename S::T T;
    typedef typename S::W W;
    const T* x;
    const W* w;
    const T* b;
    T* y;
    int s, m, k, steps, units, columns;  // units: tiles of the rows of w that make columns of y; columns: their blocks
    const f32* scales;                   // of whole rows of w
    f32 alpha, limit;
    T* rows;
    W* codes;

    __device__ __forceinline__ Product(const T* x, const W* w, const T* b, T* y, int s, int E, int m, int k, f32 alpha,
                                       f32 limit, unsigned char* memory)
        : x(x), w(w), b(b), y(y), s(s), m(m), k(k), steps((k + STEP - 1) / STEP),
          units((m + BLOCK_ROWS - 1) / BLOCK_ROWS), columns(W::columns(k)),
          scales(W::row_scales(w, E * S::PARTS * units * BLOCK_ROWS, k)), alpha(alpha), limit(limit),
          rows(reinterpret_cast<T*>(memory)), codes(reinterpret_cast<W*>(rows + S::DEPTH * S::STAGE)) {}
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

// x and codes on their way to shared memory. N: pairs at most. A thread copies vector t % 8 of rows t / 8, t / 8 +
// APART, ... of x; a warp the packed blocks of its own tiles, in place of one beyond the last the last one, whose sums
// go nowhere.
template <typename S, int N>
struct Operands {
    typedef typename S::T T;
    typedef typename S::W W;
    static constexpr int APART = S::THREADS / 8, PIECES = sizeof(W) / 16;
    const T* x;
    u32 rows[N / APART];  // first elements of the thread's rows of x, which has less than 2^32
    T* stages;            // where its vector of the first row goes, in the first stage
    const uint4* tiles[S::TILES];
    uint4* ring;  // of this lane
    int count, k, at, stage = 0, left, slot = 0;

    __device__ __forceinline__ Operands(const Product<S>& product, const Share& share)
        : x(product.x), k(product.k), at(threadIdx.x % 8 * 8), left(product.columns) {
        const int row = threadIdx.x / 8, lane = threadIdx.x % WARP, first = threadIdx.x / WARP * S::TILES;
#pragma unroll
        for (int i = 0; i < N / APART; i++) rows[i] = u32(share.own[row + i * APART] / product.s) * k;
        count = share.tile.count - row;
        stages = product.rows + Layout<STEP>::at(row, threadIdx.x % 8);
        ring = reinterpret_cast<uint4*>(product.codes + first) + lane;
#pragma unroll
        for (int i = 0; i < S::TILES; i++) {
            const int part = (first + i) / (BAND / S::PARTS);
            const int unit = share.column / BLOCK_ROWS + (first + i) % (BAND / S::PARTS);
            const i64 tile = i64(share.tile.expert * S::PARTS + part) * product.units + min(unit, product.units - 1);
            tiles[i] = reinterpret_cast<const uint4*>(product.w + tile * product.columns) + lane;
        }
    }

    // Asks for x of the next step; beyond k zeros.
    __device__ __forceinline__ void fetch_rows() {
        const bool inside = at < k;
        T* to = stages + stage * S::STAGE;
#pragma unroll
        for (int i = 0; i < N / APART; i++)
            cp_async_16(to + i * APART * STEP, x + rows[i] + at, inside && i * APART < count);
        at += STEP;
        stage = stage + 1 == S::DEPTH ? 0 : stage + 1;
    }

    // Asks for the next packed block of each of the warp's tiles, if there is one.
    __device__ __forceinline__ void fetch_codes() {
        if (left <= 0) return;
#pragma unroll
        for (int i = 0; i < S::TILES; i++) {
            uint4* to = ring + (slot * BAND + i) * PIECES;
#pragma unroll
            for (int p = 0; p < PIECES; p += WARP)
                if (p + WARP <= PIECES || int(threadIdx.x % WARP) < PIECES % WARP)
                    cp_async_16(to + p, tiles[i] + p, true);
            tiles[i] += PIECES;
        }
        left--;
        slot = slot + 1 == S::BLOCKS ? 0 : slot + 1;
    }

    // The first groups of copies.
    __device__ __forceinline__ void begin() {
#pragma unroll
        for (int i = 0; i < S::AHEAD; i++) {
            fetch_rows();
            if (i < S::BLOCKS) fetch_codes();
            cp_async_commit();
        }
    }
};

// ---- codes in the order of the products -----------------------------------------------------------------------------

// The codes of four chunks of a block, the first half or the second, as those of chunks 0 .. 3: as half_lane, but a
// lane 4 r + t has columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a chunk. A pair of columns has bytes p and p + 2 of a
// word of up to 8 bits a code, of both rows if they have up to 4.
template <typename W>
__device__ __forceinline__ typename W::Words ordered_half(const W& block, int half) {
    typedef typename W::Words Words;
    static_assert(W::BITS <= 8, "codes of 16 bits and more lie otherwise");
    const int t = threadIdx.x % 4, low = threadIdx.x % WARP - t + t / 2, high = low + 2;
    const u32 choice = t % 2 == 0 ? 0x6240u : 0x7351u;
    Words words;
    const uint4* vectors = reinterpret_cast<const uint4*>(&block) + half * (Words::LOW / 8 * WARP);
#pragma unroll
    for (int v = 0; v < Words::LOW / 8; v++) {
        const uint4 a = vectors[v * WARP + low], b = vectors[v * WARP + high];
        words.low[4 * v] = __byte_perm(a.x, b.x, choice);
        words.low[4 * v + 1] = __byte_perm(a.y, b.y, choice);
        words.low[4 * v + 2] = __byte_perm(a.z, b.z, choice);
        words.low[4 * v + 3] = __byte_perm(a.w, b.w, choice);
    }
    if constexpr (Words::HIGH > 0) {
        constexpr int PAIR = W::BITS == 6 ? 4 : 2;  // bits of a pair of columns, of both rows
        constexpr u32 FIRST = W::BITS == 6 ? 0x0f0f0f0fu : 0x33333333u;
        const u32* from = reinterpret_cast<const u32*>(&block) + W::LOW_BYTES / 4 + half * (Words::HIGH / 2);
#pragma unroll
        for (int i = 0; i < Words::HIGH / 2; i++) {
            const u32 a = from[low * Words::HIGH + i] >> t % 2 * PAIR, b = from[high * Words::HIGH + i] >> t % 2 * PAIR;
            words.high[i] = (a & FIRST) | (b & FIRST) << PAIR;
        }
    }
    return words;
}

// ---- what becomes of the sums ---------------------------------------------------------------------------------------

// The block's sums to y, by way of shared memory, which nothing else uses by now: a thread then has 8 columns of a
// pair. total: of (tile, 8 pairs, row half, pair) the sum. With STRIDE the 32 numbers that a warp writes at a time meet
// all banks.
template <typename S, int N>
__device__ __forceinline__ void put_sums(const float (&total)[S::TILES * N / 2], const Product<S>& product,
                                         const Share& share) {
    typedef typename S::T T;
    constexpr int PARTS = S::PARTS, VECTORS = S::OUTS / 8;
    f32* room = reinterpret_cast<f32*>(product.rows);
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * (S::TILES * BLOCK_ROWS) + lane / 4;
    f32* mine = room + lane % 4 * 2 * S::STRIDE + first;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < S::TILES; i++)
#pragma unroll
        for (int j = 0; j < N / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                mine[(j * 8 + e % 2) * S::STRIDE + i * BLOCK_ROWS + e / 2 * 8] = total[(i * (N / 8) + j) * 4 + e];
    __syncthreads();

    const int m = product.m, vector = threadIdx.x % VECTORS * 8, column = share.column + vector;
    const i64 before = i64(share.tile.expert) * PARTS;
    float bias[PARTS][8] = {}, scale[PARTS][8];
#pragma unroll
    for (int p = 0; p < PARTS; p++)
#pragma unroll
        for (int c = 0; c < 8; c++) {
            const bool there = column + c < m;
            if (product.b != nullptr && there) bias[p][c] = to_float(product.b[(before + p) * m + column + c]);
            scale[p][c] = 1.f;
            if (S::W::ROW_SCALES && there)
                scale[p][c] = product.scales[(before + p) * (product.units * BLOCK_ROWS) + column + c];
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
