// quantise_rows    codes[n,k] = e4m3(x / s)   x_scale[n] = s       s = max over a row of |x| / 448
// quantise_groups  codes[n,k] = e4m3(x / s)   x_scale[K,n] = s     s = max over 128 columns of a row, K = ceil(k / 128)
//                  x: T   codes: 8-bit floats, four in a word   x_scale: f32
//
// What a product of 8-bit floats needs of its activations: codes that use the whole range of e4m3, whose largest number
// is 448, and what they are to be multiplied by. x is read once. k is a multiple of 16, as cuBLAS demands.
//
// Mapping: a thread takes vectors of 8 columns. quantise_rows gives a row to a block, which holds it in registers;
// quantise_groups 128 columns to half a warp, and neighbours are of neighbouring rows, whose scales lie side by side.
//
// Launched by cuplama/backends/cuda/planning.py. Reference: cuplama/quant/activations.py.
// Test: tests/backends/cuda/test_activations_fp8.py. Benchmark: python -m benchmarks.fp8_products.
// Tried: nothing else yet.
#include "common.cuh"
#include "ptx.cuh"

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

template <typename T, int CHUNKS>
__global__ void __launch_bounds__(1024)
    quantise_rows(const T* __restrict__ x, u32* __restrict__ codes, f32* __restrict__ x_scale, int k) {
    x += i64(blockIdx.x) * k;
    codes += i64(blockIdx.x) * (k / 4);
    Pack<T, 8> v[CHUNKS];
    float largest = 0.f;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        v[c] = load_row<8>(x, (c * blockDim.x + threadIdx.x) * 8, k, true);
        largest = fmaxf(largest, largest_of(v[c]));
    }
    const float scale = scale_of(block_max(largest)), inverse = 1.f / scale;
    if (threadIdx.x == 0) x_scale[blockIdx.x] = scale;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int at = (c * blockDim.x + threadIdx.x) * 2;
        store_row<2>(codes, at, k / 4, true, codes_of(v[c], inverse));
    }
}

template <typename T>
__global__ void __launch_bounds__(256)
    quantise_groups(const T* __restrict__ x, u32* __restrict__ codes, f32* __restrict__ x_scale, int n, int k) {
    const i64 index = (i64(blockIdx.x) * blockDim.x + threadIdx.x) / 16;  // of the group: group * n + row
    const int row = index % n, group = index / n, at = group * 128 + threadIdx.x % 16 * 8;
    const bool inside = at < k;
    Pack<T, 8> v{};
    if (inside) v = load<8>(x + i64(row) * k + at);
    float largest = largest_of(v);
#pragma unroll
    for (int lanes = 8; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, lanes));
    const float scale = scale_of(largest), inverse = 1.f / scale;
    if (!inside) return;
    if (threadIdx.x % 16 == 0) x_scale[index] = scale;
    store<2>(codes + (i64(row) * k + at) / 4, codes_of(v, inverse));
}
