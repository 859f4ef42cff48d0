// What linear_packed.cu is made of: a warp's stream of packed blocks.
#ifndef CUPLAMA_LINEAR_PACKED_CUH
#define CUPLAMA_LINEAR_PACKED_CUH

#include "activation.cuh"
#include "formats.cuh"
#include "ptx.cuh"

// Whether products are those of tensor cores.
template <typename T>
#if __CUDA_ARCH__ >= 800
constexpr bool TENSOR = sizeof(T) == 2;
#else
constexpr bool TENSOR = false;
#endif

// The constants of a launch. ROWS: of x, at most (1, 2, 4 or 8; of experts_packed.cu 16, too); WARPS: of a block;
// BLOCKS: of columns, at most, that a warp has of a row of blocks in a phase; PHASES: in which k goes; DEPTH: of a warp's
// ring, in blocks, or twins; EARLY: how many it asks for before x; STEP: units of tiles between two barriers; ORDERED: x
// is read in another order; TWINS: 2 where blocks of two tiles with the same columns lie together in a ring, so that a
// warp reads x once for both, else 1. Twins are the tiles of a gated unit, or else of two neighbouring units.
template <typename T_, typename W_, int ACT_, int ROWS_, int WARPS_, int BLOCKS_, int PHASES_, int DEPTH_, int EARLY_,
          int STEP_, int SPLIT_, bool ORDERED_, int TWINS_ = 1>
struct Shape {
    typedef T_ T;
    typedef W_ W;
    static constexpr int ACT = ACT_, ROWS = ROWS_, WARPS = WARPS_, BLOCKS = BLOCKS_, PHASES = PHASES_, DEPTH = DEPTH_,
                         EARLY = EARLY_, STEP = STEP_, SPLIT = SPLIT_;
    static constexpr int TWINS = TWINS_;
    static_assert(TWINS == 1 || (STEP * (GATED<ACT> ? 2 : 1) % TWINS == 0 && PHASES == 1), "twins go together");
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
// and what next() reads. Where there is one weight it then lets the next kernel start.
template <typename S, typename Weights = OneWeight<S>>
struct Stream {
    typedef typename S::W W;
    static constexpr int PIECES = sizeof(W) / 16, SLOT = S::TWINS * PIECES;
    static constexpr int UNITS = S::TWINS / S::PARTS > 1 ? 2 : 1;  // that go together
    uint4* ring;                                                   // of this lane, in its warp's
    const uint4* weight;                                           // of this lane
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
        ring = memory + threadIdx.x / WARP * (S::DEPTH * SLOT) + lane;
        const int row = this->weights.next(units, begin, end);
        columns = W::columns(k);
        half = units * columns * PIECES;
        weight = reinterpret_cast<const uint4*>(blocks) + lane, from = (row * columns + column_of(first)) * PIECES;
        filling = 0, reading = 0, phase = first;
        begin_phase();
        fill<S::EARLY>();
        if constexpr (!Weights::MORE) launch_dependents();  // where there are several, they may come ahead of the wait
    }

    // Asks for that many blocks, for empty slots.
    template <int COUNT>
    __device__ __forceinline__ void fill() {
#pragma unroll 1
        for (int slot = 0; slot < COUNT; slot++) {
            fetch();
            filling += SLOT;
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
        return reinterpret_cast<f32*>(memory + S::WARPS * S::DEPTH * SLOT);
    }
    static __device__ __forceinline__ f32* sums() { return partials() + 2 * PARTIAL; }
    __device__ __forceinline__ f32* staged() const {
        return sums() + (S::WAITING ? (end - begin) * S::PARTS * S::TILE : 0);
    }

    // What there is to ask for in a phase. A unit's tiles are half of the weight apart. Of neighbouring units the last
    // may be alone.
    __device__ __forceinline__ void begin_phase() {
        run = left = blocks_of(phase);
        remaining = run * ((end - begin + UNITS - 1) / UNITS) * (S::PARTS / (S::TWINS / UNITS));
        next = on = (columns * UNITS - run) * PIECES;
        if constexpr (S::PARTS > 1 && S::TWINS == 1) on += half - columns * PIECES, next -= half;
    }
    // From a block to its twin's place, in pieces; the twin of one that is alone is itself.
    __device__ __forceinline__ int twin() const {
        if constexpr (UNITS == 1) return half;
        return (end - begin) % 2 == 1 && remaining <= run ? 0 : columns * PIECES;
    }

    // Asks for the next block, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch() {
        if (remaining > 0) {
#pragma unroll
            for (int i = 0; i < PIECES; i += WARP)
                if (i + WARP <= PIECES || int(threadIdx.x % WARP) < PIECES % WARP) {
                    cp_async_16(ring + filling + i, weight + from + i, true);
                    if constexpr (S::TWINS > 1)
                        cp_async_16(ring + filling + PIECES + i, weight + from + twin() + i, true);
                }
            from += PIECES, remaining--, left--;
            if (left == 0) {
                left = run, from += on;
                if constexpr (S::PARTS > 1 && S::TWINS == 1) {
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

    // The next block of the ring, or twins. The one that was taken before is no longer read by any lane, and its place is filled.
    __device__ __forceinline__ const W* take() {
        cp_async_wait<S::DEPTH - 2>();
        __syncwarp();
        const W* block = reinterpret_cast<const W*>(ring + reading - threadIdx.x % WARP);
        fetch();
        filling = reading;
        reading = reading + SLOT == S::DEPTH * SLOT ? 0 : reading + SLOT;
        return block;
    }
};

#endif
