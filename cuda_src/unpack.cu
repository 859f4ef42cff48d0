// unpack  dense[to + i, :] = row first + i of a segment of a packed weight, up to row `end`        dense [.., k]: T
//
// Every number is scale * (number(code) - zero) + offset in f32, rounded once to T. The columns are in their own order:
// where the segment has an `order`, its column j is column order[j] of dense. For products over many rows, which a
// library computes from plain numbers; also in slices of the weight that stay in the L2 cache.
//
// Mapping: a warp takes a block of 16 rows and 128 columns; the warps of a thread block, blocks side by side. A lane
// has four neighbouring columns of a row. Of 16-bit numbers that is half of a 16-byte store, so two lanes exchange
// halves between two chunks of 16 columns: each then has eight columns of one of them. In an order of their own,
// numbers are stored one by one: the L2 cache gathers the lines, as all of a row is written at about the same time.
//
// unpack_codes  dense[end - first, k] = the codes themselves, of 8-bit floats; w_scale = their scales
//
// w_scale has one f32 for each row, or [ceil(k / 128), end - first] of them for 128 columns of each row.
//
// For products of 8-bit floats; T says no more than what the scratch is otherwise. A block of the weight goes through
// shared memory, so that rows are written in pieces of 128 bytes. k is a multiple of 16, `first` of the rows of a
// block. The codes of an 8B model take 3.6 ms on an H200: 3.9 TB/s, where reading alone has 4.5. Test:
// tests/backends/cuda/test_eight_bit.py. Benchmark: python -m benchmarks.fp8_products.
//
// Launched as cuplama/backends/cuda/unpacking.py says. Test: tests/backends/cuda/test_unpacking.py. Benchmark:
// benchmarks/packed_loading.py.
// Tried: nothing else yet.
#include "formats.cuh"

// Four numbers of T, from the codes' numbers.
template <typename T>
__device__ __forceinline__ Pack<T, 4> scaled(const float* number, float scale, float offset) {
    Pack<T, 4> found;
#pragma unroll
    for (int i = 0; i < 4; i++) found.v[i] = from_float<T>(number[i] * scale + offset);
    return found;
}

// Where a row of dense is written. order: of its columns, or null; vectorized: whether eight columns are one store.
template <typename T>
struct Target {
    T* row;
    const i32* order;
    int k;
    bool there, vectorized;

    __device__ __forceinline__ void four(int column, const Pack<T, 4>& x) const {
        if (!there) return;
        if (order == nullptr) {
            store_row<4>(row, column, k, vectorized, x);
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (column + i < k) row[order[column + i]] = x.v[i];
        }
    }

    // Of two chunks that follow each other, the lane's columns. column: the first chunk's first. All lanes call.
    __device__ __forceinline__ void two_chunks(int column, int t, const Pack<T, 4>& first,
                                               const Pack<T, 4>& second) const {
        if (sizeof(T) != 2 || !vectorized) {
            four(column + 4 * t, first);
            four(column + CHUNK_COLUMNS + 4 * t, second);
            return;
        }
        const bool odd = t % 2 == 1;
        u32 a[2], b[2];
        memcpy(a, &first, 8);
        memcpy(b, &second, 8);
        const u32 x = __shfl_xor_sync(ALL_LANES, odd ? a[0] : b[0], 1);
        const u32 y = __shfl_xor_sync(ALL_LANES, odd ? a[1] : b[1], 1);
        const uint4 eight = odd ? uint4{x, y, b[0], b[1]} : uint4{a[0], a[1], x, y};
        column += (odd ? CHUNK_COLUMNS : 0) + t / 2 * 8;
        if (there && column < k) *reinterpret_cast<uint4*>(row + column) = eight;
    }
};

template <typename T, typename W>
__global__ void __launch_bounds__(256, W::BITS == 32 ? 2 : 4)
    unpack(const W* __restrict__ w, const i32* __restrict__ order, T* __restrict__ dense, int rows, int first, int end,
           int to, int k) {
    const int lane = threadIdx.x % WARP, r = lane / 4, t = lane % 4;
    const int wide = W::columns(k), block = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (block >= wide) return;
    const int row_block = first / BLOCK_ROWS + blockIdx.y, row = row_block * BLOCK_ROWS + r;
    const W& from = w[i64(row_block) * wide + block];
    const typename W::Words words = from.lane(lane);
    const bool vectorized = order == nullptr && k % 8 == 0 && aligned(dense);
    T* out = dense + i64(to - first) * k;
    const auto inside = [&](int i) { return i >= first && i < end; };
    const Target<T> targets[2] = {{out + i64(row) * k, order, k, inside(row), vectorized},
                                  {out + i64(row + 8) * k, order, k, inside(row + 8), vectorized}};
    Two32 scales = {{1.f, 1.f}}, offsets = {{0.f, 0.f}};
    if (W::ROW_SCALES) {
        const f32* own = W::row_scales(w, rows, k);
        scales = {{own[row], own[row + 8]}};
    }
    Pack<T, 4> last[2];
#pragma unroll
    for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
        if (W::GROUP != 0 && chunk % W::GROUP_CHUNKS == 0) {
            scales = from.scales(chunk / W::GROUP_CHUNKS, r);
            if (W::OFFSET) offsets = from.offsets(chunk / W::GROUP_CHUNKS, r);
        }
        float number[8];
        from.floats(words, chunk, r, number);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const Pack<T, 4> now = scaled<T>(number + 4 * half, scales.v[half], offsets.v[half]);
            if (chunk % 2 == 1)
                targets[half].two_chunks(block * BLOCK_COLUMNS + (chunk - 1) * CHUNK_COLUMNS, t, last[half], now);
            last[half] = now;
        }
    }
}

constexpr int CODE_WARPS = 4;

template <typename T, typename W>
__global__ void __launch_bounds__(32 * CODE_WARPS)
    unpack_codes(const W* __restrict__ w, T* __restrict__ dense, f32* __restrict__ w_scale, int rows, int first,
                 int end, int k) {
    constexpr int PITCH = 144;  // bytes between the rows of a block in shared memory: no two lanes meet in a bank
    static_assert(W::BITS == 8 && (W::ROW_SCALES || W::GROUP == BLOCK_COLUMNS), "bytes that a block has one scale for");
    __shared__ __align__(16) u8 staged[CODE_WARPS][BLOCK_ROWS * PITCH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, r = lane / 4, t = lane % 4;
    const int wide = W::columns(k), block = blockIdx.x * CODE_WARPS + warp;
    if (block >= wide) return;  // a whole warp
    const int row_block = first / BLOCK_ROWS + blockIdx.y, to = blockIdx.y * BLOCK_ROWS, left = end - first - to;
    const W& from = w[i64(row_block) * wide + block];
    const typename W::Words words = from.lane(lane);
    u8* mine = staged[warp];
#pragma unroll
    for (int chunk = 0; chunk < BLOCK_CHUNKS; chunk++) {
#pragma unroll
        for (int half = 0; half < 2; half++)  // the bytes of a word are the columns 0, 2, 1, 3
            *reinterpret_cast<u32*>(mine + (r + 8 * half) * PITCH + chunk * CHUNK_COLUMNS + 4 * t) =
                __byte_perm(words.low[2 * chunk + half], 0, 0x3120);
    }
    if (t == 0 && (!W::ROW_SCALES || block == 0)) {
        Two32 scales;
        if constexpr (W::ROW_SCALES) {
            const f32* own = W::row_scales(w, rows, k) + row_block * BLOCK_ROWS + r;
            scales = {{own[0], own[8]}};
        } else {
            scales = from.scales(0, r);
        }
        f32* target = w_scale + (W::ROW_SCALES ? i64(0) : i64(block) * (end - first)) + to + r;
        if (r < left) target[0] = scales.v[0];
        if (r + 8 < left) target[8] = scales.v[1];
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 4 + lane / 8, piece = lane % 8 * 16, column = block * BLOCK_COLUMNS + piece;
        if (row < left && column < k)
            reinterpret_cast<uint4*>(dense)[(i64(to + row) * k + column) / 16] =
                *reinterpret_cast<const uint4*>(mine + row * PITCH + piece);
    }
}
