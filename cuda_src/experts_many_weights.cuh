// The weights of an expert as the A of products, for the kernels for many pairs (experts_many_mma.cu,
// experts_many_wgmma.cu): a warp's tiles of 16 rows on their way to shared memory, through a ring of its own, and from
// there to registers. PlainTiles has those of a plain weight, PackedTiles those of a packed one, whose codes become
// numbers on the way: once for all pairs of the block's tile, and no number of w is ever stored.
//
// Packed blocks have the codes in an order of k that suits an x which is read by lanes. Tensor cores read x in its own
// order, so here the codes change places instead. A lane 4 r + t has columns 4 t .. 4 t + 3 of a chunk of 16 and must
// have 2 t, 2 t + 1, 2 t + 8 and 2 t + 9: it reads the words of two lanes, t / 2 and t / 2 + 2 of the same r, and takes
// of each the same pair. That is one permutation of bytes for 8 codes of 4 bits, or 4 of 8.
#ifndef CUPLAMA_EXPERTS_MANY_WEIGHTS_CUH
#define CUPLAMA_EXPERTS_MANY_WEIGHTS_CUH

#include "experts_many.cuh"
#include "linear_packed_many.cuh"

// Of which part of w tile i of a warp is, and the column of y of its first row.
template <typename S>
__device__ __forceinline__ int part_of(int i) {
    return (int(threadIdx.x / WARP) * S::TILES + i) / (BAND / S::PARTS);
}
template <typename S>
__device__ __forceinline__ int column_of(const Share& share, int i) {
    return share.column + (int(threadIdx.x / WARP) * S::TILES + i) % (BAND / S::PARTS) * TILE_ROWS;
}

// Tiles [TILE_ROWS][STEP] of a step; beyond m and k zeros. A lane copies vector t % 8 of rows t / 8, t / 8 + 4, ...
template <typename S>
struct PlainTiles {
    typedef typename S::T T;
    static constexpr int SLOTS = S::AHEAD + 1, SLOT = WIDE * STEP, TILE = TILE_ROWS * STEP, APART = WARP / 8;
    static constexpr int COPIES = TILE_ROWS / APART;  // of a lane, of a tile
    const T* from;  // the lane's first row; a warp's tiles are of one part, one behind the other
    int left;       // rows from there on
    T* ring;        // of the warp
    int k, at, filling = 0, reading = 0;

    __device__ __forceinline__ PlainTiles(const T* w, const Product<T>& product, const Share& share)
        : k(product.k), at(threadIdx.x % 8 * 8) {
        const int column = column_of<S>(share, 0) + threadIdx.x % WARP / 8;
        left = product.m - column;
        from = w + (i64(share.tile.expert * S::PARTS + part_of<S>(0)) * product.m + column) * k;
        ring = reinterpret_cast<T*>(product.memory) + S::DEPTH * S::STAGE + threadIdx.x / WARP * (S::TILES * TILE);
    }

    // Asks for the next step.
    __device__ __forceinline__ void fetch() {
        const bool inside = at < k;
        T* to = ring + filling * SLOT;
#pragma unroll
        for (int j = 0; j < S::TILES * COPIES; j++)
            cp_async_16(to + Layout<STEP>::at(threadIdx.x % WARP / 8 + j * APART, threadIdx.x % 8),
                        from + i64(j * APART) * k + at, inside && j * APART < left);
        at += STEP;
        filling = filling + 1 == SLOTS ? 0 : filling + 1;
    }

    // What the first groups of copies have of w.
    __device__ __forceinline__ void begin(int group) {
        fetch();
        if (S::EARLY && group == 0) fetch();
    }

    // What is asked for in a step.
    __device__ __forceinline__ void go_on(int, bool) { fetch(); }

    // A step's numbers, which stay in shared memory until they are read, 16 columns at a time.
    struct Numbers {
        const T* tiles;

        __device__ __forceinline__ void read(int chunk, u32 (&a)[S::TILES][4]) const {
            const Lane<STEP> down = lane_down<STEP>();
#pragma unroll
            for (int i = 0; i < S::TILES; i++) ldmatrix_x4(a[i], tiles + i * TILE + down.at(0, chunk));
        }
    };

    // Those of the next step.
    __device__ __forceinline__ Numbers take(int) {
        const Numbers numbers{ring + reading * SLOT};
        reading = reading + 1 == SLOTS ? 0 : reading + 1;
        return numbers;
    }

    __device__ __forceinline__ const f32* scales() const { return nullptr; }
    __device__ __forceinline__ int apart() const { return 0; }
};

// ---- packed weights -------------------------------------------------------------------------------------------------

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

// Packed blocks, of two steps each; in place of one beyond the last row the last one, whose sums go nowhere.
template <typename S, typename W>
struct PackedTiles {
    typedef typename S::T T;
    static constexpr int SLOTS = (S::AHEAD + 3) / 2, PIECES = sizeof(W) / 16;
    static_assert(SLOTS <= S::AHEAD, "the first groups of copies have a packed block each");
    const uint4* from[S::TILES];                // of this lane
    W* ring;                                    // of the warp, [SLOTS][BAND]
    const f32* row_scales;                      // of the expert
    int units, left, filling = 0, reading = 0;  // units: tiles of the rows of w that make columns of y

    __device__ __forceinline__ PackedTiles(const W* w, const Product<T>& product, const Share& share, int E)
        : units((product.m + TILE_ROWS - 1) / TILE_ROWS), left(W::columns(product.k)) {
        const int expert = share.tile.expert * S::PARTS, lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < S::TILES; i++) {
            const int unit = min(column_of<S>(share, i) / TILE_ROWS, units - 1);
            from[i] = reinterpret_cast<const uint4*>(w + (i64(expert + part_of<S>(i)) * units + unit) * left) + lane;
        }
        ring = reinterpret_cast<W*>(reinterpret_cast<T*>(product.memory) + S::DEPTH * S::STAGE) +
               threadIdx.x / WARP * S::TILES;
        const int rows = units * TILE_ROWS;
        row_scales = W::ROW_SCALES ? W::row_scales(w, E * S::PARTS * rows, product.k) + i64(expert) * rows : nullptr;
    }

    // Asks for the next packed block of each tile, if there is one.
    __device__ __forceinline__ void fetch() {
        if (left <= 0) return;
#pragma unroll
        for (int i = 0; i < S::TILES; i++) {
            uint4* to = reinterpret_cast<uint4*>(ring + filling * BAND + i) + threadIdx.x % WARP;
#pragma unroll
            for (int p = 0; p < PIECES; p += WARP)
                if (p + WARP <= PIECES || int(threadIdx.x % WARP) < PIECES % WARP)
                    cp_async_16(to + p, from[i] + p, true);
            from[i] += PIECES;
        }
        left--;
        filling = filling + 1 == SLOTS ? 0 : filling + 1;
    }

    __device__ __forceinline__ void begin(int group) {
        if (group < SLOTS) fetch();
    }

    // half: of the block whose step it is; first: whether that is the first step of all.
    __device__ __forceinline__ void go_on(int half, bool first) {
        if (S::EARLY ? half == 1 : half == 0 && !first) fetch();  // a block is in registers, or was multiplied
    }

    struct Numbers {
        u32 all[S::TILES][4][4];

        __device__ __forceinline__ void read(int chunk, u32 (&a)[S::TILES][4]) const {
#pragma unroll
            for (int i = 0; i < S::TILES; i++) memcpy(a[i], all[i][chunk], sizeof(a[i]));
        }
    };

    __device__ __forceinline__ Numbers take(int half) {
        Numbers numbers;
#pragma unroll
        for (int i = 0; i < S::TILES; i++) {
            const W& block = ring[reading * BAND + i];
            make_chunks(block, ordered_half(block, half), half, numbers.all[i], T());
        }
        if (half == 1) reading = reading + 1 == SLOTS ? 0 : reading + 1;
        return numbers;
    }

    __device__ __forceinline__ const f32* scales() const { return row_scales; }
    __device__ __forceinline__ int apart() const { return units * TILE_ROWS; }
};

#endif
