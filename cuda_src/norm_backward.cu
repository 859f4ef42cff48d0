// With s = 1 / sqrt(mean(x^2) + eps), c = x s and g = dy (offset + w), over a row:
// rms_norm_backward    dx[n,d] = s (g - c mean(g c)) + a;   dw[d] += sum over rows of dy c
//
// With z = x - mean(x), s = 1 / sqrt(mean(z^2) + eps), c = z s and g = dy (offset + w):
// layer_norm_backward  dx[n,d] = s (g - mean(g) - c mean(g c)) + a;   dw[d] += sum of dy c;   db[d] += sum of dy
//                      x, a, dx[n,d]: f32, a may be absent: 0;   w[d], dy[n,d]: T;   dw, db[d]: f32
//
// qk_norm_backward     rms_norm_backward of each query head (w = q_norm) and key head (k_norm), D elements of a row;
//                      value heads: dx = dy      x, dy, dx[n,(num_heads+2*num_kv_heads)*D]: T, dq_norm, dk_norm[D]: f32
//
// qk_norm_wide_backward  the same for all query heads of a row together, and for all its key heads
//                      q_norm, dq_norm[num_heads*D], k_norm, dk_norm[num_kv_heads*D]
//
// Mapping: a block takes a row, then the row gridDim.x further on, and so on. A thread holds HELD times 8 elements of x, a,
// dy, w and of the sums for dw and db: memory is read once, and a block has one row of sums however many rows it took. It
// writes that to `partial`; a second launch adds up the rows of `partial`, 32 columns a block, in a fixed order. Longer
// rows have no room in registers (HELD = 0): they are read for each pass over them, from the cache if it holds them, and
// the sums stay in `partial`. As in the forward kernel the variance is the mean of squared differences.
// qk_norm_backward: LANES neighbouring threads take a head, then the head as many further on as there are, all rows being
// one long row of heads.
//
// Ops and references: cuplama/ops/norm_backward.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet.
#include "common.cuh"
#include "ptx.cuh"

constexpr int COLUMNS = WARP;    // of a block of the second launch
constexpr int QK_THREADS = 128;  // of a block of qk_norm_backward; ops/norm_backward.py sizes the grids with both

// The sums of both over the threads of a block, for all of them. `turn` alternates between 0 and 1 from call to call: so
// one barrier is enough, since nobody can be two calls ahead of another thread.
__device__ __forceinline__ float2 block_sums(float2 x, int turn) {
    __shared__ float2 partial[2][WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    x = {warp_sum(x.x), warp_sum(x.y)};
    if (lane == 0) partial[turn][warp] = x;
    __syncthreads();
    x = lane < warps ? partial[turn][lane] : float2{0.f, 0.f};
    return {warp_sum(x.x), warp_sum(x.y)};
}

// ---- rows -----------------------------------------------------------------------------------------------------------

// What a thread has of a row at a time: 8 elements of each array.
template <typename T>
struct Piece {
    Pack<f32, 8> x, a;
    Pack<T, 8> dy, w;

    // The element of g.
    __device__ __forceinline__ float g(int j, f32 offset) const {
        return to_float(dy.v[j]) * (offset + to_float(w.v[j]));
    }
    // Adds up x and g, for their means.
    __device__ __forceinline__ void add_to(float2& sums, f32 offset) const {
#pragma unroll
        for (int j = 0; j < 8; j++) sums.x += x.v[j], sums.y += g(j, offset);
    }
    // Adds up x^2 and g x.
    __device__ __forceinline__ void add_products_to(float2& sums, f32 offset) const {
#pragma unroll
        for (int j = 0; j < 8; j++) sums.x += x.v[j] * x.v[j], sums.y += g(j, offset) * x.v[j];
    }
    // Takes the mean off x, but not off the zeros behind the row. at: where the piece begins.
    __device__ __forceinline__ void centre(float mean, int at, int d) {
#pragma unroll
        for (int j = 0; j < 8; j++) x.v[j] = at + j < d ? x.v[j] - mean : 0.f;
    }
};

// The arrays of a call, whose rows of d elements begin every `stride` elements, and this block's rows of sums.
template <typename T, typename X>
struct Arrays {
    const X* __restrict__ x;
    const T* __restrict__ w;
    const T* __restrict__ dy;
    const f32* __restrict__ a;
    X* __restrict__ dx;
    f32* dw;
    f32* db;
    int d, stride;
    bool vectorized;

    static __device__ __forceinline__ int at(int chunk) { return (chunk * blockDim.x + threadIdx.x) * 8; }
    template <typename E>
    __device__ __forceinline__ Pack<E, 8> load(const E* row, int chunk) const {
        return load_row<8>(row, at(chunk), d, vectorized);
    }
    template <typename E>
    __device__ __forceinline__ void store(E* row, int chunk, const Pack<f32, 8>& y) const {
        Pack<E, 8> rounded;
#pragma unroll
        for (int j = 0; j < 8; j++) rounded.v[j] = from_float<E>(y.v[j]);
        store_row<8>(row, at(chunk), d, vectorized, rounded);
    }
    // A piece of the row that begins at `start`, but for w.
    __device__ __forceinline__ void load_piece(Piece<T>& piece, i64 start, int chunk) const {
        const Pack<X, 8> number = load(x + start, chunk);
#pragma unroll
        for (int j = 0; j < 8; j++) piece.x.v[j] = to_float(number.v[j]);
        piece.dy = load(dy + start, chunk);
        piece.a = a == nullptr ? Pack<f32, 8>{} : load(a + start, chunk);
    }
    // A piece for one more pass over the row: one that is held, or the only one, read again.
    template <int HELD, int N>
    __device__ __forceinline__ Piece<T>& piece_of(Piece<T> (&pieces)[N], i64 start, int chunk) const {
        if (HELD > 0) return pieces[HELD > 0 ? chunk : 0];
        load_piece(pieces[0], start, chunk);
        pieces[0].w = load(w, chunk);
        return pieces[0];
    }
    // Adds to sums in memory, which the first row of a block begins.
    __device__ __forceinline__ void add(f32* sums, int chunk, bool begin, Pack<f32, 8> y) const {
        const Pack<f32, 8> old = begin ? Pack<f32, 8>{} : load<f32>(sums, chunk);
#pragma unroll
        for (int j = 0; j < 8; j++) y.v[j] += old.v[j];
        store(sums, chunk, y);
    }
};

// HELD: pieces of a row that a thread holds; 0: none, it reads the row again for each pass.
template <bool CENTRED, int HELD, typename T, typename X>
__device__ __forceinline__ void backward(const Arrays<T, X>& to, int n, f32 eps, f32 offset) {
    constexpr int PIECES = HELD > 0 ? HELD : 1;
    const int chunks = HELD > 0 ? HELD : (to.d + 8 * blockDim.x - 1) / (8 * blockDim.x);
    Piece<T> pieces[PIECES];
    Pack<f32, 8> dw[PIECES] = {}, db[PIECES] = {};
    int turn = 0;
    for (int c = 0; c < HELD; c++) pieces[c].w = to.load(to.w, c);
    for (int row = blockIdx.x; row < n; row += gridDim.x) {
        const i64 start = i64(row) * to.stride;
        float2 means = {0.f, 0.f}, products = {0.f, 0.f};
#pragma unroll
        for (int c = 0; c < HELD; c++) to.load_piece(pieces[c], start, c);
        if constexpr (CENTRED) {
#pragma unroll PIECES
            for (int c = 0; c < chunks; c++) to.template piece_of<HELD>(pieces, start, c).add_to(means, offset);
            means = block_sums(means, turn);
            means = {means.x / to.d, means.y / to.d};
            turn ^= 1;
        }
#pragma unroll PIECES
        for (int c = 0; c < chunks; c++) {
            Piece<T>& piece = to.template piece_of<HELD>(pieces, start, c);
            if (CENTRED) piece.centre(means.x, to.at(c), to.d);
            piece.add_products_to(products, offset);
        }
        products = block_sums(products, turn);
        turn ^= 1;
        const float inverse = 1.f / sqrtf(products.x / to.d + eps);
        const float factor = products.y / to.d * inverse * inverse;
#pragma unroll PIECES
        for (int c = 0; c < chunks; c++) {
            Piece<T>& piece = to.template piece_of<HELD>(pieces, start, c);
            if (CENTRED && HELD == 0) piece.centre(means.x, to.at(c), to.d);
            Pack<f32, 8> dx, to_dw, to_db;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                to_db.v[j] = to_float(piece.dy.v[j]);
                to_dw.v[j] = to_db.v[j] * (piece.x.v[j] * inverse);
                dx.v[j] = piece.a.v[j] + inverse * (piece.g(j, offset) - means.y - piece.x.v[j] * factor);
                if (HELD > 0) dw[c].v[j] += to_dw.v[j], db[c].v[j] += to_db.v[j];
            }
            to.store(to.dx + start, c, dx);
            if (HELD == 0) to.add(to.dw, c, row == blockIdx.x, to_dw);
            if (HELD == 0 && CENTRED) to.add(to.db, c, row == blockIdx.x, to_db);
        }
    }
#pragma unroll
    for (int c = 0; c < HELD; c++) {
        to.store(to.dw, c, dw[c]);
        if (CENTRED) to.store(to.db, c, db[c]);
    }
}

template <typename T, int HELD>
__global__ void __launch_bounds__(512)
    rms_norm_backward(const f32* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                      const f32* __restrict__ a, f32* __restrict__ dx, f32* __restrict__ partial, int n, int d, f32 eps,
                      f32 offset) {
    launch_dependents();
    const bool vectorized = d % 8 == 0 && aligned(x, w, dy, a, dx, partial);
    backward<false, HELD, T, f32>({x, w, dy, a, dx, partial + i64(blockIdx.x) * d, nullptr, d, d, vectorized}, n, eps,
                                  offset);
}

template <typename T, int HELD>
__global__ void __launch_bounds__(512)
    layer_norm_backward(const f32* __restrict__ x, const T* __restrict__ w, const T* __restrict__ dy,
                        const f32* __restrict__ a, f32* __restrict__ dx, f32* __restrict__ partial, int n, int d,
                        f32 eps, f32 offset) {
    launch_dependents();
    const bool vectorized = d % 8 == 0 && aligned(x, w, dy, a, dx, partial);
    f32 *dw = partial + i64(blockIdx.x) * d, *db = dw + i64(gridDim.x) * d;
    backward<true, HELD, T, f32>({x, w, dy, a, dx, dw, db, d, d, vectorized}, n, eps, offset);
}

// blockIdx.y: queries, keys, values.
template <typename T, int HELD>
__global__ void __launch_bounds__(512)
    qk_norm_wide_backward(const T* __restrict__ x, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
                          const T* __restrict__ dy, T* __restrict__ dx, f32* __restrict__ partial, int n, int num_heads,
                          int num_kv_heads, int D, f32 eps, f32 offset) {
    launch_dependents();
    const int part = blockIdx.y, queries = num_heads * D, keys = num_kv_heads * D, stride = queries + 2 * keys;
    const int d = part == 0 ? queries : keys;
    const bool vectorized = D % 8 == 0 && aligned(x, q_norm, k_norm, dy, dx, partial);
    const i64 from = part == 0 ? 0 : queries + (part - 1) * keys;
    x += from, dy += from, dx += from;
    if (part == 2) {
        for (int row = blockIdx.x; row < n; row += gridDim.x)
            for (int at = threadIdx.x * 8; at < d; at += blockDim.x * 8)
                store_row<8>(dx + i64(row) * stride, at, d, vectorized,
                             load_row<8>(dy + i64(row) * stride, at, d, vectorized));
        return;
    }
    f32* sums = partial + (part == 0 ? 0 : i64(gridDim.x) * queries) + i64(blockIdx.x) * d;
    const T* w = part == 0 ? q_norm : k_norm;
    backward<false, HELD, T, T>({x, w, dy, nullptr, dx, sums, nullptr, d, stride, vectorized}, n, eps, offset);
}

// ---- heads ----------------------------------------------------------------------------------------------------------

// The sum over the LANES neighbouring lanes that have a head.
template <int LANES>
__device__ __forceinline__ float head_sum(float x) {
#pragma unroll
    for (int lanes = LANES / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(ALL_LANES, x, lanes);
    return x;
}

// Adds up what the lanes of a block have for the same elements, and writes it to a row of `partial`.
template <int LANES, int CHUNKS>
__device__ void add_heads(const Pack<f32, 8> (&sums)[CHUNKS], f32* row, int D) {
    constexpr int WARPS = QK_THREADS / WARP, WIDTH = LANES * 8;
    __shared__ float shared[WARPS][WIDTH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float sum = sums[c].v[j];
#pragma unroll
            for (int lanes = LANES; lanes < WARP; lanes *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, lanes);
            if (lane < LANES) shared[warp][lane * 8 + j] = sum;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < WIDTH && c * WIDTH + i < D; i += QK_THREADS) {
            float sum = 0.f;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += shared[w][i];
            row[c * WIDTH + i] = sum;
        }
        __syncthreads();
    }
}

template <typename T, int LANES, int CHUNKS>
__global__ void __launch_bounds__(QK_THREADS)
    qk_norm_backward(const T* __restrict__ x, const T* __restrict__ q_norm, const T* __restrict__ k_norm,
                     const T* __restrict__ dy, T* __restrict__ dx, f32* __restrict__ partial, int n, int num_heads,
                     int num_kv_heads, int D, f32 eps, f32 offset) {
    launch_dependents();
    constexpr int GROUPS = QK_THREADS / LANES;
    const bool vectorized = D % 8 == 0 && aligned(x, q_norm, k_norm, dy, dx);
    const int lane = threadIdx.x % LANES, heads = num_heads + 2 * num_kv_heads;
    const i64 all = i64(n) * heads;
    const int step = gridDim.x * GROUPS, group = threadIdx.x / LANES;
    Pack<f32, 8> dq[CHUNKS] = {}, dk[CHUNKS] = {};
    for (i64 first = i64(blockIdx.x) * GROUPS; first < all; first += step) {  // by whole blocks: all lanes add up
        const i64 index = first + group;
        const int head = index % heads, there = index < all ? D : 0;  // no elements of a head that is not there
        const bool is_q = head < num_heads, is_v = head >= num_heads + num_kv_heads;
        Pack<T, 8> v[CHUNKS], g[CHUNKS];
        float squares = 0.f, along = 0.f;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int at = (c * LANES + lane) * 8;
            v[c] = load_row<8>(x + index * D, at, is_v ? 0 : there, vectorized);
            g[c] = load_row<8>(dy + index * D, at, there, vectorized);
            const Pack<T, 8> w = load_row<8>(is_q ? q_norm : k_norm, at, D, vectorized);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                squares += to_float(v[c].v[j]) * to_float(v[c].v[j]);
                along += to_float(g[c].v[j]) * (offset + to_float(w.v[j])) * to_float(v[c].v[j]);
            }
        }
        const float inverse = 1.f / sqrtf(head_sum<LANES>(squares) / D + eps);
        const float factor = head_sum<LANES>(along) / D * inverse * inverse;
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const int at = (c * LANES + lane) * 8;
            const Pack<T, 8> w = load_row<8>(is_q ? q_norm : k_norm, at, D, vectorized);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float number = to_float(v[c].v[j]), gradient = to_float(g[c].v[j]);
                const float to_sum = gradient * (number * inverse);  // 0 for value heads, whose x is not read
                dq[c].v[j] += is_q ? to_sum : 0.f;
                dk[c].v[j] += is_q ? 0.f : to_sum;
                if (!is_v)
                    g[c].v[j] = from_float<T>(inverse * (gradient * (offset + to_float(w.v[j])) - number * factor));
            }
            store_row<8>(dx + index * D, at, there, vectorized, g[c]);
        }
    }
    add_heads<LANES>(dq, partial + i64(blockIdx.x) * D, D);
    add_heads<LANES>(dk, partial + i64(gridDim.x + blockIdx.x) * D, D);
}

// ---- sums of the blocks ---------------------------------------------------------------------------------------------

// Adds the rows of partial[rows, size] to sum[size]. A thread adds up every 32nd row of a column, then the first warp
// adds up what the others have.
__device__ __forceinline__ void add_rows(const f32* partial, f32* sum, int rows, int size) {
    __shared__ float shared[WARP][COLUMNS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * COLUMNS + lane;
    float total = 0.f;
    if (column < size) {
#pragma unroll 8
        for (int row = warp; row < rows; row += WARP) total += partial[i64(row) * size + column];
    }
    shared[warp][lane] = total;
    __syncthreads();
    if (warp > 0 || column >= size) return;
#pragma unroll
    for (int other = 1; other < WARP; other++) total += shared[other][lane];
    sum[column] += total;
}

__global__ void __launch_bounds__(1024) rms_norm_backward_sums(const f32* partial, f32* dw, int blocks, int d) {
    pdl_wait();
    add_rows(partial, dw, blocks, d);
}

// blockIdx.y: dw, db.
__global__ void __launch_bounds__(1024)
    layer_norm_backward_sums(const f32* partial, f32* dw, f32* db, int blocks, int d) {
    pdl_wait();
    add_rows(partial + i64(blockIdx.y) * blocks * d, blockIdx.y == 0 ? dw : db, blocks, d);
}

// blockIdx.y: dq_norm, dk_norm.
__global__ void __launch_bounds__(1024)
    qk_norm_backward_sums(const f32* partial, f32* dq_norm, f32* dk_norm, int blocks, int D) {
    pdl_wait();
    add_rows(partial + i64(blockIdx.y) * blocks * D, blockIdx.y == 0 ? dq_norm : dk_norm, blocks, D);
}

// blockIdx.y: dq_norm, dk_norm.
__global__ void __launch_bounds__(1024) qk_norm_wide_backward_sums(const f32* partial, f32* dq_norm, f32* dk_norm,
                                                                   int blocks, int num_heads, int num_kv_heads, int D) {
    pdl_wait();
    const int queries = num_heads * D;
    if (blockIdx.y == 0)
        add_rows(partial, dq_norm, blocks, queries);
    else
        add_rows(partial + i64(blocks) * queries, dk_norm, blocks, num_kv_heads * D);
}
