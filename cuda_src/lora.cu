// Low-rank adapters (Hu et al., arXiv:2106.09685) of a product y = W x: scale * B h, where h = A x is another product.
//
//   lora_add         y[n,m]:U     = a + scale * sum over l of h[i, part[j] * r + l] b[j,l]
//   lora_backward_h  dh[n,q]:T    = scale * sum of dy[i,j] b[j,l] over the j of part p, at p * r + l
//   lora_backward_b  db[m,r]:f32 += scale * sum over i of dy[i,j] h[i, part[j] * r + l]
//                    a[n,m]: U; h[n,q], b[m,r], dy[n,m]: T
//
//   part[m]: i32, which does not decrease: a stacked matrix, as that of q, k and v, has an adapter for each part, and h
//   has r columns for each, q = parts * r.
//
// lora_add_few is for few rows, as in decoding: a row of b belongs to LANES lanes, 8 elements each, which share its
// sum for ROWS rows of h. It starts early, and reads b before it waits for what the kernel ahead of it writes.
//
// The others are for training, in f32, and in 16 bits on GPUs whose tensor cores lora_mma.cu does not use: products of
// matrices by FMA. A block of 256 threads has a tile of 64 rows by 16 * C columns, a thread 4 by C of them, and both
// factors pass through shared memory 16 at a time. Tiles of y take the parts of their columns one after the other, and
// so do those of db. The two backward kernels have long sums and few tiles: blockIdx.z is a piece of the sum. Pieces go
// to partial, f32, and the kernels lora_sum_h and lora_sum_b add them up in order.
//
// Ops and references: cuplama/ops/lora.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "lora.cuh"
#include "ptx.cuh"

// ---- few rows -------------------------------------------------------------------------------------------------------

template <typename T, typename U, int LANES, int ROWS>
__global__ void __launch_bounds__(128)
    lora_add_few(const U* a, const T* h, const T* __restrict__ b, const i32* __restrict__ part, U* y, int n, int m,
                 int q, int r, f32 scale) {
    launch_dependents();
    const int group = (blockIdx.x * blockDim.x + threadIdx.x) / LANES, lane = threadIdx.x % LANES;
    const int column = min(group, m - 1), at = lane * 8, first = blockIdx.y * ROWS;
    const Pack<T, 8> weights = load_row<8>(b + i64(column) * r, at, r, r % 8 == 0 && aligned(b));
    const int p = part[column];
    const bool vectorized = r % 8 == 0 && aligned(h);
    pdl_wait();
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const int row = min(first + i, n - 1);
        const Pack<T, 8> x = load_row<8>(h + i64(row) * q + p * r, at, r, vectorized);
        const i64 to = i64(row) * m + column;
        const float before = to_float(a[to]);
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < 8; j++) sum += to_float(x.v[j]) * to_float(weights.v[j]);
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
        if (lane == 0 && group < m && first + i < n) y[to] = from_float<U>(before + scale * sum);
    }
}

// ---- products by FMA ------------------------------------------------------------------------------------------------

constexpr int TILE = 64;   // rows of a block; ops/lora.py sizes the grids with it
constexpr int DEPTH = 16;  // of the sum, in shared memory
constexpr int SIDE = 16;   // threads side by side in a tile: 16 by 16
constexpr int HEIGHT = TILE / SIDE;

// sum += left right over k = from .. to - 1. left(row, k) and right(column, k) give an element of a tile each, zeros
// outside. LEFT, RIGHT: whether neighbours in memory differ in k.
template <int C, bool LEFT, bool RIGHT, typename L, typename R>
__device__ __forceinline__ void multiply_tile(float (&sum)[HEIGHT][C], int from, int to, L left, R right) {
    constexpr int WIDTH = SIDE * C, THREADS = SIDE * SIDE;
    __shared__ __align__(16) float lefts[DEPTH][TILE + 4], rights[DEPTH][WIDTH + 4];
    const int x = threadIdx.x % SIDE, y = threadIdx.x / SIDE;
    for (int k = from; k < to; k += DEPTH) {
#pragma unroll
        for (int e = threadIdx.x; e < TILE * DEPTH; e += THREADS) {
            const int row = LEFT ? e / DEPTH : e % TILE, depth = LEFT ? e % DEPTH : e / TILE;
            lefts[depth][row] = k + depth < to ? left(row, k + depth) : 0.f;
        }
#pragma unroll
        for (int e = threadIdx.x; e < WIDTH * DEPTH; e += THREADS) {
            const int column = RIGHT ? e / DEPTH : e % WIDTH, depth = RIGHT ? e % DEPTH : e / WIDTH;
            rights[depth][column] = k + depth < to ? right(column, k + depth) : 0.f;
        }
        __syncthreads();
#pragma unroll 4
        for (int depth = 0; depth < DEPTH; depth++) {
            const Pack<f32, HEIGHT> l = load<HEIGHT>(&lefts[depth][y * HEIGHT]);
            const Pack<f32, C> other = load<C>(&rights[depth][x * C]);
#pragma unroll
            for (int i = 0; i < HEIGHT; i++)
#pragma unroll
                for (int j = 0; j < C; j++) sum[i][j] += l.v[i] * other.v[j];
        }
        __syncthreads();  // the next 16 go to the same places
    }
}

template <typename T, typename U>
__global__ void __launch_bounds__(SIDE* SIDE)
    lora_add(const U* __restrict__ a, const T* __restrict__ h, const T* __restrict__ b, const i32* __restrict__ part,
             U* __restrict__ y, int n, int m, int q, int r, f32 scale) {
    constexpr int C = 4;
    const int first = blockIdx.y * TILE, column = blockIdx.x * SIDE * C;
    float sum[HEIGHT][C] = {};
    for (int p = part[column]; p <= part[min(column + SIDE * C, m) - 1]; p++)
        multiply_tile<C, true, true>(
            sum, 0, r, [&](int i, int l) { return first + i < n ? to_float(h[i64(first + i) * q + p * r + l]) : 0.f; },
            [&](int j, int l) {
                return column + j < m && part[column + j] == p ? to_float(b[i64(column + j) * r + l]) : 0.f;
            });
    const bool vectorized = m % C == 0 && aligned(a, y);
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        const int row = first + int(threadIdx.x) / SIDE * HEIGHT + i, at = column + int(threadIdx.x) % SIDE * C;
        if (row >= n) break;
        Pack<U, C> out = load_row<C>(a + i64(row) * m, at, m, vectorized);
#pragma unroll
        for (int j = 0; j < C; j++) out.v[j] = from_float<U>(to_float(out.v[j]) + scale * sum[i][j]);
        store_row<C>(y + i64(row) * m, at, m, vectorized, out);
    }
}

// A thread's sums into rows of `width` elements; rows there are `height`.
template <int C>
__device__ __forceinline__ void put_tile(f32* to, const float (&sum)[HEIGHT][C], int first, int height, int column,
                                         int width, i64 pitch) {
#pragma unroll
    for (int i = 0; i < HEIGHT; i++) {
        const int row = first + int(threadIdx.x) / SIDE * HEIGHT + i;
#pragma unroll
        for (int j = 0; j < C; j++) {
            const int at = column + int(threadIdx.x) % SIDE * C + j;
            if (row < height && at < width) to[row * pitch + at] = sum[i][j];
        }
    }
}

// Grid: tiles of rows; tiles of r by parts; pieces of m.
template <typename T, int C>
__global__ void __launch_bounds__(SIDE* SIDE)
    lora_backward_h(const T* __restrict__ dy, const T* __restrict__ b, const i32* __restrict__ part,
                    f32* __restrict__ partial, int n, int m, int q, int r) {
    const int tiles = (r + SIDE * C - 1) / (SIDE * C), p = blockIdx.y / tiles;
    const int first = blockIdx.x * TILE, column = blockIdx.y % tiles * SIDE * C;
    const Range range(part_begin(part, m, p), part_begin(part, m, p + 1), DEPTH);
    float sum[HEIGHT][C] = {};
    multiply_tile<C, true, false>(
        sum, range.begin, range.end,
        [&](int i, int j) { return first + i < n ? to_float(dy[i64(first + i) * m + j]) : 0.f; },
        [&](int l, int j) { return column + l < r ? to_float(b[i64(j) * r + column + l]) : 0.f; });
    put_tile<C>(partial + i64(blockIdx.z) * n * q + p * r, sum, first, n, column, r, q);
}

// Grid: tiles of m; tiles of r; pieces of n.
template <typename T, int C>
__global__ void __launch_bounds__(SIDE* SIDE, 4)
    lora_backward_b(const T* __restrict__ dy, const T* __restrict__ h, const i32* __restrict__ part,
                    f32* __restrict__ partial, int n, int m, int q, int r) {
    const int first = blockIdx.x * TILE, column = blockIdx.y * SIDE * C;
    const Range range(0, n, DEPTH);
    float sum[HEIGHT][C] = {};
    for (int p = part[first]; p <= part[min(first + TILE, m) - 1]; p++)
        multiply_tile<C, false, false>(
            sum, range.begin, range.end,
            [&](int j, int i) {
                return first + j < m && part[first + j] == p ? to_float(dy[i64(i) * m + first + j]) : 0.f;
            },
            [&](int l, int i) { return column + l < r ? to_float(h[i64(i) * q + p * r + column + l]) : 0.f; });
    put_tile<C>(partial + i64(blockIdx.z) * m * r, sum, first, m, column, r, r);
}

// ---- pieces of sums -------------------------------------------------------------------------------------------------

// The sum of the pieces at elements at .. at + 3 of `size`.
__device__ __forceinline__ Pack<f32, 4> sum_pieces(const f32* partial, i64 at, i64 size, int pieces, f32 scale) {
    Pack<f32, 4> sum = {};
    for (int piece = 0; piece < pieces; piece++) {
        const Pack<f32, 4> x = load_row<4>(partial + piece * size, at, size, size % 4 == 0 && aligned(partial));
#pragma unroll
        for (int i = 0; i < 4; i++) sum.v[i] += x.v[i];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) sum.v[i] *= scale;
    return sum;
}

template <typename T>
__global__ void __launch_bounds__(256)
    lora_sum_h(const f32* __restrict__ partial, T* __restrict__ dh, int n, int q, int pieces, f32 scale) {
    const i64 size = i64(n) * q, at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at >= size) return;
    const Pack<f32, 4> sum = sum_pieces(partial, at, size, pieces, scale);
    Pack<T, 4> out;
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] = from_float<T>(sum.v[i]);
    store_row<4>(dh, at, size, aligned(dh), out);
}

__global__ void __launch_bounds__(256)
    lora_sum_b(const f32* __restrict__ partial, f32* __restrict__ db, int m, int r, int pieces, f32 scale) {
    const i64 size = i64(m) * r, at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    if (at >= size) return;
    Pack<f32, 4> out = load_row<4>(db, at, size, aligned(db));
    const Pack<f32, 4> sum = sum_pieces(partial, at, size, pieces, scale);
#pragma unroll
    for (int i = 0; i < 4; i++) out.v[i] += sum.v[i];
    store_row<4>(db, at, size, aligned(db), out);
}
