// quantise                x_codes[n,k] = e4m3(x / s)                 x[n,k]: T
// rms_norm_quantise       x_codes[n,k] = e4m3(rms_norm(x) / s)       x[n,k]: f32, g[k]: T; rounded to T first
// silu_mul_quantise       x_codes[n,k] = e4m3(silu_mul(x) / s)       x[n,2k]: T; rounded to T first
// gelu_tanh_mul_quantise  x_codes[n,k] = e4m3(gelu_tanh_mul(x) / s)  as silu_mul_quantise
//
//     x_codes: 8-bit floats, four in a word     x_scale = s = max |x| / 448: f32
//     GROUPS: max over 128 columns of a row, x_scale[ceil(k / 128), n]; else over the row, x_scale[n]
//
// What a product of 8-bit floats needs of its activations: codes that use the whole range of e4m3, whose largest number
// is 448, and what they are to be multiplied by. What comes before the product is computed here as well, where it can
// be: the activations then are never written in 16 bits and read again. k is a multiple of 16, as cuBLAS demands.
//
// Mapping: a row to a block, which holds it in registers; a thread takes CHUNKS vectors of 8 columns. 128 columns are
// half a warp's. At least two blocks fit in a multiprocessor, but for the longest rows: while one waits for its row's
// maximum, the other reads.
//
// Op and test: products over many rows (cuplama/backends/cuda/eight_bit.py), tests/backends/cuda/test_eight_bit.py.
// Benchmark: python -m benchmarks.fp8_products.
// Tried: groups of 128 columns dealt out so that neighbours are of neighbouring rows, whose scales lie side by side:
// as fast, and one kernel more.
#include "activation.cuh"
#include "common.cuh"
#include "e4m3.cuh"

constexpr int THREADS = 512;  // of a block at most; _MAX_THREADS in eight_bit.py

// The bound that gives a kernel its registers: of twice the 448 threads that four chunks of a row of 14,336 are, so
// that two blocks fit, or of one block. (A bound of one block and a minimum of two blocks means the same; with it there
// are spills.) MOST: chunks for which two blocks fit.
template <int CHUNKS, int MOST>
constexpr int bound = CHUNKS <= MOST ? 896 : THREADS;

// The scale of elements whose largest is so much. Zeros have one too, so that their product is zero and not NaN.
__device__ __forceinline__ float scale_of(float largest) { return fmaxf(largest, 1e-30f) / 448.f; }

template <typename T>
__device__ __forceinline__ float largest_of(const Pack<T, 8>& x) {
    float largest = 0.f;
#pragma unroll
    for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(to_float(x.v[j])));
    return largest;
}

template <typename T>
__device__ __forceinline__ Pack<u32, 2> codes_of(const Pack<T, 8>& x, float inverse) {
    Pack<u32, 2> codes;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) v[i] = to_float(x.v[4 * j + i]) * inverse;
        codes.v[j] = e4m3_pair(v[0], v[1]) | e4m3_pair(v[2], v[3]) << 16;
    }
    return codes;
}

// The first of the 8 columns that a thread has in a chunk.
__device__ __forceinline__ int column_of(int chunk) { return (chunk * blockDim.x + threadIdx.x) * 8; }

// Codes and scales of the block's row. Columns beyond k are zero.
template <bool GROUPS, typename T, int CHUNKS>
__device__ __forceinline__ void write_codes(const Pack<T, 8> (&x)[CHUNKS], u32* x_codes, f32* x_scale, int n, int k) {
    const int row = blockIdx.x;
    float largest[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) largest[c] = largest_of(x[c]);
    if (GROUPS) {
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
            for (int lanes = 8; lanes > 0; lanes /= 2)
                largest[c] = fmaxf(largest[c], __shfl_xor_sync(ALL_LANES, largest[c], lanes));
        }
    } else {
#pragma unroll
        for (int c = 1; c < CHUNKS; c++) largest[0] = fmaxf(largest[0], largest[c]);
        largest[0] = block_max(largest[0]);
    }
    x_codes += i64(row) * (k / 4);
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = column_of(c);
        if (at >= k) break;
        const float scale = scale_of(largest[GROUPS ? c : 0]);
        if (GROUPS ? at % 128 == 0 : at == 0) x_scale[GROUPS ? i64(at / 128) * n + row : row] = scale;
        store<2>(x_codes + at / 4, codes_of(x[c], 1.f / scale));
    }
}

template <typename T, int CHUNKS, bool GROUPS>
__global__ void __launch_bounds__(bound<CHUNKS, 4>, 1)
    quantise(const T* __restrict__ x, u32* __restrict__ x_codes, f32* __restrict__ x_scale, int n, int k) {
    Pack<T, 8> v[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) v[c] = load_row<8>(x + i64(blockIdx.x) * k, column_of(c), k, true);
    write_codes<GROUPS>(v, x_codes, x_scale, n, k);
}

// As in norm.cu.
template <typename T, int CHUNKS, bool GROUPS>
__global__ void __launch_bounds__(bound<CHUNKS, 2>, 1)
    rms_norm_quantise(const f32* __restrict__ x, const T* __restrict__ g, u32* __restrict__ x_codes,
                      f32* __restrict__ x_scale, int n, int k, f32 eps, f32 offset) {
    Pack<f32, 8> v[CHUNKS];
    Pack<T, 8> scale[CHUNKS];
    float squares = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x + i64(blockIdx.x) * k, column_of(c), k, true);
        scale[c] = load_row<8>(g, column_of(c), k, true);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += v[c].v[j] * v[c].v[j];
    }
    const float inverse = 1.f / sqrtf(block_sum(squares) / k + eps);
    Pack<T, 8> out[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
        for (int j = 0; j < 8; j++)
            out[c].v[j] = from_float<T>(v[c].v[j] * inverse * (offset + to_float(scale[c].v[j])));
    }
    write_codes<GROUPS>(out, x_codes, x_scale, n, k);
}

// As in activation.cu.
template <int ACT, bool GROUPS, int CHUNKS, typename T>
__device__ __forceinline__ void quantise_gated(const T* x, u32* x_codes, f32* x_scale, int n, int k) {
    const T* gate = x + i64(blockIdx.x) * 2 * k;
    Pack<T, 8> v[CHUNKS];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const Pack<T, 8> g = load_row<8>(gate, column_of(c), k, true), u = load_row<8>(gate + k, column_of(c), k, true);
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[c].v[j] = from_float<T>(activated<ACT, T, 2>({to_float(g.v[j]), to_float(u.v[j])}));
    }
    write_codes<GROUPS>(v, x_codes, x_scale, n, k);
}

template <typename T, int CHUNKS, bool GROUPS>
__global__ void __launch_bounds__(bound<CHUNKS, 4>, 1)
    silu_mul_quantise(const T* __restrict__ x, u32* __restrict__ x_codes, f32* __restrict__ x_scale, int n, int k) {
    quantise_gated<SILU_MUL, GROUPS, CHUNKS>(x, x_codes, x_scale, n, k);
}

template <typename T, int CHUNKS, bool GROUPS>
__global__ void __launch_bounds__(bound<CHUNKS, 4>, 1)
    gelu_tanh_mul_quantise(const T* __restrict__ x, u32* __restrict__ x_codes, f32* __restrict__ x_scale, int n,
                           int k) {
    quantise_gated<GELU_TANH_MUL, GROUPS, CHUNKS>(x, x_codes, x_scale, n, k);
}
