// What the attention kernels without tensor cores share (attention_prefill_fma.cu, attention_backward_fma.cu): tiles on
// their way to shared memory, and the two products of a block.
//
// Blocks have 256 threads, 16 x 16: thread (ty, tx). All operands are f32 in shared memory, in rows of STRIDE floats.
#ifndef CUPLAMA_ATTENTION_FMA_CUH
#define CUPLAMA_ATTENTION_FMA_CUH

#include "attention.cuh"
#include "e4m3.cuh"

constexpr int THREADS = 256;

// Blocks on a multiprocessor, which bound the registers: the sums of wider heads take more.
template <int D>
constexpr int BLOCKS = D <= 256 ? 2 : 1;

// 4 floats more than a multiple of 32 banks: no conflicts.
template <int D>
constexpr int STRIDE = (D + 31) / 32 * 32 + 4;

// A tile of COUNT rows of D elements on its way to shared memory: each thread moves vectors of 8 elements.
template <typename C, int D, int COUNT>
struct RowTile {
    static constexpr int SIZE = COUNT * D / 8, VECTORS = (SIZE + THREADS - 1) / THREADS;
    Pack<C, 8> held[VECTORS];

    // Rows first .. first+COUNT-1; those from `end` on repeat the last. where(row): the address of a row.
    template <typename Where>
    __device__ __forceinline__ void fetch(int first, int end, Where where) {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            const int vector = threadIdx.x + u * THREADS;
            if (SIZE % THREADS == 0 || vector < SIZE)
                held[u] = load<8>(where(min(first + vector / (D / 8), end - 1)) + vector % (D / 8) * 8);
        }
    }

    __device__ __forceinline__ void stash(float* tile) const {
#pragma unroll
        for (int u = 0; u < VECTORS; u++) {
            const int vector = threadIdx.x + u * THREADS;
            if (SIZE % THREADS == 0 || vector < SIZE) {
                const auto& x = readable(held[u]);
#pragma unroll
                for (int half = 0; half < 8; half += 4) {
                    Pack<f32, 4> four;
#pragma unroll
                    for (int i = 0; i < 4; i++) four.v[i] = to_float(x.v[half + i]);
                    store<4>(tile + vector / (D / 8) * STRIDE<D> + vector % (D / 8) * 8 + half, four);
                }
            }
        }
    }
};

// Thread (ty, tx) has the rows R*ty + i of a product. score += rows of a times rows tx + 16*j of b, over D.
template <int D, int R, int C>
__device__ __forceinline__ void multiply_rows(float (&score)[R][C], const float* a_rows, const float* b_rows) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 1
    for (int d = 0; d < D; d += 4) {
        Pack<f32, 4> a[R], c[C];
#pragma unroll
        for (int i = 0; i < R; i++) a[i] = load<4>(a_rows + (R * ty + i) * STRIDE<D> + d);
#pragma unroll
        for (int j = 0; j < C; j++) c[j] = load<4>(b_rows + (tx + 16 * j) * STRIDE<D> + d);
#pragma unroll
        for (int i = 0; i < R; i++) {
#pragma unroll
            for (int j = 0; j < C; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) score[i][j] += a[i].v[e] * c[j].v[e];
            }
        }
    }
}

// acc += weights [16*R][16*C + 4] times the 16*C rows of b. acc[i][j] is of the columns 2*tx + 32*j and the next.
template <int D, int C, int R, int PAIRS>
__device__ __forceinline__ void add_rows(float (&acc)[R][PAIRS][2], const float* weights, const float* b_rows) {
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll 1
    for (int row = 0; row < 16 * C; row += 4) {
        Pack<f32, 4> p[R];
#pragma unroll
        for (int i = 0; i < R; i++) p[i] = load<4>(weights + (R * ty + i) * (16 * C + 4) + row);
#pragma unroll
        for (int e = 0; e < 4; e++) {
#pragma unroll
            for (int j = 0; j < PAIRS; j++) {
                const int column = 2 * tx + 32 * j;
                if (D % 32 == 0 || column < D) {
                    const Pack<f32, 2> value = load<2>(b_rows + (row + e) * STRIDE<D> + column);
#pragma unroll
                    for (int i = 0; i < R; i++) {
                        acc[i][j][0] += p[i].v[e] * value.v[0];
                        acc[i][j][1] += p[i].v[e] * value.v[1];
                    }
                }
            }
        }
    }
}

// One of a thread's rows of such sums, each through `last`, to D elements at `to`.
template <int D, typename T, int PAIRS, typename Last>
__device__ __forceinline__ void store_sums(T* to, const float (&acc)[PAIRS][2], Last last) {
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        const int column = 2 * (threadIdx.x % 16) + 32 * j;
        if (D % 32 == 0 || column < D) {
            Pack<T, 2> out;
            out.v[0] = from_float<T>(last(acc[j][0])), out.v[1] = from_float<T>(last(acc[j][1]));
            store<2>(to + column, out);
        }
    }
}

#endif
