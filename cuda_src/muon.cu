// Muon (Keller Jordan et al., 2024): momentum whose matrices are made orthogonal. Arrays without a dtype are f32.
//
//   muon_momentum    m[n] = beta m + g;   g[n] = g + beta m (Nesterov). g is clipped before, as by adamw
//                    (optimizer.cu). Where norm_squared is not finite, m stays and g is 0.
//   muon_normalise   x:U = g[m,k] / (|g| + 1e-7), |g| the root of the sum of all squares; x is [m,k], or the transpose
//                    [k,m]
//   muon_polynomial  y[m,m]:T = diagonal I + alpha a[m,m]:T + beta b[m,m]:T
//   muon_update      master[m,k] -= lr weight_decay master + lr scale x;   p[m,k]:T = master;   g[m,k] = 0. x:T lies as
//                    muon_normalise writes it. Nothing but g changes where norm_squared is not finite.
//
// The products between muon_normalise and muon_update are those of `linear` and `linear_backward_x`.
//
// |g|: optimizer.cu's square_sum leaves at most 256 sums of parts, which every block of muon_normalise adds up, in a
// fixed order.
//
// Mapping: muon_momentum: 4 elements per thread and iteration. muon_polynomial: blockIdx.x is the row; 8 elements per
// thread. muon_normalise, muon_update: 32 x 32 elements per block of 256 threads, a row per warp and iteration, an
// element per lane. A transposed x goes through shared memory, so that its rows are also accessed along their length.
//
// Ops and references: cuplama/ops/muon.py. Tests: tests/ops/, tests/train/test_muon.py. Benchmark: `cuplama kernels
// bench`.
// Tried: nothing else yet. The accesses of tiles have 4 bytes and less: the products take most of the time.
#include "common.cuh"

constexpr int SIDE = 32, THREADS = 256, WARPS = THREADS / WARP;

__global__ void __launch_bounds__(THREADS)
    muon_momentum(f32* __restrict__ g, f32* __restrict__ m, const f32* __restrict__ norm_squared, i64 n, f32 beta,
                  f32 clip) {
    const float norm = sqrtf(norm_squared[0]);
    const bool usable = norm < infinity();  // not NaN either
    const float scale = clip > 0.f ? fminf(1.f, clip / (norm + 1e-6f)) : 1.f;
    const bool vectorized = aligned(g, m);
    const i64 stride = i64(gridDim.x) * blockDim.x * 4;
    for (i64 at = (i64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; at < n; at += stride) {
        Pack<f32, 4> update = {};
        if (usable) {
            update = load_row<4>(static_cast<const f32*>(g), at, n, vectorized);
            Pack<f32, 4> mean = load_row<4>(static_cast<const f32*>(m), at, n, vectorized);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float gradient = scale * update.v[i];
                mean.v[i] = beta * mean.v[i] + gradient;
                update.v[i] = gradient + beta * mean.v[i];
            }
            store_row<4>(m, at, n, vectorized, mean);
        }
        store_row<4>(g, at, n, vectorized, update);
    }
}

// Where a block's tile begins in a matrix [m,k].
struct Place {
    int top, left;

    __device__ __forceinline__ Place() : top(blockIdx.x * SIDE), left(blockIdx.y * SIDE) {}
    __device__ __forceinline__ static int lane() { return threadIdx.x % WARP; }
    __device__ __forceinline__ static int warp() { return threadIdx.x / WARP; }
};

using Tile = f32[SIDE][SIDE + 1];  // a column's elements lie in different banks

template <typename U, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS) muon_normalise(const f32* __restrict__ g, const f32* __restrict__ partial,
                                                          U* __restrict__ x, int m, int k, int blocks) {
    __shared__ Tile tile;
    const Place place;
    const int lane = place.lane();
    const float total = block_sum(int(threadIdx.x) < blocks ? partial[threadIdx.x] : 0.f);
    const float scale = 1.f / (sqrtf(total) + 1e-7f);
#pragma unroll
    for (int i = place.warp(); i < SIDE; i += WARPS) {
        const int row = place.top + i, column = place.left + lane;
        if (row >= m || column >= k) continue;
        const i64 at = i64(row) * k + column;
        const float value = scale * g[at];
        if (TRANSPOSED)
            tile[i][lane] = value;
        else
            x[at] = from_float<U>(value);
    }
    if (!TRANSPOSED) return;
    __syncthreads();
#pragma unroll
    for (int i = place.warp(); i < SIDE; i += WARPS) {
        const int row = place.left + i, column = place.top + lane;
        if (row < k && column < m) x[i64(row) * m + column] = from_float<U>(tile[lane][i]);
    }
}

template <typename T>
__global__ void __launch_bounds__(128) muon_polynomial(const T* __restrict__ a, const T* __restrict__ b,
                                                       T* __restrict__ y, int m, f32 diagonal, f32 alpha, f32 beta) {
    const i64 row = i64(blockIdx.x) * m;
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    if (at >= m) return;
    const bool vectorized = m % 8 == 0 && aligned(a, b, y);
    Pack<T, 8> sum = load_row<8>(a + row, at, m, vectorized);
    const Pack<T, 8> other = load_row<8>(b + row, at, m, vectorized);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float on_it = at + i == int(blockIdx.x) ? diagonal : 0.f;
        sum.v[i] = from_float<T>(on_it + (alpha * to_float(sum.v[i]) + beta * to_float(other.v[i])));
    }
    store_row<8>(y + row, at, m, vectorized, sum);
}

// p may be the same array as master (that of an f32 model is), so neither is __restrict__.
template <typename T, bool TRANSPOSED>
__global__ void __launch_bounds__(THREADS)
    muon_update(T* p, f32* __restrict__ g, f32* master, const T* __restrict__ x, const f32* __restrict__ norm_squared,
                const f32* __restrict__ schedule, int m, int k, f32 weight_decay, f32 scale) {
    __shared__ Tile tile;
    const Place place;
    const int lane = place.lane();
    const bool usable = norm_squared[0] < infinity(), own = static_cast<void*>(p) == static_cast<void*>(master);
    const float decay = schedule[0] * weight_decay, step = schedule[0] * scale;
    if (TRANSPOSED) {
#pragma unroll
        for (int i = place.warp(); i < SIDE; i += WARPS) {
            const int row = place.left + i, column = place.top + lane;
            if (row < k && column < m) tile[lane][i] = to_float(x[i64(row) * m + column]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = place.warp(); i < SIDE; i += WARPS) {
        const int row = place.top + i, column = place.left + lane;
        if (row >= m || column >= k) continue;
        const i64 at = i64(row) * k + column;
        if (usable) {
            const float direction = TRANSPOSED ? tile[i][lane] : to_float(x[at]), before = master[at];
            const float after = before - (decay * before + step * direction);
            master[at] = after;
            if (!own) p[at] = from_float<T>(after);
        }
        g[at] = 0.f;
    }
}
