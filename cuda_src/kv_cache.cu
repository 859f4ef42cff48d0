// kv_append  The last 2*H*D columns of x are the keys and values of a token, [2][H][D]. They go to
//                k, v[slot_mapping[token] / S, head, slot_mapping[token] % S, :]
//            x[n,w]: T, slot_mapping[n]: i32, k, v[P,H,S,D]: C (P pages of S tokens), updated in place.
//
// Mapping: blockIdx.x is the token; blockIdx.y and the threads share its 2*H*D elements, 8 at a time. C is T, and bits
// are moved, not converted; or it is e4m3, to which numbers are rounded. Rows whose size or address forbids 16-byte
// accesses go element by element.
//
// Op and reference: cuplama/ops/kv_cache.py. Test and benchmark: tests/ops/, `cuplama kernels bench`.
// Tried: nothing else yet. The rotation of the keys could be done on the way; that is a fusion, not this op.
#include "e4m3.cuh"

template <int W, typename T, typename C>
__device__ void append(const T* __restrict__ x, C* __restrict__ k, C* __restrict__ v, i64 page, int place, int H, int S,
                       int D) {
    for (int at = (blockIdx.y * blockDim.x + threadIdx.x) * W; at < 2 * H * D; at += gridDim.y * blockDim.x * W) {
        const int head = at / D, i = at % D;  // heads H .. 2H - 1 are the values
        C* cache = head < H ? k : v;
        store<W>(cache + ((page * H + head % H) * S + place) * D + i, narrow<C>(load<W>(x + at)));
    }
}

template <typename T, typename C>
__global__ void kv_append(const T* __restrict__ x, const i32* __restrict__ slot_mapping, C* __restrict__ k,
                          C* __restrict__ v, int w, int H, int S, int D) {
    const bool vectorized = D % 8 == 0 && w % 8 == 0 && aligned(x, k, v);
    x += i64(blockIdx.x) * w + w - 2 * H * D;
    const int page = slot_mapping[blockIdx.x] / S, place = slot_mapping[blockIdx.x] % S;
    if (vectorized)
        append<8>(x, k, v, page, place, H, S, D);
    else
        append<1>(x, k, v, page, place, H, S, D);
}
