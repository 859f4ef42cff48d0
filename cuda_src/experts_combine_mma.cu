// expert_linear_combine_mma    y[n,m] = a[n,m] + sum over slots of weights[n,slot] * (x[n*s+slot] w[expert]^T + b[expert])
//                              for up to 4 rows: expert_linear and combine_pairs in one, on tensor cores. x[n*s,k],
//                              w[E,m,k], b[E,m] (may be null): 16 bits (sm_80 and later); weights, a (may be null), y:
//                              f32; k is a multiple of 8, and all arrays begin at multiples of 16 bytes
//
// The time is that of reading the weights of the experts that were chosen, once. Every block has an equal share of the
// columns of y, to the column, and goes through all of these experts, as if the sum were one over (experts) * k. That
// sum is dealt to the WARPS warps in contiguous slices, in chunks of 64 elements of one expert. In mma.m16n8k16 16 rows
// of w are A, and column j of B is row j of x: of the pair that row j has with the chunk's expert, zeros if it has none.
// So a lane has the sums of the same elements of y whatever the expert, and adds each chunk's by the row's weight. What
// the warps have is added up once, at the end. Nothing of a pair goes through memory, and nothing is rounded to T.
//
// A warp's chunks come through a ring in shared memory with cp.async, DEPTH chunks deep: of w, and of x. A lane copies
// what it multiplies itself, so no barrier guards the ring. Which k meets which is as in linear_mma.cu: lane (r, t) has
// the elements 8t .. 8t+7 and 32 + 8t .. 32 + 8t+7 of a chunk, of row r of x and of rows r and r + 8 of w.
//
// Bytes on their way: a multiprocessor of an H200 takes 33 KB in a microsecond. Eight experts of 768 x 2048 are 190 KB
// for each of its 132, and the ring may hold all of that.
//
// Launch, tuning, op: cuplama/ops/experts_combine.py. Test: tests/ops/test_experts_combine.py.
// Measured on an H200, 2026-11-28, Qwen3-30B-A3B: one row in 12.6 us, where expert_linear and combine_pairs took 16.7;
// eight rows in 58.0 and 58.1. Tried: which experts were chosen, and their weights to the L2, ahead of the wait for the
// kernel before (12.6 and 58.0 us in place of 12.8 and 57.6, for a rule in the backend); the same for packed weights,
// MXFP4 of gpt-oss-20b: 14.7 us, where two launches took 13.6, and 62.7 and 47.8 for eight rows; a ring of 100 KB that
// fits beside the kernel before, filled while that one runs, with 8 warps: 2.948 ms a token, as much as without.
#include "experts.cuh"
#include "linear_mma.cuh"

constexpr int MAX_PAIRS = 128;  // 4 rows with 32 experts

// The experts that have a pair, in their order, each with a place for every row: in shared memory, weights [most][N],
// pairs [most][N] and experts [most], where there are `most` of them at most. A row has an expert once.
template <int N>
struct Chosen {
    f32* weights;  // of each row, 0 where the row did not choose the expert
    i32* pairs;    // -1 there
    i32* experts;
    int count;

    // memory: on an 8-byte boundary
    __device__ __forceinline__ Chosen(f32* memory, int most)
        : weights(memory), pairs(reinterpret_cast<i32*>(memory) + most * N), experts(pairs + most * N), count(0) {
        for (int i = threadIdx.x; i < most * N; i += blockDim.x) pairs[i] = -1, weights[i] = 0.f;
    }

    // Reads what was chosen, all of it at once: sorted[n*s] (pairs), offsets[E+1], by[n,s] (weights). All threads of the
    // block call.
    __device__ __forceinline__ void read(const i32* sorted, const i32* offsets, const f32* by, int size, int s, int E) {
        __shared__ i32 before[MAX_EXPERTS + 1], starts[MAX_EXPERTS + 1], list[MAX_PAIRS];
        __shared__ f32 weight[MAX_PAIRS];
        // From both ends of the block, so that few threads wait for one load after the other.
        for (int i = threadIdx.x; i <= E; i += blockDim.x) starts[i] = offsets[i];
        for (int i = blockDim.x - 1 - threadIdx.x; i < size; i += blockDim.x) list[i] = sorted[i], weight[i] = by[i];
        __syncthreads();
        running_sums(before, E, [&](int expert) { return starts[expert + 1] > starts[expert]; });
        count = before[E];
        for (int expert = threadIdx.x; expert < E; expert += blockDim.x) {
            const int place = before[expert];
            if (before[expert + 1] == place) continue;
            experts[place] = expert;
            for (int i = starts[expert]; i < starts[expert + 1]; i++) {
                const int pair = list[i], at = place * N + pair / s;
                pairs[at] = pair, weights[at] = weight[pair];
            }
        }
        __syncthreads();
    }
};

// What an element of y begins with: a, and the biases of the row's experts by their weights.
template <int N, typename T>
__device__ __forceinline__ float combine_start(const Chosen<N>& chosen, const f32* a, const T* b, int row, int column,
                                               int m) {
    float sum = a != nullptr ? a[i64(row) * m + column] : 0.f;
    if (b != nullptr)
#pragma unroll 4
        for (int e = 0; e < chosen.count; e++)
            sum = fmaf(chosen.weights[e * N + row], to_float(b[i64(chosen.experts[e]) * m + column]), sum);
    return sum;
}

// What the rows of x of a lane's sums, 2 t and 2 t + 1, weigh an expert by.
template <int N>
__device__ __forceinline__ Pack<f32, 2> lane_weights(const Chosen<N>& chosen, int expert) {
    const f32* of = chosen.weights + expert * N;
    if constexpr (N == 1) return {{of[0], 0.f}};
    return load<2>(of + threadIdx.x % 4 * 2 % N);
}

// The columns first .. end - 1 of y: what each begins with, and the WARPS warps' sums of it, in their order. partial:
// tiles of a warp [16][N], those of the next warp `stride` behind them. early: what this thread's first one begins
// with.
template <int N, int WARPS, typename Start>
__device__ __forceinline__ void put_columns(const f32* partial, int stride, f32* y, int n, int first, int end, int m,
                                            float early, const Start& start) {
    for (int i = threadIdx.x; i < (end - first) * N; i += WARPS * WARP) {
        const int row = i % N, column = first + i / N;
        if (row >= n) continue;
        float sum = i < WARPS * WARP ? early : start(row, column);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) sum += partial[warp * stride + i];
        y[i64(row) * m + column] = sum;
    }
}

// Where a warp is in its slice: a chunk of an expert of those that were chosen, for a tile of columns.
struct Place {
    int first, count, chunks;  // of the slice: where it begins, its chunks; chunks of an expert
    int column, expert, chunk, left;

    __device__ __forceinline__ Place(int first, int count, int chunks, int column)
        : first(first), count(count), chunks(chunks), column(column) {
        begin();
    }
    __device__ __forceinline__ void begin() { expert = first / chunks, chunk = first % chunks, left = count; }
    __device__ __forceinline__ void go_on() {
        if (++chunk == chunks) chunk = 0, expert++;
        if (--left == 0) column += 2 * ROWS, begin();
    }
};

// A warp's chunks on their way through its ring. N: rows of x, at most (1, 2 or 4).
template <int N, int DEPTH, typename T>
struct PairStream {
    static constexpr int SLOT = 4 * WARP + 8 * N;  // vectors: of w four of each lane, of x two of each lane with a row
    uint4* ring;                                   // of this warp
    const T *x, *w;
    Chosen<N> chosen;
    Place next;  // to ask for
    int m, k, end;

    __device__ __forceinline__ PairStream(const T* x, const T* w, const Chosen<N>& chosen, const Place& from, int m,
                                          int k, int end)
        : x(x), w(w), chosen(chosen), next(from), m(m), k(k), end(end) {
        DYNAMIC_SHARED(uint4, memory);
        ring = memory + threadIdx.x / WARP * (DEPTH * SLOT);
#pragma unroll 1
        for (int slot = 0; slot < DEPTH; slot++) fetch(slot);
    }

    // Asks for the next chunk, or for nothing at the end: a group of copies in any case.
    __device__ __forceinline__ void fetch(int slot) {
        if (next.column < end && next.count > 0) {
            const int row = next.column + lane_row(), at = next.chunk * CHUNK + threadIdx.x % 4 * 8;
            const T* from = w + (i64(chosen.experts[next.expert]) * m + row) * k + at;
            uint4* to = ring + slot * SLOT + threadIdx.x % WARP;
#pragma unroll
            for (int i = 0; i < 4; i++)
                cp_async_16(to + i * WARP, from + i / 2 * (ROWS * i64(k)) + i % 2 * 32,
                            row + i / 2 * ROWS < end && at + i % 2 * 32 < k);
            if (lane_row() < N) {
                const int pair = chosen.pairs[next.expert * N + lane_row()];
                const T* own = x + i64(max(pair, 0)) * k + at;
#pragma unroll
                for (int i = 0; i < 2; i++)
                    cp_async_16(to + 4 * WARP + i * (4 * N), own + i * 32, pair >= 0 && at + i * 32 < k);
            }
            next.go_on();
        }
        cp_async_commit();
    }

    // The next chunk of the ring, whose place is asked for anew: two vectors of rows r and r + 8 of w, and of row r of x.
    __device__ __forceinline__ void take(int& slot, Vector (&of_w)[4], Vector (&of_x)[2]) {
        cp_async_wait<DEPTH - 1>();
        const uint4* from = ring + slot * SLOT + threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < 4; i++) memcpy(&of_w[i], from + i * WARP, 16);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            of_x[i] = {};
            if (lane_row() < N) memcpy(&of_x[i], from + 4 * WARP + i * (4 * N), 16);
        }
        fetch(slot);
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
};

// The sums of this warp over its slice, of all tiles of columns, to partial: tiles [16][N].
template <int N, int DEPTH, typename T>
__device__ __forceinline__ void multiply_slice(PairStream<N, DEPTH, T>& stream, Place at, f32* partial) {
    int slot = 0;
#pragma unroll 1
    while (at.column < stream.end) {
        float total[4] = {};
#pragma unroll 1
        for (int c = 0; c < at.count; c++) {
            Vector w[4], x[2];
            stream.take(slot, w, x);
            float sum[2][4] = {};
#pragma unroll
            for (int i = 0; i < 2; i++) multiply_vectors(sum[0], sum[1], w[i].v, w[i + 2].v, x[i].v, T());
            const Pack<f32, 2> weight = lane_weights(stream.chosen, at.expert);
#pragma unroll
            for (int i = 0; i < 4; i++) total[i] = fmaf(weight.v[i % 2], sum[0][i] + sum[1][i], total[i]);
            at.go_on();
        }
        if (at.count == 0) at.column += 2 * ROWS;
        store_tile<N>(partial, total);
        partial += 2 * ROWS * N;
    }
}

// N: of the rows, at most; most: experts that may be chosen.
template <typename T, int N, int WARPS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 1)
    expert_linear_combine_mma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                              const f32* weights, const T* __restrict__ b, const f32* a, f32* y, int n, int s, int E,
                              int m, int k, int most) {
    using Weights = PairStream<N, DEPTH, T>;
    DYNAMIC_SHARED(uint4, memory);
    f32* partial = reinterpret_cast<f32*>(memory + WARPS * DEPTH * Weights::SLOT);
    const int begin = OneWeight::border(m, 0), end = OneWeight::border(m, 1), warp = threadIdx.x / WARP;
    const int stride = (end - begin + 2 * ROWS - 1) / (2 * ROWS) * (2 * ROWS * N);  // sums of a warp
    Chosen<N> chosen(partial + WARPS * stride, most);
    pdl_wait();
    chosen.read(pairs, offsets, weights, n * s, s, E);
    const int chunks = (k + CHUNK - 1) / CHUNK, all = chosen.count * chunks;
    const int first = all * warp / WARPS, count = all * (warp + 1) / WARPS - first;
    const Place place(first, count, chunks, begin);
    Weights stream(x, w, chosen, place, m, k, end);
    launch_dependents();
    const auto start = [&](int row, int column) { return combine_start<N>(chosen, a, b, row, column, m); };
    const int row = threadIdx.x % N, column = begin + threadIdx.x / N;
    const float early = row < n && column < end ? start(row, column) : 0.f;
    multiply_slice(stream, place, partial + warp * stride);
    __syncthreads();
    put_columns<N, WARPS>(partial, stride, y, n, begin, end, m, early, start);
}
