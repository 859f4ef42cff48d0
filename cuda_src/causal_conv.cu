// causal_conv  y[t,c] = silu(bias[c] + sum over k < K of w[c,k] x[t-K+1+k,c])    c < d; silu(a) = a / (1 + exp(-a))
//              conv[state_slots[i]] = the last K-1 inputs of sequence i, oldest first
//
//   x            [n, m] T     the first d of m columns
//   w, bias      [d, K], [d] T; bias may be null
//   conv         [Z, K-1, d] T    before a sequence's new tokens; zeros instead where seq_lens[i] is their number
//   cu_seqlens, seq_lens, state_slots    [b+1], [b], [b] i32
//   y            [n, d] T; zeros of a sequence whose seq_lens is 0, which has no state either
//
// Mapping: grid (tiles, parts of the columns). A thread has 8 columns of a tile, which is RUN tokens of one sequence,
// and reads their inputs at once. RUN >= K - 1, so the first tile of a sequence alone reads its state, and so it may
// write the new one, which comes from x and, of short sequences, from the old one.
//
// It starts early (programmatic dependent launch) and reads weights, lengths and slots before it waits.
//
// Op and reference: cuplama/ops/causal_conv.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet; no GPU has run it.
#include "activation.cuh"
#include "attention.cuh"
#include "ptx.cuh"

constexpr int RUN = 8;  // tokens of a tile

template <typename T, int K>
__global__ void __launch_bounds__(128)
    causal_conv(const T* x, const T* __restrict__ w, const T* __restrict__ bias, T* conv, const i32* cu_seqlens,
                const i32* seq_lens, const i32* state_slots, T* y, int b, int d, int m) {
    static_assert(K >= 2 && K - 1 <= RUN, "a tile holds what its sequence keeps");
    launch_dependents();
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    const Tile tile(cu_seqlens, b, 1, RUN, blockIdx.x);
    if (at >= d || tile.first >= tile.end) return;
    const bool vectorized = d % 8 == 0 && m % 8 == 0 && aligned(x, w, bias, conv, y);
    const int length = seq_lens[tile.sequence];
    const bool old = length > tile.end, any = length > 0;
    T* kept = conv + i64(state_slots[tile.sequence]) * (K - 1) * d;
    x += i64(tile.start) * m;
    y += i64(tile.start) * d;
    Pack<T, 8> weights[K], shift = {}, rows[RUN + K - 1] = {};  // weights: as they lie, K of a column together
#pragma unroll
    for (int k = 0; k < K; k++) weights[k] = load_row<8>(w, i64(at) * K + 8 * k, i64(d) * K, vectorized);
    if (bias != nullptr) shift = load_row<8>(bias, at, d, vectorized);
    pdl_wait();
#pragma unroll
    for (int j = 0; j < RUN + K - 1; j++) {
        const int position = tile.first + j - (K - 1);  // among the new tokens
        if (position >= 0 && position < tile.end) rows[j] = load_row<8>(x + i64(position) * m, at, d, vectorized);
        if (position < 0 && old) rows[j] = load_row<8>(kept + (position + K - 1) * i64(d), at, d, vectorized);
    }
#pragma unroll
    for (int j = 0; j < RUN; j++) {
        if (tile.first + j >= tile.end) break;
        Pack<T, 8> out;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float sum = to_float(shift.v[i]);
#pragma unroll
            for (int k = 0; k < K; k++)
                sum += to_float(weights[(i * K + k) / 8].v[(i * K + k) % 8]) * to_float(rows[j + k].v[i]);
            out.v[i] = from_float<T>(any ? silu_of<T>(sum) : 0.f);
        }
        store_row<8>(y + i64(tile.first + j) * d, at, d, vectorized, out);
    }
    if (tile.first > 0 || !any) return;
    Pack<T, 8> last[K - 1] = {};
#pragma unroll
    for (int k = 0; k < K - 1; k++) {
        const int position = tile.end - (K - 1) + k;
        if (position >= 0) last[k] = load_row<8>(x + i64(position) * m, at, d, vectorized);
        if (position < 0 && old) last[k] = load_row<8>(kept + (position + K - 1) * i64(d), at, d, vectorized);
    }
#pragma unroll
    for (int k = 0; k < K - 1; k++) store_row<8>(kept + k * i64(d), at, d, vectorized, last[k]);
}
