// What linear_packed_many.cu computes, on Hopper's tensor cores (sm_90a alone): linear_packed_many_wgmma and
// linear_add_packed_many_wgmma. Parameters, units of work and scratch are as there.
//
// wgmma takes A from registers, in the same shares per warp as mma.m16n8k16: so a warp still makes the numbers of its
// own tiles of w, four warps have 64 rows of w at a time, and all rows of x are the N of one product. What is gained: x
// is read from shared memory by the tensor cores, once for 64 rows of w, and the products of 64 columns run while the
// numbers of the next 64 are made: two sets of registers, and one group of products always on its way.
//
// No warp waits for the whole block. The weights come by bulk copies, a ring for each warp, which asks for its own
// tiles. x comes by way of four more warps: it lies in shared memory in panels of 64 columns (rows of 128 bytes,
// 16-byte vectors exchanged by ^ (row % 8)), and in each chunk in the order of k that packed weights have, which no
// copy can make. Each of the four has a stage of its own and takes every fourth unit: a fence between a store and the
// tensor cores waits for the loads of its warp as well, so a warp that loaded ahead would gain nothing.
//
// What a unit takes, fitted to times on an H200 with one tile a warp: 0.2 us, 28 ns for each KB of w, and 20 ns for
// each KB of x, which comes from L2 once for each band. Bands of more warps read x less often; the sums that blocks
// leave for others weigh more then (Cost in the file of the launch decides).
//
// E4m3 to bf16 takes 18 instructions of a warp for a chunk, of which 10 are the compiler's logic and shifts by addition
// (LEA.HI) at half rate; shifts to the left are products, in another pipe. No other placing of bits needed fewer.
//
// Tried: two tiles a warp, so that x serves twice as many rows of w: 42.4 us in place of 42.3 for 28672 x 4096 by 64
// rows of x in int4, 35.7 in place of 26.1 for 4096 x 14336. Scales on the sums of each group in float32, in accumulators of their own (330 instructions of a warp for a
// unit of int4, and waits for each group: 54.8 us for 28672 x 4096 by 64 rows on an H200); x stored by the same warps,
// between barriers of the block.
//
// Launch and tuning: cuplama/ops/linear_packed_many.py. Tests: tests/ops/test_linear_packed_many.py. Benchmark:
// python -m benchmarks.packed_batch.
#include "linear_packed_many.cuh"

constexpr int PANEL = 64;    // columns of x in a row of 128 bytes
constexpr int BRINGERS = 4;  // warps that bring x, and stages of it

template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, bool add, f16) {
    wgmma_rows_f16(d, a, b, add);
}
template <int N>
__device__ __forceinline__ void multiply_rows_of(float (&d)[N], const u32 (&a)[4], u64 b, bool add, bf16) {
    wgmma_rows_bf16(d, a, b, add);
}

// A warp's own tiles of w on their way to shared memory, in bulk copies that one lane asks for. In place of a tile
// beyond the last one that one is taken; its sums go nowhere.
template <typename S, typename W>
struct Tiles {
    u64* full;  // of this warp, a barrier for each stage
    W* ring;    // of this warp, in the first stage; a stage has BAND blocks
    const W* w;
    int tile, tiles, block, blocks;  // of the next unit, and how many there are

    __device__ __forceinline__ Tiles(const W* w, W* ring, u64* full, const Work& work)
        : full(full + threadIdx.x / WARP * S::DEPTH), ring(ring + threadIdx.x / WARP * S::TILES), w(w),
          tiles(work.tiles), block(work.begin % work.blocks), blocks(work.blocks) {
        tile = work.begin / blocks * S::BAND + threadIdx.x / WARP * S::TILES;
    }

    __device__ __forceinline__ void begin() const {
        if (threadIdx.x % WARP == 0) {
            for (int i = 0; i < S::DEPTH; i++) mbarrier_init(full + i, 1);
        }
        fence_proxy_async();
        __syncwarp();
    }

    // Asks for the next unit.
    __device__ __forceinline__ void fetch(int stage) {
        if (threadIdx.x % WARP == 0) {
            mbarrier_arrive_expect_tx(full + stage, S::TILES * sizeof(W));
#pragma unroll
            for (int i = 0; i < S::TILES; i++)
                bulk_copy(ring + stage * S::BAND + i, w + (i64(min(tile + i, tiles - 1)) * blocks + block), sizeof(W),
                          full + stage);
        }
        if (++block == blocks) block = 0, tile += S::BAND;
    }
};

template <typename S, typename W>
struct Room {
    static constexpr int X = S::ROWS * BLOCK_COLUMNS * 2, STAGE = S::BAND * int(sizeof(W));
};

// Registers of a thread that multiplies and of one that brings x, out of 65536; 0: as many for all. ptxas keeps the
// tensor cores' addresses in uniform registers where they differ. CHUNKS: of x that a bringer's lane holds at a time.
template <typename S>
struct Registers {
    static constexpr bool SHARED_OUT = S::WARPS == 8 || S::WARPS == 12;
    static constexpr int MORE = S::WARPS == 8 ? (S::TILES == 2 ? 208 : 176) : S::TILES == 2 ? 144 : 136;
    static constexpr int FEWER = S::WARPS == 8 ? (S::TILES == 2 ? 88 : 152) : S::TILES == 2 ? 80 : 96;
    static constexpr int CHUNKS = FEWER >= 152 ? 16 : FEWER >= 88 ? 8 : 4;
};

// What a warp does that brings x: BLOCK_COLUMNS columns of the rows at a time, and in a chunk the pairs of columns 0,
// 2, 4, 6, 1, 3, 5, 7, as the lanes have them of w. Rows beyond n are copies of the last one, whose sums go nowhere.
template <typename S, typename T>
struct Bringer {
    // Chunks of a lane, in rounds so that registers hold them. Four lanes have chunks side by side, and the next four
    // those of the row below: so they write to all banks at once.
    static constexpr int ITEMS = 2 * S::NTILES, EACH = ITEMS < Registers<S>::CHUNKS ? ITEMS : Registers<S>::CHUNKS;
    const T* x;
    int last, k, to;  // the last row; where the lane's chunks go
    bool vectorized;

    __device__ __forceinline__ Bringer(const T* x, int n, int k) : x(x), last(n - 1), k(k) {
        const int row = threadIdx.x % WARP / 4, place = threadIdx.x % 4;
        to = row * PANEL + (place * 2 ^ row) * 8;
        vectorized = aligned(x) && k % 8 == 0;
    }

    // A unit's columns from `column` on, to a stage.
    __device__ __forceinline__ void bring(T* stage, int column) const {
        const int at = column + threadIdx.x % 4 * CHUNK_COLUMNS;
        if (!vectorized || column + BLOCK_COLUMNS > k) return bring_elements(stage, at);
        int row = threadIdx.x % WARP / 4;
        keep(row);  // or the places of all rows take registers from unit to unit
#pragma unroll
        for (int first = 0; first < ITEMS; first += EACH) {
            Pack<u32, 8> chunk[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                const int item = first + i;
                if (item >= ITEMS) break;
                const T* place = x + (min(item % S::NTILES * 8 + row, last) * k + at + item / S::NTILES * PANEL);
                chunk[i] = load<8>(reinterpret_cast<const u32*>(place));
            }
#pragma unroll
            for (int i = 0; i < EACH; i++)
                if (first + i < ITEMS) put(stage, first + i, chunk[i]);
        }
    }

    // The same, element by element.
    __device__ __forceinline__ void bring_elements(T* stage, int at) const {
        const int row = threadIdx.x % WARP / 4;
#pragma unroll
        for (int j = 0; j < S::NTILES; j++)
#pragma unroll 1
            for (int panel = 0; panel < 2; panel++) {
                const int column = at + panel * PANEL;
                const T* place = x + (min(j * 8 + row, last) * k + column);
                const Pack<u32, 4> low = elements(place, k - column), high = elements(place + 8, k - column - 8);
                Pack<u32, 8> chunk;
#pragma unroll
                for (int e = 0; e < 4; e++) chunk.v[e] = low.v[e], chunk.v[4 + e] = high.v[e];
                put(stage, panel * S::NTILES + j, chunk);
            }
    }

    __device__ __forceinline__ void put(T* stage, int item, const Pack<u32, 8>& chunk) const {
        T* place = stage + (item / S::NTILES * (S::ROWS * PANEL) + item % S::NTILES * (8 * PANEL));
        const u32(&v)[8] = chunk.v;
        store<4>(reinterpret_cast<u32*>(place + to), Pack<u32, 4>{v[0], v[2], v[4], v[6]});
        store<4>(reinterpret_cast<u32*>(place + (to ^ 8)), Pack<u32, 4>{v[1], v[3], v[5], v[7]});
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
};

// The barriers of the stages of x.
struct Stages {
    u64 full[BRINGERS], empty[BRINGERS];
};

template <typename S, typename W, typename T>
__device__ __forceinline__ void bring_rows(const T* x, int n, int k, const Work& work, T* stages, Stages& barriers) {
    const int mine = threadIdx.x / WARP - S::WARPS;
    const Bringer<S, T> bringer(x, n, k);
    int parity = 1;
#pragma unroll 1
    for (int unit = work.begin + mine; unit < work.end; unit += BRINGERS) {
        mbarrier_wait(&barriers.empty[mine], parity);
        parity ^= 1;
        bringer.bring(stages + mine * (S::ROWS * BLOCK_COLUMNS), unit % work.blocks * BLOCK_COLUMNS);
        fence_proxy_async();
        __syncwarp();
        if (threadIdx.x % WARP == 0) mbarrier_arrive(&barriers.full[mine]);
    }
}

// total += the products of the units begin .. end - 1, which are of one band.
template <typename S, typename W>
struct Multiplier {
    typedef Room<S, W> Place;
    Tiles<S, W>& tiles;
    Stages& barriers;
    u64 matrix;  // x in the first stage
    int later;   // units that are not yet asked for
    int stage = 0, parity = 0, turn = 0, turn_parity = 0;

    template <typename T>
    __device__ __forceinline__ void multiply(float (&total)[S::SUMS], int units, T) {
        const bool first = threadIdx.x % WARP == 0;
        u32 a[2][4][4];
        int before = -1;  // the stage of x that the products on their way read
#pragma unroll 1
        for (int unit = 0; unit < units; unit++) {
            const W* own = tiles.ring + stage * S::BAND;
            const u64 x = matrix + turn * (Place::X / 16);
            mbarrier_wait(tiles.full + stage, parity);
#pragma unroll
            for (int part = 0; part < 2 * S::TILES; part++) {  // half of a tile
                const int half = part % 2;
                float (&sums)[S::NTILES * 4] =
                    *reinterpret_cast<float (*)[S::NTILES * 4]>(total + part / 2 * (S::NTILES * 4));
                make_chunks(own[part / 2], half_lane(own[part / 2], half), half, a[half], T());
                if (part == 0) mbarrier_wait(&barriers.full[turn], turn_parity);
                wgmma_fence();
#pragma unroll
                for (int c = 0; c < 4; c++)
                    multiply_rows_of(sums, a[half][c],
                                     x + (half * (S::ROWS * PANEL * 2) + c * (CHUNK_COLUMNS * 2)) / 16, true, T());
                wgmma_commit();
                wgmma_wait<1>();
                if (part == 0 && before >= 0 && first) mbarrier_arrive(&barriers.empty[before]);
            }
            before = turn;
            __syncwarp();
            if (later > 0) tiles.fetch(stage), later--;
            if (++stage == S::DEPTH) stage = 0, parity ^= 1;
            if (++turn == BRINGERS) turn = 0, turn_parity ^= 1;
        }
        wgmma_wait<0>();
        wgmma_done(total);
        if (before >= 0 && first) mbarrier_arrive(&barriers.empty[before]);
    }
};

// y = a + x w^T + b for one launch. x: from its first row on. wait: pdl_wait, which the kernels themselves call.
template <typename S, typename W, typename T, typename U, typename Wait>
__device__ __forceinline__ void multiply_rows(const T* x, const Output<W, T, U>& out, const Wait& wait) {
    typedef Room<S, W> Place;
    DYNAMIC_SHARED(unsigned char, raw);
    unsigned char* memory = raw + (1024 - unsigned(__cvta_generic_to_shared(raw)) % 1024) % 1024;
    unsigned char* ring = memory + BRINGERS * Place::X;
    f32* room = reinterpret_cast<f32*>(ring + S::DEPTH * Place::STAGE);
    const Work work(out.rows, out.k, S::BAND);
    __shared__ Stages barriers;
    __shared__ u64 full[S::WARPS * S::DEPTH];
    const bool bringing = threadIdx.x >= S::THREADS;
    if (threadIdx.x == S::THREADS) {
        for (int i = 0; i < BRINGERS; i++) {
            mbarrier_init(&barriers.full[i], 1);
            mbarrier_init(&barriers.empty[i], S::WARPS);
        }
        fence_proxy_async();
    }
    Tiles<S, W> tiles(out.w, reinterpret_cast<W*>(ring), full, work);
    const int ahead = min(S::DEPTH, work.end - work.begin);
    if (!bringing) {
        tiles.begin();
#pragma unroll 1
        for (int i = 0; i < ahead; i++) tiles.fetch(i);
    }
    launch_dependents();
    __syncthreads();
    wait();
    typedef Registers<S> Share;
    if (bringing) {
        if (Share::SHARED_OUT) registers_fewer<Share::FEWER>();
        bring_rows<S, W>(x, out.n - out.first, out.k, work, reinterpret_cast<T*>(memory), barriers);
        return;
    }
    if (Share::SHARED_OUT) registers_more<Share::MORE>();
    Multiplier<S, W> multiplier = {tiles, barriers, wgmma_matrix(memory, 1), work.end - work.begin - ahead};
    float total[S::SUMS] = {};
    int unit = work.begin;
#pragma unroll 1
    for (int band = unit / work.blocks; unit < work.end; band++) {
        const int end = min((band + 1) * work.blocks, work.end);
        multiplier.multiply(total, end - unit, T());
        unit = end;
        finish<S>(total, out, work, band, room);
    }
}

template <typename T, typename U, typename W, int NTILES, int TILES, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP + BRINGERS * WARP, 1)
    linear_packed_many_wgmma(const T* x, const W* __restrict__ w, const T* __restrict__ b, U* y, f32* partial,
                             u32* arrivals, int n, int first, int column, int rows, int m, int k) {
    const Output<W, T, U> out = {w, nullptr, b, nullptr, y, partial, arrivals, first, column, n, m, rows, k};
    multiply_rows<Shape<NTILES, TILES, WARPS, 1, DEPTH>>(x + i64(first) * k, out, [] { pdl_wait(); });
}

template <typename T, typename W, int NTILES, int TILES, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP + BRINGERS * WARP, 1)
    linear_add_packed_many_wgmma(const T* x, const W* __restrict__ w, const f32* a, const T* __restrict__ b, f32* y,
                                 f32* partial, u32* arrivals, int n, int first, int column, int rows, int m, int k) {
    const Output<W, T, f32> out = {w, nullptr, b, a, y, partial, arrivals, first, column, n, m, rows, k};
    multiply_rows<Shape<NTILES, TILES, WARPS, 1, DEPTH>>(x + i64(first) * k, out, [] { pdl_wait(); });
}
