// embedding      x[n,d] = table[input_ids[n]]                                   input_ids: i32, table[V,d]: T, x: f32
// embedding_pos  x[n,d] = table[input_ids[n]] + position_table[positions[n]]    positions: i32, position_table[P,d]: T
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its d columns, 8 at a time: 16 bytes of a 16-bit
// table in, 32 bytes out. Rows whose size or address forbids 16-byte accesses go element by element.
//
// Op and reference: cuplama/ops/embedding.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. The op moves 6 bytes per element and is bound by latency at one token.
#include "common.cuh"

template <typename T>
__global__ void embedding(const i32* __restrict__ input_ids, const T* __restrict__ table, f32* __restrict__ x, int d) {
    const T* token = table + i64(input_ids[blockIdx.x]) * d;
    f32* out = x + i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(table, x);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < d; i += gridDim.y * blockDim.x * 8) {
        const Pack<T, 8> t = load_row<8>(token, i, d, vectorized);
        Pack<f32, 8> sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = to_float(t.v[j]);
        store_row<8>(out, i, d, vectorized, sum);
    }
}

template <typename T>
__global__ void embedding_pos(const i32* __restrict__ input_ids, const i32* __restrict__ positions,
                              const T* __restrict__ table, const T* __restrict__ position_table, f32* __restrict__ x,
                              int d) {
    const T* token = table + i64(input_ids[blockIdx.x]) * d;
    const T* position = position_table + i64(positions[blockIdx.x]) * d;
    f32* out = x + i64(blockIdx.x) * d;
    const bool vectorized = d % 8 == 0 && aligned(table, position_table, x);
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < d; i += gridDim.y * blockDim.x * 8) {
        const Pack<T, 8> t = load_row<8>(token, i, d, vectorized);
        const Pack<T, 8> p = load_row<8>(position, i, d, vectorized);
        Pack<f32, 8> sum;
#pragma unroll
        for (int j = 0; j < 8; j++) sum.v[j] = to_float(t.v[j]) + to_float(p.v[j]);
        store_row<8>(out, i, d, vectorized, sum);
    }
}
