// What the two ways of a decode step's attention share (attention_decode.cu): the arguments, what a block works on, and
// how the sums of warps and of splits become rows of y.
#ifndef CUPLAMA_ATTENTION_DECODE_CUH
#define CUPLAMA_ATTENTION_DECODE_CUH

#include "attention.cuh"
#include "e4m3.cuh"

constexpr int TILE = 16;  // keys of a warp's mma; windows begin at a multiple

__host__ __device__ constexpr int power_of_two(int x) { return x <= 1 ? 1 : 2 * power_of_two((x + 1) / 2); }
__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Elements of a row that a lane holds without tensor cores, and of a new head: 32 lanes hold it.
template <int D>
constexpr int SHARE = D > 8 * WARP ? 16 : 8;

// What a lane reads at once of a row of keys, and of values, on tensor cores: 16 bytes where that divides the row.
template <typename C, int D>
constexpr int KEY_EACH = sizeof(C) == 1 && D % 64 == 0 ? 16 : 8;
template <typename C, int D>
constexpr int VALUE_EACH = sizeof(C) == 1 && D % 128 == 0 ? 16 : 8;

// Of a warp's ring of tiles: STAGES of keys, as many of values (attention_decode_ring.cuh).
template <typename C, int D, int STAGES>
constexpr int RING_BYTES = 2 * STAGES * TILE * D * sizeof(C);

// The numbers of an instance. Shared memory: queries [QUERIES][QUERY] T, then sums [PARTS][PITCH] f32, of which a part
// begins with [Q][STRIDE]; a warp's lie where its ring was.
template <typename T, typename C, int D, int Q, int WARPS, bool TENSOR, int STAGES>
struct Decode {
    static constexpr int THREADS = WARPS * WARP;
    static constexpr int LANES = D <= 8 ? 2 : power_of_two(D / SHARE<D>);
    static constexpr int PARTS = TENSOR ? WARPS : 1;  // sums of a block that are added up at the end
    static constexpr int STRIDE = TENSOR ? D + 4 : SHARE<D> * LANES;
    static constexpr int CHUNKS = (D + 31) / 32;  // of 4 lanes x 8 elements
    // Two rows of queries lie 64 bytes apart modulo the 128 of all banks; or 16, where lanes read 32 bytes apart.
    static constexpr int QUERY = !TENSOR                ? D
                                 : KEY_EACH<C, D> == 16 ? D + 8
                                 : CHUNKS % 2           ? CHUNKS * 32
                                                        : CHUNKS * 32 + 32;
    static constexpr int QUERIES = TENSOR ? 8 : Q;
    static constexpr int ROWS = larger(1, THREADS / (Q * D / 4));  // splits that are added up side by side
    static constexpr int PITCH = larger(Q * STRIDE, RING_BYTES<C, D, STAGES> / 4);
    static constexpr int ROOM = larger(PARTS * PITCH, ROWS * Q * D);
};

// The arguments of both kernels, as the head of attention_decode.cu describes them.
template <typename T, typename C>
struct Arguments {
    const T* x;
    const C *k, *v;
    const i32 *seq_lens, *page_table;
    T* y;
    f32 *partial, *stats;
    u32* arrivals;
    int num_heads, H, heads, M, window, min_keys, alone, max_splits, splits;
    float scale;
    const T* sinks;
    float softcap;
};

// The arguments of append_attention alone; k and v are the cache again, to write to.
template <typename T, typename C>
struct NewToken {
    const i32* slot_mapping;
    C *k, *v;
    const i32* rope_rows;
    const f32 *cos, *sin;
    const T *q_norm, *k_norm;
    int h;
    float eps, offset;
};

// The part of a sequence that the query sees, in splits.
struct Span {
    int low, length, first, size, count;  // first: low, rounded down to where a tile begins

    __device__ __forceinline__ Span(int length, int window, int min_keys, int alone, int max_splits) : length(length) {
        low = window > 0 && length > window ? length - window : 0;
        first = low / TILE * TILE;
        const int keys = length - first, each = (keys + max_splits - 1) / max_splits;
        size = max(min_keys, keys <= alone ? alone : (each + 63) / 64 * 64);
        count = (keys + size - 1) / size;
    }
    __device__ __forceinline__ int begin(int split) const { return first + split * size; }
    __device__ __forceinline__ int end(int split) const { return min(begin(split) + size, length); }
};

// The query heads of a block, up to Q that share a key head, and their sequence.
template <int Q>
struct Heads {
    int sequence, kv_head, part, count, first;  // part: the first one's number in the group; first: in a row of x

    __device__ __forceinline__ Heads(int num_heads, int H) {
        const int group = num_heads / H, parts = (group + Q - 1) / Q;
        sequence = blockIdx.z, kv_head = blockIdx.y / parts;
        part = blockIdx.y % parts * Q, count = min(Q, group - part);
        first = kv_head * group + part;
    }
};

// The keys and values of a key head of a sequence: in the cache from `low` on, but token `fresh` at key and value.
template <typename C>
struct History {
    const C *k, *v;
    const i32* table;  // the sequence's row of the page table
    int head, H, low, fresh;
    const C *key, *value;

    // Whether the tile from token `at` on has token `fresh`.
    __device__ __forceinline__ bool newest_from(int at) const { return fresh - at < TILE && fresh >= at; }
};

// A split's result from the PARTS sums in room: rows of y if it is the only one, else partial sums.
template <int D, int Q, typename Numbers, bool SINKS, typename T, typename C, int PARTS>
__device__ __forceinline__ void store_split(const Arguments<T, C>& a, const Heads<Q>& heads, T* y, int split, bool only,
                                            const float* room, const float (&largest)[PARTS][Q],
                                            const float (&sum)[PARTS][Q]) {
    const i64 first = i64(heads.sequence) * a.num_heads + heads.first;
    for (int i = threadIdx.x; i < heads.count * D; i += Numbers::THREADS) {
        const int row = i / D, column = i % D;
        float top = largest[0][row], total = 0.f, weights = 0.f;
#pragma unroll
        for (int w = 1; w < PARTS; w++) top = fmaxf(top, largest[w][row]);
#pragma unroll
        for (int w = 0; w < PARTS; w++) {
            const float factor = exp2f(largest[w][row] - top);
            total += room[w * Numbers::PITCH + row * Numbers::STRIDE + column] * factor;
            weights += sum[w][row] * factor;
        }
        if (only) {
            y[i] = from_float<T>(total / with_sink<SINKS>(weights, top, a.sinks, heads.first + row));
            continue;
        }
        const i64 at = (first + row) * a.splits + split;
        a.partial[at * D + column] = total;
        if (column == 0) a.stats[at * 2] = top, a.stats[at * 2 + 1] = weights;
    }
}

// A softmax over splits and the sum of 4 columns under it.
struct SplitSums {
    static constexpr int BATCH = 8;  // splits that a thread asks for at once
    Pack<f32, 4> acc = {};
    float top = LOWEST, total = 0.f;

    // Adds the splits start, start + step, ... of `count`, in the columns from `column` on. first: the head's split 0.
    template <int D, int STEP>
    __device__ __forceinline__ void add(const f32* stats, const f32* partial, i64 first, int start, int count,
                                        int column) {
        for (int s = start; s < count; s += STEP * BATCH) {
            float2 stat[BATCH];
            float4 four[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const bool there = s + j * STEP < count;
                const i64 at = first + s + j * STEP;
                stat[j] = there ? __ldcg(reinterpret_cast<const float2*>(stats + at * 2)) : make_float2(LOWEST, 0.f);
                four[j] = there ? __ldcg(reinterpret_cast<const float4*>(partial + at * D + column))
                                : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            const float before = top;
#pragma unroll
            for (int j = 0; j < BATCH; j++) top = fmaxf(top, stat[j].x);
            const float shrink = exp2f(before - top);
            total *= shrink;
#pragma unroll
            for (int e = 0; e < 4; e++) acc.v[e] *= shrink;
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const float factor = exp2f(stat[j].x - top);
                total += factor * stat[j].y;
                acc.v[0] += factor * four[j].x, acc.v[1] += factor * four[j].y;
                acc.v[2] += factor * four[j].z, acc.v[3] += factor * four[j].w;
            }
        }
    }
};

// Rows of y from all splits of the block's heads. ROWS threads share 4 columns of a head, each with a softmax of its
// own over every ROWS-th split. room: [ROWS][Q][D]
template <int D, int Q, int THREADS, int ROWS, bool SINKS, typename T, typename C>
__device__ __forceinline__ void add_up_splits(const Arguments<T, C>& a, const Heads<Q>& heads, T* y, int count,
                                              float* room) {
    constexpr int ITEMS = Q * D / 4;
    __shared__ float tops[ROWS][Q], totals[ROWS][Q];
    const i64 first = (i64(heads.sequence) * a.num_heads + heads.first) * a.splits;
    for (int i = threadIdx.x; i < ITEMS * ROWS; i += THREADS) {
        const int row = i % ITEMS / (D / 4), column = i % (D / 4) * 4, start = i / ITEMS;
        if (row >= heads.count) continue;
        SplitSums sums;
        sums.add<D, ROWS>(a.stats, a.partial, first + row * a.splits, start, count, column);
        store<4>(room + (start * Q + row) * D + column, sums.acc);
        if (column == 0) tops[start][row] = sums.top, totals[start][row] = sums.total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads.count * D; i += THREADS) {
        float top = LOWEST, total = 0.f, weights = 0.f;
#pragma unroll
        for (int r = 0; r < ROWS; r++) top = fmaxf(top, tops[r][i / D]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float factor = exp2f(tops[r][i / D] - top);
            total += room[r * Q * D + i] * factor;
            weights += totals[r][i / D] * factor;
        }
        y[i] = from_float<T>(total / with_sink<SINKS>(weights, top, a.sinks, heads.first + i / D));
    }
}

#endif
