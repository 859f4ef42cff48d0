// What linear_packed.cu is made of: a warp's stream of packed blocks, and its sums of a tile on tensor cores.
#ifndef CUPLAMA_LINEAR_PACKED_CUH
#define CUPLAMA_LINEAR_PACKED_CUH

#include "activation.cuh"
#include "formats.cuh"
#include "mma.cuh"

// Whether products are those of tensor cores.
template <typename T>
#if __CUDA_ARCH__ >= 800
constexpr bool TENSOR = sizeof(T) == 2;
#else
constexpr bool TENSOR = false;
#endif

// The constants of a launch. ROWS: of x, at most (1, 2, 4 or 8; of experts_packed.cu 16 or 32, too); WARPS: of a block; BLOCKS: of columns, at most, that a
// warp has of a row of blocks in a phase; PHASES: in which k goes; DEPTH: of a warp's ring, in blocks; EARLY: blocks
// that it asks for before x; STEP: units of tiles between two barriers; ORDERED: x is read in another order.
template <typename T_, typename W_, int ACT_, int ROWS_, int WARPS_, int BLOCKS_, int PHASES_, int DEPTH_, int EARLY_,
          int STEP_, int SPLIT_, bool ORDERED_>
struct Shape {
    typedef T_ T;
    typedef W_ W;
    static constexpr int ACT = ACT_, ROWS = ROWS_, WARPS = WARPS_, BLOCKS = BLOCKS_, PHASES = PHASES_, DEPTH = DEPTH_,
                         EARLY = EARLY_, STEP = STEP_, SPLIT = SPLIT_;
    static constexpr bool ORDERED = ORDERED_;
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int PARTS = GATED<ACT> ? 2 : 1;             // sums for an element of y, and tiles of a unit
    static constexpr int TILE = BLOCK_ROWS * ROWS;               // sums of a tile
    static constexpr bool WAITING = PHASES > 1 || SPLIT > 1;     // sums of tiles stay in shared memory for a while
    static constexpr int SPAN = WARPS * BLOCKS * BLOCK_COLUMNS;  // columns of a phase
};

// Elements from a row of x to the next in shared memory: with 16 bits 64 bytes more than they take, so that the lanes
// of two rows meet different banks.
template <typename S, typename Y>
constexpr int STRIDE_OF = S::SPAN + (sizeof(Y) == 2 ? 32 : 0);

// Where four elements of x from `column` on (a multiple of 4) lie in a row in shared memory. With 16 bits a lane's of
// two chunks are neighbours, which it reads at once: [pair of chunks][4 t][two chunks][4 columns].
template <typename Y>
__device__ __forceinline__ int staged_at(int column) {
    if (sizeof(Y) != 2) return column;
    return column / 32 * 32 + column % 16 / 4 * 8 + column / 16 % 2 * 4;
}

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }

// The units of a GPU block where it has those of one weight: an equal share of all.
template <typename S>
struct OneWeight {
    static constexpr bool MORE = false;  // there is no other weight

    // Goes to the units begin .. end - 1 of the next weight; none at the end. Where they lie, in units from the first.
    __device__ __forceinline__ int next(int units, int& begin, int& end) {
        const int group = blockIdx.x / S::SPLIT, groups = gridDim.x / S::SPLIT;
        begin = units * group / groups, end = units * (group + 1) / groups;
        return begin;
    }
};

// A warp's share of the weight on its way through its ring, packed block by packed block. What it has of a tile in a
// phase is a run of at most BLOCKS that lie one behind the other. The order is phase, unit, tile of the unit, and from
// one weight to the next where a GPU block has units of several. Making one starts it; it reads nothing but weights,
// and what next() reads.
template <typename S, typename Weights = OneWeight<S>>
struct Stream {
    typedef typename S::W W;
    static constexpr int PIECES = sizeof(W) / 16;
    uint4* ring;            // of this lane, in its warp's
    const uint4* weight;    // of this lane
    int from;               // what to ask for next, in pieces of 16 bytes: fewer than 2^31, as 32 GiB
    int begin, end, units;  // of this GPU block, of the weight that it asks for, and of a weight
    int first;              // phase of this GPU block
    int columns;            // blocks of a row of blocks
    int half;               // from a unit's first tile to its second, in pieces
    int on, next;           // from a run's end to where the next begins, and so for the run after it, in pieces
    int phase, remaining;   // what to ask for: phase, and its blocks that are left
    int run, left;          // blocks of a run, and those of this one that are left
    int filling, reading;   // slots, in pieces

    Weights weights;

    // rows: of a weight, if gated of half of it
    __device__ __forceinline__ Stream(const W* blocks, int rows, int k, const Weights& weights = Weights())
        : weights(weights) {
        DYNAMIC_SHARED(uint4, memory);
        const int lane = threadIdx.x % WARP;
        units = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, first = blockIdx.x % S::SPLIT * S::PHASES;
        ring = memory + threadIdx.x / WARP * (S::DEPTH * PIECES) + lane;
        const int row = this->weights.next(units, begin, end);
        columns = W::columns(k);
        half = units * columns * PIECES;
        weight = reinterpret_cast<const uint4*>(blocks) + lane, from = (row * columns + column_of(first)) * PIECES;
        filling = 0, reading = 0, phase = first;
        begin_phase();
        fill<S::EARLY>();
        launch_dependents();
    }

    // Asks for that many blocks, for empty slots.
    template <int COUNT>
    __device__ __forceinline__ void fill() {
#pragma unroll 1
        for (int slot = 0; slot < COUNT; slot++) {
            fetch();
            filling += PIECES;
        }
    }
    // Fills the ring, once x has been asked for.
    __device__ __forceinline__ void fill_rest() { fill<S::DEPTH - 1 - S::EARLY>(); }

    // Where this warp's runs begin in a row of blocks in a phase, and how many blocks they have: none in a later phase
    // if there are none in an earlier one.
    static __device__ __forceinline__ int column_of(int phase) {
        return (phase * S::WARPS + int(threadIdx.x / WARP)) * S::BLOCKS;
    }
    __device__ __forceinline__ int blocks_of(int phase) const {
        return min(max(columns - column_of(phase), 0), S::BLOCKS);
    }

    // Shared memory behind the rings: sums of the tiles between two barriers, twice [2][WARPS][STEP][PARTS][TILE]; with
    // several phases or parts those of all tiles of the block [units][PARTS][TILE]; x (SharedRows); with offsets the
    // sums of x over groups [groups of SPAN][ROWS].
    static constexpr int PARTIAL = S::WARPS * S::STEP * S::PARTS * S::TILE;
    static __device__ __forceinline__ f32* partials() {
        DYNAMIC_SHARED(uint4, memory);
        return reinterpret_cast<f32*>(memory + S::WARPS * S::DEPTH * PIECES);
    }
    static __device__ __forceinline__ f32* sums() { return partials() + 2 * PARTIAL; }
    __device__ __forceinline__ f32* staged() const {
        return sums() + (S::WAITING ? (end - begin) * S::PARTS * S::TILE : 0);
    }

    // What there is to ask for in a phase. A unit's tiles are half of the weight apart.
    __device__ __forceinline__ void begin_phase() {
        run = left = blocks_of(phase);
        remaining = run * (end - begin) * S::PARTS;
        next = on = (columns - run) * PIECES;
        if constexpr (S::PARTS > 1) on += half - columns * PIECES, next -= half;
    }

    // Asks for the next block, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch() {
        if (remaining > 0) {
#pragma unroll
            for (int i = 0; i < PIECES; i += WARP)
                if (i + WARP <= PIECES || int(threadIdx.x % WARP) < PIECES % WARP)
                    cp_async_16(ring + filling + i, weight + from + i, true);
            from += PIECES, remaining--, left--;
            if (left == 0) {
                left = run, from += on;
                if constexpr (S::PARTS > 1) {
                    const int other = on;
                    on = next, next = other;
                }
                if (S::PHASES > 1 && remaining == 0 && phase + 1 < first + S::PHASES) {
                    from += ((begin - end) * columns + S::WARPS * S::BLOCKS) * PIECES;
                    phase++;
                    begin_phase();
                }
                if constexpr (Weights::MORE)
                    if (remaining == 0) {
                        from = (weights.next(units, begin, end) * columns + column_of(first)) * PIECES;
                        begin_phase();
                    }
            }
        }
        cp_async_commit();
    }

    // The next block of the ring. The one that was taken before is no longer read by any lane, and its place is filled.
    __device__ __forceinline__ const W& take() {
        cp_async_wait<S::DEPTH - 2>();
        __syncwarp();
        const W* block = reinterpret_cast<const W*>(ring + reading - threadIdx.x % WARP);
        fetch();
        filling = reading;
        reading = reading + PIECES == S::DEPTH * PIECES ? 0 : reading + PIECES;
        return *block;
    }
};

// ---- tiles on tensor cores ------------------------------------------------------------------------------------------
// Products with the rows of x in shared memory.
//
// One row of x has the eight columns of an mma's B for itself. With small groups it is put there chunk by chunk: column
// c has chunk c of a packed block, and zeros elsewhere (SPREAD). So the sums of all groups come from one chain of
// products, a lane has those of chunks 2 t and 2 t + 1 alone, and needs the scales of these alone: a quarter.
//
// More than eight rows are several mma (slices) for the same A: what it takes to make the numbers of a block is shared.
// Slices that no row needs are left out: there are 1, 2 or 4.
template <int ROWS>
__device__ __forceinline__ int slices_of(int count) {
    if (ROWS <= 8 || count <= 8) return 1;
    return ROWS <= 16 || count <= 16 ? 2 : 4;
}

template <typename S, int LEVELS>
struct Factors {
    typedef typename S::T T;
    typedef typename S::W W;
    static constexpr bool SPREAD = S::ROWS == 1 && W::GROUP > 0 && W::GROUP_CHUNKS <= 2;
    static constexpr int STRIDE = STRIDE_OF<S, T>;
    static constexpr float RAW = W::template RAW<T>;
    const T* x;  // of this lane, at its warp's first block
    f32* sums;   // of this warp's groups [group][ROWS]
    int slices;  // of the rows of x, of up to 8
    // 1 for the chunk of this lane's column: hidden, else its products become choices, on the slower pipe.
    u32 mine[SPREAD ? BLOCK_CHUNKS : 1];

    __device__ __forceinline__ Factors() {
        if constexpr (SPREAD)
#pragma unroll
            for (int c = 0; c < BLOCK_CHUNKS; c++) mine[c] = hidden(lane_row() == c);
    }

    template <typename Weights, typename Rows>
    __device__ __forceinline__ void fill(Stream<S, Weights>& stream, const Rows& rows, int phase) {
        rows.stage(stream, phase);
        slices = slices_of<S::ROWS>(rows.count);
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
        x = rows.staged + warp * (S::BLOCKS * BLOCK_COLUMNS) + lane % 4 * 8 + lane_row() % S::ROWS * STRIDE;
        sums =
            reinterpret_cast<f32*>(rows.staged + LEVELS * S::ROWS * STRIDE) + warp * (S::BLOCKS * W::GROUPS * S::ROWS);
        if constexpr (W::OFFSET) {
            const u32 one = twice<T>(1.f);
#pragma unroll 1
            for (int g = 0; g < S::BLOCKS * W::GROUPS; g++)
#pragma unroll 1
                for (int slice = 0; slice < (S::ROWS > 8 ? slices : 1); slice++) {
                    float sum[4] = {};
#pragma unroll
                    for (int c = 0; c < W::GROUP_CHUNKS; c++)
#pragma unroll
                        for (int l = 0; l < LEVELS; l++) {
                            u32 b[2];
                            read(x + slice * (8 * STRIDE), g * W::GROUP_CHUNKS + c, l, b);
                            multiply(sum, {one, one, one, one}, b, T());
                        }
                    if (lane < 4 && 2 * lane < S::ROWS) {
                        f32* to = sums + g * S::ROWS + 8 * slice + 2 * lane;
                        to[0] = sum[0];
                        if (S::ROWS > 1) to[1] = sum[1];
                    }
                }
            __syncwarp();
        }
    }

    // The B of a chunk.
    static __device__ __forceinline__ void read(const T* x, int chunk, int level, u32 (&b)[2]) {
        const Pack<T, 4> four =
            load<4>(x + level * (S::ROWS * STRIDE) + chunk / 2 * (2 * CHUNK_COLUMNS) + chunk % 2 * 4);
        memcpy(b, &four, 8);
    }

    // Those of a chunk and the next.
    static __device__ __forceinline__ void read_two(const T* x, int chunk, int level, u32 (&b)[2][2]) {
        const Pack<T, 8> two = load<8>(x + level * (S::ROWS * STRIDE) + chunk / 2 * (2 * CHUNK_COLUMNS));
        memcpy(b, &two, 16);
    }

    // The sums of a tile over the columns of this warp, to partial [TILE].
    template <int SLICES = (S::ROWS > 8 ? S::ROWS / 8 : 1), typename Weights>
    __device__ __forceinline__ void multiply_tile(Stream<S, Weights>& stream, int count, f32* partial) const {
        if constexpr (SLICES > 1)
            if (slices < SLICES) return multiply_tile<SLICES / 2>(stream, count, partial);
        float total[SLICES][4] = {};
        const T* at = x;
        const f32* of = sums;
#pragma unroll 1
        for (int b = 0; b < count; b++) {
            add(stream.take(), at, of, total);
            at += BLOCK_COLUMNS;
            of += W::GROUPS * S::ROWS;
        }
        const int r = lane_row(), t = threadIdx.x % 4;
        if constexpr (S::ROWS == 1) {
            if constexpr (SPREAD)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    total[0][i] += __shfl_xor_sync(ALL_LANES, total[0][i], 1);
                    total[0][i] += __shfl_xor_sync(ALL_LANES, total[0][i], 2);
                }
            if (t == 0) partial[r] = total[0][0], partial[r + 8] = total[0][2];
        } else if (2 * t < S::ROWS) {
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) {
                f32* to = partial + r * S::ROWS + 8 * slice + 2 * t;
                store<2>(to, Pack<f32, 2>{total[slice][0], total[slice][1]});
                store<2>(to + 8 * S::ROWS, Pack<f32, 2>{total[slice][2], total[slice][3]});
            }
        }
    }

    // A block's sums, added to those of its tile.
    template <int SLICES>
    __device__ __forceinline__ void add(const W& block, const T* x, const f32* sums, float (&total)[SLICES][4]) const {
        if constexpr (SPREAD)
            add_spread(block, x, sums, total[0]);
        else
            add_block(block, x, sums, total);
    }

    template <int SLICES>
    __device__ __forceinline__ void add_block(const W& block, const T* x, const f32* sums,
                                              float (&total)[SLICES][4]) const {
        constexpr int CHAINS = W::GROUP_CHUNKS > 4 && SLICES == 1 ? 2 : 1;  // of products: short ones
        const int r = lane_row();
        const typename W::Words words = block.lane(threadIdx.x % WARP);
        float inner[SLICES][4] = {}, least[SLICES][4] = {};
#pragma unroll
        for (int g = 0; g < W::GROUPS; g++) {
            u32 minus[2];
            block.template raw_minus<T>(g, r, minus);
            float sum[SLICES][CHAINS][4] = {};
            u32 b[SLICES][LEVELS][2][2];
#pragma unroll
            for (int c = 0; c < W::GROUP_CHUNKS; c++) {
                const int chunk = g * W::GROUP_CHUNKS + c;
                u32 a[4];
                W::template raw<T>(words, chunk, minus, a);
#pragma unroll
                for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
                    for (int l = 0; l < LEVELS; l++) {
                        u32(&of)[2][2] = b[slice][l];
                        if (W::GROUP_CHUNKS == 1)
                            read(x + slice * (8 * STRIDE), chunk, l, of[0]);
                        else if (c % 2 == 0)
                            read_two(x + slice * (8 * STRIDE), chunk, l, of);
                        multiply(sum[slice][c % CHAINS], a, of[c % 2], T());
                    }
            }
            Two32 scale = {{1.f, 1.f}}, offset;
            if (W::GROUP > 0) scale = inner_scale(block, g);
            if constexpr (W::OFFSET) offset = block.inner_offset(g, r);
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) {
                Pack<f32, 2> of;
                if constexpr (W::OFFSET) {
                    if (S::ROWS == 1)
                        of.v[0] = of.v[1] = sums[g];
                    else
                        of = load<2>(sums + g * S::ROWS + 8 * slice + threadIdx.x % 4 * 2 % S::ROWS);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float more = sum[slice][0][i];
                    if (CHAINS > 1) more += sum[slice][CHAINS - 1][i];
                    if (W::GROUP == 0) total[slice][i] = fmaf(RAW, more, total[slice][i]);
                    if (W::GROUP > 0) inner[slice][i] = fmaf(scale.v[i / 2], more, inner[slice][i]);
                    if (W::OFFSET) least[slice][i] = fmaf(offset.v[i / 2], of.v[i % 2], least[slice][i]);
                }
            }
        }
        if (W::GROUP > 0)
#pragma unroll
            for (int slice = 0; slice < SLICES; slice++) add_inner(block, inner[slice], least[slice], total[slice]);
    }

    // The same where a lane has the sums of chunks 2 t and 2 t + 1.
    __device__ __forceinline__ void add_spread(const W& block, const T* x, const f32* sums, float (&total)[4]) const {
        const int r = lane_row(), t = threadIdx.x % 4;
        const typename W::Words words = block.lane(threadIdx.x % WARP);
        u32 own[LEVELS][2];
#pragma unroll
        for (int l = 0; l < LEVELS; l++) read(x, r, l, own[l]);
        float sum[2][4] = {};  // chains of products
        u32 minus[2];
#pragma unroll
        for (int c = 0; c < BLOCK_CHUNKS; c++) {
            if (c % W::GROUP_CHUNKS == 0) block.template raw_minus<T>(c / W::GROUP_CHUNKS, r, minus);
            u32 a[4];
            W::template raw<T>(words, c, minus, a);
#pragma unroll
            for (int l = 0; l < LEVELS; l++)
                multiply(sum[c % 2], a, {own[l][0] * mine[SPREAD ? c : 0], own[l][1] * mine[SPREAD ? c : 0]}, T());
        }
        float inner[4] = {}, least[4] = {};
#pragma unroll
        for (int i = 0; i < 4; i++) sum[0][i] += sum[1][i];
#pragma unroll
        for (int g = 0; g < 2 / W::GROUP_CHUNKS; g++) {
            const int group = 2 / W::GROUP_CHUNKS * t + g;
            const Two32 scale = inner_scale(block, group);
            Two32 offset;
            if constexpr (W::OFFSET) offset = block.inner_offset(group, r);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float more =
                    W::GROUP_CHUNKS == 2 ? sum[0][2 * half] + sum[0][2 * half + 1] : sum[0][2 * half + g];
                inner[2 * half] = fmaf(scale.v[half], more, inner[2 * half]);
                if (W::OFFSET) least[2 * half] = fmaf(offset.v[half], sums[group], least[2 * half]);
            }
        }
        add_inner(block, inner, least, total);
    }

    // The scale of a group, or of nested ones its inner factor. What `raw` leaves off goes with the other factor then.
    static __device__ __forceinline__ Two32 inner_scale(const W& block, int group) {
        const Two32 scale = block.inner(group, lane_row());
        return W::NESTED ? scale : times_raw(scale);
    }
    static __device__ __forceinline__ Two32 times_raw(const Two32& scale) {
        return {{scale.v[0] * RAW, scale.v[1] * RAW}};
    }

    // What the groups of a block add up to, times what they have in common.
    static __device__ __forceinline__ void add_inner(const W& block, const float (&inner)[4], const float (&least)[4],
                                                     float (&total)[4]) {
        Two32 scale = {{1.f, 1.f}}, offset = {{1.f, 1.f}};
        if constexpr (W::NESTED) scale = times_raw(block.outer(lane_row()));
        if constexpr (W::NESTED && W::OFFSET) offset = block.outer_offset(lane_row());
#pragma unroll
        for (int i = 0; i < 4; i++) {
            total[i] = W::NESTED ? fmaf(scale.v[i / 2], inner[i], total[i]) : total[i] + inner[i];
            if (W::OFFSET) total[i] = W::NESTED ? fmaf(offset.v[i / 2], least[i], total[i]) : total[i] + least[i];
        }
    }
};

#endif
