// What linear_packed.cu is made of: a warp's stream of packed blocks, rows of x in registers, and the sums of a tile.
#ifndef CUPLAMA_LINEAR_PACKED_CUH
#define CUPLAMA_LINEAR_PACKED_CUH

#include "activation.cuh"
#include "formats.cuh"
#include "mma.cuh"

enum Norm { NO_NORM, RMS_NORM, LAYER_NORM };

// Whether products are those of tensor cores.
template <typename T>
#if __CUDA_ARCH__ >= 800
constexpr bool TENSOR = sizeof(T) == 2;
#else
constexpr bool TENSOR = false;
#endif

// The constants of a launch. ROWS: of x, 1 or up to 8; WARPS: of a block; BLOCKS: of columns, that a warp has of a row of
// blocks in a phase; PHASES: in which k goes; DEPTH: of a warp's ring, in blocks; ORDERED: x is read in another order.
template <typename T_, typename W_, int ACT_, int ROWS_, int WARPS_, int BLOCKS_, int PHASES_, int DEPTH_,
          bool ORDERED_>
struct Shape {
    typedef T_ T;
    typedef W_ W;
    static constexpr int ACT = ACT_, ROWS = ROWS_, WARPS = WARPS_, BLOCKS = BLOCKS_, PHASES = PHASES_, DEPTH = DEPTH_;
    static constexpr bool ORDERED = ORDERED_;
    static constexpr int THREADS = WARPS * WARP, CHUNKS = BLOCKS * BLOCK_CHUNKS;
    static constexpr int PARTS = ACT == SILU_MUL ? 2 : 1;        // sums for an element of y, and tiles of a unit
    static constexpr int TILE = BLOCK_ROWS * ROWS;               // sums of a tile
    static constexpr int STEP = 2;                               // units between two barriers
    static constexpr int SPAN = WARPS * BLOCKS * BLOCK_COLUMNS;  // columns of a phase
};

// Where a lane's first column of a chunk of its warp lies along k; it has four.
template <typename S>
__device__ __forceinline__ int place(int phase, int chunk) {
    const int block = (phase * S::WARPS + int(threadIdx.x / WARP)) * S::BLOCKS;
    return block * BLOCK_COLUMNS + chunk * CHUNK_COLUMNS + int(threadIdx.x % 4) * 4;
}

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }

// A warp's share of the weight on its way through its ring, in the order phase, unit, tile of the unit, block. Making one
// starts it; it reads nothing but weights.
template <typename S>
struct Stream {
    typedef typename S::W W;
    static constexpr int PIECES = sizeof(W) / 16;
    uint4* ring;     // of this warp
    const uint4* w;  // of this lane
    int begin, end;  // units of this GPU block
    int columns, half,
        count;  // blocks of a row of blocks; from a unit's tile to its other; blocks of this warp in a row
    const uint4* from;
    int phase, unit, part, block;  // to ask for next
    int filling, reading;          // slots

    // rows: of the weight, for silu_mul of half of it
    __device__ __forceinline__ Stream(const W* weight, int rows, int k) {
        DYNAMIC_SHARED(uint4, memory);
        ring = memory + threadIdx.x / WARP * (S::DEPTH * PIECES);
        w = reinterpret_cast<const uint4*>(weight) + threadIdx.x % WARP;
        half = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        begin = u32(half) * blockIdx.x / gridDim.x, end = u32(half) * (blockIdx.x + 1) / gridDim.x;
        columns = W::columns(k);
        phase = 0, unit = begin, part = 0, block = 0, filling = 0, reading = 0;
        count = blocks_of(0);
        seek();
        if (begin == end || count == 0) phase = S::PHASES;
#pragma unroll 1
        for (int slot = 0; slot < S::DEPTH - 1; slot++) fetch();
        launch_dependents();
    }

    // Blocks that this warp has of a row of blocks in a phase.
    __device__ __forceinline__ int blocks_of(int phase) const {
        return min(max(columns - (phase * S::WARPS + int(threadIdx.x / WARP)) * S::BLOCKS, 0), S::BLOCKS);
    }

    __device__ __forceinline__ void seek() {
        const int column = (phase * S::WARPS + int(threadIdx.x / WARP)) * S::BLOCKS;
        from = w + (i64(unit + part * half) * columns + column) * PIECES;
    }

    // Shared memory behind the rings: sums of the tiles between two barriers, twice [2][WARPS][STEP][PARTS][TILE]; with
    // several phases those of all tiles of the block [units][PARTS][TILE]; without tensor cores x [ROWS][SPAN].
    static constexpr int PARTIAL = S::WARPS * S::STEP * S::PARTS * S::TILE;
    static __device__ __forceinline__ f32* partials() {
        DYNAMIC_SHARED(uint4, memory);
        return reinterpret_cast<f32*>(memory + S::WARPS * S::DEPTH * PIECES);
    }
    static __device__ __forceinline__ f32* sums() { return partials() + 2 * PARTIAL; }
    __device__ __forceinline__ f32* staged() const {
        return sums() + (S::PHASES > 1 ? (end - begin) * S::PARTS * S::TILE : 0);
    }

    // Asks for the next block, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch() {
        if (phase < S::PHASES) {
            uint4* to = ring + filling * PIECES + threadIdx.x % WARP;
#pragma unroll
            for (int i = 0; i < PIECES; i += WARP)
                if (i + WARP <= PIECES || threadIdx.x % WARP < PIECES % WARP) cp_async_16(to + i, from + i, true);
            from += PIECES;
            if (++block == count) next_tile();
        }
        filling = filling + 1 == S::DEPTH ? 0 : filling + 1;
        cp_async_commit();
    }

    __device__ __forceinline__ void next_tile() {
        block = 0;
        if (S::PARTS == 1 || ++part == S::PARTS) {
            part = 0;
            if (++unit == end) {
                unit = begin, phase++;
                if (S::PHASES > 1) {
                    count = blocks_of(phase);
                    if (count == 0) phase = S::PHASES;
                }
            }
        }
        seek();
    }

    // The next block of the ring. The one that was taken before is no longer read by any lane, and its place is filled.
    __device__ __forceinline__ const W& take() {
        cp_async_wait<S::DEPTH - 2>();
        __syncwarp();
        const W& block = *reinterpret_cast<const W*>(ring + reading * PIECES);
        reading = reading + 1 == S::DEPTH ? 0 : reading + 1;
        fetch();
        return block;
    }
};

// ---- rows of x ------------------------------------------------------------------------------------------------------

// Four elements of a row at `at`, zeros beyond k. What is not `vectorized` comes element by element, in a loop that takes
// few registers. order: where the columns of the weight lie in x, or null.
template <bool ORDERED, typename T>
__device__ __forceinline__ Pack<T, 4> load_four(const T* row, const i32* order, int at, int k, bool vectorized) {
    if (!ORDERED && vectorized && at + 4 <= k) return load<4>(row + at);
    Pack<T, 4> four;
#pragma unroll
    for (int j = 0; j < 4; j++) four.v[j] = from_float<T>(0.f);
#pragma unroll 1
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int i = 0; i < 3; i++) four.v[i] = four.v[i + 1];
        four.v[3] = from_float<T>(0.f);
        if (at + j < k) four.v[3] = row[ORDERED ? order[at + j] : at + j];
    }
    return four;
}

// A normalised element.
template <int NORM>
__device__ __forceinline__ float normalised(float x, float mean, float inverse, float g, float h) {
    const float value = (NORM == LAYER_NORM ? x - mean : x) * inverse * g;
    return NORM == LAYER_NORM ? value + h : value;
}

// The rows of x as the registers of an mma's B, those of a phase at a time. LEVELS: an element is a number of T, or the sum
// of two where y is f32 and a norm comes first. X: of x in memory, T, or f32 if there is a norm.
template <typename S, int NORM, int LEVELS, typename X>
struct RegisterRows {
    typedef typename S::T T;
    static constexpr bool KEPT = NORM != NO_NORM && S::PHASES == 1 && LEVELS == 1;
    const X* x;  // of this lane
    const T *g, *h;
    const i32* order;
    int k;
    bool there, vectorized;
    float mean, inverse;
    Pack<X, 4> kept[KEPT ? S::CHUNKS : 1];

    __device__ __forceinline__ RegisterRows(const X* x, const T* g, const T* h, const i32* order, int k, int count)
        : x(x + (S::ROWS > 1 ? i64(lane_row()) * k : 0)), g(g), h(h), order(order), k(k),
          there(S::ROWS == 1 || lane_row() < count), vectorized(k % 4 == 0 && aligned(x, g, h)), mean(0.f),
          inverse(1.f) {}

    __device__ __forceinline__ Pack<X, 4> four(int phase, int chunk) const {
        return load_four<S::ORDERED>(x, order, place<S>(phase, chunk), there ? k : 0, vectorized);
    }

    // The sum of f(element) over the row of this lane.
    template <typename F>
    __device__ __forceinline__ float sum(const F& f, float (*partial)[S::ROWS]) const {
        float total = 0.f;
#pragma unroll 1
        for (int phase = 0; phase < S::PHASES; phase++)
#pragma unroll
            for (int c = 0; c < S::CHUNKS; c++) {
                const Pack<X, 4> v = KEPT ? kept[KEPT ? c : 0] : four(phase, c);
                const int at = place<S>(phase, c);
#pragma unroll
                for (int j = 0; j < 4; j++) total += at + j < k ? f(to_float(v.v[j])) : 0.f;
            }
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const int row = S::ROWS == 1 ? 0 : lane_row();
        if (threadIdx.x % 4 == 0 && lane_row() < S::ROWS) partial[threadIdx.x / WARP][row] = total;
        __syncthreads();
        total = 0.f;
#pragma unroll
        for (int p = 0; p < S::WARPS; p++) total += partial[p][row];
        return total;
    }

    // Reads x, for what the rows are multiplied with.
    __device__ __forceinline__ void measure(f32 eps) {
        if constexpr (NORM != NO_NORM) {
            __shared__ float partial[2][S::WARPS][S::ROWS];
#pragma unroll
            for (int c = 0; KEPT && c < S::CHUNKS; c++) kept[KEPT ? c : 0] = four(0, c);
            if constexpr (NORM == LAYER_NORM) mean = sum([](float v) { return v; }, partial[1]) / k;
            const float from = mean;
            inverse = 1.f / sqrtf(sum([from](float v) { return (v - from) * (v - from); }, partial[0]) / k + eps);
        }
    }

    __device__ __forceinline__ void operator()(int phase, u32 (&to)[S::CHUNKS][LEVELS][2]) const {
#pragma unroll
        for (int c = 0; c < S::CHUNKS; c++) {
            const Pack<X, 4> v = KEPT ? kept[KEPT ? c : 0] : four(phase, c);
            if constexpr (NORM == NO_NORM) {
                memcpy(to[c][0], &v, 8);
            } else {
                const int at = place<S>(phase, c);
                const Pack<T, 4> by = load_four<S::ORDERED>(g, order, at, k, vectorized);
                Pack<T, 4> shift = {}, high, low;
                if (NORM == LAYER_NORM) shift = load_four<S::ORDERED>(h, order, at, k, vectorized);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float value =
                        normalised<NORM>(to_float(v.v[j]), mean, inverse, to_float(by.v[j]), to_float(shift.v[j]));
                    high.v[j] = from_float<T>(at + j < k && there ? value : 0.f);
                    low.v[j] = from_float<T>(at + j < k && there ? value - to_float(high.v[j]) : 0.f);
                }
                memcpy(to[c][0], &high, 8);
                if (LEVELS > 1) memcpy(to[c][LEVELS - 1], &low, 8);
            }
        }
    }
};

// ---- tiles on tensor cores ------------------------------------------------------------------------------------------
// x of this lane, and the sums over each group of the rows 2 t and 2 t + 1, if the format has offsets.
template <typename S, int LEVELS>
struct Factors {
    typedef typename S::T T;
    static constexpr int GROUPS = S::W::OFFSET ? S::BLOCKS * S::W::GROUPS : 1;
    u32 x[S::CHUNKS][LEVELS][2];
    float sums[GROUPS][2];

    template <typename Rows>
    __device__ __forceinline__ void fill(const Rows& rows, int phase) {
        rows(phase, x);
        if constexpr (S::W::OFFSET) {
            const u32 one = twice<T>(1.f);
#pragma unroll
            for (int g = 0; g < GROUPS; g++) {
                float sum[4] = {};
#pragma unroll
                for (int c = 0; c < S::W::GROUP_CHUNKS; c++)
#pragma unroll
                    for (int l = 0; l < LEVELS; l++)
                        multiply(sum, {one, one, one, one}, x[g * S::W::GROUP_CHUNKS + c][l], T());
                sums[g][0] = sum[0], sums[g][1] = sum[1];
            }
        }
    }

    // The sums of a tile over the columns of this warp, to partial [TILE].
    __device__ __forceinline__ void multiply_tile(Stream<S>& stream, int count, f32* partial) const {
        typedef typename S::W W;
        float total[4] = {};
#pragma unroll
        for (int b = 0; b < S::BLOCKS; b++)
            if (b < count) add_block(stream.take(), b, total);
        const int lane = threadIdx.x % WARP;
        if constexpr (S::ROWS == 1) {
            if (lane % 4 == 0) partial[lane / 4] = total[0], partial[lane / 4 + 8] = total[2];
        } else {
            store<2>(partial + lane * 2, Pack<f32, 2>{total[0], total[1]});
            store<2>(partial + lane * 2 + S::TILE / 2, Pack<f32, 2>{total[2], total[3]});
        }
    }

    __device__ __forceinline__ void add_block(const typename S::W& block, int b, float (&total)[4]) const {
        typedef typename S::W W;
        constexpr int CHAINS = W::GROUP_CHUNKS > 4 ? 2 : 1;  // of products: short ones
        const int r = lane_row();
        const typename W::Words words = block.lane(threadIdx.x % WARP);
#pragma unroll
        for (int g = 0; g < W::GROUPS; g++) {
            u32 minus[2];
            block.template minus<T>(g, r, minus);
            float sum[CHAINS][4] = {};
#pragma unroll
            for (int c = 0; c < W::GROUP_CHUNKS; c++) {
                const int chunk = g * W::GROUP_CHUNKS + c;
                u32 a[4];
                W::template fragment<T>(words, chunk, minus, a);
#pragma unroll
                for (int l = 0; l < LEVELS; l++) multiply(sum[c % CHAINS], a, x[b * BLOCK_CHUNKS + chunk][l], T());
            }
            Two32 scale = {{1.f, 1.f}}, offset;
            if (W::GROUP > 0) scale = block.scales(g, r);
            if (W::OFFSET) offset = block.offsets(g, r);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float more = sum[0][i];
                if (CHAINS > 1) more += sum[CHAINS - 1][i];
                if (W::OFFSET) total[i] += offset.v[i / 2] * sums[W::OFFSET ? b * W::GROUPS + g : 0][i % 2];
                total[i] = W::GROUP > 0 ? fmaf(scale.v[i / 2], more, total[i]) : total[i] + more;
            }
        }
    }
};

#endif
