// linear_backward_x  dx[n,k] = dy w (+ a)       dy[n,m], w[m,k], a[n,k], dx: T; the sum is in f32, rounded once
// linear_backward_w  dw[m,k] += dy^T x          dy[n,m], x[n,k]: T   dw: f32
// column_sums        partial[p,j] = sum of dy[i,j] over the i of piece p, of `rows` rows        partial: f32
// linear_backward_b  db[m] += sum of partial[p,:] over p        db: f32
//
// The products are cuBLAS's where it is there, for any number of rows; these take its place where it is not. A packed
// w is unpacked before (unpack.cu).
//
// Mapping of the products: a block of 256 threads computes 64 x 64 elements, a thread 4 x 4 of them. 16 columns of the
// left matrix and 16 rows of the right one are in shared memory as f32, the depth as the first index; the next 16 are
// on their way in registers meanwhile. A thread adds along the depth, in order.
// Mapping of column_sums: a block has 256 columns, eight to a lane, and the rows of a piece; its eight warps take every
// eighth row, and their sums are added up in shared memory. linear_backward_b gives a column to a thread.
//
// Ops and references: cuplama/ops/linear_backward.py. Test: tests/ops/. Benchmarks: cuplama kernels bench, and
// benchmarks/backward_products.py for those of cuBLAS.
// Tried: nothing else yet.
#include "common.cuh"

constexpr int TILE = 64, STEP = 16, SIDE = 4;  // of a block; of the depth, at once; of a thread
constexpr int LANES = TILE / SIDE, THREADS = LANES * LANES;
constexpr int PITCH = TILE + 4;  // of a row in shared memory: a multiple of 16 bytes

// Where a thread's elements lie in the tile, and the tile in the result.
struct Place {
    int row, column;   // of the tile
    int down, across;  // of the thread, in the tile

    __device__ __forceinline__ Place()
        : row(blockIdx.x * TILE), column(blockIdx.y * TILE), down(threadIdx.x / LANES * SIDE),
          across(threadIdx.x % LANES * SIDE) {}
};

// A factor of a product. DEPTH_FIRST: data is [depth, width], else [width, depth]; the tile begins at `first` of width.
template <typename T, bool DEPTH_FIRST>
struct Factor {
    const T* data;
    int width, depth, first;
    bool vectorized;

    __device__ __forceinline__ Factor(const T* data, int width, int depth, int first)
        : data(data), width(width), depth(depth), first(first),
          vectorized((DEPTH_FIRST ? width : depth) % SIDE == 0 && aligned(data)) {}

    // The thread's four elements of the depths l .. l + STEP - 1; what lies outside is zero.
    __device__ __forceinline__ Pack<T, SIDE> load(int l) const {
        const int line = DEPTH_FIRST ? l + int(threadIdx.x) / LANES : first + int(threadIdx.x) / (STEP / SIDE);
        const int at =
            DEPTH_FIRST ? first + int(threadIdx.x) % LANES * SIDE : l + int(threadIdx.x) % (STEP / SIDE) * SIDE;
        const int lines = DEPTH_FIRST ? depth : width, size = DEPTH_FIRST ? width : depth;
        return load_row<SIDE>(data + i64(line) * size, at, line < lines ? size : 0, vectorized);
    }

    __device__ __forceinline__ static void put(f32 (&tile)[STEP][PITCH], const Pack<T, SIDE>& x) {
        if (DEPTH_FIRST) {
            Pack<f32, SIDE> wide;
#pragma unroll
            for (int j = 0; j < SIDE; j++) wide.v[j] = to_float(x.v[j]);
            store<SIDE>(&tile[threadIdx.x / LANES][threadIdx.x % LANES * SIDE], wide);
        } else {
#pragma unroll
            for (int j = 0; j < SIDE; j++)
                tile[threadIdx.x % (STEP / SIDE) * SIDE + j][threadIdx.x / (STEP / SIDE)] = to_float(x.v[j]);
        }
    }
};

// sum[i][j] = the product at the thread's row i and column j, added along the depth. All threads call.
template <typename Left, typename Right>
__device__ __forceinline__ void multiply(const Left& left, const Right& right, const Place& place,
                                         float (&sum)[SIDE][SIDE]) {
    __shared__ __align__(16) f32 lefts[STEP][PITCH], rights[STEP][PITCH];
    auto coming_left = left.load(0);
    auto coming_right = right.load(0);
    for (int l = 0; l < left.depth; l += STEP) {
        left.put(lefts, coming_left);
        right.put(rights, coming_right);
        __syncthreads();
        coming_left = left.load(l + STEP);
        coming_right = right.load(l + STEP);
#pragma unroll
        for (int d = 0; d < STEP; d++) {
            const Pack<f32, SIDE> x = load<SIDE>(&lefts[d][place.down]), y = load<SIDE>(&rights[d][place.across]);
#pragma unroll
            for (int i = 0; i < SIDE; i++)
#pragma unroll
                for (int j = 0; j < SIDE; j++) sum[i][j] = fmaf(x.v[i], y.v[j], sum[i][j]);
        }
        __syncthreads();  // the tiles may be written again
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    linear_backward_x(const T* __restrict__ dy, const T* __restrict__ w, const T* __restrict__ a, T* __restrict__ dx,
                      int n, int m, int k) {
    const Place place;
    float sum[SIDE][SIDE] = {};
    multiply(Factor<T, false>(dy, n, m, place.row), Factor<T, true>(w, k, m, place.column), place, sum);
    const bool vectorized = k % SIDE == 0 && aligned(a, dx);
    const int column = place.column + place.across;
#pragma unroll
    for (int i = 0; i < SIDE; i++) {
        const int row = place.row + place.down + i;
        if (row >= n) break;
        Pack<T, SIDE> out;
        if (a != nullptr) out = load_row<SIDE>(a + i64(row) * k, column, k, vectorized);
#pragma unroll
        for (int j = 0; j < SIDE; j++)
            out.v[j] = from_float<T>(a != nullptr ? sum[i][j] + to_float(out.v[j]) : sum[i][j]);
        store_row<SIDE>(dx + i64(row) * k, column, k, vectorized, out);
    }
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    linear_backward_w(const T* __restrict__ dy, const T* __restrict__ x, f32* __restrict__ dw, int n, int m, int k) {
    const Place place;
    float sum[SIDE][SIDE] = {};
    multiply(Factor<T, true>(dy, m, n, place.row), Factor<T, true>(x, k, n, place.column), place, sum);
    const bool vectorized = k % SIDE == 0 && aligned(dw);
    const int column = place.column + place.across;
#pragma unroll
    for (int i = 0; i < SIDE; i++) {
        const int row = place.row + place.down + i;
        if (row >= m) break;
        Pack<f32, SIDE> out = load_row<SIDE>(dw + i64(row) * k, column, k, vectorized);
#pragma unroll
        for (int j = 0; j < SIDE; j++) out.v[j] += sum[i][j];
        store_row<SIDE>(dw + i64(row) * k, column, k, vectorized, out);
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    column_sums(const T* __restrict__ dy, f32* __restrict__ partial, int n, int m, int rows) {
    constexpr int WIDTH = 8, WARPS = 8;  // columns of a lane, warps of a block
    __shared__ __align__(16) f32 sums[WARPS][WARP * WIDTH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int first = blockIdx.x * WARP * WIDTH, column = first + lane * WIDTH;
    const int end = min(int(blockIdx.y + 1) * rows, n);
    const bool vectorized = m % WIDTH == 0 && aligned(dy);
    Pack<f32, WIDTH> sum = {};
#pragma unroll 4
    for (int row = blockIdx.y * rows + warp; row < end; row += WARPS) {
        const Pack<T, WIDTH> x = load_row<WIDTH>(dy + i64(row) * m, column, m, vectorized);
#pragma unroll
        for (int j = 0; j < WIDTH; j++) sum.v[j] += to_float(x.v[j]);
    }
    store<WIDTH>(&sums[warp][lane * WIDTH], sum);
    __syncthreads();
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[i][threadIdx.x];
    if (first + int(threadIdx.x) < m) partial[i64(blockIdx.y) * m + first + threadIdx.x] = total;
}

__global__ void __launch_bounds__(128)
    linear_backward_b(const f32* __restrict__ partial, f32* __restrict__ db, int m, int pieces) {
    const int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= m) return;
    float total = 0.f;
#pragma unroll 8
    for (int p = 0; p < pieces; p++) total += partial[i64(p) * m + column];
    db[column] += total;
}
