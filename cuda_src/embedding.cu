// embedding      x[n,d] = table[ids[n]]                          ids: i32, table[V,d]: T, x: f32
// embedding_pos  x[n,d] = table[ids[n]] + positions[pos[n]]      pos: i32, positions[P,d]: T
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its d columns, 8 at a time: 16 bytes of a 16-bit
// table in, 32 bytes out. Rows whose size or address forbids wide accesses go element by element.
//
// Op and reference: cuplama/ops/embedding.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. The op moves 6 bytes per element and is bound by latency at one token.
#include "common.cuh"

template <typename T>
__global__ void embedding(const i32* __restrict__ ids, const T* __restrict__ table, f32* __restrict__ x, int d) {
    const T* token = table + i64(ids[blockIdx.x]) * d;
    f32* out = x + i64(blockIdx.x) * d;
    const bool wide = d % 8 == 0 && aligned(table, x);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < d; i += gridDim.y * blockDim.x * 8) {
        const Pack<T, 8> t = load_row<8>(token, i, d, wide);
        Pack<f32, 8> sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = to_float(t.v[j]);
        store_row<8>(out, i, d, wide, sum);
    }
}

template <typename T>
__global__ void embedding_pos(const i32* __restrict__ ids, const i32* __restrict__ pos, const T* __restrict__ table,
                              const T* __restrict__ positions, f32* __restrict__ x, int d) {
    const T* token = table + i64(ids[blockIdx.x]) * d;
    const T* position = positions + i64(pos[blockIdx.x]) * d;
    f32* out = x + i64(blockIdx.x) * d;
    const bool wide = d % 8 == 0 && aligned(table, positions, x);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < d; i += gridDim.y * blockDim.x * 8) {
        const Pack<T, 8> t = load_row<8>(token, i, d, wide);
        const Pack<T, 8> p = load_row<8>(position, i, d, wide);
        Pack<f32, 8> sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = to_float(t.v[j]) + to_float(p.v[j]);
        store_row<8>(out, i, d, wide, sum);
    }
}
