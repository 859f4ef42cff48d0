// linear_packed.cu on tensor cores: a warp's sums of a tile, products with the rows of x in shared memory.
//
// One row of x has the eight columns of an mma's B for itself. With small groups it is put there chunk by chunk: column
// c has chunk c of a packed block, and zeros elsewhere (SPREAD). So the sums of all groups come from one chain of
// products, a lane has those of chunks 2 t and 2 t + 1 alone, and needs the scales of these alone: a quarter.
//
// More than eight rows are several mma (slices) for the same A: what it takes to make the numbers of a block is shared.
// A slice that no row needs is left out.
#ifndef CUPLAMA_LINEAR_PACKED_MMA_CUH
#define CUPLAMA_LINEAR_PACKED_MMA_CUH

#include "linear_packed.cuh"
#include "mma.cuh"

// How many slices so many rows need, where there are ROWS at most.
template <int ROWS>
__device__ __forceinline__ int slices_of(int count) {
    return ROWS > 8 && count > 8 ? 2 : 1;
}

// With FOLD scales that are powers of two go into A: then sums of all groups are those of one chain of products, which
// goes on from block to block.
template <typename S, int LEVELS, bool FOLD = false>
struct Factors {
    typedef typename S::T T;
    typedef typename S::W W;
    static constexpr bool FOLDED = FOLD && W::template FOLDS<T>;
    static constexpr bool SPREAD = !FOLDED && S::ROWS == 1 && W::GROUP > 0 && W::GROUP_CHUNKS <= 2;
    static constexpr int STRIDE = STRIDE_OF<S, T>;
    static constexpr float RAW = W::template RAW<T>;
    const T* x;  // of this lane, at its warp's first block
    f32* sums;   // of this warp's groups [group][ROWS]
    int slices;  // of the rows of x, of up to 8
    // 1 for the chunk of this lane's column: hidden, else its products become choices, on the slower pipe.
    u32 mine[SPREAD ? BLOCK_CHUNKS : 1];

    __device__ __forceinline__ Factors() {
        if constexpr (SPREAD) {
#pragma unroll
            for (int c = 0; c < BLOCK_CHUNKS; c++) mine[c] = hidden(lane_row() == c);
        }
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

    // The sums of a tile, or of twins, over the columns of this warp, to partial [TWINS][TILE].
    template <int SLICES = (S::ROWS > 8 ? S::ROWS / 8 : 1), typename Weights>
    __device__ __forceinline__ void multiply_tile(Stream<S, Weights>& stream, int count, f32* partial) const {
        if constexpr (SLICES > 1)
            if (slices < SLICES) return multiply_tile<SLICES / 2>(stream, count, partial);
        float total[S::TWINS * SLICES][4];
        sum_tiles<SLICES>(stream, count, total);
#pragma unroll
        for (int i = 0; i < S::TWINS * SLICES; i++)
            store_tile<S::ROWS>(partial + i / SLICES * S::TILE + i % SLICES * 8, total[i]);
    }

    // The same in the registers that have them: total [TWINS][SLICES].
    template <int SLICES, typename Weights>
    __device__ __forceinline__ void sum_tiles(Stream<S, Weights>& stream, int count,
                                              float (&total)[S::TWINS * SLICES][4]) const {
        constexpr int OWN = S::TWINS * SLICES;
        constexpr int SUMS = FOLDED && OWN == 1 ? 2 : OWN;  // chains of products, where one alone would be slow
        float sum[SUMS][4] = {};
        const T* at = x;
        const f32* of = sums;
#pragma unroll 1
        for (int b = 0; b < count; b++) {
            const W* blocks = stream.take();
            if constexpr (FOLDED) {
                add_folded<SLICES>(blocks, at, sum);
            } else if constexpr (SPREAD) {
#pragma unroll
                for (int twin = 0; twin < S::TWINS; twin++) add_spread(blocks[twin], at, of, sum[twin]);
            } else {
                add_blocks<SLICES>(blocks, at, of, sum);
            }
            at += BLOCK_COLUMNS;
            of += W::GROUPS * S::ROWS;
        }
#pragma unroll
        for (int i = 0; i < 4 * OWN; i++) {
            float& whole = total[i / 4][i % 4];
            whole = sum[i / 4][i % 4];
            if constexpr (FOLDED) whole = (SUMS > OWN ? whole + sum[SUMS - 1][i % 4] : whole) * W::FOLDED;
            if (SPREAD && i % 2 == 0) {
                whole += __shfl_xor_sync(ALL_LANES, whole, 1);
                whole += __shfl_xor_sync(ALL_LANES, whole, 2);
            }
        }
    }

    // The B of all slices for a chunk, `at` being even or not; with pairs those of two are read with the even one.
    template <bool PAIRS, int SLICES>
    static __device__ __forceinline__ void read_slices(const T* x, int chunk, int at, u32 (&b)[SLICES][LEVELS][2][2]) {
#pragma unroll
        for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
            for (int l = 0; l < LEVELS; l++) {
                if (!PAIRS)
                    read(x + slice * (8 * STRIDE), chunk, l, b[slice][l][0]);
                else if (at % 2 == 0)
                    read_two(x + slice * (8 * STRIDE), chunk, l, b[slice][l]);
            }
    }

    // The sums of a block, or of twins, added to those of their tiles.
    template <int SLICES>
    __device__ __forceinline__ void add_blocks(const W* blocks, const T* x, const f32* sums,
                                               float (&total)[S::TWINS * SLICES][4]) const {
        constexpr int OWN = S::TWINS * SLICES, CHAINS = W::GROUP_CHUNKS > 4 && OWN == 1 ? 2 : 1;  // of products: short
        const int r = lane_row();
        typename W::Words words[S::TWINS];
#pragma unroll
        for (int twin = 0; twin < S::TWINS; twin++) words[twin] = blocks[twin].lane(threadIdx.x % WARP);
        float inner[OWN][4] = {}, least[OWN][4] = {};
#pragma unroll
        for (int g = 0; g < W::GROUPS; g++) {
            float sum[OWN][CHAINS][4] = {};
            u32 b[SLICES][LEVELS][2][2], minus[S::TWINS][2];
#pragma unroll
            for (int twin = 0; twin < S::TWINS; twin++) blocks[twin].template raw_minus<T>(g, r, minus[twin]);
#pragma unroll
            for (int c = 0; c < W::GROUP_CHUNKS; c++) {
                const int chunk = g * W::GROUP_CHUNKS + c;
                read_slices<(W::GROUP_CHUNKS > 1)>(x, chunk, c, b);
#pragma unroll
                for (int twin = 0; twin < S::TWINS; twin++) {
                    u32 a[4];
                    W::template raw<T>(words[twin], chunk, minus[twin], a);
#pragma unroll
                    for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
                        for (int l = 0; l < LEVELS; l++)
                            multiply(sum[twin * SLICES + slice][c % CHAINS], a, b[slice][l][c % 2], T());
                }
            }
#pragma unroll
            for (int own = 0; own < OWN; own++) {
                const W& block = blocks[own / SLICES];
                Two32 scale = {{1.f, 1.f}}, offset;
                if (W::GROUP > 0) scale = inner_scale(block, g);
                Pack<f32, 2> of;
                if constexpr (W::OFFSET) {
                    offset = block.inner_offset(g, r);
                    if (S::ROWS == 1)
                        of.v[0] = of.v[1] = sums[g];
                    else
                        of = load<2>(sums + g * S::ROWS + own % SLICES * 8 + threadIdx.x % 4 * 2 % S::ROWS);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float more = sum[own][0][i];
                    if (CHAINS > 1) more += sum[own][CHAINS - 1][i];
                    if (W::GROUP == 0) total[own][i] = fmaf(RAW, more, total[own][i]);
                    if (W::GROUP > 0) inner[own][i] = fmaf(scale.v[i / 2], more, inner[own][i]);
                    if (W::OFFSET) least[own][i] = fmaf(offset.v[i / 2], of.v[i % 2], least[own][i]);
                }
            }
        }
        if (W::GROUP > 0) {
#pragma unroll
            for (int own = 0; own < OWN; own++) add_inner(blocks[own / SLICES], inner[own], least[own], total[own]);
        }
    }

    // The same over W::FOLDED.
    template <int SLICES, int SUMS>
    static __device__ __forceinline__ void add_folded(const W* blocks, const T* x, float (&total)[SUMS][4]) {
        typename W::Words words[S::TWINS];
#pragma unroll
        for (int twin = 0; twin < S::TWINS; twin++) words[twin] = blocks[twin].lane(threadIdx.x % WARP);
        u32 factor[S::TWINS][2], b[SLICES][LEVELS][2][2];
#pragma unroll
        for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
            read_slices<true>(x, chunk, chunk, b);
#pragma unroll
            for (int twin = 0; twin < S::TWINS; twin++) {
                if (chunk % W::GROUP_CHUNKS == 0)
                    blocks[twin].factors(chunk / W::GROUP_CHUNKS, lane_row(), factor[twin]);
                u32 a[4];
                W::folded(words[twin], chunk, factor[twin], a);
#pragma unroll
                for (int slice = 0; slice < SLICES; slice++)
#pragma unroll
                    for (int l = 0; l < LEVELS; l++)
                        multiply(total[SUMS > S::TWINS * SLICES ? chunk % 2 : twin * SLICES + slice], a,
                                 b[slice][l][chunk % 2], T());
            }
        }
    }

    // The same as add_blocks, of one, where a lane has the sums of chunks 2 t and 2 t + 1.
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
