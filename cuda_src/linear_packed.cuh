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

// A warp's share of the weight on its way through its ring, slice by slice: what it has of a tile in a phase, at most BLOCKS
// packed blocks that lie one behind the other. The order is phase, unit, tile of the unit. Making one starts it; it reads
// nothing but weights.
template <typename S>
struct Stream {
    typedef typename S::W W;
    static constexpr int PIECES = sizeof(W) / 16, SLICE = S::BLOCKS * PIECES;
    uint4* ring;           // of this lane, in its warp's
    const uint4* from;     // of this lane: what to ask for next
    int begin, end;        // units of this GPU block
    int columns;           // blocks of a row of blocks
    i64 across, on;        // from a unit's first tile to its second, and on to the next unit, in pieces
    int phase, tile;       // to ask for next: tile of this GPU block
    int left;              // pieces of a slice, less this lane's number
    int filling, reading;  // slots, in pieces

    // rows: of the weight, for silu_mul of half of it
    __device__ __forceinline__ Stream(const W* weight, int rows, int k) {
        DYNAMIC_SHARED(uint4, memory);
        const int lane = threadIdx.x % WARP, half = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
        ring = memory + threadIdx.x / WARP * (S::DEPTH * SLICE) + lane;
        begin = u32(half) * blockIdx.x / gridDim.x, end = u32(half) * (blockIdx.x + 1) / gridDim.x;
        columns = W::columns(k);
        across = S::PARTS > 1 ? i64(half) * columns * PIECES : 0, on = i64(columns) * PIECES - across;
        from = reinterpret_cast<const uint4*>(weight) + (i64(begin) * columns + column_of(0)) * PIECES + lane;
        phase = 0, tile = 0, filling = 0, reading = 0;
        left = blocks_of(0) * PIECES - lane;
#pragma unroll 1
        for (int slot = 0; slot < S::DEPTH - 1; slot++) fetch();
        launch_dependents();
    }

    // Where this warp's slices begin in a row of blocks in a phase, and how many blocks they have.
    static __device__ __forceinline__ int column_of(int phase) {
        return (phase * S::WARPS + int(threadIdx.x / WARP)) * S::BLOCKS;
    }
    __device__ __forceinline__ int blocks_of(int phase) const {
        return min(max(columns - column_of(phase), 0), S::BLOCKS);
    }

    // Shared memory behind the rings: sums of the tiles between two barriers, twice [2][WARPS][STEP][PARTS][TILE]; with
    // several phases those of all tiles of the block [units][PARTS][TILE]; without tensor cores x [ROWS][SPAN].
    static constexpr int PARTIAL = S::WARPS * S::STEP * S::PARTS * S::TILE;
    static __device__ __forceinline__ f32* partials() {
        DYNAMIC_SHARED(uint4, memory);
        return reinterpret_cast<f32*>(memory + S::WARPS * S::DEPTH * SLICE);
    }
    static __device__ __forceinline__ f32* sums() { return partials() + 2 * PARTIAL; }
    __device__ __forceinline__ f32* staged() const {
        return sums() + (S::PHASES > 1 ? (end - begin) * S::PARTS * S::TILE : 0);
    }

    // Asks for the next slice, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch() {
        if (phase < S::PHASES) {
#pragma unroll
            for (int i = 0; i < SLICE; i += WARP)
                if (i + WARP <= SLICE || threadIdx.x % WARP < SLICE % WARP)
                    cp_async_16(ring + filling + i, from + i, i < left);
            tile++;
            from += S::PARTS > 1 && tile % 2 == 1 ? across : on;
            if (tile == (end - begin) * S::PARTS) {
                tile = 0, phase++;
                if (S::PHASES > 1) {
                    from += i64(begin - end) * columns * PIECES + S::WARPS * SLICE;
                    left = blocks_of(phase) * PIECES - threadIdx.x % WARP;
                }
            }
        }
        filling = filling + SLICE == S::DEPTH * SLICE ? 0 : filling + SLICE;
        cp_async_commit();
    }

    // The next slice of the ring. The one that was taken before is no longer read by any lane, and its place is filled.
    __device__ __forceinline__ const W* take() {
        cp_async_wait<S::DEPTH - 2>();
        __syncwarp();
        const W* slice = reinterpret_cast<const W*>(ring + reading - threadIdx.x % WARP);
        reading = reading + SLICE == S::DEPTH * SLICE ? 0 : reading + SLICE;
        fetch();
        return slice;
    }
};

// ---- rows of x ------------------------------------------------------------------------------------------------------

// N times four elements of a row of x, or of a norm's scale, at first, first + step, ...; zeros beyond k. order: where the
// columns of the weight lie in the row, with ORDERED.
template <bool ORDERED, int N, typename X>
__device__ __forceinline__ void read_fours(Pack<X, 4> (&v)[N], const X* row, const i32* order, int first, int step,
                                           int k, bool vectorized) {
    const X zero = from_float<X>(0.f);
    if (vectorized) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int at = first + i * step;
            v[i] = {zero, zero, zero, zero};
            if constexpr (ORDERED) {
                const Pack<i32, 4> from = at < k ? load<4>(order + at) : Pack<i32, 4>{};
#pragma unroll
                for (int j = 0; j < 4; j++) v[i].v[j] = at < k ? row[from.v[j]] : zero;
            } else if (at < k) {
                v[i] = load<4>(row + at);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int at = first + i * step + j;
                v[i].v[j] = at < k ? row[ORDERED ? order[at] : at] : zero;
            }
    }
}

// The rows of x as the registers of an mma's B, those of a phase at a time: x without a norm, read as it is.
template <typename S>
struct PlainRows {
    typedef typename S::T T;
    const T* x;  // of this lane
    const i32* order;
    int k;  // 0 if there is no such row
    bool vectorized;

    __device__ __forceinline__ PlainRows(const T* x, const i32* order, int k, int count)
        : x(x + (S::ROWS > 1 ? i64(lane_row()) * k : 0)), order(order), k(S::ROWS == 1 || lane_row() < count ? k : 0),
          vectorized(k % 4 == 0 && aligned(x, order)) {}

    __device__ __forceinline__ void measure(f32) {}

    __device__ __forceinline__ void operator()(int phase, u32 (&to)[S::CHUNKS][1][2]) const {
        Pack<T, 4> v[S::CHUNKS];
        read_fours<S::ORDERED>(v, x, order, place<S>(phase, 0), CHUNK_COLUMNS, k, vectorized);
#pragma unroll
        for (int c = 0; c < S::CHUNKS; c++) memcpy(to[c][0], &v[c], 8);
    }
};

// The rows of x of the ops with a norm, and of all without tensor cores: the GPU block computes those of a phase together
// and leaves them in shared memory, [LEVELS][ROWS][STRIDE] of Y. X: of x in memory. Y: T, an element being a number or,
// where y is f32 and a norm comes first, the sum of two (LEVELS); or f32, rounded to T if ROUNDED. What one phase takes
// is read once (KEPT), and the norm's scale before the wait for earlier kernels.
template <typename S, int NORM, int LEVELS, bool ROUNDED, typename X, typename Y>
struct SharedRows {
    typedef typename S::T T;
    static constexpr bool NORMED = NORM != NO_NORM, KEPT = NORMED && S::PHASES == 1;
    static constexpr int EACH = S::SPAN / S::THREADS / 4;               // fours of a thread, of a row in a phase
    static constexpr int STRIDE = S::SPAN + (sizeof(Y) == 2 ? 16 : 0);  // eight rows meet different banks
    const X* x;
    const T *g, *h;
    const i32* order;
    int k, count;
    bool vectorized;
    Y* staged;
    float mean[S::ROWS], inverse[S::ROWS];
    Pack<X, 4> kept[KEPT ? S::ROWS : 1][EACH];
    Pack<T, 4> scale[EACH];

    __device__ __forceinline__ SharedRows(const X* x, const T* g, const T* h, const i32* order, int k, int count,
                                          f32* staged)
        : x(x), g(g), h(h), order(order), k(k), count(count), vectorized(k % 4 == 0 && aligned(x, g, h, order)),
          staged(reinterpret_cast<Y*>(staged)) {
        if constexpr (KEPT) read(scale, g, 0);
    }

    template <typename E>
    __device__ __forceinline__ void read(Pack<E, 4> (&v)[EACH], const E* row, int phase, bool there = true) const {
        read_fours<S::ORDERED>(v, row, order, phase * S::SPAN + int(threadIdx.x) * 4, S::THREADS * 4, there ? k : 0,
                               vectorized);
    }

    // total[row] = the sum of f(element, row) over each row, by all threads of the block.
    template <typename F>
    __device__ __forceinline__ void sum(float (&total)[S::ROWS], const F& f) const {
        __shared__ float partial[S::ROWS][WARP], whole[S::ROWS];
#pragma unroll
        for (int row = 0; row < S::ROWS; row++) {
            total[row] = 0.f;
#pragma unroll 1
            for (int phase = 0; phase < S::PHASES; phase++) {
                Pack<X, 4> v[EACH];
                if constexpr (!KEPT) read(v, x + i64(row) * k, phase, row < count);
#pragma unroll
                for (int e = 0; e < EACH; e++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float element = to_float(KEPT ? kept[KEPT ? row : 0][e].v[j] : v[e].v[j]);
                        const int at = phase * S::SPAN + (e * S::THREADS + int(threadIdx.x)) * 4 + j;
                        total[row] += at < k ? f(element, row) : 0.f;
                    }
            }
            total[row] = warp_sum(total[row]);
        }
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
        for (int row = 0; row < S::ROWS; row++)
            if (lane == row) partial[row][warp] = total[row];
        __syncthreads();
        if constexpr (S::ROWS == 1) {
            total[0] = 0.f;
#pragma unroll
            for (int p = 0; p < S::WARPS; p++) total[0] += partial[0][p];
        } else {
            for (int row = warp; row < S::ROWS; row += S::WARPS) {
                const float one = warp_sum(lane < S::WARPS ? partial[row][lane] : 0.f);
                if (lane == 0) whole[row] = one;
            }
            __syncthreads();
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) total[row] = whole[row];
        }
    }

    // Reads x, for what the rows are multiplied with.
    __device__ __forceinline__ void measure(f32 eps) {
        if constexpr (NORMED) {
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) {
                if constexpr (KEPT) read(kept[KEPT ? row : 0], x + i64(row) * k, 0, row < count);
                mean[row] = 0.f;
            }
            if constexpr (NORM == LAYER_NORM) {
                sum(mean, [](float v, int) { return v; });
#pragma unroll
                for (int row = 0; row < S::ROWS; row++) mean[row] /= k;
                __syncthreads();  // what lies in shared memory may be written again
            }
            sum(inverse, [this](float v, int row) { return (v - mean[row]) * (v - mean[row]); });
#pragma unroll
            for (int row = 0; row < S::ROWS; row++) inverse[row] = 1.f / sqrtf(inverse[row] / k + eps);
        }
    }

    // Leaves the rows of a phase in shared memory. Whoever reads them there has passed a barrier before the next phase.
    __device__ __forceinline__ void stage(int phase) const {
        Pack<T, 4> by[EACH], shift[EACH];
        if constexpr (NORMED && !KEPT) read(by, g, phase);
        if constexpr (NORM == LAYER_NORM) read(shift, h, phase);
#pragma unroll
        for (int row = 0; row < S::ROWS; row++) {
            Pack<X, 4> v[EACH];
            if constexpr (!KEPT) read(v, x + i64(row) * k, phase, row < count);
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                Pack<Y, 4> high, low;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float value = to_float(KEPT ? kept[KEPT ? row : 0][e].v[j] : v[e].v[j]);
                    if constexpr (NORMED) {
                        const float factor = to_float(KEPT ? scale[e].v[j] : by[e].v[j]);
                        value = (value - mean[row]) * inverse[row] * factor;  // beyond k the factor is zero
                        if (NORM == LAYER_NORM) value += to_float(shift[e].v[j]);
                    }
                    if (row >= count) value = 0.f;
                    if (ROUNDED) value = to_float(from_float<T>(value));
                    high.v[j] = from_float<Y>(value);
                    low.v[j] = from_float<Y>(value - to_float(high.v[j]));
                }
                Y* to = staged + row * STRIDE + (e * S::THREADS + int(threadIdx.x)) * 4;
                store<4>(to, high);
                if (LEVELS > 1) store<4>(to + S::ROWS * STRIDE, low);
            }
        }
        __syncthreads();
    }

    // The registers of an mma's B.
    __device__ __forceinline__ void operator()(int phase, u32 (&to)[S::CHUNKS][LEVELS][2]) const {
        stage(phase);
        const Y* from = staged + (S::ROWS > 1 ? lane_row() * STRIDE : 0) + place<S>(0, 0);
#pragma unroll
        for (int c = 0; c < S::CHUNKS; c++)
#pragma unroll
            for (int l = 0; l < LEVELS; l++) {
                const Pack<Y, 4> four = load<4>(from + l * S::ROWS * STRIDE + c * CHUNK_COLUMNS);
                memcpy(to[c][l], &four, 8);
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
        const W* slice = stream.take();
#pragma unroll
        for (int b = 0; b < S::BLOCKS; b++)
            if (b < count) add_block(slice[b], b, total);
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
