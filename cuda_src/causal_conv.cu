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
// Tried: nothing else yet. Not timed alone.
#include "activation.cuh"
#include "attention.cuh"
#include "ptx.cuh"

constexpr int RUN = 8;  // tokens of a tile

// A tile of one sequence. x, y: from the sequence's first new token on; kept: its state; old: whether it holds
// something; any: whether the sequence has tokens at all.
template <typename T>
struct Run {
    const T *x, *w, *bias;
    T *kept, *y;
    int first, tokens, d, m;  // first: of the tile; tokens: of the sequence
    bool old, any;

    // An input at W columns, of a token that the sequence may have from before, or not have.
    template <int W>
    __device__ __forceinline__ Pack<T, W> input(int position, int taps, int at) const {
        if (position >= 0 && position < tokens) return load<W>(x + i64(position) * m + at);
        if (position < 0 && old) return load<W>(kept + (position + taps - 1) * i64(d) + at);
        return {};
    }
};

// W columns of a tile. wait: pdl_wait, which the kernel itself calls so that it is known to be early.
template <int W, int K, typename T, typename Wait>
__device__ __forceinline__ void convolve(const Run<T>& run, int at, Wait wait) {
    Pack<T, W> weights[K], shift = {}, rows[RUN + K - 1];  // weights: as they lie, K of a column together
#pragma unroll
    for (int k = 0; k < K; k++) weights[k] = load<W>(run.w + i64(at) * K + W * k);
    if (run.bias != nullptr) shift = load<W>(run.bias + at);
    wait();
#pragma unroll
    for (int j = 0; j < RUN + K - 1; j++) rows[j] = run.template input<W>(run.first + j - (K - 1), K, at);
#pragma unroll
    for (int j = 0; j < RUN; j++) {
        if (run.first + j >= run.tokens) break;
        Pack<T, W> out;
#pragma unroll
        for (int i = 0; i < W; i++) {
            float sum = to_float(shift.v[i]);
#pragma unroll
            for (int k = 0; k < K; k++)
                sum += to_float(weights[(i * K + k) / W].v[(i * K + k) % W]) * to_float(rows[j + k].v[i]);
            out.v[i] = from_float<T>(run.any ? silu_of<T>(sum) : 0.f);
        }
        store<W>(run.y + i64(run.first + j) * run.d + at, out);
    }
    if (run.first > 0 || !run.any) return;
    Pack<T, W> last[K - 1];
#pragma unroll
    for (int k = 0; k < K - 1; k++) last[k] = run.template input<W>(run.tokens - (K - 1) + k, K, at);
#pragma unroll
    for (int k = 0; k < K - 1; k++) store<W>(run.kept + k * i64(run.d) + at, last[k]);
}

template <typename T, int K>
__global__ void __launch_bounds__(128)
    causal_conv(const T* x, const T* __restrict__ w, const T* __restrict__ bias, T* conv, const i32* cu_seqlens,
                const i32* seq_lens, const i32* state_slots, T* y, int b, int d, int m) {
    static_assert(K >= 2 && K - 1 <= RUN, "a tile holds what its sequence keeps");
    launch_dependents();
    const int at = (blockIdx.y * blockDim.x + threadIdx.x) * 8;
    const Tile tile(cu_seqlens, b, 1, RUN, blockIdx.x);
    if (at >= d || tile.first >= tile.end) return;
    const int length = seq_lens[tile.sequence];
    T* kept = conv + i64(state_slots[tile.sequence]) * (K - 1) * d;
    const Run<T> run{
        x + i64(tile.start) * m, w,          bias, kept, y + i64(tile.start) * d, tile.first, tile.end, d, m,
        length > tile.end,       length > 0,
    };
    const auto wait = [] { pdl_wait(); };
    if (d % 8 == 0 && m % 8 == 0 && aligned(x, w, bias, conv, y)) return convolve<8, K>(run, at, wait);
    for (int i = at; i < min(at + 8, d); i++) convolve<1, K>(run, i, wait);
}
