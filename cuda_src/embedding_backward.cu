// embedding_backward    dtable[V,d] += dx[n,d], summed by token      dtable[ids[i]] += dx[i]; all f32, ids[n]: i32
//                       order[n]: i32, the positions sorted by their ids, equal ids in the order of the text
//
// In that order the rows of one token lie side by side: a run. Runs are of any length (the commonest token is 5% of
// a text, most occur once), so the order is cut into pieces of 32 positions whatever lies in them, and two launches:
//
//   embedding_backward        a piece: each run that lies inside is added to its row of dtable at once; of a run that
//                             comes from the piece before, or goes on in the next, the sum goes to partial[pieces,2,d]
//   embedding_backward_runs   adds the partial sums of a run that crosses pieces, in order, and adds them to dtable
//
// Mapping: blockIdx.x is the piece, blockIdx.y and the threads share the columns, 4 each. Lane i of every warp looks
// at position i of the piece: where runs begin and end is two masks that the whole block knows. Eight rows of dx, and
// the rows of dtable for runs that end there, are on their way at once. Each sum has one order: the same inputs give
// the same bits.
//
// Op and reference: cuplama/ops/embedding_backward.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. Not taken: a block for each run, where the commonest token takes as long as all others.
#include "common.cuh"

constexpr int PIECE = WARP;  // positions; ops/embedding_backward.py sizes grids and scratch with it
constexpr int MANY = 8;      // rows on their way at once
constexpr int COLUMNS = 4;   // of a thread

using Four = Pack<f32, COLUMNS>;

__device__ __forceinline__ void add_to(Four& sum, const Four& x) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) sum.v[j] += x.v[j];
}

// A piece, and where its runs begin and end: bit i of a mask is its position i.
struct Piece {
    int first, size;
    u32 begins, ends;

    __device__ __forceinline__ bool ends_at(int i) const { return ends >> i & 1; }
    // Whether the run at position i began in this piece.
    __device__ __forceinline__ bool began(int i) const { return (begins & ((2u << i) - 1)) != 0; }
};

// Every warp computes it; the rows of dx and of dtable go to shared memory, for all.
__device__ __forceinline__ Piece read_piece(const i32* ids, const i32* order, int n, int (&rows)[PIECE],
                                            int (&tokens)[PIECE]) {
    Piece piece;
    piece.first = blockIdx.x * PIECE;
    piece.size = min(PIECE, n - piece.first);
    const int lane = threadIdx.x % WARP, at = piece.first + lane;
    const bool there = lane < piece.size;
    const int row = there ? order[at] : 0, token = there ? ids[row] : -1;
    piece.begins = __ballot_sync(ALL_LANES, there && (at == 0 || ids[order[at - 1]] != token));
    piece.ends = __ballot_sync(ALL_LANES, there && (at + 1 == n || ids[order[at + 1]] != token));
    if (threadIdx.x < PIECE) rows[lane] = row, tokens[lane] = token;
    __syncthreads();
    return piece;
}

__global__ void __launch_bounds__(64, 6)
    embedding_backward(f32* __restrict__ dtable, const i32* __restrict__ ids, const i32* __restrict__ order,
                       const f32* __restrict__ dx, f32* __restrict__ partial, int n, int d) {
    __shared__ int rows[PIECE], tokens[PIECE];
    const Piece piece = read_piece(ids, order, n, rows, tokens);
    f32* parts = partial + i64(blockIdx.x) * 2 * d;
    const bool vectorized = d % COLUMNS == 0 && aligned(dtable, dx, partial);
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * COLUMNS; at < d; at += gridDim.y * blockDim.x * COLUMNS) {
        Four sum = {};
        for (int i = 0; i < piece.size; i += MANY) {
            Four x[MANY], before[MANY];
#pragma unroll
            for (int m = 0; m < MANY; m++) {
                if (i + m >= piece.size) break;
                x[m] = load_row<COLUMNS>(dx + i64(rows[i + m]) * d, at, d, vectorized);
                if (piece.ends_at(i + m) && piece.began(i + m))
                    before[m] = load_row<COLUMNS>(dtable + i64(tokens[i + m]) * d, at, d, vectorized);
            }
#pragma unroll
            for (int m = 0; m < MANY; m++) {
                if (i + m >= piece.size) break;
                add_to(sum, x[m]);
                if (!piece.ends_at(i + m)) continue;
                if (piece.began(i + m)) {
                    add_to(sum, before[m]);
                    store_row<COLUMNS>(dtable + i64(tokens[i + m]) * d, at, d, vectorized, sum);
                } else {
                    store_row<COLUMNS>(parts, at, d, vectorized, sum);
                }
                sum = {};
            }
        }
        const int last = piece.size - 1;
        if (!piece.ends_at(last)) store_row<COLUMNS>(parts + (piece.began(last) ? d : 0), at, d, vectorized, sum);
    }
}

// For the piece in which a run begins that goes on in the next: the other blocks leave at once.
__global__ void __launch_bounds__(64)
    embedding_backward_runs(f32* __restrict__ dtable, const i32* __restrict__ ids, const i32* __restrict__ order,
                            const f32* __restrict__ partial, int n, int d) {
    const int first = blockIdx.x * PIECE, next = first + PIECE, lane = threadIdx.x % WARP;
    if (next >= n) return;
    const int token = ids[order[next - 1]];
    if (ids[order[next]] != token || (first > 0 && ids[order[first - 1]] == token)) return;
    int pieces = 0;  // behind this one, that begin with the token
    for (u32 alike = ALL_LANES; alike == ALL_LANES; pieces += __popc(alike)) {
        const int at = next + (pieces + lane) * PIECE;
        alike = __ballot_sync(ALL_LANES, at < n && ids[order[at]] == token);
    }
    const f32* parts = partial + i64(blockIdx.x) * 2 * d;
    const bool vectorized = d % COLUMNS == 0 && aligned(dtable, partial);
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * COLUMNS; at < d; at += gridDim.y * blockDim.x * COLUMNS) {
        const Four before = load_row<COLUMNS>(dtable + i64(token) * d, at, d, vectorized);
        Four sum = load_row<COLUMNS>(parts + d, at, d, vectorized);
        for (int i = 1; i <= pieces; i += MANY) {
            Four x[MANY];
#pragma unroll
            for (int m = 0; m < MANY; m++)
                if (i + m <= pieces) x[m] = load_row<COLUMNS>(parts + i64(i + m) * 2 * d, at, d, vectorized);
#pragma unroll
            for (int m = 0; m < MANY; m++)
                if (i + m <= pieces) add_to(sum, x[m]);
        }
        add_to(sum, before);
        store_row<COLUMNS>(dtable + i64(token) * d, at, d, vectorized, sum);
    }
}
