// Products of a packed weight (formats.cuh) with 9 to 64 rows of x in 16 bits, on tensor cores (sm_80 and later):
//
// linear_packed_many        y[n,m] = x w^T + b
// linear_add_packed_many    y[n,m] = a + x w^T + b                a, y: f32 (the residual stream)
// gather_columns            gathered[n,k] = x[n, order[k]]        for a weight whose columns were sorted
//
//   x [n,k], b [m] (may be null): T, f16 or bf16; y: U (T or f32)
//   w         blocks of the `rows` rows of a segment, which make the columns of y from `column` on
//   partial   [blocks of the grid][TEAMS][SUMS][WARP] f32: sums of bands that blocks share
//   arrivals  [bands][TEAMS] u32: zero before and after
//   A launch takes the rows first .. first + 8 NTILES - 1 of x, as far as there are so many.
//
// Few rows: the time is that of reading w once. Many: that of the products, or of making 16-bit numbers of the codes,
// so each is made once and multiplied with all rows of x.
//
// Mapping: a unit of work is a band of BAND tiles of 16 rows of w, by one packed block of 128 columns. The units, band
// after band, are dealt to one block a multiprocessor in equal runs (Work). Where a band is shared, all blocks but that
// with its first part leave their sums, and that one waits and adds them in the order of k: the result is the same in
// every run. A block so leaves one part, at the beginning of its run, and waits at the end of it. Tried: all leave
// their sums, and who comes last adds them.
//
// mma.m16n8k16 has w as A, in the order in which formats.cuh gives it, and x as B: a lane reads the columns 4t .. 4t+3
// of a chunk of 16, which are 8 bytes side by side. A ring in shared memory, DEPTH units deep, has x (for all warps)
// and w (each warp's own tiles); both come by cp.async, and one barrier a unit guards it. A warp has TILES tiles, so
// what it reads of x serves as many products; SLICES warps have the same tiles and each a part of the columns.
//
// Scales and offsets are folded into A: a number of w is rounded to T, as a weight is that a program keeps in 16 bits.
// So sums run over all of k. Scales of whole rows come in at the end, in float32. Tried: sums of each group without its
// scale, then total += scale * sum + offset * (sum of x): most of the instructions were not those of products.
//
// The ring is filled with weights before the wait for the kernel ahead. An x that does not lie on 16-byte boundaries
// comes element by element.
//
// Launch and tuning: cuplama/ops/linear_packed_many.py. Ops: cuplama/ops/linear.py, cuplama/ops/fused.py. Tests:
// tests/ops/test_linear_packed_many.py. Benchmark: python -m benchmarks.packed_batch. On Hopper more than 16 rows, and
// with codes of 4 bits all, are linear_packed_many_wgmma.cu's.
#include "linear_packed_many.cuh"

constexpr int STRIDE =
    BLOCK_COLUMNS + CHUNK_COLUMNS;  // of a row of x in shared memory: 8 bytes of 4 rows at a time meet all banks once

template <typename S, typename W>
struct Room {
    static constexpr int X = S::ROWS * STRIDE * 2, STAGE = X + S::BAND * int(sizeof(W));
};

// The rows of x, BLOCK_COLUMNS columns at a time. Rows beyond n are copies of the last one, whose sums go nowhere.
template <typename S, typename T>
struct Rows {
    static constexpr int VECTORS = BLOCK_COLUMNS / 8,
                         STEP = S::THREADS / VECTORS;  // rows that the block copies at once
    static constexpr int ITEMS = (S::ROWS + STEP - 1) / STEP;
    const T* from[ITEMS];    // of this thread, its vectors in the next unit
    int column, left, wrap;  // of the next unit the first column; columns from this thread's vector on to the end
    bool vectorized;

    __device__ __forceinline__ Rows(const T* x, int n, int k, const Work& work)
        : column(work.begin % work.blocks * BLOCK_COLUMNS), wrap(work.blocks * BLOCK_COLUMNS) {
        const int row = threadIdx.x / VECTORS, at = column + threadIdx.x % VECTORS * 8;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) from[i] = x + (i64(min(row + i * STEP, n - 1)) * k + at);
        left = k - at;
        int aligned_rows = aligned(x) && k % 8 == 0;
        keep(aligned_rows);
        vectorized = aligned_rows;
    }

    // Where the first vector of this thread goes in a stage.
    static __device__ __forceinline__ int place() { return threadIdx.x / VECTORS * STRIDE + threadIdx.x % VECTORS * 8; }

    // Asks for the next unit. to: the place in a stage.
    __device__ __forceinline__ void fetch(T* to) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const bool mine = S::ROWS % STEP == 0 || threadIdx.x / VECTORS + i * STEP < S::ROWS;
            if (vectorized) {
                if (mine) cp_async_16(to + i * (STEP * STRIDE), from[i], left > 0);
            } else if (mine) {
#pragma unroll 1
                for (int j = 0; j < 8; j++) to[i * (STEP * STRIDE) + j] = j < left ? from[i][j] : from_float<T>(0.f);
            }
            from[i] += BLOCK_COLUMNS;
        }
        column += BLOCK_COLUMNS, left -= BLOCK_COLUMNS;
        if (column < wrap) return;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) from[i] -= wrap;
        column = 0, left += wrap;
    }
};

// This lane's share of a product's B: of row lane / 4 of x the columns 4t .. 4t+3 of a chunk.
template <typename T>
__device__ __forceinline__ void load_columns(const T* x, u32 (&b)[2]) {
    const uint2 bits = *reinterpret_cast<const uint2*>(x);
    b[0] = bits.x, b[1] = bits.y;
}

// total += the products of this warp's part of a stage. tiles: of its team; x: of the stage.
template <typename S, typename W, typename T>
__device__ __forceinline__ void multiply_unit(float (&total)[S::SUMS], const W* tiles, const T* x) {
    constexpr int CHUNKS = BLOCK_CHUNKS / S::SLICES;
    const int lane = threadIdx.x % WARP, slice = threadIdx.x / WARP % S::SLICES;
    x += lane / 4 * STRIDE + lane % 4 * 4 + slice * (BLOCK_COLUMNS / S::SLICES);
    Numbers<W, T> numbers[S::TILES];
#pragma unroll
    for (int half = 0; half < CHUNKS / 4; half++) {
        typename W::Words codes[S::TILES];
#pragma unroll
        for (int i = 0; i < S::TILES; i++) codes[i] = half_lane(tiles[i], slice * (CHUNKS / 4) + half);
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int chunk = half * 4 + c;
            u32 a[S::TILES][4];
#pragma unroll
            for (int i = 0; i < S::TILES; i++) {
                if (chunk % W::GROUP_CHUNKS == 0)
                    numbers[i].begin(tiles[i], GROUPED<W> ? (slice * CHUNKS + chunk) / W::GROUP_CHUNKS : 0);
                numbers[i].make(codes[i], c, a[i]);
            }
#pragma unroll
            for (int j = 0; j < S::NTILES; j++) {
                u32 b[2];
                load_columns(x + j * 8 * STRIDE + chunk * CHUNK_COLUMNS, b);
#pragma unroll
                for (int i = 0; i < S::TILES; i++) {
                    float (&d)[4] = *reinterpret_cast<float (*)[4]>(total + (i * S::NTILES + j) * 4);
                    multiply(d, a[i], b, T());
                }
            }
        }
    }
}

// y = a + x w^T + b for one launch. x: from its first row on. wait: pdl_wait, which the kernels themselves call.
template <typename S, typename W, typename T, typename U, typename Wait>
__device__ __forceinline__ void multiply_rows(const T* x, const Output<W, T, U>& out, const Wait& wait) {
    typedef Room<S, W> Place;
    DYNAMIC_SHARED(unsigned char, memory);
    f32* room = reinterpret_cast<f32*>(memory + S::DEPTH * Place::STAGE);
    const Work work(out.rows, out.k, S::BAND);
    Weights<S, W> weights(out.w, work);
    unsigned char* to = memory + Place::X + weights.place();
#pragma unroll 1
    for (int i = 0; i < min(S::DEPTH - 1, work.end - work.begin); i++) weights.fetch(to + i * Place::STAGE);
    launch_dependents();
    wait();
    Rows<S, T> rows(x, out.n - out.first, out.k, work);
    T* columns = reinterpret_cast<T*>(memory) + rows.place();
#pragma unroll 1
    for (int i = 0; i < S::DEPTH - 1; i++) {
        if (i < work.end - work.begin) rows.fetch(columns + i * (Place::STAGE / 2));
        cp_async_commit();
    }

    float total[S::SUMS] = {};
    const W* tiles = reinterpret_cast<const W*>(memory + Place::X) + threadIdx.x / WARP / S::SLICES * S::TILES;
    int stage = 0, free = (S::DEPTH - 1) * Place::STAGE;  // in bytes
    int band = work.begin / work.blocks, left = (band + 1) * work.blocks - work.begin;
#pragma unroll 1
    for (int unit = work.begin; unit < work.end; unit++) {
        cp_async_wait<S::DEPTH - 2>();
        __syncthreads();
        if (unit + S::DEPTH - 1 < work.end) {
            weights.fetch(to + free);
            rows.fetch(columns + free / 2);
        }
        cp_async_commit();
        const T* now = reinterpret_cast<const T*>(memory + stage);
        multiply_unit<S>(total, reinterpret_cast<const W*>(reinterpret_cast<const unsigned char*>(tiles) + stage), now);
        if (--left == 0 || unit == work.end - 1) {
            finish<S>(total, out, work, band, room);
            band++, left = work.blocks;
        }
        free = stage;
        stage = stage == (S::DEPTH - 1) * Place::STAGE ? 0 : stage + Place::STAGE;
    }
}

template <typename T, typename U, typename W, int NTILES, int TILES, int WARPS, int SLICES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_packed_many(const T* x, const W* __restrict__ w, const T* __restrict__ b, U* y, f32* partial, u32* arrivals,
                       int n, int first, int column, int rows, int m, int k) {
    const Output<W, T, U> out = {w, nullptr, b, nullptr, y, partial, arrivals, first, column, n, m, rows, k};
    multiply_rows<Shape<NTILES, TILES, WARPS, SLICES, DEPTH>>(x + i64(first) * k, out, [] { pdl_wait(); });
}

template <typename T, typename W, int NTILES, int TILES, int WARPS, int SLICES, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_add_packed_many(const T* x, const W* __restrict__ w, const f32* a, const T* __restrict__ b, f32* y,
                           f32* partial, u32* arrivals, int n, int first, int column, int rows, int m, int k) {
    const Output<W, T, f32> out = {w, nullptr, b, a, y, partial, arrivals, first, column, n, m, rows, k};
    multiply_rows<Shape<NTILES, TILES, WARPS, SLICES, DEPTH>>(x + i64(first) * k, out, [] { pdl_wait(); });
}

// gathered[n,k]: the columns of x in the order in which a weight has them, for a weight whose columns were sorted.
template <typename T>
__global__ void __launch_bounds__(256) gather_columns(const T* x, const i32* __restrict__ order, T* gathered, int k) {
    launch_dependents();
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    const int from = column < k ? order[column] : 0;
    pdl_wait();
    if (column < k) gathered[i64(blockIdx.y) * k + column] = x[i64(blockIdx.y) * k + from];
}
