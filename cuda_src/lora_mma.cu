// The products of low-rank adapters on tensor cores (sm_80 and later), T f16 or bf16: formulas and names as in lora.cu,
// which adds up the pieces of both backward kernels and computes lora_add for few rows.
//
// All three are bound by memory, by y and dy, as long as the cores take the products: at rank 16 an element of y has 32
// operations. mma.sync m16n8k16, f32 sums. The places of k, and of the columns of a tile, in the fragments are free
// as long as both factors agree, so they are chosen such that a lane moves 16 bytes at once where it matters:
//
//   lora_add_mma         a warp has 16 rows by 32 columns of y. Lane t of four has columns 8t .. 8t + 7 of a row, so a
//                        and y move by 16 bytes; it takes elements 4t .. 4t + 3 of every 16 of a row of h and of b,
//                        by 8 bytes. No shared memory: b and h are small, and stay in L1 and L2. a is asked for first.
//   lora_backward_h_mma  a warp has 16 rows of dh by NEW tiles of 8 columns, and walks over m in steps of 64. Lane t
//                        takes elements 8t .. 8t + 7 of every 32 of a row of dy, straight to registers, a step ahead.
//                        b passes through shared memory, two stages of cp.async; a row of b lies there where the
//                        fragments made of such elements want it (place_of).
//   lora_backward_b_mma  a warp has 16 columns of dy, rows of db, by NEW tiles of 8 columns, and walks over n in steps
//                        of 32. dy and h pass through shared memory, two stages; both factors are read transposed.
//
// Arrays whose rows do not allow accesses of 16 bytes go element by element.
//
// Ops and references: cuplama/ops/lora.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "lora.cuh"
#include "mma.cuh"

// Pairs of 16-bit elements as registers of a fragment.
template <typename T, int W>
__device__ __forceinline__ Pack<u32, W / 2> pairs(const Pack<T, W>& x) {
    return *reinterpret_cast<const Pack<u32, W / 2>*>(&x);
}

// ---- y = a + scale b h ----------------------------------------------------------------------------------------------

template <typename T, typename U>
__global__ void __launch_bounds__(256, 2)
    lora_add_mma(const U* __restrict__ a, const T* __restrict__ h, const T* __restrict__ b,
                 const i32* __restrict__ part, U* __restrict__ y, int n, int m, int q, int r, f32 scale) {
    constexpr int WIDE = 4;  // fragments of a warp: 16 rows and 8 columns each
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * 64 + warp / 2 * 16 + g, column = blockIdx.x * 64 + warp % 2 * 32;
    if (first - g >= n || column >= m) return;  // a whole warp
    const bool vectorized = m % 8 == 0 && aligned(a, y), factors = r % 4 == 0 && aligned(h, b);
    Pack<U, 8> before[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (first + 8 * i < n) before[i] = load_row<8>(a + i64(first + 8 * i) * m, column + 8 * t, m, vectorized);
    int owner[WIDE];  // the parts of the columns that the lane has of b; -1 outside
#pragma unroll
    for (int c = 0; c < WIDE; c++) {
        const int j = column + g / 2 * 8 + c * 2 + g % 2;
        owner[c] = j < m ? part[j] : -1;
    }
    float sum[WIDE][4] = {};
    for (int p = part[column]; p <= part[min(column + 32, m) - 1]; p++) {
        for (int k = 4 * t; k - 4 * t < r; k += 16) {
            Pack<u32, 2> left[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = min(first + 8 * i, n - 1);
                left[i] = pairs(load_row<4>(h + i64(row) * q + p * r, k, r, factors));
            }
#pragma unroll
            for (int c = 0; c < WIDE; c++) {
                const int j = column + g / 2 * 8 + c * 2 + g % 2;
                Pack<u32, 2> right = {};
                if (owner[c] == p) right = pairs(load_row<4>(b + i64(j) * r, k, r, factors));
                multiply(sum[c], {left[0].v[0], left[1].v[0], left[0].v[1], left[1].v[1]}, {right.v[0], right.v[1]},
                         T{});
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (first + 8 * i >= n) break;
#pragma unroll
        for (int j = 0; j < 8; j++)
            before[i].v[j] = from_float<U>(to_float(before[i].v[j]) + scale * sum[j / 2][i * 2 + j % 2]);
        store_row<8>(y + i64(first + 8 * i) * m, column + 8 * t, m, vectorized, before[i]);
    }
}

// ---- shared memory --------------------------------------------------------------------------------------------------

constexpr int WARPS = 8, THREADS = WARPS * WARP;  // of a block of the backward kernels

// Elements from one row to the next: eight rows at one column lie in different banks.
__device__ constexpr int pitch_of(int width) { return width + 8; }

// 8 elements into shared memory, which arrive with the group of the copies; zeros outside.
template <typename T>
__device__ __forceinline__ void fetch(T* to, const T* row, int at, int size, bool there, bool vectorized) {
    if (vectorized)
        cp_async_16(to, row + at, there && at < size);
    else
        store<8>(to, load_row<8>(row, at, there ? size : 0, false));
}

// Adds to a warp's tile: left is a 16 x 16 fragment; the right matrix lies in shared memory as 16 rows of k by 8 * NEW
// columns, PITCH elements apart, and is read transposed.
template <typename T, int NEW, int PITCH>
__device__ __forceinline__ void multiply_rows(float (&sum)[NEW][4], const u32 (&left)[4], const T* right) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int c = 0; c < NEW; c += 2) {
        u32 both[4];
        ldmatrix_x4_trans(both, right + lane % 16 * PITCH + (c + lane / 16) * 8);
        multiply(sum[c], left, {both[0], both[1]}, T{});
        multiply(sum[c + 1], left, {both[2], both[3]}, T{});
    }
}

// The lane's elements of the first or second row that it has of a tile, into a row of f32 with `width` columns.
template <int NEW>
__device__ __forceinline__ void put_row(f32* to, const float (&sum)[NEW][4], int half, int column, int width) {
#pragma unroll
    for (int c = 0; c < NEW; c++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int at = column + c * 8 + int(threadIdx.x) % 4 * 2 + e;
            if (at < width) to[at] = half ? sum[c][2 + e] : sum[c][e];
        }
}

// ---- dh = scale dy b ------------------------------------------------------------------------------------------------

constexpr int STEP_H = 64;

// Where row j of 32 rows of b lies: lane t of four has elements 8t .. 8t + 7 of dy, and gives pairs 2s and 2s + 1 of
// them to product s, as elements 2t and 2t + 8 of its k.
__device__ __forceinline__ int place_of(int j) {
    return j / 32 * 32 + j % 8 / 4 * 16 + j % 4 / 2 * 8 + j % 32 / 8 * 2 + j % 2;
}

template <typename T>
struct Rows {  // of dy: a lane's elements of 16 rows by STEP_H columns
    Pack<T, 8> v[2][STEP_H / 32];

    __device__ __forceinline__ void read(const T* dy, int row, int n, int j, int m, bool vectorized) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int s = 0; s < STEP_H / 32; s++) {
                const i64 from = i64(min(row + 8 * i, n - 1)) * m;  // what is too much is not stored
                v[i][s] = load_row<8>(dy + from, j + s * 32 + int(threadIdx.x) % 4 * 8, m, vectorized);
            }
    }
};

// Grid: tiles of rows; tiles of r by parts; pieces of m.
template <typename T, int NEW>
__global__ void __launch_bounds__(THREADS)
    lora_backward_h_mma(const T* __restrict__ dy, const T* __restrict__ b, const i32* __restrict__ part,
                        f32* __restrict__ partial, int n, int m, int q, int r) {
    constexpr int WIDTH = NEW * 8, PITCH = pitch_of(WIDTH);
    __shared__ __align__(16) T stages[2][STEP_H * PITCH];
    const int tiles = (r + WIDTH - 1) / WIDTH, p = blockIdx.y / tiles, column = blockIdx.y % tiles * WIDTH;
    const int row = (blockIdx.x * WARPS + threadIdx.x / WARP) * 16 + threadIdx.x % WARP / 4;
    const int low = part_begin(part, m, p), high = part_begin(part, m, p + 1);
    const Range range(low - low % 8, high, STEP_H);
    const bool vectorized = m % 8 == 0 && aligned(dy), copied = r % 8 == 0 && aligned(b);
    const auto get = [&](int stage, int from) {
        for (int e = threadIdx.x; e < STEP_H * NEW; e += THREADS) {
            const int i = e / NEW, j = from + i, at = e % NEW * 8;
            fetch(stages[stage] + place_of(i) * PITCH + at, b + i64(j) * r, column + at, r, j >= low && j < range.end,
                  copied);
        }
        cp_async_commit();
    };
    float sum[NEW][4] = {};
    Rows<T> now, next;
    if (range.begin < range.end) {
        get(0, range.begin);
        now.read(dy, row, n, range.begin, m, vectorized);
    }
    for (int j = range.begin, stage = 0; j < range.end; j += STEP_H, stage ^= 1) {
        if (j + STEP_H < range.end) {
            get(stage ^ 1, j + STEP_H);
            next.read(dy, row, n, j + STEP_H, m, vectorized);
        } else {
            cp_async_commit();
        }
        cp_async_wait<1>();
        __syncthreads();
#pragma unroll
        for (int s = 0; s < STEP_H / 16; s++) {
            const Pack<u32, 4> upper = pairs(now.v[0][s / 2]), lower = pairs(now.v[1][s / 2]);
            const int at = s % 2 * 2;
            multiply_rows<T, NEW, PITCH>(sum, {upper.v[at], lower.v[at], upper.v[at + 1], lower.v[at + 1]},
                                         stages[stage] + s * 16 * PITCH);
        }
        now = next;
        __syncthreads();  // the stage is filled again
    }
    f32* to = partial + i64(blockIdx.z) * n * q + p * r;
#pragma unroll
    for (int half = 0; half < 2; half++)
        if (row + half * 8 < n) put_row(to + i64(row + half * 8) * q, sum, half, column, r);
}

// ---- db = scale dy^T h ----------------------------------------------------------------------------------------------

// Grid: tiles of m; tiles of r; pieces of n.
template <typename T, int NEW>
__global__ void __launch_bounds__(THREADS)
    lora_backward_b_mma(const T* __restrict__ dy, const T* __restrict__ h, const i32* __restrict__ part,
                        f32* __restrict__ partial, int n, int m, int q, int r) {
    constexpr int WIDTH = NEW * 8, PITCH = pitch_of(WIDTH);
    constexpr int STEP = 32, TILE = WARPS * 16, PITCH_Y = pitch_of(TILE);
    __shared__ __align__(16) T lefts[2][STEP * PITCH_Y], rights[2][STEP * PITCH];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int first = blockIdx.x * TILE, column = blockIdx.y * WIDTH, row = first + warp * 16 + lane / 4;
    const Range range(0, n, STEP);
    const bool vectorized = m % 8 == 0 && aligned(dy), copied = r % 8 == 0 && aligned(h);
    f32* to = partial + i64(blockIdx.z) * m * r;
    for (int p = part[first]; p <= part[min(first + TILE, m) - 1]; p++) {
        const auto get = [&](int stage, int from) {
            for (int e = threadIdx.x; e < STEP * (TILE / 8); e += THREADS) {
                const int i = e / (TILE / 8), at = e % (TILE / 8) * 8;
                fetch(lefts[stage] + i * PITCH_Y + at, dy + i64(from + i) * m, first + at, m, from + i < range.end,
                      vectorized);
            }
            for (int e = threadIdx.x; e < STEP * NEW; e += THREADS) {
                const int i = e / NEW, at = e % NEW * 8;
                fetch(rights[stage] + i * PITCH + at, h + i64(from + i) * q + p * r, column + at, r,
                      from + i < range.end, copied);
            }
            cp_async_commit();
        };
        float sum[NEW][4] = {};
        if (range.begin < range.end) get(0, range.begin);
        for (int i = range.begin, stage = 0; i < range.end; i += STEP, stage ^= 1) {
            if (i + STEP < range.end)
                get(stage ^ 1, i + STEP);
            else
                cp_async_commit();
            cp_async_wait<1>();
            __syncthreads();
#pragma unroll
            for (int s = 0; s < STEP / 16; s++) {
                u32 left[4];  // lanes 8i .. 8i + 7: k from i / 2 * 8, columns of dy from i % 2 * 8
                ldmatrix_x4_trans(
                    left, lefts[stage] + (s * 16 + lane / 16 * 8 + lane % 8) * PITCH_Y + warp * 16 + lane / 8 % 2 * 8);
                multiply_rows<T, NEW, PITCH>(sum, left, rights[stage] + s * 16 * PITCH);
            }
            __syncthreads();  // the stage is filled again
        }
        // Of the two rows of db that the lane has, those of the part.
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int j = row + half * 8;
            if (j < m && part[j] == p) put_row(to + i64(j) * r, sum, half, column, r);
        }
    }
}
