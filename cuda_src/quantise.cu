// quantise_scales  scales = those of the groups of columns of a plain weight w [m,k], or of its rows (GROUP = 0)
// quantise_codes   blocks = the code of each number: that nearest to it over its scale
//
// A weight is quantised while it is loaded, straight into the blocks of 16 rows x 128 columns that products read
// (cuplama/quant/packed.py). cuplama/quant/grid.py says which scale a group gets, and both compute the same bits: every
// operation is rounded on its own, and sums are of halves, of their halves, and so on. The numbers of a Grid come from
// there. Codes are whole numbers, or 8-bit floats (FLOATS). Rows and columns beyond the matrix are zero bytes.
//
// Mapping: quantise_scales: a warp takes a row of a block, lane l its columns l, l + 32, l + 64 and l + 96; of whole
// rows (GROUP = 0) a warp walks along one. quantise_codes: a warp writes a block, lane by lane as a product reads it.
//
// Launched by cuplama/backends/cuda/rounding.py. Test: tests/backends/cuda/test_rounding.py.
// Tried: nothing else yet.
#include "common.cuh"
#include "e4m3.cuh"

// Codes stand for numbers from `least` to `most`; the largest number of a group becomes `far`, with its sign if
// `is_signed`, under the first of the scales that are tried: those of the shares that are not 0.
struct Grid {
    float least, most, far;
    bool is_signed;
    float shares[4];
};

__device__ __forceinline__ float clipped(float ratio, const Grid& grid) {
    return fminf(fmaxf(ratio, grid.least), grid.most);
}

// 1 / scale: ratios are products with it.
__device__ __forceinline__ float inverse(float scale) { return __fdiv_rn(1.f, scale); }

// A share of the scale of the whole range, as T stores it.
template <typename T>
__device__ __forceinline__ float rounded_scale(float whole, float share) {
    const float scale = to_float(from_float<T>(__fmul_rn(whole, share)));
    return scale == 0.f ? 1.f : scale;
}

// The largest number of a warp by its size, and of several the first: lanes bring theirs, with its column.
__device__ __forceinline__ float warp_largest(float value, int column) {
#pragma unroll
    for (int lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, value, lanes);
        const int place = __shfl_xor_sync(ALL_LANES, column, lanes);
        const float size = fabsf(value), other_size = fabsf(other);
        if (other_size > size || (other_size == size && place < column)) {
            value = other;
            column = place;
        }
    }
    return value;
}

// The scale of a group whose numbers are a warp's, N of each lane: columns 32 apart.
template <typename T, int N>
__device__ float group_scale(const float (&v)[N], const Grid& grid) {
    float value = v[0];
    int column = threadIdx.x % WARP;
#pragma unroll
    for (int i = 1; i < N; i++)
        if (fabsf(v[i]) > fabsf(value)) {
            value = v[i];
            column = threadIdx.x % WARP + i * WARP;
        }
    value = warp_largest(value, column);
    const float whole = __fdiv_rn(grid.is_signed ? value : fabsf(value), grid.far);
    float best = rounded_scale<T>(whole, grid.shares[0]), least = infinity();
    if (grid.shares[1] == 0.f) return best;
#pragma unroll
    for (int s = 0; s < 4; s++) {
        if (grid.shares[s] == 0.f) break;
        const float scale = rounded_scale<T>(whole, grid.shares[s]), over = inverse(scale);
        float squares[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float nearest = rintf(clipped(__fmul_rn(v[i], over), grid));
            const float error = __fsub_rn(__fmul_rn(nearest, scale), v[i]);
            squares[i] = __fmul_rn(error, error);
        }
#pragma unroll
        for (int count = N; count > 1; count /= 2)
#pragma unroll
            for (int i = 0; i < count / 2; i++) squares[i] = __fadd_rn(squares[i], squares[i + count / 2]);
        float sum = squares[0];
#pragma unroll
        for (int lanes = WARP / 2; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(ALL_LANES, sum, lanes));
        if (sum < least) {
            best = scale;
            least = sum;
        }
    }
    return best;
}

// scales: where those of the first block begin; stride: bytes from one block to the next.
template <typename T, int GROUP>
__global__ void __launch_bounds__(256)
    quantise_scales(u8* __restrict__ scales, const T* __restrict__ w, int m, int k, int stride, int wide, float least,
                    float most, float far, int is_signed, float share0, float share1, float share2, float share3) {
    const Grid grid{least, most, far, is_signed != 0, {share0, share1, share2, share3}};
    const int lane = threadIdx.x % WARP, row = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (row >= (m + 15) / 16 * 16) return;
    const T* from = w + i64(row) * k;
    if constexpr (GROUP == 0) {
        float value = 0.f;
        int column = lane;
        if (row < m)
            for (int j = lane; j < k; j += WARP) {
                const float x = to_float(from[j]);
                if (fabsf(x) > fabsf(value)) {
                    value = x;
                    column = j;
                }
            }
        value = warp_largest(value, column);
        const float whole = __fdiv_rn(grid.is_signed ? value : fabsf(value), grid.far);
        if (lane == 0) reinterpret_cast<float*>(scales)[row] = row < m ? rounded_scale<T>(whole, grid.shares[0]) : 0.f;
    } else {
        constexpr int GROUPS = 128 / GROUP, N = GROUP / WARP;
        const int begin = blockIdx.y * 128;
        T* to = reinterpret_cast<T*>(scales + (i64(row / 16) * wide + blockIdx.y) * stride);
#pragma unroll
        for (int g = 0; g < GROUPS; g++) {
            const int first = begin + g * GROUP;
            const bool there = row < m && first < k;  // a whole group: GROUP divides k
            float v[N];
#pragma unroll
            for (int i = 0; i < N; i++) v[i] = there ? to_float(from[first + i * WARP + lane]) : 0.f;
            const float scale = group_scale<T, N>(v, grid);
            if (lane == 0) to[g * 16 + row % 8 * 2 + row % 16 / 8] = from_float<T>(there ? scale : 0.f);
        }
    }
}

template <bool FLOATS>
__device__ __forceinline__ u32 code_of(float ratio, const Grid& grid) {
    const float in = clipped(ratio, grid);
    if constexpr (FLOATS) return e4m3_bits(in);
    return u32(int(rintf(in) - grid.least));
}

// scales: as above.
template <typename T, int BITS, int GROUP, bool FLOATS>
__global__ void __launch_bounds__(256)
    quantise_codes(u8* __restrict__ blocks, const u8* __restrict__ scales, const T* __restrict__ w, int m, int k,
                   int block_bytes, float least, float most) {
    constexpr int EACH = BITS / 4;  // words of a chunk of 16 columns, of which a lane has four in rows r and r + 8
    constexpr int STEP = 4 / EACH;  // chunks whose words are stored together
    const Grid grid{least, most};
    const int lane = threadIdx.x % WARP, row_block = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int r = lane / 4;
    if (row_block * 16 >= m) return;
    const i64 block = i64(row_block) * gridDim.y + blockIdx.y;
    const T* of_groups = reinterpret_cast<const T*>(scales + block * block_bytes);
    const float* of_rows = reinterpret_cast<const float*>(scales) + row_block * 16;
    for (int chunk = 0; chunk < 8; chunk += STEP) {
        Pack<u32, 4> words{};
#pragma unroll
        for (int step = 0; step < STEP; step++) {
            const int at = (chunk + step) * 16, column = blockIdx.y * 128 + at + lane % 4 * 4;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int row = row_block * 16 + r + 8 * half;
                if (row >= m || column >= k) continue;
                float scale;
                if constexpr (GROUP == 0)
                    scale = of_rows[r + 8 * half];
                else
                    scale = to_float(of_groups[at / GROUP * 16 + r * 2 + half]);
                const Pack<T, 4> x = load_row<4>(w + i64(row) * k, column, k, k % 4 == 0);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 code =
                        column + i < k ? code_of<FLOATS>(__fmul_rn(to_float(x.v[i]), inverse(scale)), grid) : 0;
                    if constexpr (BITS == 4)
                        words.v[step] |= code << (4 * (i / 2 * 2 + half) + i % 2 * 16);
                    else
                        words.v[step * 2 + half] |= code << (8 * (i / 2) + 16 * (i % 2));
                }
            }
        }
        u32* to = reinterpret_cast<u32*>(blocks + block * block_bytes);
        store<4>(to + (chunk * EACH / 4 * WARP + lane) * 4, words);
    }
}
