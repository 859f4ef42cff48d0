// gated_delta  A state S [K, V] of each sequence and value head, and for each new token, with q and k of its key head,
//
//     S = exp(g) S + k (beta (v - exp(g) k^T S))        y = q^T S / sqrt(K)
//
// where q and k have been divided by sqrt(|q|^2 + 1e-6) and sqrt(|k|^2 + 1e-6), beta = 1 / (1 + exp(-b)), and
// g = -exp(A_log) log(1 + exp(a + dt_bias)).
//
//   x            [n, 2*G*K + H*V] T    queries and keys of G key heads, values of H value heads; value heads of one key
//                                      head are neighbours
//   ba           [n, m] T    b of all heads, then a, in the columns from start on
//   A_log, dt_bias    [H] f32
//   state        [Z, H, K, V] f32    of sequence i at state_slots[i]; zeros instead where seq_lens[i] is the number of
//                                    its new tokens
//   cu_seqlens, seq_lens, state_slots    [b+1], [b], [b] i32
//   y            [n, H*V] T; zeros of a sequence whose seq_lens is 0, which has no state either
//   all arrays lie on 16-byte boundaries; K and V are multiples of 8
//
// One token after the other: for decode steps, for f32, and for what gated_delta_chunks.cu does not take.
//
// Mapping: grid (parts of the columns, H, b), 4 columns and K / GROUPS rows of the state to a thread, in registers. A
// warp has all rows of its columns, so that it needs no other, and one sequence makes many warps: 384 of 48 heads of
// 128 by 128. Of a token it adds up q^T S, k^T S, |q|^2, |k|^2 and q^T k at once; as q^T (exp(g) S + k delta) =
// exp(g) q^T S + (q^T k) delta, the new state need not be read for y.
//
// It starts early (programmatic dependent launch) and reads lengths, slots and the state before it waits: they come
// from earlier steps. A step must therefore begin with a kernel that is launched in the ordinary way (embedding is),
// and nothing in it but this kernel may write the state or, before its end, those lengths and slots.
//
// Op and reference: cuplama/ops/gated_delta.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. Not timed alone.
#include "gated_delta.cuh"

// That a multiprocessor has at least: as many as registers allow without spills, for more of the state to be on its
// way at once.
template <typename T>
constexpr int BLOCKS = sizeof(T) == 2 ? 3 : 2;

// What a lane reads of a token: its rows of q and k, its columns of v, and what the gates are made of.
template <typename T, int R>
struct Token {
    static constexpr int W = R % 8 == 0 ? 8 : 1;  // elements of an access
    Pack<T, W> q[R / W], k[R / W];
    Pack<T, 4> v;
    T b, a;

    // x: the row; v: from the lane's column on.
    __device__ __forceinline__ void fetch(const T* queries, const T* keys, const T* values, const T* ba, int H,
                                          bool there) {
#pragma unroll
        for (int i = 0; i < R / W; i++) {
            q[i] = load<W>(queries + i * W);
            k[i] = load<W>(keys + i * W);
        }
        v = there ? load<4>(values) : Pack<T, 4>{};
        b = ba[0];
        a = ba[H];
    }

    __device__ __forceinline__ float query(int i) const { return to_float(q[i / W].v[i % W]); }
    __device__ __forceinline__ float key(int i) const { return to_float(k[i / W].v[i % W]); }
};

// One token: updates the lane's part of the state and gives its columns of y.
template <int K, int GROUPS, typename T, int R>
__device__ __forceinline__ Pack<T, 4> step(Pack<f32, 4> (&state)[R], const Token<T, R>& token, const Head& head) {
    float sums[11] = {};  // k^T S, q^T S, |k|^2, |q|^2, q^T k
#pragma unroll
    for (int i = 0; i < R; i++) {
        const float q = token.query(i), k = token.key(i);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            sums[j] += k * state[i].v[j];
            sums[4 + j] += q * state[i].v[j];
        }
        sums[8] += k * k;
        sums[9] += q * q;
        sums[10] += q * k;
    }
#pragma unroll
    for (int lanes = WARP / GROUPS; lanes < WARP; lanes *= 2) {
#pragma unroll
        for (int j = 0; j < 11; j++) sums[j] += __shfl_xor_sync(ALL_LANES, sums[j], lanes);
    }
    const float decay = expf(head.log_decay(to_float(token.a))), beta = sigmoid(to_float(token.b));
    const float unit_k = unit(sums[8]), unit_q = unit(sums[9]) * (1.f / sqrtf(float(K)));
    Pack<T, 4> y;
    float delta[4];
#pragma unroll
    for (int j = 0; j < 4; j++) {
        delta[j] = unit_k * beta * (to_float(token.v.v[j]) - decay * unit_k * sums[j]);
        y.v[j] = from_float<T>(unit_q * (decay * sums[4 + j] + sums[10] * delta[j]));
    }
#pragma unroll
    for (int i = 0; i < R; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) state[i].v[j] = decay * state[i].v[j] + token.key(i) * delta[j];
    }
    return y;
}

template <typename T, int K, int GROUPS>
__global__ void __launch_bounds__(128, BLOCKS<T>)
    gated_delta(const T* x, const T* ba, const f32* __restrict__ A_log, const f32* __restrict__ dt_bias, f32* state,
                const i32* cu_seqlens, const i32* seq_lens, const i32* state_slots, T* y, int G, int H, int V, int m,
                int start) {
    constexpr int R = K / GROUPS, LANES = WARP / GROUPS;
    static_assert(K % GROUPS == 0, "each group of lanes has as many rows");
    launch_dependents();
    const int lane = threadIdx.x % WARP, warp = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int column = (warp * LANES + lane % LANES) * 4, row = lane / LANES * R, head = blockIdx.y;
    const int first = cu_seqlens[blockIdx.z], end = cu_seqlens[blockIdx.z + 1], length = seq_lens[blockIdx.z];
    const bool there = column < V, mine = there && lane < LANES;  // mine: y is the lane's to write
    const int key_head = head / (H / G), width = 2 * G * K + H * V;
    const Head gates(A_log, dt_bias, head);
    if (first >= end) return;
    f32* kept = state + ((i64(state_slots[blockIdx.z]) * H + head) * K + row) * V + column;
    Pack<f32, 4> s[R] = {};
    if (there && length > end - first) {
#pragma unroll
        for (int i = 0; i < R; i++) s[i] = load<4>(kept + i64(i) * V);
    }
    pdl_wait();
    Token<T, R> token, next;
    const auto fetch = [&](int at) {
        const T* from = x + i64(at) * width;
        next.fetch(from + key_head * K + row, from + (G + key_head) * K + row, from + 2 * G * K + head * V + column,
                   ba + i64(at) * m + start + head, H, there);
    };
    fetch(first);
    for (int at = first; at < end; at++) {
        token = next;
        if (at + 1 < end) fetch(at + 1);
        Pack<T, 4> out = step<K, GROUPS>(s, token, gates);
#pragma unroll
        for (int j = 0; j < 4; j++) out.v[j] = length > 0 ? out.v[j] : from_float<T>(0.f);
        if (mine) store<4>(y + (i64(at) * H + head) * V + column, out);
    }
    if (!there || length == 0) return;
#pragma unroll
    for (int i = 0; i < R; i++) store<4>(kept + i64(i) * V, s[i]);
}
