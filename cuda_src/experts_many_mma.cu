// expert_linear_many_mma           y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear (experts.cu),
//                                  for many pairs, on tensor cores: x, w, b, y in 16 bits (sm_80 and later) on 16-byte
//                                  boundaries; k is a multiple of 8
// expert_linear_packed_many_mma    the same of a packed weight (formats.cuh) with codes of up to 8 bits; where two rows
//                                  of w make a column of y, m is a multiple of 16
//
// experts_many.cuh tells how blocks divide the work. Four warps; each has 32 of the block's 128 rows of w, in registers
// for all pairs of the tile, and takes products by mma.sync m16n8k16 with f32 sums. Rows of x that the tile does not
// have are left out, 16 at a time.
//
// Launch: cuplama/ops/experts_many.py. Op: cuplama/ops/experts.py. Test: tests/ops/test_experts_many.py. Benchmark:
// python -m benchmarks.packed_experts. Tried: nothing else yet; no GPU before Hopper has run it.
#include "experts_many_weights.cuh"

constexpr int WARPS = 4;

// total += the products of a step. x: of the stage; count: of pairs.
template <typename S, typename Numbers>
__device__ __forceinline__ void multiply_step(float (&total)[S::TILES * S::ROWS / 2], const Numbers& numbers,
                                              const typename S::T* x, const Lane<STEP>& across, int count) {
    typedef typename S::T T;
#pragma unroll
    for (int c = 0; c < 4; c++) {
        u32 a[S::TILES][4];
        numbers.read(c, a);
#pragma unroll
        for (int j = 0; j < S::ROWS / 16; j++) {
            if (j * 16 >= count) break;
            u32 both[4];
            ldmatrix_x4(both, x + across.at(16 * j, c));
            const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
            for (int i = 0; i < S::TILES; i++) {
                float (*d)[4] = reinterpret_cast<float (*)[4]>(total + (i * (S::ROWS / 8) + 2 * j) * 4);
                multiply(d[0], a[i], left, T());
                multiply(d[1], a[i], right, T());
            }
        }
    }
}

template <typename S, typename Weights>
__device__ __forceinline__ void multiply_pairs(const Product<typename S::T>& product, const Share& share,
                                               Weights weights) {
    typedef typename S::T T;
    PairRows<S, S::ROWS> rows(product, share);
    begin<S>(rows, weights);
    const Lane<STEP> across = lane_across<STEP>();
    float total[S::TILES * S::ROWS / 2] = {};
    int stage = 0;
#pragma unroll 1
    for (int left = product.steps(); left > 0; left -= 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == left) break;
            cp_async_wait<S::AHEAD - 1>();
            __syncthreads();  // this stage is there, and nobody reads the one before
            rows.fetch();
            weights.go_on(half, left == product.steps());
            cp_async_commit();
            multiply_step<S>(total, weights.take(half), reinterpret_cast<const T*>(product.memory) + stage * S::STAGE,
                             across, share.tile.count);
            stage = stage + 1 == S::DEPTH ? 0 : stage + 1;
        }
    }
    cp_async_wait<0>();
    put_sums<S, S::ROWS>(total, product, share, weights.scales(), weights.apart());
}

template <typename T, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 2)
    expert_linear_many_mma(const T* x, const T* __restrict__ w, const i32* pairs, const i32* offsets,
                           const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    typedef Tiling<T, ACT, ROWS, WARPS, DEPTH, false> S;
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    Share share;
    if (!find_share<S>(share, PairTiles<ROWS>(offsets, before, E), pairs, own, m)) return;
    const Product<T> product{x, b, y, s, m, k, alpha, limit, memory};
    multiply_pairs<S>(product, share, PlainTiles<S>(w, product, share));
}

template <typename T, typename W, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 2)
    expert_linear_packed_many_mma(const T* x, const W* __restrict__ w, const i32* pairs, const i32* offsets,
                                  const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    typedef Tiling<T, ACT, ROWS, WARPS, DEPTH, false> S;
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    Share share;
    if (!find_share<S>(share, PairTiles<ROWS>(offsets, before, E), pairs, own, m)) return;
    const Product<T> product{x, b, y, s, m, k, alpha, limit, memory};
    multiply_pairs<S>(product, share, PackedTiles<S, W>(w, product, share, E));
}
