// TEMPORARY stand-in for the file of the same name.
#ifndef CUPLAMA_FORMATS_CUH
#define CUPLAMA_FORMATS_CUH

#include "mma.cuh"

template <int BITS, int BIAS>
struct Whole {
    static constexpr int bits = BITS;
};
template <int GROUP_, typename S_, bool ZERO_, bool OFFSET_>
struct Direct {
    typedef S_ S;
    static constexpr int GROUP = GROUP_;
    static constexpr bool ZERO = ZERO_, OFFSET = OFFSET_;
};

__device__ __forceinline__ u32 pair_minus(u32 bits, float by, bf16) {
    __nv_bfloat162 x;
    memcpy(&x, &bits, 4);
    x = __hsub2(x, __float2bfloat162_rn(by));
    memcpy(&bits, &x, 4);
    return bits;
}
__device__ __forceinline__ u32 pair_minus(u32 bits, float by, f16) {
    __half2 x;
    memcpy(&x, &bits, 4);
    x = __hsub2(x, __float2half2_rn(by));
    memcpy(&bits, &x, 4);
    return bits;
}
template <typename T>
struct Magic;
template <>
struct Magic<bf16> {
    static constexpr u32 bits = 0x43004300;
    static constexpr float value = 128;
};
template <>
struct Magic<f16> {
    static constexpr u32 bits = 0x64006400;
    static constexpr float value = 1024;
};

template <typename Code, typename Scales>
struct Packed;

template <int BIAS, typename Scales>
struct Packed<Whole<4, BIAS>, Scales> {
    static constexpr int GROUP = Scales::GROUP, GROUPS = GROUP ? 128 / GROUP : 0, CODES = 1024;
    static constexpr bool OFFSET = Scales::OFFSET;
    static constexpr int BYTES =
        CODES + 16 * GROUPS * (int(sizeof(typename Scales::S)) * (1 + OFFSET) + Scales::ZERO);
    unsigned char bytes[BYTES];
};

// Half a block's codes of a lane: 4 chunks.
template <typename W>
struct Half {
    uint4 v;
    __device__ __forceinline__ Half() {}
    __device__ __forceinline__ Half(const unsigned char* block, int half)
        : v(reinterpret_cast<const uint4*>(block)[half * 32 + threadIdx.x % 32]) {}
    template <typename T>
    __device__ __forceinline__ void fragment(int c, u32 (&a)[4], T) const {
        const u32 word = c == 0 ? v.x : c == 1 ? v.y : c == 2 ? v.z : v.w;
#pragma unroll
        for (int i = 0; i < 4; i++)
            a[i] = pair_minus((word >> (4 * i) & 0x000f000f) | Magic<T>::bits, Magic<T>::value + 8, T());
    }
};

template <typename Code, typename Scales>
__device__ __forceinline__ void group_scale(const Packed<Code, Scales>*, const unsigned char* block, int group,
                                            float (&scale)[2], float (&offset)[2]) {
    typedef Packed<Code, Scales> W;
    typedef typename Scales::S S;
    const S* from = reinterpret_cast<const S*>(block + W::CODES) + (group * 8 + threadIdx.x % 32 / 4) * 2;
    scale[0] = to_float(from[0]), scale[1] = to_float(from[1]);
    if (Scales::OFFSET) {
        from += 16 * W::GROUPS;
        offset[0] = to_float(from[0]), offset[1] = to_float(from[1]);
    }
}

#endif
