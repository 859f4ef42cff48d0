// From a warp's sums of tiles to y, for linear_packed.cu and experts_packed.cu.
#ifndef CUPLAMA_LINEAR_PACKED_SUMS_CUH
#define CUPLAMA_LINEAR_PACKED_SUMS_CUH

#include "linear_packed.cuh"

// Where a product goes. y, a (may be null) and b (may be null) begin at the launch's first row of x and first column of
// y.
template <typename T, typename U>
struct Output {
    U* y;
    const f32* a;
    const T* b;
    int count, m, rows;  // rows of x; columns of y in all, and of this launch
    const f32* scales;   // of whole rows of w
    f32* parts;          // with SPLIT, sums [SPLIT][units][PARTS][TILE]
    u32* arrivals;       // and of each group of GPU blocks how many have left theirs

    __device__ __forceinline__ float residual_of(int row, int column) const { return a[i64(row) * m + column]; }
    template <int ACT, int PARTS>
    __device__ __forceinline__ void put(int row, int column, float residual, const float (&total)[PARTS]) const {
        y[i64(row) * m + column] = from_float<U>(residual + activated<ACT, T>(total));
    }
};

// What the warps have of an element of y, added up in four short chains.
template <typename S>
__device__ __forceinline__ float add_warps(const f32* partial) {
    float chains[4] = {};
#pragma unroll
    for (int warp = 0; warp < S::WARPS; warp++) chains[warp % 4] += partial[warp * (S::STEP * S::PARTS * S::TILE)];
    return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// An element of y, whose sums are total.
template <typename S, typename U>
__device__ __forceinline__ void finish(float (&total)[S::PARTS], int row, int column,
                                       const Output<typename S::T, U>& out) {
    const i64 at = i64(row) * out.m + column;
    const float residual = out.a != nullptr ? out.a[at] : 0.f;
#pragma unroll
    for (int p = 0; p < S::PARTS; p++) {
        if (S::W::ROW_SCALES) total[p] *= out.scales[p * out.m + column];
        if (out.b != nullptr) total[p] += to_float(out.b[p * out.m + column]);
    }
    out.y[at] = from_float<U>(residual + activated<S::ACT, typename S::T>(total));
}

// Leaves this GPU block's sums in memory. The last of the SPLIT that share tiles adds them up, in the order of their
// parts of k.
template <typename S, typename U>
__device__ __forceinline__ void add_parts(const Stream<S>& stream, const Output<typename S::T, U>& out) {
    __shared__ u32 arrived;
    constexpr int UNIT = S::PARTS * S::TILE;
    const int units = stream.end - stream.begin;
    const i64 part = i64(stream.units) * UNIT;  // elements
    f32* from = out.parts + i64(stream.begin) * UNIT;
    __syncthreads();
    for (int i = threadIdx.x; i < units * UNIT; i += S::THREADS) {
        const int row = i % S::ROWS, column = (stream.begin + i / UNIT) * BLOCK_ROWS + i % S::TILE / S::ROWS;
        if (row < out.count && column < out.rows) from[blockIdx.x % S::SPLIT * part + i] = stream.sums()[i];
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        u32* counter = out.arrivals + blockIdx.x / S::SPLIT;
        arrived = atomicAdd(counter, 1u) + 1;
        if (arrived == S::SPLIT) *counter = 0;
    }
    __syncthreads();
    if (arrived < S::SPLIT) return;
    __threadfence();
    for (int i = threadIdx.x; i < units * S::TILE; i += S::THREADS) {
        const int row = i % S::ROWS, column = stream.begin * BLOCK_ROWS + i / S::ROWS;
        if (row >= out.count || column >= out.rows) continue;
        float total[S::PARTS] = {};
#pragma unroll
        for (int p = 0; p < S::PARTS; p++)
#pragma unroll
            for (int s = 0; s < S::SPLIT; s++)
                total[p] += from[s * part + (i / S::TILE * S::PARTS + p) * S::TILE + i % S::TILE];
        finish<S>(total, row, column, out);
    }
}

// The units begin .. end - 1 of y = a + act(x w^T + b). factors: x of this lane, which `rows` fills.
template <typename S, typename Weights, typename Rows, typename Factors, typename Out>
__device__ __forceinline__ void multiply_rows(Stream<S, Weights>& stream, int begin, int end, const Rows& rows,
                                              Factors& factors, const Out& out) {
    typedef typename S::W W;
    constexpr int OUTS = S::STEP * S::TILE;  // elements of y between two barriers
    constexpr int EACH = (OUTS + S::THREADS - 1) / S::THREADS;
    int turn = 0;
#pragma unroll 1
    for (int phase = stream.first; phase < stream.first + S::PHASES; phase++) {
        const bool whole = S::SPLIT == 1 && phase == S::PHASES - 1;  // sums are, from here on
        factors.fill(stream, rows, phase);
        const int count = stream.blocks_of(phase);
#pragma unroll 1
        for (int first = begin; first < end; first += S::STEP) {
            // What is added to this thread's elements of y: asked for now, needed at the end. So a bias stays as it is
            // read until then: making a float of it would wait for it here.
            typename S::T bias[EACH][S::PARTS];
            float scale[EACH][S::PARTS], residual[EACH] = {};
#pragma unroll
            for (int e = 0; e < EACH; e++) {
#pragma unroll
                for (int p = 0; p < S::PARTS; p++) bias[e][p] = from_float<typename S::T>(0.f);
                const int i = threadIdx.x + e * S::THREADS, row = i % S::ROWS,
                          column = first * BLOCK_ROWS + i / S::ROWS;
                if (i >= OUTS || row >= out.count || column >= min(out.rows, end * BLOCK_ROWS)) continue;
                if (!whole) continue;
                if (out.a != nullptr) residual[e] = out.residual_of(row, column);
#pragma unroll
                for (int p = 0; p < S::PARTS; p++) {
                    if (out.b != nullptr) bias[e][p] = out.b[p * out.m + column];
                    if (W::ROW_SCALES) scale[e][p] = out.scales[p * out.m + column];
                }
            }

            f32* partial = stream.partials() + turn * stream.PARTIAL;
            turn ^= 1;
            f32* mine = partial + threadIdx.x / WARP * (S::STEP * S::PARTS * S::TILE);
#pragma unroll 1
            for (int tile = first * S::PARTS; tile < min(first + S::STEP, end) * S::PARTS; tile += S::TWINS) {
                factors.multiply_tile(stream, count, mine);
                mine += S::TWINS * S::TILE;
            }
            __syncthreads();
#pragma unroll
            for (int e = 0; e < EACH; e++) {
                const int i = threadIdx.x + e * S::THREADS, row = i % S::ROWS,
                          column = first * BLOCK_ROWS + i / S::ROWS;
                if (i >= OUTS || row >= out.count || column >= min(out.rows, end * BLOCK_ROWS)) continue;
                float total[S::PARTS];
#pragma unroll
                for (int p = 0; p < S::PARTS; p++) {
                    const int at = (i / S::TILE * S::PARTS + p) * S::TILE + i % S::TILE;
                    total[p] = add_warps<S>(partial + at);
                    if constexpr (S::WAITING) {
                        f32& earlier = stream.sums()[(first - begin) * (S::PARTS * S::TILE) + at];
                        if (phase > stream.first) total[p] += earlier;
                        earlier = total[p];
                    }
                    if (W::ROW_SCALES) total[p] *= scale[e][p];
                    total[p] += to_float(bias[e][p]);
                }
                if (!whole) continue;
                out.template put<S::ACT>(row, column, residual[e], total);
            }
        }
    }
    if constexpr (S::SPLIT > 1) add_parts(stream, out);
}

#endif
