// Tiles of a decode step's attention on tensor cores that come through shared memory (attention_decode.cu): each warp has
// a ring of its own, so that nobody waits for another one.
#ifndef CUPLAMA_ATTENTION_DECODE_RING_CUH
#define CUPLAMA_ATTENTION_DECODE_RING_CUH

#include "attention_decode_mma.cuh"

// Whether a warp takes a whole tile out of its ring into registers before it multiplies, and asks for the next tile in
// between. A wider one has no room there, beside the sums of its values: a fragment is read just before its products.
template <int D>
constexpr bool HELD = D <= 128;

// A warp's next tiles on their way through shared memory, STAGES of keys and as many of values, which its lanes ask for
// without waiting for them. Rows of whole 128 bytes have their 16-byte parts exchanged, so that the eight lanes that are
// served together meet eight different ones: of keys 2 rows x 4 parts, of values 4 rows (every second) x 2 parts.
template <typename C, int D, int S, int STAGES>
struct WarpRing {
    static constexpr int ROW = D * sizeof(C), PARTS = ROW / 16;
    static constexpr int AHEAD = HELD<D> ? 8 : 4;  // copies whose addresses a lane has at once, as registers allow
    static_assert(ROW % 16 == 0, "rows are copied 16 bytes at a time");
    unsigned char* room;  // RING_BYTES<C, D, STAGES> bytes

    template <bool VALUES>
    __device__ __forceinline__ unsigned char* at(int stage, int row, int byte) const {
        const int moved = PARTS % 8 != 0 ? 0 : VALUES ? row / 2 % 4 * 32 : row % 2 * 64;
        return room + ((VALUES ? STAGES : 0) + stage) * TILE * ROW + row * ROW + byte / 128 * 128 +
               (byte % 128 ^ moved);
    }

    // The rows from `from` on that lie in low .. high-1; others become zeros. Closes a group of copies. A tile behind the
    // one with token `high`, which may be the newest, is used by nobody and not copied.
    template <bool VALUES>
    __device__ __forceinline__ void request(const History<C>& past, int stage, int from, int high) const {
        const C* cache = VALUES ? past.v : past.k;
        const bool whole = S % TILE == 0;
        const C* tile = whole && from < high ? cache + token_offset<S, D>(past.table, from, past.head, past.H) : cache;
        const int lane = threadIdx.x % WARP;
        if (from <= high) {
#pragma unroll AHEAD
            for (int i = lane; i < TILE * PARTS; i += WARP) {
                const int row = i / PARTS, byte = i % PARTS * 16, token = from + row;
                const bool there = token >= past.low && token < high;
                const C* start = whole   ? tile + row * D
                                 : there ? cache + token_offset<S, D>(past.table, token, past.head, past.H)
                                         : cache;
                cp_async_16(at<VALUES>(stage, row, byte), reinterpret_cast<const unsigned char*>(start) + byte, there);
            }
        }
        cp_async_commit();
    }

    // The oldest group of the lane's 2 * STAGES has arrived, for all lanes to read.
    __device__ __forceinline__ void wait() const {
        cp_async_wait<2 * STAGES - 1>();
        __syncwarp();
    }

    // Nothing is on its way any more, and nobody reads the ring: it may be used for something else.
    __device__ __forceinline__ void drain() const {
        cp_async_wait<0>();
        __syncwarp();
    }

    // Row `number` of a stage, which has arrived, becomes the new token's.
    template <bool VALUES>
    __device__ __forceinline__ void insert(int stage, int number, const C* row) const {
        typedef Pack<u32, 4> Part;
        const Part* parts = reinterpret_cast<const Part*>(row);
        for (int i = threadIdx.x % WARP; i < PARTS; i += WARP)
            *reinterpret_cast<Part*>(at<VALUES>(stage, number, i * 16)) = parts[i];
        __syncwarp();
    }
};

// A stage of a ring, whose fragments a lane reads as WarpTile has them.
template <typename C, int D, int S, int STAGES>
struct RingTile {
    static constexpr int KE = KEY_EACH<C, D>, VE = VALUE_EACH<C, D>;
    typedef Pack<u32, KE * sizeof(C) / 4> KeyPart;
    typedef Pack<u32, VE * sizeof(C) / 4> ValuePart;
    const WarpRing<C, D, S, STAGES>& ring;
    int stage;

    __device__ __forceinline__ KeyPart key(int u, int c) const {
        const int g = threadIdx.x % WARP / 4, column = 4 * KE * c + KE * (threadIdx.x % 4);
        if (D % (4 * KE) != 0 && column >= D) return {};
        return *reinterpret_cast<const KeyPart*>(ring.template at<false>(stage, g + 8 * u, column * sizeof(C)));
    }
    __device__ __forceinline__ ValuePart value(int i, int c) const {
        const int row = value_row(i), column = 8 * VE * c + VE * (threadIdx.x % WARP / 4);
        if (D % (8 * VE) != 0 && column >= D) return {};
        return *reinterpret_cast<const ValuePart*>(ring.template at<true>(stage, row, column * sizeof(C)));
    }
};

// What a warp has its next tiles in: registers, or a ring in shared memory.
template <typename C, int D, int S, int STAGES>
struct Tiles {
    typedef WarpRing<C, D, S, STAGES> Type;
};
template <typename C, int D, int S>
struct Tiles<C, D, S, 0> {
    typedef WarpTile<C, D, S> Type[2];
};

// A warp's first tiles of a split that begins at `begin`, tokens before `high`, as groups of copies to its ring.
template <int WARPS, typename C, int D, int S, int STAGES>
__device__ __forceinline__ void fetch_tiles(const WarpRing<C, D, S, STAGES>& ring, const History<C>& past, int begin,
                                            int high) {
#pragma unroll
    for (int n = 0; n < STAGES; n++) {
        const int at = begin + (n * WARPS + threadIdx.x / WARP) * TILE;
        ring.template request<false>(past, n, at, high);
        ring.template request<true>(past, n, at, high);
    }
}

// attend_warp of attention_decode_mma.cuh with tiles that come through the ring: a stage is asked for again as soon as
// nobody needs what is in it. `out` may lie in the warp's own ring.
template <int QUERY, int Q, int WARPS, int STRIDE, typename T, typename C, int D, int S, int STAGES, bool CAPPED>
__device__ __forceinline__ void attend_warp(const WarpRing<C, D, S, STAGES>& ring, const T* rows,
                                            const History<C>& past, int begin, int end,
                                            const Scaling<T, CAPPED>& scaling, float* out, float* largest, float* sum) {
    constexpr int STEP = WARPS * TILE;
    const int high = min(end, past.fresh);
    typedef typename Products<T, C>::Type M;
    const M* q = reinterpret_cast<const M*>(rows);
    WarpSums<C, D> sums;
    int stage = 0;
    for (int at = begin + threadIdx.x / WARP * TILE; at < end; at += STEP) {
        const bool newest = past.newest_from(at);
        const RingTile<C, D, S, STAGES> here{ring, stage};
        WarpTile<C, D, S> held;
        float p[2][2];
        ring.wait();
        if (newest) ring.template insert<false>(stage, past.fresh - at, past.key);
        if constexpr (HELD<D>)
            held.read_keys(here);
        else
            dot<QUERY, C, D>(here, q, p);
        __syncwarp();
        ring.template request<false>(past, stage, at + STAGES * STEP, high);
        if constexpr (HELD<D>) dot<QUERY, C, D>(held, q, p);
        sums.weigh(p, at, past.low, end, scaling);
        ring.wait();
        if (newest) ring.template insert<true>(stage, past.fresh - at, past.value);
        if constexpr (HELD<D>)
            held.read_values(here);
        else
            sums.template add<M>(here, p);
        __syncwarp();
        ring.template request<true>(past, stage, at + STAGES * STEP, high);
        if constexpr (HELD<D>) sums.template add<M>(held, p);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    ring.drain();
    sums.template store_to<Q, STRIDE>(out, largest, sum);
}

#endif
