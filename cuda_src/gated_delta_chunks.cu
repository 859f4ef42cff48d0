// gated_delta_chunks  The same as gated_delta.cu, 32 tokens at a time, on tensor cores (sm_80 and later): for prompts.
//
// Yang, Kautz & Hatamizadeh, arXiv:2412.06464. Of the tokens of a chunk let c_i be the sum of g up to token i. Then,
// with the state S from before the chunk, and q (divided by sqrt(K)) and k as unit vectors,
//
//     A_ij = beta_i (k_i k_j) exp(c_i - c_j)  for j < i       u = (1 + A)^-1 beta (v - exp(c) k S)
//     P_ij = (q_i k_j) exp(c_i - c_j)         for j <= i      y = exp(c) q S + P u
//                                                             S = exp(c_last) S + sum of exp(c_last - c_j) k_j u_j
//
// Parameters as in gated_delta.cu. T is f16 or bf16; K is a multiple of 16 up to 128, V one of COLUMNS.
//
// Mapping: grid (V / COLUMNS, H, b). A block walks over the chunks of a sequence with COLUMNS columns of a head's
// state.
//   Warps 0 to 3 have 16 columns each and need no other. All is transposed (columns of V by tokens, columns of V by K),
//     so that sums of one product are, as they lie in registers, an operand of the next: the state stays there over
//     all chunks, S^T as 16 x K sums, and so do k S, u and y.
//   Warps 4 and 5 prepare the next chunk meanwhile: (1 + A)^-1 beta, P, and the factors of tokens. They also ask for
//     the rows of the one after it. Of the inverse, which is triangular, each solves for a quarter on the diagonal;
//     from those and A follows the third one.
// One barrier a chunk, at which the two groups exchange buffers.
//
// Numbers: k and q go into products as they are in x, and the factors that make them unit vectors, and all others, go
// to f32 sums. What is f32 and goes into a product (the state, the inverse, P, u) does so as two numbers of T, itself
// and what rounding it took away. So nothing is lost that shows beside rounding y.
//
// It starts early, and reads the state before it waits, as gated_delta does.
//
// Op and reference: cuplama/ops/gated_delta.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. Not timed alone. Chunks of 64 would need more registers than there are, and more shared
// memory than a block of sm_89 has.
#include "gated_delta.cuh"
#include "mma_tiles.cuh"

constexpr int TOKENS = 32, COLUMNS = 64;  // of a chunk; of a block
constexpr int WORKERS = COLUMNS / 16;     // warps with columns
constexpr int HELPERS = 2 * WARP;         // threads that prepare
constexpr int PITCH = TOKENS + 4;         // floats from one row of A to the next

// Matrices of tokens by tokens, two numbers of T for each element; Layout<TOKENS>.
template <typename T>
struct Doubled {
    T *high, *low;

    // x, y: the elements of a row from an even column on.
    __device__ __forceinline__ void put(int row, int column, float x, float y) const;
    __device__ __forceinline__ void put(int row, int column, float x) const {
        const int at = Layout<TOKENS>::at(row, column / 8) + column % 8;
        high[at] = from_float<T>(x);
        low[at] = from_float<T>(x - to_float(high[at]));
    }
};

// Two floats as two numbers of T each: rounded, and what that took away.
template <typename T>
struct Halves {
    u32 high, low;

    __device__ __forceinline__ Halves(float x, float y) : high(pack<T>(x, y)) {
        const Pack<T, 2> rounded = *reinterpret_cast<const Pack<T, 2>*>(&high);
        low = pack<T>(x - to_float(rounded.v[0]), y - to_float(rounded.v[1]));
    }
};

template <typename T>
__device__ __forceinline__ void Doubled<T>::put(int row, int column, float x, float y) const {
    const int at = Layout<TOKENS>::at(row, column / 8) + column % 8;
    const Halves<T> both(x, y);
    *reinterpret_cast<u32*>(high + at) = both.high;
    *reinterpret_cast<u32*>(low + at) = both.low;
}

// The left operand of a product, 16x16, in two numbers for each element.
template <typename T>
struct Operand {
    u32 high[4], low[4];

    __device__ __forceinline__ Operand() {}
    // Of sums as they lie: a lane has rows lane/4 and lane/4 + 8, and of every 8 columns 2*(lane%4) and the next.
    __device__ __forceinline__ Operand(const float (&left)[4], const float (&right)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Halves<T> both(i < 2 ? left[2 * i] : right[2 * i - 4], i < 2 ? left[2 * i + 1] : right[2 * i - 3]);
            high[i] = both.high, low[i] = both.low;
        }
    }

    // left, right: 8 columns of sums each; both: of the other operand, as an ldmatrix gives them.
    __device__ __forceinline__ void times(float (&left)[4], float (&right)[4], const u32 (&both)[4]) const {
        const u32 first[2] = {both[0], both[1]}, second[2] = {both[2], both[3]};
        multiply(left, high, first, T());
        multiply(right, high, second, T());
        multiply(left, low, first, T());
        multiply(right, low, second, T());
    }

    // The same where the other operand is doubled, too.
    __device__ __forceinline__ void times(float (&left)[4], float (&right)[4], const u32 (&both)[4],
                                          const u32 (&lost)[4]) const {
        const u32 first[2] = {lost[0], lost[1]}, second[2] = {lost[2], lost[3]};
        times(left, right, both);
        multiply(left, high, first, T());
        multiply(right, high, second, T());
    }
};

// The buffers in shared memory: rows of x of three chunks, and what is prepared of two.
template <typename T, int K>
struct Buffers {
    static constexpr int ROWS = TOKENS * (2 * K + COLUMNS), SQUARE = TOKENS * TOKENS;
    T* memory;

    __device__ __forceinline__ T* keys(int chunk) const { return memory + chunk % 3 * ROWS; }
    __device__ __forceinline__ T* queries(int chunk) const { return keys(chunk) + TOKENS * K; }
    __device__ __forceinline__ T* values(int chunk) const { return keys(chunk) + 2 * TOKENS * K; }
    __device__ __forceinline__ Doubled<T> inverse(int chunk) const {
        T* at = memory + 3 * ROWS + chunk % 2 * 4 * SQUARE;
        return {at, at + SQUARE};
    }
    __device__ __forceinline__ Doubled<T> scores(int chunk) const {
        const Doubled<T> before = inverse(chunk);
        return {before.high + 2 * SQUARE, before.low + 2 * SQUARE};
    }
};

// Of the tokens of a chunk, what products are multiplied with.
struct alignas(16) Factors {
    float recalled[TOKENS], answered[TOKENS], written[TOKENS];  // of k S, q S, k u
    float decay;                                                // of the state
};

// ---- warps with columns ---------------------------------------------------------------------------------------------

// The warp's 16 columns of the state, transposed: sums[i] has rows 8i .. 8i + 7 of it.
template <typename T, int K>
struct Columns {
    typedef float Sums[K / 8][4], OfTokens[TOKENS / 8][4];

    // Between the sums and the state [K][V], from the warp's first column on.
    template <typename Move>
    static __device__ __forceinline__ void each(Sums& sums, Move move) {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < K / 8; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) move(sums[i][e], i * 8 + lane % 4 * 2 + e % 2, lane / 4 + e / 2 * 8);
        }
    }

    // k S and q S.
    static __device__ __forceinline__ void recall(const Sums& sums, const T* keys, const T* queries,
                                                  const Lane<K>& across, OfTokens& recalled, OfTokens& answered) {
#pragma unroll
        for (int i = 0; i < K / 16; i++) {
            const Operand<T> state(sums[2 * i], sums[2 * i + 1]);
#pragma unroll
            for (int j = 0; j < TOKENS / 16; j++) {
                u32 k[4], q[4];
                ldmatrix_x4(k, keys + across.at(16 * j, i));
                ldmatrix_x4(q, queries + across.at(16 * j, i));
                state.times(recalled[2 * j], recalled[2 * j + 1], k);
                state.times(answered[2 * j], answered[2 * j + 1], q);
            }
        }
    }

    // to += matrix x, of a lower triangular matrix.
    static __device__ __forceinline__ void add_lower(OfTokens& to, const OfTokens& x, const Doubled<T>& matrix) {
        const Lane<TOKENS> across = lane_across<TOKENS>();
#pragma unroll
        for (int i = 0; i < TOKENS / 16; i++) {
            const Operand<T> left(x[2 * i], x[2 * i + 1]);
#pragma unroll
            for (int j = i; j < TOKENS / 16; j++) {
                u32 both[4], lost[4];
                ldmatrix_x4(both, matrix.high + across.at(16 * j, i));
                ldmatrix_x4(lost, matrix.low + across.at(16 * j, i));
                left.times(to[2 * j], to[2 * j + 1], both, lost);
            }
        }
    }

    // The state, `decay` of it, and the sum of k u over the tokens.
    static __device__ __forceinline__ void update(Sums& sums, const OfTokens& u, float decay, const T* keys,
                                                  const Lane<K>& down) {
#pragma unroll
        for (int i = 0; i < K / 8; i++) {
#pragma unroll
            for (int e = 0; e < 4; e++) sums[i][e] *= decay;
        }
#pragma unroll
        for (int j = 0; j < TOKENS / 16; j++) {
            const Operand<T> left(u[2 * j], u[2 * j + 1]);
#pragma unroll
            for (int i = 0; i < K / 16; i++) {
                u32 k[4];
                ldmatrix_x4_trans(k, keys + down.at(16 * j, i));
                left.times(sums[2 * i], sums[2 * i + 1], k);
            }
        }
    }
};

// x times a factor of each token.
__device__ __forceinline__ void scale_tokens(float (&x)[TOKENS / 8][4], const float* factors) {
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
        const Pack<f32, 2> factor = load<2>(factors + j * 8 + threadIdx.x % 4 * 2);
#pragma unroll
        for (int e = 0; e < 4; e++) x[j][e] *= factor.v[e % 2];
    }
}

// x = v - x, of the warp's columns.
template <typename T>
__device__ __forceinline__ void subtract_from_values(float (&x)[TOKENS / 8][4], const T* values) {
    const Lane<COLUMNS> down = lane_down<COLUMNS>();
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
        u32 v[4];  // rows lane/4 of tokens 8 and the next 8, then rows lane/4 + 8
        ldmatrix_x4_trans(v, values + down.at(16 * j, threadIdx.x / WARP));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const Pack<T, 2> two = *reinterpret_cast<const Pack<T, 2>*>(&v[i]);
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& to = x[2 * j + i % 2][i / 2 * 2 + e];
                to = to_float(two.v[e]) - to;
            }
        }
    }
}

// The warp's columns of y, for `count` tokens, through its columns of `values`, which nobody reads any more. y: from
// the warp's first column on; stride: elements from one token to the next.
template <typename T>
__device__ __forceinline__ void store_tokens(const float (&out)[TOKENS / 8][4], T* values, T* y, i64 stride,
                                             int count) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncwarp();  // the warp's last reads of them are done
#pragma unroll
    for (int j = 0; j < TOKENS / 8; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++)
            values[Layout<COLUMNS>::at(j * 8 + lane % 4 * 2 + e % 2, 2 * warp + e / 2) + lane / 4] =
                from_float<T>(out[j][e]);
    }
    __syncwarp();
    if (lane >= count) return;
#pragma unroll
    for (int i = 0; i < 2; i++)
        store<8>(y + lane * stride + 8 * i, load<8>(values + Layout<COLUMNS>::at(lane, 2 * warp + i)));
}

// ---- warps that prepare ---------------------------------------------------------------------------------------------

// `count` rows of D elements of a chunk to shared memory, and zeros for those that are missing.
template <int D, typename T>
__device__ __forceinline__ void fetch_chunk(T* to, const T* from, i64 stride, int count, int helper) {
    constexpr int VECTORS = D / 8;
#pragma unroll
    for (int i = 0; i < TOKENS * VECTORS; i += HELPERS) {
        const int row = (i + helper) / VECTORS, vector = (i + helper) % VECTORS;
        cp_async_16(to + Layout<D>::at(row, vector), from + row * stride + vector * 8, row < count);
    }
}

// What a helper knows of the chunk's tokens.
struct alignas(16) Prepared {
    float a[TOKENS][PITCH], sum[TOKENS], beta[TOKENS], key[TOKENS], query[TOKENS];  // sum: c; key, query: unit(k), ...
};

// Gates and norms: a lane has a token. The first helper warp has the norms of keys, the other those of queries.
template <int K, typename T>
__device__ __forceinline__ void weigh_tokens(const T* rows, float log_decay, float beta, bool queries, Prepared& work,
                                             Factors& factors) {
    const int lane = threadIdx.x % WARP;
    float squares = 0.f;
#pragma unroll
    for (int i = 0; i < K / 8; i++) {
        const Pack<T, 8> part = load<8>(rows + Layout<K>::at(lane, i));
#pragma unroll
        for (int j = 0; j < 8; j++) squares += to_float(part.v[j]) * to_float(part.v[j]);
    }
    float sum = log_decay;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const float before = __shfl_up_sync(ALL_LANES, sum, lanes);
        if (lane >= lanes) sum += before;
    }
    const float last = __shfl_sync(ALL_LANES, sum, WARP - 1);
    if (queries) {
        work.query[lane] = unit(squares) * (1.f / sqrtf(float(K)));
        factors.answered[lane] = work.query[lane] * __expf(sum);
        return;
    }
    work.key[lane] = unit(squares);
    work.sum[lane] = sum;
    work.beta[lane] = beta;
    factors.recalled[lane] = work.key[lane] * __expf(sum);
    factors.written[lane] = work.key[lane] * __expf(last - sum);
    if (lane == 0) factors.decay = __expf(last);
}

// 16 rows from `first` on of products with the keys of the first 8 N tokens, times what A and P have in common: the
// keys' lengths and exp(c_i - c_j). Each pair of neighbours goes to put(row, column, x, y). rows: of keys or queries.
template <int K, int N, typename T, typename Put>
__device__ __forceinline__ void relate_tokens(const T* rows, const T* keys, int first, const Prepared& work, Put put) {
    const int lane = threadIdx.x % WARP;
    float sums[1][N][4] = {};
    multiply_rows<T, K>(sums, rows + first * K, keys, lane_down<K>(), lane_across<K>());
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = first + half * 8 + lane / 4;
        const float sum = work.sum[row];
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int column = j * 8 + lane % 4 * 2;
            float x[2];
#pragma unroll
            for (int e = 0; e < 2; e++)
                x[e] = sums[0][j][2 * half + e] * work.key[column + e] *
                       __expf(fminf(0.f, sum - work.sum[column + e]));  // above the diagonal it would be too large
            put(row, column, x[0], x[1]);
        }
    }
}

// 16 rows of A to work.a, and what is above its diagonal, which nobody reads. Rows of its lower left quarter are not
// multiplied with beta yet.
template <int K, int N, typename T>
__device__ __forceinline__ void relate_keys(const T* keys, int first, Prepared& work) {
    relate_tokens<K, N>(keys, keys, first, work, [&](int row, int column, float x, float y) {
        const float factor = work.key[row] * (column >= first ? work.beta[row] : 1.f);
        const Pack<f32, 2> a{x * factor, y * factor};
        store<2>(&work.a[row][column], a);
    });
}

// 16 rows of P.
template <int K, int N, typename T>
__device__ __forceinline__ void relate_queries(const T* queries, const T* keys, int first, const Prepared& work,
                                               const Doubled<T>& scores) {
    relate_tokens<K, N>(queries, keys, first, work, [&](int row, int column, float x, float y) {
        const float factor = work.query[row];
        scores.put(row, column, column <= row ? x * factor : 0.f, column < row ? y * factor : 0.f);
    });
}

// A quarter on the diagonal of (1 + A)^-1 beta, from token `first` on: lane l and lane l + 16 solve for column l.
template <typename T>
__device__ __forceinline__ void invert(const Prepared& work, int first, const Doubled<T>& inverse) {
    const int lane = threadIdx.x % WARP, at = lane % 16;
    const float beta = work.beta[first + at];
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; i++) {
        float sums[4] = {};
#pragma unroll
        for (int j = 0; j < i; j += 4) {
            const Pack<f32, 4> a = load<4>(&work.a[first + i][first + j]);
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (j + e < i) sums[e] += a.v[e] * column[j + e];
        }
        column[i] = (i == at ? 1.f : 0.f) - ((sums[0] + sums[1]) + (sums[2] + sums[3]));
        if (lane < 16) inverse.put(first + i, first + at, column[i] * beta);
    }
}

// The lower left quarter of it, from those on the diagonal: -(lower right) (A's lower left) (upper left), transposed.
template <typename T>
__device__ __forceinline__ void join(const Prepared& work, const Doubled<T>& inverse) {
    const int lane = threadIdx.x % WARP;
    const Lane<TOKENS> across = lane_across<TOKENS>();
    Operand<T> upper;
    u32 both[4], lost[4];
    ldmatrix_x4_trans(upper.high, inverse.high + across.at(0, 0));
    ldmatrix_x4_trans(upper.low, inverse.low + across.at(0, 0));
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const Pack<f32, 2> a = load<2>(&work.a[16 + i / 2 * 8 + lane / 4][i % 2 * 8 + lane % 4 * 2]);
        const Halves<T> halves(a.v[0], a.v[1]);
        both[i] = halves.high, lost[i] = halves.low;
    }
    float product[2][4] = {}, result[2][4] = {};
    upper.times(product[0], product[1], both, lost);
    ldmatrix_x4(both, inverse.high + across.at(16, 1));
    ldmatrix_x4(lost, inverse.low + across.at(16, 1));
    Operand<T>(product[0], product[1]).times(result[0], result[1], both, lost);
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) inverse.put(16 + j * 8 + lane % 4 * 2 + e % 2, e / 2 * 8 + lane / 4, -result[j][e]);
    }
}

// What a chunk's rows become. The second warp has the longer way to its quarter, the first one has P.
template <typename T, int K>
__device__ __forceinline__ void relate(const Buffers<T, K>& buffers, int chunk, bool second, Prepared& work) {
    const T *keys = buffers.keys(chunk), *queries = buffers.queries(chunk);
    const Doubled<T> inverse = buffers.inverse(chunk), scores = buffers.scores(chunk);
    if (second)
        relate_keys<K, TOKENS / 8>(keys, 16, work);
    else
        relate_keys<K, TOKENS / 16>(keys, 0, work);
    __syncwarp();
    invert(work, second ? 16 : 0, inverse);
    bar_sync(1, HELPERS);
    if (second) return join(work, inverse);
    relate_queries<K, TOKENS / 16>(queries, keys, 0, work, scores);
    relate_queries<K, TOKENS / 8>(queries, keys, 16, work, scores);
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// A block's part of a sequence. x, ba, y: from its first token on, and from its own columns on.
template <typename T>
struct Task {
    const T *queries, *keys, *values, *ba;
    T* y;
    int tokens, chunks, width, m, H;  // width: of x; m: of ba
    i64 height;                       // of y: elements from one token to the next
};

// Both groups call it after each chunk: its buffers may be written again, and those of the next one are there.
__device__ __forceinline__ void exchange() { bar_sync(2, WORKERS * WARP + HELPERS); }

template <int K, typename T>
__device__ __forceinline__ void prepare_chunks(const Task<T>& task, const Buffers<T, K>& buffers, const Head& gates,
                                               Prepared& work, Factors* factors) {
    const int helper = threadIdx.x - WORKERS * WARP, lane = helper % WARP;
    const bool queries = helper >= WARP;
    const auto fetch = [&](int chunk) {
        const int count = task.tokens - chunk * TOKENS;
        const i64 from = i64(chunk) * TOKENS * task.width;
        fetch_chunk<K>(buffers.queries(chunk), task.queries + from, task.width, count, helper);
        fetch_chunk<K>(buffers.keys(chunk), task.keys + from, task.width, count, helper);
        fetch_chunk<COLUMNS>(buffers.values(chunk), task.values + from, task.width, count, helper);
    };
    fetch(0);
    cp_async_commit();
    for (int chunk = 0; chunk < task.chunks; chunk++) {
        const int token = chunk * TOKENS + lane;
        const bool there = token < task.tokens;  // if not, its q, k and v are zeros, and its gates must keep the state
        const T* gate = task.ba + i64(there ? token : 0) * task.m;
        const float b = to_float(gate[0]), a = to_float(gate[task.H]);
        if (chunk + 1 < task.chunks) fetch(chunk + 1);
        cp_async_commit();
        cp_async_wait<1>();
        bar_sync(1, HELPERS);  // all rows of the chunk are there
        weigh_tokens<K>(queries ? buffers.queries(chunk) : buffers.keys(chunk), there ? gates.log_decay(a) : 0.f,
                        sigmoid(b), queries, work, factors[chunk % 2]);
        bar_sync(1, HELPERS);
        relate(buffers, chunk, queries, work);
        exchange();
    }
    exchange();
}

template <int K, typename T>
__device__ __forceinline__ void work_on_chunks(const Task<T>& task, const Buffers<T, K>& buffers,
                                               const Factors* factors, typename Columns<T, K>::Sums& sums) {
    using Own = Columns<T, K>;
    const int warp = threadIdx.x / WARP;
    exchange();
    for (int chunk = 0; chunk < task.chunks; chunk++) {
        typename Own::OfTokens recalled = {}, out = {}, u = {};
        const Factors& factor = factors[chunk % 2];
        Own::recall(sums, buffers.keys(chunk), buffers.queries(chunk), lane_across<K>(), recalled, out);
        scale_tokens(recalled, factor.recalled);
        subtract_from_values(recalled, buffers.values(chunk));
        Own::add_lower(u, recalled, buffers.inverse(chunk));
        scale_tokens(out, factor.answered);
        Own::add_lower(out, u, buffers.scores(chunk));
        scale_tokens(u, factor.written);
        Own::update(sums, u, factor.decay, buffers.keys(chunk), lane_down<K>());
        store_tokens(out, buffers.values(chunk), task.y + chunk * TOKENS * task.height + warp * 16, task.height,
                     task.tokens - chunk * TOKENS);
        exchange();
    }
}

template <typename T, int K>
__global__ void __launch_bounds__(WORKERS* WARP + HELPERS, 1)
    gated_delta_chunks(const T* x, const T* ba, const f32* __restrict__ A_log, const f32* __restrict__ dt_bias,
                       f32* state, const i32* cu_seqlens, const i32* seq_lens, const i32* state_slots, T* y, int G,
                       int H, int V, int m, int start) {
    DYNAMIC_SHARED(T, memory);
    __shared__ Factors factors[2];
    __shared__ Prepared work;
    launch_dependents();
    const int head = blockIdx.y, key_head = head / (H / G), part = blockIdx.x * COLUMNS, warp = threadIdx.x / WARP;
    const int first = cu_seqlens[blockIdx.z], tokens = cu_seqlens[blockIdx.z + 1] - first, width = 2 * G * K + H * V;
    if (tokens <= 0) return;
    const T* row = x + i64(first) * width;
    const Task<T> task{row + key_head * K,
                       row + (G + key_head) * K,
                       row + 2 * G * K + head * V + part,
                       ba + i64(first) * m + start + head,
                       y + i64(first) * H * V + head * V + part,
                       tokens,
                       (tokens + TOKENS - 1) / TOKENS,
                       width,
                       m,
                       H,
                       i64(H) * V};
    const Buffers<T, K> buffers{memory};
    const auto wait = [] { pdl_wait(); };
    if (warp >= WORKERS) {
        const Head gates(A_log, dt_bias, head);
        wait();
        return prepare_chunks(task, buffers, gates, work, factors);
    }
    typename Columns<T, K>::Sums sums = {};
    f32* kept = state + (i64(state_slots[blockIdx.z]) * H + head) * K * V + part + warp * 16;
    if (seq_lens[blockIdx.z] > tokens)
        Columns<T, K>::each(sums, [&](float& sum, int row, int at) { sum = kept[row * V + at]; });
    wait();
    work_on_chunks(task, buffers, factors, sums);
    Columns<T, K>::each(sums, [&](float& sum, int row, int at) { kept[row * V + at] = sum; });
}
