// What the kernels share that stream weights through tensor cores for up to 8 rows (linear_mma.cu, experts_mma.cu): how
// the weights come, and what the warps of a block do with them. linear_mma.cu tells the whole.
#ifndef CUPLAMA_LINEAR_MMA_CUH
#define CUPLAMA_LINEAR_MMA_CUH

#include "activation.cuh"
#include "mma.cuh"

constexpr int ROWS = 8;                             // of x, and of w in half a tile
constexpr int CHUNK = 64;                           // elements of a row of w that a warp takes at a time
constexpr int HALF = ROWS * ROWS, TILE = 2 * HALF;  // sums of half a tile, of a tile
constexpr int GROUP = 2;                            // tiles between two barriers

// Columns of y of a tile.
template <int ACT>
constexpr int COLUMNS = 2 * ROWS / HALVES<ACT>;

__device__ __forceinline__ int lane_row() { return threadIdx.x % WARP / 4; }

// Where this lane's first vector of a chunk of its warp lies along k. The second is 32 elements on.
template <int WARPS, int CHUNKS>
__device__ __forceinline__ int place(int phase, int chunk) {
    return ((phase * WARPS + int(threadIdx.x / WARP)) * CHUNKS + chunk) * CHUNK + int(threadIdx.x % 4) * 8;
}

// Eight elements of T in the registers of an mma.
typedef Pack<u32, 4> Vector;

template <typename T>
__device__ __forceinline__ Vector as_vector(const Pack<T, 8>& x) {
    Vector vector;
    memcpy(&vector, &x, 16);
    return vector;
}

// Zeros if not `there`, and nothing is read. What does not lie on a 16-byte boundary (not `vectorized`) comes element
// by element, in a loop that takes few registers.
template <typename T>
__device__ __forceinline__ Vector load_vector(const T* from, bool there, bool vectorized) {
    Vector vector = {};
    if (!there) return vector;
    if (vectorized) return load<4>(reinterpret_cast<const u32*>(from));
#pragma unroll 1
    for (int j = 0; j < 8; j++) {
        const T element = from[j];
        unsigned short bits;
        memcpy(&bits, &element, 2);
#pragma unroll
        for (int i = 0; i < 3; i++) vector.v[i] = vector.v[i] >> 16 | vector.v[i + 1] << 16;
        vector.v[3] = vector.v[3] >> 16 | u32(bits) << 16;
    }
    return vector;
}

// Columns of y of a block, in which it has those of one weight: an equal share of all.
struct OneWeight {
    // Where they begin (0) and end (1). In 32 bits: m is below a million.
    static __device__ __forceinline__ int border(int m, int side) { return u32(m) * (blockIdx.x + side) / gridDim.x; }

    // Goes on to the columns of another weight, if there is one.
    template <typename T>
    __device__ __forceinline__ bool next(const T*& w, int& begin, int& end) {
        return false;
    }
};

// A warp's share of the weights on its way through the ring, in the order phase, tile, chunk, and from one weight to
// the next where a block has columns of several. Making one starts it; it reads nothing but weights, and what next()
// reads.
template <int COLUMNS, int WARPS, int CHUNKS, int PHASES, int DEPTH, typename T, typename Weights = OneWeight>
struct Stream {
    uint4* ring;  // of this lane: a vector every WARP
    const T* w;
    int m, k, begin, end;  // columns of y of this block
    bool vectorized;
    int phase, column, chunk;  // to ask for next
    Weights weights;

    __device__ __forceinline__ Stream(const T* w, int m, int k)
        : Stream(w, m, k, OneWeight::border(m, 0), OneWeight::border(m, 1), Weights()) {}

    __device__ __forceinline__ Stream(const T* w, int m, int k, int begin, int end, const Weights& weights)
        : w(w), m(m), k(k), begin(begin), end(end), weights(weights) {
        DYNAMIC_SHARED(uint4, memory);
        ring = memory + threadIdx.x / WARP * (DEPTH * 4 * WARP) + threadIdx.x % WARP;
        vectorized = aligned(w);
        phase = 0, column = begin, chunk = 0;
#pragma unroll 1
        for (int slot = 0; slot < DEPTH; slot++) fetch(slot);
        launch_dependents();
    }

    // Shared memory behind the ring: sums of a group's tiles [2][WARPS][GROUP][TILE]; with several phases those of all
    // tiles of the block [tiles][TILE]; then scale and shift of a norm.
    static constexpr int PARTIAL = WARPS * GROUP * TILE;
    static __device__ __forceinline__ f32* partials() {
        DYNAMIC_SHARED(uint4, memory);
        return reinterpret_cast<f32*>(memory + DEPTH * 4 * WARPS * WARP);
    }
    static __device__ __forceinline__ f32* sums() { return partials() + 2 * PARTIAL; }
    static __device__ __forceinline__ T* scales(int m) {
        const int columns = OneWeight::border(m, 1) - OneWeight::border(m, 0);
        return reinterpret_cast<T*>(sums() + (PHASES > 1 ? (columns + COLUMNS - 1) / COLUMNS * TILE : 0));
    }

    // Whether vector i of a chunk is one of the block.
    __device__ __forceinline__ bool there(int row, int at, int i) const {
        return row + i / 2 * (COLUMNS - ROWS) < end && at + i % 2 * 32 < k;
    }

    // Asks for the next chunk of a tile, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch(int slot) {
        if (phase < PHASES) {
            const int at = place<WARPS, CHUNKS>(phase, chunk), row = column + lane_row();
            const T* from = w + i64(row) * k + at;
            const i64 other = i64(COLUMNS > ROWS ? ROWS : m) * k;  // from a row to that of the other half
            uint4* to = ring + slot * (4 * WARP);
            if (vectorized) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    cp_async_16(to + i * WARP, from + i / 2 * other + i % 2 * 32, there(row, at, i));
            } else {
#pragma unroll 1
                for (int i = 0; i < 4; i++) {
                    const Vector vector = load_vector(from + i / 2 * other + i % 2 * 32, there(row, at, i), false);
                    memcpy(to + i * WARP, &vector, 16);
                }
            }
            if (++chunk == CHUNKS) {
                chunk = 0, column += COLUMNS;
                if (column >= end) {
                    column = begin;
                    if (++phase == PHASES && weights.next(w, begin, end)) phase = 0, column = begin;
                }
            }
        }
        cp_async_commit();
    }

    // The next chunk of the ring, which is asked for anew: two vectors of row r of each half.
    __device__ __forceinline__ void take(int& slot, Vector (&vector)[4]) {
        cp_async_wait<DEPTH - 1>();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 bits = ring[(slot * 4 + i) * WARP];
            memcpy(&vector[i], &bits, 16);
        }
        fetch(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
};

// Products of a vector of x with those of rows r (p) and r + 8 (q) of w: two, to two sums, which may be one.
template <typename T>
__device__ __forceinline__ void multiply_vectors(float (&sum)[4], float (&other)[4], const u32 (&p)[4],
                                                 const u32 (&q)[4], const u32 (&x)[4], T) {
    multiply(sum, {p[0], q[0], p[1], q[1]}, {x[0], x[1]}, T());
    multiply(other, {p[2], q[2], p[3], q[3]}, {x[2], x[3]}, T());
}

// The sums of one tile over the chunks of this warp, to partial [TILE]. x: this lane's vectors, each as the sum of
// LEVELS numbers.
template <int LEVELS, int COLUMNS, int WARPS, int CHUNKS, int PHASES, int DEPTH, typename T, typename Weights>
__device__ __forceinline__ void multiply_tile(Stream<COLUMNS, WARPS, CHUNKS, PHASES, DEPTH, T, Weights>& stream,
                                              int& slot, const Vector (&x)[CHUNKS][2][LEVELS], f32* partial) {
    constexpr int CHAINS = 3 - LEVELS;  // of products: short ones where there are registers
    float sum[CHAINS][4] = {};
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        Vector w[4];
        stream.take(slot, w);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int l = 0; l < LEVELS; l++)
                multiply_vectors(sum[0], sum[CHAINS - 1], w[i].v, w[i + 2].v, x[c][i][l].v, T());
    }
#pragma unroll
    for (int i = 0; CHAINS > 1 && i < 4; i++) sum[0][i] += sum[CHAINS - 1][i];
    // Row r of each half with rows 2t and 2t + 1 of x.
    store<2>(partial, Pack<f32, 2>{sum[0][0], sum[0][1]});
    store<2>(partial + HALF, Pack<f32, 2>{sum[0][2], sum[0][3]});
}

// What becomes of the sums: y = a + act(sum), in rows one behind the other.
template <int ACT, typename T, typename U>
struct Output {
    const f32* a;  // may be null
    U* y;
    int m;

    __device__ __forceinline__ float residual(int r, int column) const { return a[i64(r) * m + column]; }
    __device__ __forceinline__ void put(int r, int column, float residual, const float (&total)[HALVES<ACT>]) const {
        y[i64(r) * m + column] = from_float<U>(residual + activated<ACT, T>(total));
    }
};

// The place in the ring to read next, and which sums the next group of tiles has.
struct Turn {
    int slot = 0, sums = 0;
};

// The columns begin .. end - 1 of y, of count rows. rows(phase, x) gives this lane's vectors of x, each as the sum of
// LEVELS numbers.
template <int ACT, typename Rows, typename Out, int LEVELS, int WARPS, int CHUNKS, int PHASES, int DEPTH, typename T,
          typename Weights>
__device__ __forceinline__ void multiply_columns(Stream<COLUMNS<ACT>, WARPS, CHUNKS, PHASES, DEPTH, T, Weights>& stream,
                                                 Turn& turn, int begin, int end, const Rows& rows,
                                                 Vector (&x)[CHUNKS][2][LEVELS], const T* b, const Out& out,
                                                 int count) {
    constexpr int THREADS = WARPS * WARP;
    constexpr int STEP = GROUP * COLUMNS<ACT>, PARTS = HALVES<ACT>;  // sums for an element of y
    constexpr int EACH = (STEP * ROWS + THREADS - 1) / THREADS;      // elements of y of a thread in a group
    const int m = stream.m;
#pragma unroll 1
    for (int phase = 0; phase < PHASES; phase++) {
        rows(phase, x);
#pragma unroll 1
        for (int first = begin; first < end; first += STEP) {
            // What is added to this thread's elements of y: asked for now, needed at the end.
            float bias[EACH][PARTS] = {}, residual[EACH] = {};
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = threadIdx.x + e * THREADS, r = i % ROWS, column = first + i / ROWS;
                if (i < STEP * ROWS && r < count && column < end && phase == PHASES - 1) {
                    if (out.a != nullptr) residual[e] = out.residual(r, column);
#pragma unroll
                    for (int p = 0; p < PARTS; p++)
                        if (b != nullptr) bias[e][p] = to_float(b[p * m + column]);
                }
            }

            f32* partial = stream.partials() + turn.sums * stream.PARTIAL;
            turn.sums ^= 1;
            f32* mine = partial + threadIdx.x / WARP * (GROUP * TILE) + threadIdx.x % WARP * 2;
#pragma unroll 1
            for (int column = first; column < min(first + STEP, end); column += COLUMNS<ACT>) {
                multiply_tile<LEVELS>(stream, turn.slot, x, mine);
                mine += TILE;
            }
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = threadIdx.x + e * THREADS, r = i % ROWS, column = first + i / ROWS;
                if (i >= STEP * ROWS || r >= count || column >= end) continue;
                float total[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    const int at = i / (TILE / PARTS) * TILE + p * HALF + i % (TILE / PARTS);
                    total[p] = 0.f;
#pragma unroll
                    for (int warp = 0; warp < WARPS; warp++) total[p] += partial[warp * (GROUP * TILE) + at];
                    if constexpr (PHASES > 1) {
                        f32& earlier = stream.sums()[(first - begin) * (ROWS * PARTS) + at];
                        if (phase > 0) total[p] += earlier;
                        earlier = total[p];
                    }
                    total[p] += bias[e][p];
                }
                if (phase < PHASES - 1) continue;
                out.put(r, column, residual[e], total);
            }
        }
    }
}

// The block's share of y = a + act(x w^T + b).
template <int ACT, typename Rows, int LEVELS, int WARPS, int CHUNKS, int PHASES, int DEPTH, typename T, typename U>
__device__ __forceinline__ void multiply_rows(Stream<COLUMNS<ACT>, WARPS, CHUNKS, PHASES, DEPTH, T>& stream,
                                              const Rows& rows, Vector (&x)[CHUNKS][2][LEVELS], const T* b,
                                              const f32* a, U* y, int count) {
    Turn turn;
    const Output<ACT, T, U> out{a, y, stream.m};
    multiply_columns<ACT>(stream, turn, stream.begin, stream.end, rows, x, b, out, count);
}

// Rows of x as they are.
template <int WARPS, int CHUNKS, typename T>
struct PlainRows {
    const T* x;  // of this lane
    int k;
    bool there, vectorized;

    // row: of this lane, if it is there.
    __device__ __forceinline__ PlainRows(const T* x, i64 row, int k, bool there)
        : x(x + row * k), k(k), there(there), vectorized(aligned(x)) {}

    __device__ __forceinline__ void operator()(int phase, Vector (&to)[CHUNKS][2][1]) const {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = place<WARPS, CHUNKS>(phase, c) + 32 * i;
                to[c][i][0] = load_vector(x + at, there && at < k, vectorized);
            }
    }
};

#endif
