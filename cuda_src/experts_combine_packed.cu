// expert_linear_combine_packed    y[n,m] = a[n,m] + sum over slots of weights[n,slot] * (x[n*s+slot] w[expert]^T + b[expert])
//                                 for up to 8 rows, as experts_combine_mma.cu, of a packed weight (formats.cuh): x[n*s,k],
//                                 b[E,m] (may be null): T, 16 bits (sm_80 and later); w: W, the row blocks of an expert
//                                 behind those of the one before it; weights, a (may be null), y: f32; k is a multiple of
//                                 8, and all arrays begin at multiples of 16 bytes
//
// The GPU blocks have equal numbers of units (16 columns of y), and go with them through all experts that were chosen.
// TEAMS teams of WARPS warps take one expert after the other, each every TEAMS-th; of an expert's row of packed blocks
// a warp has BLOCKS. A warp streams its packed blocks as in linear_packed.cu, from expert to expert without a pause.
// Column j of the product's B is row j of x, of the pair that row j has with the expert, zeros if it has none; so a
// lane adds a tile's sums to those of the experts before, each by its row's weight, in a place of shared memory that is
// its warp's own. What the warps have is added up once, at the end.
//
// x: rows of all pairs in shared memory, if there is room for them: they are asked for as soon as there is x, and arrive
// while it is found out which experts were chosen. Else as many experts after each other as there is room for: the rows
// lie in the order of the sorted pairs then, and the warps meet at a barrier before each of these groups.
//
// Launch, tuning, op: cuplama/ops/experts_combine.py. Test: tests/ops/test_experts_combine.py.
// Tried: nothing else yet; no GPU has run it.
#include "experts_combine.cuh"
#include "linear_packed_mma.cuh"

// The units first .. last - 1 of the experts of a team.
template <typename S>
struct TeamExperts {
    static constexpr bool MORE = true;
    const i32* experts;
    int at, count, first, last;

    // For the stream of weights, as OneWeight has it.
    __device__ __forceinline__ int next(int units, int& begin, int& end) {
        begin = end = 0;
        if (at >= count) return 0;
        const int expert = experts[at];
        begin = first, end = last, at += S::TEAMS;
        return expert * units + first;
    }
};

// Shared memory behind the rings: a warp's sums [units][16][ROWS], of each; Chosen; rows of x [1 + room][STRIDE], of
// which the first is zeros; with offsets the sums of x over groups, of each warp.
template <typename S>
struct PairRows {
    typedef typename S::T T;
    static constexpr int STRIDE = STRIDE_OF<S, T>, THREADS = S::TEAMS * S::THREADS;
    const T* x;
    T* rows;
    int k, room;

    __device__ __forceinline__ PairRows(const T* x, void* rows, int k, int room)
        : x(x), rows(static_cast<T*>(rows)), k(k), room(room) {
        const T zero = from_float<T>(0.f);
        for (int at = threadIdx.x * 4; at < S::SPAN; at += THREADS * 4)
            store<4>(this->rows + staged_at<T>(at), Pack<T, 4>{zero, zero, zero, zero});
    }

    // The row of a place, or zeros where that is negative.
    __device__ __forceinline__ T* at(int place) const { return rows + (max(place, -1) + 1) * STRIDE; }
    __device__ __forceinline__ f32* sums() const { return reinterpret_cast<f32*>(rows + (1 + room) * STRIDE); }

    // Asks for the row of a pair.
    __device__ __forceinline__ void ask(int place, int pair) const {
        const T* from = x + i64(pair) * k;
#pragma unroll 1
        for (int column = threadIdx.x * 4; column < S::SPAN; column += THREADS * 4)
            cp_async_8(at(place) + staged_at<T>(column), from + column, column < k);
    }
};

// Adds an expert's sums to those of this warp. place: of this lane's row of x; scales: of the expert's rows of w.
template <typename S, typename Weights>
__device__ __forceinline__ void add_expert(Stream<S, Weights>& stream, Factors<S, 1, true>& factors,
                                           const PairRows<S>& rows, int place, const Pack<f32, 2>& weight,
                                           const f32* scales, int units, f32* partial) {
    typedef typename S::W W;
    const int count = stream.blocks_of(0);
    __syncwarp();  // the sums of groups of the expert before have been read
    factors.begin(stream, rows.at(place), rows.sums());
#pragma unroll 1
    for (int unit = 0; unit < units; unit++) {
        float total[4] = {}, scale[2] = {1.f, 1.f};
        if constexpr (W::ROW_SCALES) {
#pragma unroll
            for (int half = 0; half < 2; half++) scale[half] = scales[unit * BLOCK_ROWS + 8 * half + lane_row()];
        }
        factors.sum_tile(stream, count, total);
        f32* own = partial + unit * S::TILE;
        float sum[4];
        load_tile<S::ROWS>(own, sum);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (W::ROW_SCALES) total[i] *= scale[i / 2];
            sum[i] = fmaf(weight.v[i % 2], total[i], sum[i]);
        }
        store_tile<S::ROWS>(own, sum);
    }
}

// The sums of this warp over all experts of its team, of `units` units, the first of an expert being `first`.
template <typename S, typename Weights>
__device__ __forceinline__ void add_experts(Stream<S, Weights>& stream, const Chosen<S::ROWS>& chosen,
                                            const PairRows<S>& rows, bool whole, const f32* scales, int first,
                                            int units, f32* partial) {
    const int team = threadIdx.x / WARP / S::WARPS, row = lane_row() % S::ROWS;
    const float none[4] = {};
    for (int unit = 0; unit < units; unit++) store_tile<S::ROWS>(partial + unit * S::TILE, none);
    Factors<S, 1, true> factors;
    int pair = 0;  // the first of this group's among the sorted ones
#pragma unroll 1
    for (int from = 0; from < chosen.count;) {
        int to = chosen.count, next = pair;
        if (whole) {
            cp_async_wait<S::DEPTH - 1>();  // x came before the ring
        } else {
            for (to = from; to < chosen.count && next + chosen.rows_of(to) - pair <= rows.room; to++)
                next += chosen.rows_of(to);
            __syncthreads();  // the rows of the group before have been read
            for (int i = pair; i < next; i++) rows.ask(i - pair, chosen.found[i]);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
#pragma unroll 1
        for (int e = from + (team - from % S::TEAMS + S::TEAMS) % S::TEAMS; e < to; e += S::TEAMS) {
            const int place = chosen.pairs[e * S::ROWS + row] - pair;
            const f32* own = scales + (i64(chosen.experts[e]) * stream.units + first) * BLOCK_ROWS;
            add_expert(stream, factors, rows, place, lane_weights(chosen, e), own, units, partial);
        }
        from = to, pair = next;
    }
}

// Asks for the units first .. last - 1 of the chosen experts' weights, as far as AHEAD_BYTES go, to come to the L2.
template <int ROWS, typename W>
__device__ __forceinline__ void prefetch_units(const Chosen<ROWS>& chosen, const W* w, int first, int last, int units,
                                               int columns) {
    const int bytes = columns * sizeof(W), own = last - first, all = min(chosen.count * own, AHEAD_BYTES / bytes);
    for (int i = threadIdx.x; i < all; i += blockDim.x)
        prefetch_l2(w + (i64(chosen.experts[i / own]) * units + first + i % own) * columns, bytes);
}

// most: experts that may be chosen; room: for rows of x in shared memory; ahead: whether which experts were chosen is
// known before the wait for earlier kernels.
template <typename T, typename W, int ROWS, int WARPS, int BLOCKS, int TEAMS, int DEPTH>
__global__ void __launch_bounds__(TEAMS * WARPS * WARP, 1)
    expert_linear_combine_packed(const T* x, const W* __restrict__ w, const i32* pairs, const i32* offsets,
                                 const f32* weights, const T* __restrict__ b, const f32* a, f32* y, int n, int s, int E,
                                 int m, int k, int most, int room, int ahead) {
    typedef Shape<T, W, NO_ACT, ROWS, WARPS, BLOCKS, 1, DEPTH, DEPTH - 1, 1, 1, false, 1, TEAMS> S;
    constexpr int ALL = TEAMS * WARPS;
    DYNAMIC_SHARED(uint4, memory);
    const int units = (m + BLOCK_ROWS - 1) / BLOCK_ROWS, pair_count = n * s, warp = threadIdx.x / WARP;
    const int first = units * int(blockIdx.x) / int(gridDim.x), last = units * (int(blockIdx.x) + 1) / int(gridDim.x);
    const int stride = (last - first) * S::TILE;
    f32* partial = reinterpret_cast<f32*>(memory + ALL * DEPTH * (sizeof(W) / 16));
    Chosen<ROWS> chosen(partial + ALL * stride, most);
    const PairRows<S> rows(x, partial + ALL * stride + (most * (1 + 2 * ROWS) + 3) / 4 * 4, k, room);
    const bool whole = pair_count <= room;
    const auto wait = [&] {
        pdl_wait();
        for (int pair = 0; whole && pair < pair_count; pair++) rows.ask(pair, pair);
        cp_async_commit();
    };
    if (!ahead) wait();
    chosen.read(pairs, offsets, weights, pair_count, s, E, !whole);
    if (ahead) {
        prefetch_units(chosen, w, first, last, units, W::columns(k));
        wait();
    }
    Stream<S, TeamExperts<S>> stream(w, m, k, {chosen.experts, warp / WARPS, chosen.count, first, last});
    const int begin = first * BLOCK_ROWS, end = min(last * BLOCK_ROWS, m);
    const auto start = [&](int row, int column) { return combine_start<ROWS>(chosen, a, b, row, column, m); };
    const int row = threadIdx.x % ROWS, column = begin + threadIdx.x / ROWS;
    const float early = row < n && column < end ? start(row, column) : 0.f;
    const f32* scales = W::row_scales(w, E * units * BLOCK_ROWS, k);
    add_experts(stream, chosen, rows, whole, scales, first, last - first, partial + warp * stride);
    __syncthreads();
    put_columns<ROWS, ALL>(partial, stride, y, n, begin, end, m, early, start);
}
