// embedding      x[n,d] = table[input_ids[n]]                                   input_ids: i32, table[V,d]: T, x: f32
// embedding_pos  x[n,d] = table[input_ids[n]] + position_table[positions[n]]    positions: i32, position_table[P,d]: T
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its d columns, 8 at a time: 16 bytes of a 16-bit
// table in, 32 bytes out. Rows whose size or address forbids 16-byte accesses go element by element. So do those of a
// packed table (embedding_packed, embedding_pos_packed): of a row, a block of 16 rows by 128 columns has single words.
// Each segment of such a table has a launch, which leaves the tokens of the others alone.
//
// Op and reference: cuplama/ops/embedding.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. The op moves 6 bytes per element and is bound by latency at one token.
#include "formats.cuh"

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

// Columns i, i + step, ... of a row of a packed table with d columns, given to write(column, number). order: of the
// columns, or null; rows: of the table's segment.
template <typename W, typename Write>
__device__ __forceinline__ void packed_row(const W* table, const i32* order, int rows, int row, int d, Write write) {
    const W* blocks = table + i64(row / BLOCK_ROWS) * W::columns(d);
    const float scale = W::ROW_SCALES ? W::row_scales(table, rows, d)[row] : 1.f;
    for (int i = blockIdx.y * blockDim.x + threadIdx.x; i < d; i += gridDim.y * blockDim.x) {
        const float number = blocks[i / BLOCK_COLUMNS].element(row % BLOCK_ROWS, i % BLOCK_COLUMNS, scale);
        write(order == nullptr ? i : order[i], number);
    }
}

// first: of the table's rows, that of the segment.
template <typename W>
__global__ void embedding_packed(const i32* __restrict__ input_ids, const W* __restrict__ table,
                                 const i32* __restrict__ order, f32* __restrict__ x, int d, int first, int rows) {
    const int row = input_ids[blockIdx.x] - first;
    if (row < 0 || row >= rows) return;
    f32* out = x + i64(blockIdx.x) * d;
    packed_row(table, order, rows, row, d, [&](int i, float number) { out[i] = number; });
}

template <typename W, typename T>
__global__ void embedding_pos_packed(const i32* __restrict__ input_ids, const i32* __restrict__ positions,
                                     const W* __restrict__ table, const i32* __restrict__ order,
                                     const T* __restrict__ position_table, f32* __restrict__ x, int d, int first,
                                     int rows) {
    const int row = input_ids[blockIdx.x] - first;
    if (row < 0 || row >= rows) return;
    const T* position = position_table + i64(positions[blockIdx.x]) * d;
    f32* out = x + i64(blockIdx.x) * d;
    packed_row(table, order, rows, row, d, [&](int i, float number) { out[i] = number + to_float(position[i]); });
}
