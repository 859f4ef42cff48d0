// e4m3, the 8-bit float of weights, of activations, and of a cache of keys and values: a sign, 4 bits of exponent (bias
// 7), 3 of mantissa. How products read weights of it is in formats_codes.cuh.
//
//     s eeee mmm = (-1)^s 2^(e-7) 1.mmm; with e = 0, 2^-6 0.mmm; s 1111 111 is NaN; no infinities, at most 448
//
// Micikevicius et al., "FP8 formats for deep learning", arXiv:2209.05433. From sm_89 on there are instructions for it
// (ptx.cuh); before, bits are shifted. A NaN is read as 480 there, as its neighbours in the table suggest: that a model
// computes NaN shows in its queries, and so in its outputs, all the same.
#ifndef CUPLAMA_E4M3_CUH
#define CUPLAMA_E4M3_CUH

#include "common.cuh"
#include "ptx.cuh"

struct e4m3 {
    unsigned char bits;
};

template <typename A, typename B>
constexpr bool same_type = false;
template <typename A>
constexpr bool same_type<A, A> = true;

template <bool FIRST, typename A, typename B>
struct Choose {
    typedef A Type;
};
template <typename A, typename B>
struct Choose<false, A, B> {
    typedef B Type;
};

// ---- to e4m3: to nearest, ties to even; what is too large becomes 448, NaN stays NaN --------------------------------

__device__ __forceinline__ u32 e4m3_bits(float x) {
    const u32 bits = __float_as_uint(x), sign = bits >> 24 & 0x80u, size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return 0x7fu;
    // Below 2^-6 the unit is 2^-9, the last bit of a float near 2^14: the addition rounds.
    if (size < 0x3c800000u) return sign | (__float_as_uint(__uint_as_float(size) + 16384.f) - 0x46800000u);
    const u32 rounded = (size + 0x7ffffu + (size >> 20 & 1u)) >> 20;  // exponent, with f32's bias of 127, and 3 bits
    return sign | min(rounded - (120u << 3), 0x7eu);
}

// Two numbers in 16 bits, the first in the lower half.
__device__ __forceinline__ u32 e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
    return e4m3x2_from_f32(low, high);
#else
    return e4m3_bits(low) | e4m3_bits(high) << 8;
#endif
}

// W elements as a cache of C holds them: as they are if that is their own type.
template <typename C, typename T, int W>
__device__ __forceinline__ Pack<C, W> narrow(const Pack<T, W>& x) {
    if constexpr (same_type<C, T>) {
        return x;
    } else {
        Pack<C, W> out;
#pragma unroll
        for (int i = 0; i < W; i += 2) {
            const u32 both = e4m3_pair(to_float(x.v[i]), i + 1 < W ? to_float(x.v[i + 1]) : 0.f);
            out.v[i].bits = both & 0xffu;
            if (i + 1 < W) out.v[i + 1].bits = both >> 8;
        }
        return out;
    }
}

// ---- from e4m3, exactly ---------------------------------------------------------------------------------------------

// Two numbers, in the upper byte of each half, as f16: its exponent has a bias of 15, so shifted bits are 2^8 too
// small, denormals too.
__device__ __forceinline__ u32 shifted_e4m3(u32 x) {
    const u32 bits = (x & 0x80008000u) | (x & 0x7f007f00u) >> 1;
    const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.f));
    return *reinterpret_cast<const u32*>(&scaled);
}

// Four numbers as f16, the first in the lower half of `low`.
__device__ __forceinline__ void widen_e4m3(u32 x, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
    e4m3x4_to_f16(x, low, high);
#else
    low = shifted_e4m3(__byte_perm(x, 0, 0x1404)), high = shifted_e4m3(__byte_perm(x, 0, 0x3424));
#endif
}

// W elements of a cache as to_float takes them: e4m3 as f32, others as they are.
template <typename C, int W>
__device__ __forceinline__ const Pack<C, W>& readable(const Pack<C, W>& x) {
    return x;
}
template <int W>
__device__ __forceinline__ Pack<f32, W> readable(const Pack<e4m3, W>& x) {
    static_assert(W % 4 == 0);
    Pack<f32, W> out;
#pragma unroll
    for (int i = 0; i < W; i += 4) {
        u32 half[2];
        widen_e4m3(*reinterpret_cast<const u32*>(x.v + i), half[0], half[1]);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float2 two = __half22float2(*reinterpret_cast<const __half2*>(half + j));
            out.v[i + 2 * j] = two.x, out.v[i + 2 * j + 1] = two.y;
        }
    }
    return out;
}

#endif
