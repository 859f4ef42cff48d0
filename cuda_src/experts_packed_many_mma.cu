// expert_linear_packed_many_mma    y[pair, m] = act(x[pair / s] w[expert]^T + b[expert]), as expert_linear
//                                  (experts.cu), of a packed weight (formats.cuh) for many pairs, on tensor cores: x,
//                                  b, y in 16 bits (sm_80 and later), x on 16-byte boundaries; codes of up to 8 bits; k
//                                  is a multiple of 8; where two rows of w make a column of y, m is a multiple of 16
//
// The codes become numbers in the registers of the products, once for all pairs of a tile (experts_packed_many.cuh): no
// weight in 16 bits is written or read. A block has a tile of up to ROWS pairs of one expert by 128 rows of its
// weights: all columns of y of a tile of pairs are next to each other in the grid, and so are the tiles of an expert,
// so that rows of x and codes are still in L2 when they are read again. How many tiles there are is read on the device;
// the grid has room for the most that there can be, n*s / ROWS + min(E, n*s), and blocks beyond the last tile end at
// once.
//
// Four warps, each with 32 rows of w and all pairs, so that what is read of x in shared memory serves two tiles of w.
//
// Scales and offsets are folded into the numbers, which are rounded to T once, as a weight is that a program keeps in
// 16 bits; scales of whole rows come in at the end, in f32. Sums go along k in steps of 16, whatever ROWS is: a row of
// y does not depend on the other pairs, bit for bit.
//
// Launch: cuplama/ops/experts_packed.py. Op: cuplama/ops/experts.py. Test: tests/ops/test_experts_packed_many.py.
// Benchmark: python -m benchmarks.packed_experts. Tried: nothing else yet; no GPU has run it.
#include "experts_packed_many.cuh"

constexpr int WARPS = 4;

// total += the products of a step. codes: of the warp's first tile; x: of the stage; count: of pairs.
template <typename S>
__device__ __forceinline__ void multiply_step(float (&total)[S::TILES * S::ROWS / 2], const typename S::W* codes,
                                              int half, const typename S::T* x, const Lane<STEP>& across, int count) {
    typedef typename S::T T;
    u32 a[S::TILES][4][4];
#pragma unroll
    for (int i = 0; i < S::TILES; i++) make_chunks(codes[i], ordered_half(codes[i], half), half, a[i], T());
#pragma unroll
    for (int c = 0; c < 4; c++)
#pragma unroll
        for (int j = 0; j < S::ROWS / 16; j++) {
            if (j * 16 >= count) break;
            u32 both[4];
            ldmatrix_x4(both, x + across.at(16 * j, c));
            const u32 left[2] = {both[0], both[1]}, right[2] = {both[2], both[3]};
#pragma unroll
            for (int i = 0; i < S::TILES; i++) {
                float (*d)[4] = reinterpret_cast<float (*)[4]>(total + (i * (S::ROWS / 8) + 2 * j) * 4);
                multiply(d[0], a[i][c], left, T());
                multiply(d[1], a[i][c], right, T());
            }
        }
}

template <typename T, typename W, int ACT, int ROWS, int DEPTH>
__global__ void __launch_bounds__(WARPS* WARP, 2)
    expert_linear_packed_many_mma(const T* x, const W* __restrict__ w, const i32* pairs, const i32* offsets,
                                  const T* __restrict__ b, T* y, int s, int E, int m, int k, f32 alpha, f32 limit) {
    typedef Tiling<T, W, ACT, ROWS, WARPS, DEPTH, DEPTH - 1> S;
    DYNAMIC_SHARED(unsigned char, memory);
    __shared__ i32 before[MAX_EXPERTS + 1], own[ROWS];
    launch_dependents();
    pdl_wait();
    Share share;
    if (!find_share<S>(share, PairTiles<ROWS>(offsets, before, E), pairs, own, m)) return;
    const Product<S> product(x, w, b, y, s, E, m, k, alpha, limit, memory);
    Operands<S, ROWS> operands(product, share);
    operands.begin();
    const Lane<STEP> across = lane_across<STEP>();
    float total[S::TILES * ROWS / 2] = {};
    int stage = 0, slot = 0;
#pragma unroll 1
    for (int left = product.steps; left > 0; left -= 2) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            if (half == left) break;
            cp_async_wait<S::AHEAD - 1>();
            __syncthreads();  // this stage is there, and nobody reads the one before
            operands.fetch_rows();
            if (half == 0 && left < product.steps) operands.fetch_codes();  // where the block before was
            cp_async_commit();
            multiply_step<S>(total, product.codes + slot * BAND + threadIdx.x / WARP * S::TILES, half,
                             product.rows + stage * S::STAGE, across, share.tile.count);
            stage = stage + 1 == S::DEPTH ? 0 : stage + 1;
        }
        slot = slot + 1 == S::BLOCKS ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    put_sums<S, ROWS>(total, product, share);
}
