// What the kernels for 9 to 64 rows of x on packed weights share: who computes what, the way of the weights to shared
// memory, and what becomes of the sums. linear_packed_many.cu tells the whole.
#ifndef CUPLAMA_LINEAR_PACKED_MANY_CUH
#define CUPLAMA_LINEAR_PACKED_MANY_CUH

#include "formats.cuh"
#include "mma.cuh"

// How the threads share a unit of work, which is BAND tiles of 16 rows of w by BLOCK_COLUMNS columns.
// NTILES: groups of 8 rows of x; TILES: of w, of a warp; SLICES: warps that share their tiles, each with a part of the
// columns; DEPTH: units in the ring.
template <int NTILES_, int TILES_, int WARPS_, int SLICES_, int DEPTH_>
struct Shape {
    static constexpr int NTILES = NTILES_, TILES = TILES_, WARPS = WARPS_, SLICES = SLICES_, DEPTH = DEPTH_;
    static constexpr int THREADS = WARPS * WARP, TEAMS = WARPS / SLICES, BAND = TEAMS * TILES, ROWS = 8 * NTILES;
    static constexpr int SUMS = TILES * NTILES * 4;  // of a thread: of (tile, group of rows, half, row) the sum
};

// ---- the division of the work ---------------------------------------------------------------------------------------

// The units, band after band and along k within a band, are dealt to the blocks in equal contiguous runs. A run may
// begin and end within a band: then several blocks have a part of its sums. Runs are dealt from the last block on: so a
// block waits only for blocks that were started before it.
struct Work {
    int blocks;  // of a tile along k
    int tiles;
    u32 units;
    int run, begin, end;  // of this block

    __device__ __forceinline__ Work(int rows, int k, int band)
        : blocks((k + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS), tiles((rows + BLOCK_ROWS - 1) / BLOCK_ROWS),
          run(gridDim.x - 1 - blockIdx.x) {
        units = u32((tiles + band - 1) / band) * blocks;
        begin = start(run), end = start(run + 1);
    }
    __device__ __forceinline__ int start(u32 run) const { return units * run / gridDim.x; }
    __device__ __forceinline__ int owner(u32 unit) const { return ((unit + 1) * gridDim.x - 1) / units; }
};

// ---- to shared memory -----------------------------------------------------------------------------------------------

// A warp's share of the weights: of its team's tiles, the pieces that are its slice's. It goes through the block's
// units in their order.
template <typename S, typename W>
struct Weights {
    static constexpr int BYTES = sizeof(W), PIECES = BYTES / 16, STEP = S::SLICES * WARP;
    const unsigned char* from;  // of the next unit, this lane's first piece of the team's first tile
    i64 stride;                 // from a tile to the next
    int first, tile, tiles, block, blocks;

    __device__ __forceinline__ Weights(const W* w, const Work& work)
        : stride(i64(work.blocks) * BYTES), tiles(work.tiles), blocks(work.blocks) {
        const int warp = threadIdx.x / WARP;
        first = warp % S::SLICES * WARP + threadIdx.x % WARP;
        tile = work.begin / blocks * S::BAND + warp / S::SLICES * S::TILES;
        block = work.begin % blocks;
        from = reinterpret_cast<const unsigned char*>(w + i64(tile) * blocks + block) + first * 16;
        keep(first);
    }

    // Where the first piece of this lane goes, from where a stage's tiles begin.
    __device__ __forceinline__ int place() const {
        return int(threadIdx.x) / WARP / S::SLICES * (S::TILES * BYTES) + first * 16;
    }

    // Asks for the next unit. to: the place in a stage.
    __device__ __forceinline__ void fetch(unsigned char* to) {
#pragma unroll
        for (int t = 0; t < S::TILES; t++) {
            const bool there = tile + t < tiles;
#pragma unroll
            for (int i = 0; i < PIECES; i += STEP)
                if (i + STEP <= PIECES || i + first < PIECES)
                    cp_async_16(to + t * BYTES + i * 16, from + t * stride + i * 16, there);
        }
        from += BYTES;
        if (++block == blocks) block = 0, tile += S::BAND, from += (S::BAND - 1) * stride;
    }
};

// Whether scales come in group by group. Else they come in at the end, if there are any.
template <typename W>
constexpr bool GROUPED = W::GROUP != 0 && W::SCALED;

// Numbers of w in T, scale * (number(code) - zero) + offset, for a lane's rows of a tile: rounded to T once, and the
// scale and the offset before. Row scales are left to the end.
template <typename W, typename T>
struct Numbers {
    u32 minus[2], scale[2], offset[2];  // of rows r and r + 8, the same in both halves

    // From here on those of a group.
    __device__ __forceinline__ void begin(const W& tile, int group) {
        const int r = threadIdx.x % WARP / 4;
        tile.template minus<T>(group, r, minus);
        if constexpr (GROUPED<W>) {
            const Two32 scales = tile.scales(group, r), offsets = tile.offsets(group, r);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                scale[half] = pack<T>(scales.v[half], scales.v[half]);
                if (W::OFFSET) offset[half] = pack<T>(offsets.v[half], offsets.v[half]);
            }
        }
    }

    // The A of a chunk.
    __device__ __forceinline__ void make(const typename W::Words& codes, int chunk, u32 (&a)[4]) const {
        W::template fragment<T>(codes, chunk, minus, a);
        if constexpr (GROUPED<W>) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = W::OFFSET ? multiply_add_two<T>(a[i], scale[i % 2], offset[i % 2])
                                 : multiply_two<T>(a[i], scale[i % 2]);
        }
    }
};

// The A of four chunks, the first half of a block or the second. codes: of these, in the order in which x has its columns.
template <typename W, typename T>
__device__ __forceinline__ void make_chunks(const W& block, const typename W::Words& codes, int half, u32 (&a)[4][4],
                                            T) {
    Numbers<W, T> numbers;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        const int chunk = half * 4 + c;
        if (c == 0 || chunk % W::GROUP_CHUNKS == 0) numbers.begin(block, GROUPED<W> ? chunk / W::GROUP_CHUNKS : 0);
        numbers.make(codes, c, a[c]);
    }
}

// The codes of four chunks of a block, the first half or the second: a lane's share, as that of chunks 0 .. 3.
template <typename W>
__device__ __forceinline__ typename W::Words half_lane(const W& block, int half) {
    typedef typename W::Words Words;
    Words words;
    const uint4* vectors = reinterpret_cast<const uint4*>(&block) + half * (Words::LOW / 8 * WARP);
#pragma unroll
    for (int v = 0; v < Words::LOW / 8; v++) {
        const uint4 bits = vectors[v * WARP + threadIdx.x % WARP];
        memcpy(words.low + 4 * v, &bits, 16);
    }
    if constexpr (Words::HIGH > 0) {
        const u32* high = reinterpret_cast<const u32*>(&block) + W::LOW_BYTES / 4;
#pragma unroll
        for (int i = 0; i < Words::HIGH / 2; i++)
            words.high[i] = high[threadIdx.x % WARP * Words::HIGH + half * (Words::HIGH / 2) + i];
    }
    return words;
}

// ---- what becomes of the sums ---------------------------------------------------------------------------------------

// What is added to the sums, and where they go, as a launch was given it. partial [blocks of the
// grid][TEAMS][SUMS][WARP]; arrivals [bands][TEAMS].
template <typename W, typename T, typename U>
struct Output {
    const W* w;
    const f32* scales;  // of whole rows, or null
    const T* b;
    const f32* a;
    U* y;
    f32* partial;
    u32* arrivals;
    int first, column, n, m, rows, k;

    // With the scales; b, a and y from the launch's first column and row on; n of the rows that are left. Made where it
    // is used: else the pointers take registers of the products.
    __device__ __forceinline__ Output here() const {
        Output found = *this;
        int at = column, of = rows;
        keep(at);
        if (W::ROW_SCALES) keep(of), found.scales = W::row_scales(w, of, k);
        const i64 from = i64(first) * m + at;
        if (b != nullptr) found.b = b + at;
        if (a != nullptr) found.a = a + from;
        found.y = y + from, found.n = n - first;
        return found;
    }
};

// Adds up the slices of each team: its first warp gets the sums. room: of this team, in shared
// memory [SLICES - 1][SUMS][WARP].
template <typename S>
__device__ __forceinline__ void add_slices(float (&total)[S::SUMS], f32* room) {
    constexpr int SLICE = S::SUMS * WARP;
    const int warp = threadIdx.x / WARP, slice = warp % S::SLICES;
    f32* mine = room + threadIdx.x % WARP * 4;
    if (slice > 0) {
#pragma unroll
        for (int i = 0; i < S::SUMS; i += 4)
            store<4>(mine + (slice - 1) * SLICE + i * WARP,
                     Pack<f32, 4>{total[i], total[i + 1], total[i + 2], total[i + 3]});
    }
    __syncthreads();
    if (slice > 0) return;
#pragma unroll
    for (int s = 0; s < S::SLICES - 1; s++)
#pragma unroll
        for (int i = 0; i < S::SUMS; i += 4) {
            const Pack<f32, 4> more = load<4>(mine + s * SLICE + i * WARP);
#pragma unroll
            for (int e = 0; e < 4; e++) total[i + e] += more.v[e];
        }
}

// Sums of a band that several blocks have parts of. The block with the first part, which is the end of its run, waits
// for the others and adds them in the order of k; it gets true. The others, at the beginning of their runs, leave their
// sums.
template <typename S>
__device__ __forceinline__ bool add_parts(float (&total)[S::SUMS], const Work& work, int band, f32* partial,
                                          u32* arrivals) {
    constexpr int SIZE = S::SUMS * WARP;
    constexpr int AT_ONCE = S::SUMS >= 64 ? 1 : S::SUMS >= 32 ? 2 : 4;  // parts: fewer waits for memory
    const int team = threadIdx.x / WARP / S::SLICES, lane = threadIdx.x % WARP;
    u32* counter = arrivals + band * S::TEAMS + team;
    partial += team * SIZE + lane * 4;
    if (work.begin > band * work.blocks) {
        f32* mine = partial + i64(work.run) * (S::TEAMS * SIZE);
#pragma unroll
        for (int i = 0; i < S::SUMS; i += 4)
            store<4>(mine + i * WARP, Pack<f32, 4>{total[i], total[i + 1], total[i + 2], total[i + 3]});
        __syncwarp();
        if (lane == 0) {  // for all lanes
            fence_gpu();
            atomicAdd(counter, 1u);
        }
        return false;
    }
    const int last = work.owner((band + 1) * work.blocks - 1);
    if (lane == 0) {
        while (ld_acquire(counter) < u32(last - work.run)) {
        }
        *counter = 0;
    }
    __syncwarp();
#pragma unroll 1
    for (int run = work.run + 1; run <= last; run += AT_ONCE) {
        Pack<f32, 4> more[AT_ONCE][S::SUMS / 4];
#pragma unroll
        for (int b = 0; b < AT_ONCE; b++) {
            const f32* from = partial + i64(min(run + b, last)) * (S::TEAMS * SIZE);
#pragma unroll
            for (int i = 0; i < S::SUMS / 4; i++) more[b][i] = load<4>(from + i * 4 * WARP);
        }
#pragma unroll
        for (int b = 0; b < AT_ONCE; b++)
#pragma unroll
            for (int i = 0; i < S::SUMS; i++)
                if (run + b <= last) total[i] += more[b][i / 4].v[i % 4];
    }
    return true;
}

// Of a row of x the sums of a tile, in shared memory: what the lanes of a warp write at a time meets all banks once.
constexpr int TILE_STRIDE = BLOCK_ROWS + 4;

// A warp's sums to y, by way of its own shared memory, 16 rows of x at a time: so a lane has 8 columns side by side.
// tile: its first.
template <typename S, typename W, typename T, typename U>
__device__ __forceinline__ void write_sums(const float (&total)[S::SUMS], const Output<W, T, U>& out, int tile,
                                           f32* room) {
    constexpr int AT_ONCE = S::SUMS > 32 ? 1 : S::NTILES == 6 ? 2 : S::NTILES / 2;  // residuals, as registers allow
    const int lane = threadIdx.x % WARP, r = lane / 4, t = lane % 4;
    const bool vectorized = out.m % 8 == 0 && aligned(out.y, out.a);
#pragma unroll
    for (int i = 0; i < S::TILES; i++) {
        const int column = (tile + i) * BLOCK_ROWS + lane % 2 * 8;  // from here on this lane's
        float scale[2] = {1.f, 1.f}, bias[2] = {};                  // of rows r and r + 8 of the tile
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int at = (tile + i) * BLOCK_ROWS + r + 8 * half;
            if (out.scales != nullptr && at < out.rows) scale[half] = out.scales[at];
            if (out.b != nullptr && at < out.rows) bias[half] = to_float(out.b[at]);
        }
        Pack<f32, 8> residual[AT_ONCE];
#pragma unroll
        for (int j = 0; j < S::NTILES; j += 2) {
            if (j / 2 % AT_ONCE == 0) {
#pragma unroll
                for (int e = 0; e < AT_ONCE; e++) {
                    const int row = (j + 2 * e) * 8 + lane / 2;
                    residual[e] = {};
                    if (out.a != nullptr && row < min(out.n, S::ROWS))
                        residual[e] = load_row<8>(out.a + i64(row) * out.m, column, out.rows, vectorized);
                }
            }
            __syncwarp();
#pragma unroll
            for (int e = 0; e < 8; e++)
                room[(e / 4 * 8 + 2 * t + e % 2) * TILE_STRIDE + r + e / 2 % 2 * 8] =
                    total[(i * S::NTILES + j) * 4 + e] * scale[e / 2 % 2] + bias[e / 2 % 2];
            __syncwarp();
            const int row = j * 8 + lane / 2;
            if (row >= out.n) continue;
            const Pack<f32, 8> sum = load<8>(room + lane / 2 * TILE_STRIDE + lane % 2 * 8);
            Pack<U, 8> y;
#pragma unroll
            for (int c = 0; c < 8; c++) y.v[c] = from_float<U>(sum.v[c] + residual[j / 2 % AT_ONCE].v[c]);
            store_row<8>(out.y + i64(row) * out.m, column, out.rows, vectorized, y);
        }
    }
}

// Floats of shared memory that a team takes in `finish`: for its slices' sums, and then for a tile.
template <typename S>
constexpr int SLICED = (S::SLICES - 1) * S::SUMS * WARP;
template <typename S>
constexpr int FINISH = SLICED<S> > 16 * TILE_STRIDE ? SLICED<S> : 16 * TILE_STRIDE;

// The end of a band, or of this block's part of it. room: in shared memory [TEAMS][FINISH].
template <typename S, typename W, typename T, typename U>
__device__ __forceinline__ void finish(float (&total)[S::SUMS], const Output<W, T, U>& out, const Work& work, int band,
                                       f32* room) {
    room += threadIdx.x / WARP / S::SLICES * FINISH<S>;
    if (S::SLICES > 1) add_slices<S>(total, room);
    const int warp = threadIdx.x / WARP, tile = band * S::BAND + warp / S::SLICES * S::TILES;
    if (warp % S::SLICES == 0 && tile < work.tiles) {
        const bool whole = work.begin <= band * work.blocks && work.end >= (band + 1) * work.blocks;
        if (whole || add_parts<S>(total, work, band, out.partial, out.arrivals))
            write_sums<S>(total, out.here(), tile, room);
    }
#pragma unroll
    for (int i = 0; i < S::SUMS; i++) total[i] = 0.f;
}

#endif
