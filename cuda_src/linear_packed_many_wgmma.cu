// What linear_packed_many.cu computes, on Hopper's tensor cores (sm_90a alone): linear_packed_many_wgmma and
// linear_add_packed_many_wgmma. Parameters, units of work and scratch are as there.
//
// wgmma takes A from registers, in the same shares per warp as mma.m16n8k16: so a warp still makes the numbers of its
// own tile of w, a warpgroup has 64 rows, and all rows of x are the N of one product. What is gained: x is read from
// shared memory by the tensor cores, once for 64 rows of w, and the products of a chunk run while the numbers of the
// next are made.
//
// x lies in shared memory in panels of 64 columns (rows of 128 bytes, 16-byte vectors exchanged by ^ (row % 8)), and in
// each chunk in the order of k that packed weights have. cp.async cannot change the order, so x goes through registers:
// asked for when a unit begins, stored when its products are under way, in two stages. The weights come by bulk
// copies, one for each tile, through a ring that is DEPTH units deep.
//
// A group's sums have registers of their own, two sets where a unit has several groups: while one is scaled and added
// up, the other's products run.
//
// Launch and tuning: cuplama/ops/linear_packed_many.py. Tests: tests/ops/test_linear_packed_many.py. Benchmark:
// python -m benchmarks.packed_batch.
#include "linear_packed_many.cuh"

constexpr int PANEL = 64;  // columns of x in a row of 128 bytes

template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, bool add, f16) {
    wgmma_rows_f16(d, a, b, add);
}
template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, bool add, bf16) {
    wgmma_rows_bf16(d, a, b, add);
}

// Columns whose products are added up before their scale comes in.
template <typename W>
constexpr int RUN = GROUPED<W> ? W::GROUP : BLOCK_COLUMNS;

// Columns whose sum the lanes of a row of x find together.
template <typename W>
constexpr int PIECE = RUN<W> < PANEL ? RUN<W> : PANEL;

// A warp's own tiles of w on their way to shared memory, in bulk copies that one lane asks for: a fence of the proxies
// would wait for copies of the lanes (cp.async). A warp beyond the last tile takes that one; its sums go nowhere.
template <typename S, typename W>
struct Tiles {
    u64* full;  // of this warp, a barrier for each stage
    W* ring;    // of this warp, in the first stage; a stage has BAND blocks
    const W* w;
    const W* from;
    int tile, tiles, block, blocks;  // of the next unit, and how many there are

    __device__ __forceinline__ Tiles(const W* w, W* ring, u64* full, const Work& work)
        : full(full + threadIdx.x / WARP * S::DEPTH), ring(ring + threadIdx.x / WARP), w(w), tiles(work.tiles),
          block(work.begin % work.blocks), blocks(work.blocks) {
        tile = work.begin / blocks * S::BAND + threadIdx.x / WARP;
        from = w + (i64(min(tile, tiles - 1)) * blocks + block);
        if (threadIdx.x % WARP == 0) {
            for (int i = 0; i < S::DEPTH; i++) mbarrier_init(this->full + i, 1);
        }
        fence_proxy_async();
        __syncwarp();
    }

    // Asks for the next unit.
    __device__ __forceinline__ void fetch(int stage) {
        if (threadIdx.x % WARP == 0) {
            mbarrier_arrive_expect_tx(full + stage, sizeof(W));
            bulk_copy(ring + stage * S::BAND, from, sizeof(W), full + stage);
        }
        from++;
        if (++block < blocks) return;
        block = 0, tile += S::BAND;
        from = w + i64(min(tile, tiles - 1)) * blocks;
    }
};

template <typename S, typename W>
struct Room {
    static constexpr int X = S::ROWS * BLOCK_COLUMNS * 2, STAGE = S::BAND * int(sizeof(W)),
                         SUMS = BLOCK_COLUMNS / PIECE<W> * S::ROWS;
};

// BLOCK_COLUMNS columns of the rows of x on their way through registers: in a chunk, the pairs of columns 0, 2, 4, 6,
// 1, 3, 5, 7, as the lanes have them of w. Rows beyond n are copies of the last one, whose sums go nowhere.
template <typename S, typename T>
struct Rows {
    static constexpr int ITEMS = (S::ROWS * BLOCK_CHUNKS + S::THREADS - 1) / S::THREADS;  // chunks of a thread
    const T* from[ITEMS];  // the thread's chunks in the next unit
    int to[ITEMS];         // where their first vectors go in a stage; the second: exchange the lowest bit
    int column, wrap, k;   // of the next unit the first column
    bool vectorized;
    Pack<u32, 8> chunk[ITEMS];

    __device__ __forceinline__ Rows(const T* x, int n, int k, const Work& work)
        : column(work.begin % work.blocks * BLOCK_COLUMNS), wrap(work.blocks * BLOCK_COLUMNS), k(k) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            from[i] = x + (i64(min(row(i), n - 1)) * k + place(i) % BLOCK_CHUNKS * CHUNK_COLUMNS + column);
            to[i] = place(i) / 4 * (S::ROWS * PANEL) + row(i) * PANEL + (place(i) % 4 * 2 ^ row(i) % 8) * 8;
            keep(to[i]);
        }
        int aligned_rows = aligned(x) && k % 8 == 0;
        keep(aligned_rows);
        vectorized = aligned_rows;
    }

    // Of item i: its row, and which chunk. Four lanes have chunks side by side, and the next four those of the row
    // below: so they write to all banks at once.
    static __device__ __forceinline__ int row(int i) { return (threadIdx.x + i * S::THREADS) / 4 % S::ROWS; }
    static __device__ __forceinline__ int place(int i) {
        const int item = threadIdx.x + i * S::THREADS;
        return item / (4 * S::ROWS) * 4 + item % 4;
    }
    static __device__ __forceinline__ bool there(int i) {
        return S::ROWS * BLOCK_CHUNKS % S::THREADS == 0 || place(i) < BLOCK_CHUNKS;
    }

    __device__ __forceinline__ void load() {
        if (vectorized && column + BLOCK_COLUMNS <= k) {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) chunk[i] = ::load<8>(reinterpret_cast<const u32*>(from[i]));
        } else {
#pragma unroll
            for (int i = 0; i < ITEMS; i++) {
                const int left = k - column - place(i) % BLOCK_CHUNKS * CHUNK_COLUMNS;
                const Pack<u32, 4> low = elements(from[i], left), high = elements(from[i] + 8, left - 8);
#pragma unroll
                for (int e = 0; e < 4; e++) chunk[i].v[e] = low.v[e], chunk[i].v[4 + e] = high.v[e];
            }
        }
        column += BLOCK_COLUMNS;
        if (column == wrap) column = 0;
        const int step = column == 0 ? BLOCK_COLUMNS - wrap : BLOCK_COLUMNS;
#pragma unroll
        for (int i = 0; i < ITEMS; i++) from[i] += step;
    }

    // The first 8 elements of `left`, one by one.
    static __device__ __forceinline__ Pack<u32, 4> elements(const T* from, int left) {
        Pack<u32, 4> bits = {};
#pragma unroll 1
        for (int j = 0; j < 8; j++) {
            const T element = j < left ? from[j] : from_float<T>(0.f);
            unsigned short low;
            memcpy(&low, &element, 2);
#pragma unroll
            for (int e = 0; e < 3; e++) bits.v[e] = bits.v[e] >> 16 | bits.v[e + 1] << 16;
            bits.v[3] = bits.v[3] >> 16 | u32(low) << 16;
        }
        return bits;
    }

    // To a stage, and to sums [pieces][ROWS] what each row adds up to over LENGTH columns, which offsets are multiplied
    // with.
    template <bool OFFSET, int LENGTH>
    __device__ __forceinline__ void store(T* stage, f32* sums) const {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            const u32(&v)[8] = chunk[i].v;
            if (there(i)) {
                ::store<4>(reinterpret_cast<u32*>(stage + to[i]), Pack<u32, 4>{v[0], v[2], v[4], v[6]});
                ::store<4>(reinterpret_cast<u32*>(stage + (to[i] ^ 8)), Pack<u32, 4>{v[1], v[3], v[5], v[7]});
            }
            if (OFFSET) {
                float sum = 0.f;
#pragma unroll
                for (int e = 0; e < 8; e++) {
                    T pair[2];
                    memcpy(pair, &v[e], 4);
                    sum += to_float(pair[0]) + to_float(pair[1]);
                }
#pragma unroll
                for (int lanes = 1; lanes < LENGTH / CHUNK_COLUMNS; lanes *= 2)
                    sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
                if (there(i) && place(i) % (LENGTH / CHUNK_COLUMNS) == 0)
                    sums[place(i) / (LENGTH / CHUNK_COLUMNS) * S::ROWS + row(i)] = sum;
            }
        }
    }
};

// total += of one run the sums, scaled.
template <typename S, typename W>
__device__ __forceinline__ void add_run(float (&total)[S::SUMS], const float (&acc)[S::SUMS], const W& tile, int group,
                                        const f32* sums) {
    const int r = threadIdx.x % WARP / 4;
    const Two32 scale = tile.scales(group, r), offset = tile.offsets(group, r);
#pragma unroll
    for (int j = 0; j < S::NTILES; j++) {
        Pack<f32, 2> sum = {};
        if (W::OFFSET) {
            sum = load<2>(sums + j * 8 + threadIdx.x % 4 * 2);
            if (RUN<W> > PIECE<W>) {
                const Pack<f32, 2> more = load<2>(sums + S::ROWS + j * 8 + threadIdx.x % 4 * 2);
                sum.v[0] += more.v[0], sum.v[1] += more.v[1];
            }
        }
#pragma unroll
        for (int e = 0; e < 4; e++) {
            total[j * 4 + e] += scale.v[e / 2] * acc[j * 4 + e];
            if (W::OFFSET) total[j * 4 + e] += offset.v[e / 2] * sum.v[e % 2];
        }
    }
}

// total += the products of this warp's tile and a stage of x.
template <typename S, typename W, typename T>
__device__ __forceinline__ void multiply_unit(float (&total)[S::SUMS], const W& tile, u64 x, const f32* sums, T) {
    constexpr int EACH = RUN<W> / CHUNK_COLUMNS, RUNS = BLOCK_CHUNKS / EACH;
    float acc[RUNS > 1 ? 2 : 1][S::SUMS];
    u32 a[BLOCK_CHUNKS][4], minus[2];
    typename W::Words codes;
    const auto add = [&](int run) {
        wgmma_done(acc[run % 2]);
        add_run<S>(total, acc[run % 2], tile, run, sums + run * (RUN<W> / PIECE<W>)*S::ROWS);
    };
#pragma unroll
    for (int run = 0; run < RUNS; run++) {
        tile.template minus<T>(GROUPED<W> ? run : 0, threadIdx.x % WARP / 4, minus);
#pragma unroll
        for (int c = run * EACH; c < (run + 1) * EACH; c++) {
            if (c % 4 == 0) codes = half_lane(tile, c / 4);
            W::template fragment<T>(codes, c % 4, minus, a[c]);
            wgmma_fence();
            const u64 b = x + (c / 4 * (S::ROWS * PANEL * 2) + c % 4 * (CHUNK_COLUMNS * 2)) / 16;
            if (!GROUPED<W>)
                multiply_rows_of(total, a[c], b, true, T());
            else
                multiply_rows_of(acc[run % 2], a[c], b, c > run * EACH, T());
        }
        wgmma_commit();
        if (GROUPED<W> && run > 0) {
            wgmma_wait<1>();
            add(run - 1);
        }
    }
    wgmma_wait<0>();
    if (GROUPED<W>)
        add(RUNS - 1);
    else
        wgmma_done(total);
}

// y = a + x w^T + b for one launch. x, out: from its first row on. wait: pdl_wait, which the kernels themselves call.
template <typename S, typename W, typename T, typename U, typename Wait>
__device__ __forceinline__ void multiply_rows(const T* x, const W* w, Output<T, U> out, int k, const Wait& wait) {
    typedef Room<S, W> Place;
    DYNAMIC_SHARED(unsigned char, raw);
    unsigned char* memory = raw + (1024 - unsigned(__cvta_generic_to_shared(raw)) % 1024) % 1024;
    unsigned char* ring = memory + 2 * Place::X;
    f32* room = reinterpret_cast<f32*>(ring + S::DEPTH * Place::STAGE);
    f32* sums = room + S::TEAMS * FINISH<S>;
    const Work work(out.rows, k, S::BAND);
    __shared__ u64 full[S::WARPS * S::DEPTH];
    Tiles<S, W> tiles(w, reinterpret_cast<W*>(ring), full, work);
#pragma unroll 1
    for (int i = 0; i < min(S::DEPTH - 1, work.end - work.begin); i++) tiles.fetch(i);
    launch_dependents();
    if (W::ROW_SCALES) out.scales = W::row_scales(w, out.rows, k);
    wait();
    Rows<S, T> rows(x, out.n, k, work);
    rows.load();
    rows.template store<W::OFFSET, PIECE<W>>(reinterpret_cast<T*>(memory), sums);

    float total[S::SUMS] = {};
    int stage = 0, free = S::DEPTH - 1, parity = 0, turn = 0;  // turn: which stage of x
    int band = work.begin / work.blocks, left = (band + 1) * work.blocks - work.begin;
    const u64 matrix = wgmma_matrix(memory, 1);
#pragma unroll 1
    for (int unit = work.begin; unit < work.end; unit++) {
        fence_proxy_async();
        __syncthreads();
        if (unit + 1 < work.end) rows.load();  // behind the fence, which would wait for it
        if (unit + S::DEPTH - 1 < work.end) tiles.fetch(free);
        mbarrier_wait(tiles.full + stage, parity);
        multiply_unit<S>(total, tiles.ring[stage * S::BAND], matrix + turn * (Place::X / 16), sums + turn * Place::SUMS,
                         T());
        turn ^= 1;
        rows.template store<W::OFFSET, PIECE<W>>(reinterpret_cast<T*>(memory + turn * Place::X),
                                                 sums + turn * Place::SUMS);
        if (--left == 0 || unit == work.end - 1) {
            finish<S>(total, out, work, band, room);
            band++, left = work.blocks;
        }
        free = stage;
        if (++stage == S::DEPTH) stage = 0, parity ^= 1;
    }
}

template <typename T, typename U, typename W, int NTILES, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_packed_many_wgmma(const T* x, const W* __restrict__ w, const T* __restrict__ b, U* y, f32* partial,
                             u32* arrivals, int n, int first, int column, int rows, int m, int k) {
    const Output<T, U> out = {
        nullptr, b == nullptr ? b : b + column, nullptr, y + (i64(first) * m + column), partial, arrivals, n - first, m,
        rows};
    multiply_rows<Shape<NTILES, 1, WARPS, 1, DEPTH>>(x + i64(first) * k, w, out, k, [] { pdl_wait(); });
}

template <typename T, typename W, int NTILES, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    linear_add_packed_many_wgmma(const T* x, const W* __restrict__ w, const f32* a, const T* __restrict__ b, f32* y,
                                 f32* partial, u32* arrivals, int n, int first, int column, int rows, int m, int k) {
    const i64 from = i64(first) * m + column;
    const Output<T, f32> out = {
        nullptr, b == nullptr ? b : b + column, a + from, y + from, partial, arrivals, n - first, m, rows};
    multiply_rows<Shape<NTILES, 1, WARPS, 1, DEPTH>>(x + i64(first) * k, w, out, k, [] { pdl_wait(); });
}
