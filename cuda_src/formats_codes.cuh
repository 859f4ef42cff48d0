// The codes of packed weights: where they lie in a block, and what they stand for. See formats.cuh.
#ifndef CUPLAMA_FORMATS_CODES_CUH
#define CUPLAMA_FORMATS_CODES_CUH

#include "common.cuh"
#include "ptx.cuh"

typedef signed char i8;

// A power of two, 2^(bits - 127): the exponent of an f32, whose smallest, 2^-127, is below the normal numbers and
// counts as 0. 255 stands for no number.
struct e8m0 {
    u8 bits;
};

constexpr int BLOCK_ROWS = 16, BLOCK_COLUMNS = 128, CHUNK_COLUMNS = 16, BLOCK_CHUNKS = BLOCK_COLUMNS / CHUNK_COLUMNS;

// ---- pairs of 16-bit floats in a register ---------------------------------------------------------------------------
template <typename T>
struct Two;
template <>
struct Two<f16> {
    typedef __half2 type;
};
template <>
struct Two<bf16> {
    typedef __nv_bfloat162 type;
};

template <typename T>
__device__ __forceinline__ typename Two<T>::type as_two(u32 bits) {
    typename Two<T>::type two;
    memcpy(&two, &bits, 4);
    return two;
}
template <typename T>
__device__ __forceinline__ u32 subtract_two(u32 a, u32 b) {
    const typename Two<T>::type two = __hsub2(as_two<T>(a), as_two<T>(b));
    u32 bits;
    memcpy(&bits, &two, 4);
    return bits;
}
template <typename T>
__device__ __forceinline__ u32 multiply_two(u32 a, u32 b) {
    const typename Two<T>::type two = __hmul2(as_two<T>(a), as_two<T>(b));
    u32 bits;
    memcpy(&bits, &two, 4);
    return bits;
}
template <typename T>
__device__ __forceinline__ u32 multiply_add_two(u32 a, u32 b, u32 c) {
    const typename Two<T>::type two = __hfma2(as_two<T>(a), as_two<T>(b), as_two<T>(c));
    u32 bits;
    memcpy(&bits, &two, 4);
    return bits;
}

// A number of T in both halves of a register.
template <typename T>
__device__ __forceinline__ u32 twice(float number) {
    const T rounded = from_float<T>(number);
    unsigned short bits;
    memcpy(&bits, &rounded, 2);
    return bits * 0x10001u;
}

template <typename T>
constexpr bool IS_F16 = false;
template <>
constexpr bool IS_F16<f16> = true;

// Bits moved up, or down if by is negative.
__device__ __forceinline__ u32 moved(u32 bits, int by) { return by >= 0 ? bits << by : bits >> -by; }

// A whole number below 2^23 as f32: what is behind a 1 in the mantissa of 2^23.
__device__ __forceinline__ float whole_float(u32 number) { return __int_as_float(0x4b000000u | number) - 8388608.f; }

// ---- the codes of a block -------------------------------------------------------------------------------------------
// A lane's share, as it lies in memory: word c of `low` is that of chunk c (two words of 8 bits, four of 16, eight of
// 32). Of 5 and 6 bits `high` has what is above the fourth.
template <int BITS>
struct LaneWords {
    static constexpr int LOW = BITS <= 6 ? 8 : 2 * BITS, HIGH = BITS == 6 ? 4 : BITS == 5 ? 2 : 0;
    static constexpr int CHUNKS = BITS == 6 ? 2 : 4;  // of a word of `high`
    static constexpr u32 HIGH_MASK = BITS == 6 ? 3 : 1;
    u32 low[LOW], high[HIGH > 0 ? HIGH : 1];

    // Where in its word of `high` the bits of the first element of register i begin; those of the second are 16 on.
    static __device__ __forceinline__ int high_place(int chunk, int i) {
        constexpr int MORE = BITS == 6 ? 2 : 1;
        return 4 * MORE * (chunk % CHUNKS) + MORE * i;
    }

    // Which word of `low` has an element of register i of a chunk, and at which bit.
    static __device__ __forceinline__ int word(int chunk, int i, int second) {
        if constexpr (BITS <= 6) return chunk;
        return BITS == 8    ? 2 * chunk + i % 2
               : BITS == 16 ? 4 * chunk + i
                            : 8 * chunk + 4 * (i % 2) + i / 2 * 2 + second;
    }
    static __device__ __forceinline__ int bit(int i, int second) {
        if constexpr (BITS <= 6) return 4 * i + 16 * second;
        return BITS == 8 ? 8 * (2 * second + i / 2) : BITS == 16 ? 16 * second : 0;
    }
    // The code in that word, and in that of `high`.
    static __device__ __forceinline__ u32 code(u32 low, u32 high, int chunk, int i, int second) {
        constexpr u32 MASK = BITS <= 6 ? 15u : 0xffffffffu >> (32 - BITS);
        const u32 found = low >> bit(i, second) & MASK;
        if constexpr (HIGH == 0) return found;
        return found | (high >> (high_place(chunk, i) + 16 * second) & HIGH_MASK) << 4;
    }
    __device__ __forceinline__ u32 code(int chunk, int i, int second) const {
        return code(low[word(chunk, i, second)], high[HIGH > 0 ? chunk / CHUNKS : 0], chunk, i, second);
    }
};

template <int BITS>
struct Codes {
    u8 bytes[BLOCK_ROWS * BLOCK_COLUMNS / 8 * BITS];

    // Where the low bits end, which vectors of 16 bytes hold.
    static constexpr int LOW_BYTES = LaneWords<BITS>::LOW * 4 * WARP;

    __device__ __forceinline__ LaneWords<BITS> lane(int lane) const {
        typedef LaneWords<BITS> Words;
        Words words;
        const uint4* vectors = reinterpret_cast<const uint4*>(bytes) + lane;
#pragma unroll
        for (int v = 0; v < Words::LOW / 4; v++) {
            const uint4 bits = vectors[v * WARP];
            memcpy(words.low + 4 * v, &bits, 16);
        }
        if constexpr (Words::HIGH == 4) {
            const uint4 bits = reinterpret_cast<const uint4*>(bytes + LOW_BYTES)[lane];
            memcpy(words.high, &bits, 16);
        } else if constexpr (Words::HIGH == 2) {
            const uint2 bits = reinterpret_cast<const uint2*>(bytes + LOW_BYTES)[lane];
            memcpy(words.high, &bits, 8);
        }
        return words;
    }

    // The code of an element, whichever thread asks for it.
    __device__ __forceinline__ u32 code(int row, int column) const {
        typedef LaneWords<BITS> Words;
        const int lane = row % 8 * 4 + column % 16 / 4, chunk = column / 16;
        const int i = column % 4 / 2 * 2 + row / 8, second = column % 2, at = Words::word(chunk, i, second);
        const u32 low = reinterpret_cast<const u32*>(bytes)[(at / 4 * WARP + lane) * 4 + at % 4];
        u32 high = 0;
        if constexpr (Words::HIGH > 0)
            high = reinterpret_cast<const u32*>(bytes + LOW_BYTES)[lane * Words::HIGH + chunk / Words::CHUNKS];
        return Words::code(low, high, chunk, i, second);
    }
};

// Whole numbers 0 .. 2^BITS - 1, less BIAS.
template <int BITS_, int BIAS>
struct Whole : Codes<BITS_> {
    static constexpr int BITS = BITS_;
    static constexpr bool ZEROS = BIAS == 0;
    typedef LaneWords<BITS> Words;

    static __device__ __forceinline__ float number(u32 code) {
        return __int_as_float(0x4b000000u | code) - (8388608.f + BIAS);
    }

    // What `fragment` takes off a code of row r (half 0) or r + 8 (1) for the zero point, in both halves of a register.
    template <typename T>
    static __device__ __forceinline__ u32 minus(u32 zero, int half) {
        const u32 number = zero + BIAS;
        if (BITS == 8 && !IS_F16<T>) return twice<T>(whole_float(number) - 128.f);
        if (BITS == 8) return 0x64006400u + number * 0x10001u;
        if (IS_F16<T>) return half == 0 ? 0x64006400u + number * 0x10001u : 0x54005400u + number * 0x100010u;
        return 0x43004300u + number * 0x10001u;
    }

    // A code in the mantissa of 2^p, whose last bit is worth 1 where the code's is, is 2^p + code: one logical
    // operation, and one exact subtraction of 2^p + zero. Of f16, with 10 bits, two codes fit beside each other: those
    // of row r lie at bit 0 behind 1024, those of row r + 8 at bit 4 behind 64. Of bf16, with 7 bits, one at bit 0
    // behind 128.
    template <typename T>
    static __device__ __forceinline__ void nibbles(const Words& words, int chunk, const u32 (&minus)[2], u32 (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const bool above = IS_F16<T> && i % 2 == 1;  // bit 4
            const u32 one = above ? 0x00100010u : 0x00010001u;
            const u32 magic = !IS_F16<T> ? 0x43004300u : above ? 0x54005400u : 0x64006400u;
            u32 bits = and_or(words.low[chunk] >> (IS_F16<T> ? i / 2 * 8 : 4 * i), 15u * one, magic);
            if constexpr (BITS > 4) {
                const int to = above ? 8 : 4;
                const u32 high = moved(words.high[chunk / Words::CHUNKS], to - Words::high_place(chunk, i));
                bits |= high & Words::HIGH_MASK * 0x10001u << to;
            }
            a[i] = subtract_two<T>(bits, minus[i % 2]);
        }
    }

    // Of a byte the mantissa of bf16 holds 7 bits: 128 + those, less 128 if the eighth is set, else less 256, is the
    // byte less 128. These two differ in the eighth bit alone.
    template <typename T>
    static __device__ __forceinline__ void bytes(const Words& words, int chunk, const u32 (&minus)[2], u32 (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = words.low[2 * chunk + i % 2], pair = word >> (i / 2 * 8);
            if constexpr (IS_F16<T>) {
                const u32 bits =
                    i < 2 ? and_or(word, 0x00ff00ffu, 0x64006400u) : __byte_perm(word, 0x64646464u, 0x4341);
                a[i] = subtract_two<T>(bits, minus[i % 2]);
            } else {
                a[i] =
                    subtract_two<T>(and_or(pair, 0x007f007fu, 0x43004300u), not_and_or(pair, 0x00800080u, 0x43004300u));
                if constexpr (BIAS != 128) a[i] = subtract_two<T>(a[i], minus[i % 2]);
            }
        }
    }

    // The same over 64, for 4 bits and bf16, with fewer shifts: up to 8 bits, alone in a half of a register, are that
    // number times 2^-133, from bf16's subnormal numbers into its smallest normal ones. One multiply-add takes off the
    // zero point.
    template <typename T>
    static constexpr float RAW = BITS == 4 && (BIAS == 0 || BIAS == 8) && !IS_F16<T> ? 64.f : 1.f;
    static __device__ __forceinline__ u32 raw_minus(u32 zero) {
        if (BIAS == 8) return 0xbe00be00u;                        // -8 / 64
        return multiply_two<bf16>(zero * 0x10001u, 0xff00ff00u);  // by -2^127
    }
    static __device__ __forceinline__ void raw(const Words& words, int chunk, const u32 (&minus)[2], u32 (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 bits = words.low[chunk] >> (i / 2 * 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
            a[i] = multiply_add_two<bf16>(bits, i % 2 == 0 ? 0x7f007f00u : 0x7d007d00u, minus[i % 2]);  // 2^127, 2^123
        }
    }

    template <typename T>
    static __device__ __forceinline__ void fragment(const Words& words, int chunk, const u32 (&minus)[2], u32 (&a)[4]) {
        if constexpr (BITS == 8)
            bytes<T>(words, chunk, minus, a);
        else
            nibbles<T>(words, chunk, minus, a);
    }
};

// What is not whole has no zero point. Where codes become numbers by a product anyway, `times` is `fragment` with other
// factors, of rows r and r + 8.
struct NoMinus {
    static constexpr bool ZEROS = false;
    template <typename T>
    static constexpr float RAW = 1.f;
    template <typename T>
    static __device__ __forceinline__ u32 minus(u32, int) {
        return 0;
    }
};

// 8-bit floats: a sign, 4 bits of exponent, 3 of mantissa.
struct E4m3 : Codes<8>, NoMinus {
    static constexpr int BITS = 8;
    typedef LaneWords<8> Words;

    // By way of f16, whose exponents count from 8 less: f32 has no denormals here.
    static __device__ __forceinline__ float number(u32 code) {
        const unsigned short bits = (code & 0x80u) << 8 | (code & 0x7fu) << 7;
        f16 x;
        memcpy(&x, &bits, 2);
        return to_float(x) * 256.f;
    }

    // Exponent and mantissa go to where those of T begin to count; the product makes up for the exponents' bias.
    template <typename T>
    static __device__ __forceinline__ void fragment(const Words& words, int chunk, const u32 (&)[2], u32 (&a)[4]) {
        constexpr int UP = IS_F16<T> ? 7 : 4;                          // of the seven bits
        constexpr u32 FACTOR = IS_F16<T> ? 0x5c005c00u : 0x7b807b80u;  // 2^8, 2^120
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = words.low[2 * chunk + i % 2], sign = i < 2 ? word << 8 : word;
            const u32 rest = i < 2 ? (word & 0x007f007fu) << UP : (word & 0x7f007f00u) >> (8 - UP);
            a[i] = multiply_two<T>((sign & 0x80008000u) | rest, FACTOR);
        }
    }
};

// 4-bit floats: a sign, 2 bits of exponent, 1 of mantissa.
struct E2m1 : Codes<4>, NoMinus {
    static constexpr int BITS = 4;
    typedef LaneWords<4> Words;

    static __device__ __forceinline__ float number(u32 code) {
        const unsigned short bits = (code & 8u) << 12 | (code & 7u) << 9;
        f16 x;
        memcpy(&x, &bits, 2);
        return to_float(x) * 16384.f;
    }

    // As of E4m3: the sign to the highest bit, the other three to where exponent and mantissa of T meet. In bf16 a product
    // takes a code to both places, which do not overlap: one instruction in place of two, and on another pipe than logic.
    template <typename T>
    static __device__ __forceinline__ void times(const Words& words, int chunk, const u32 (&factor)[2], u32 (&a)[4]) {
        constexpr int UP = IS_F16<T> ? 9 : 6;  // of the three bits
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 word = words.low[chunk];
            u32 bits;
            if constexpr (IS_F16<T>) {
                const u32 rest = moved(word, UP - 4 * i) & 0x00070007u << UP;
                bits = and_or(word << (12 - 4 * i), 0x80008000u, rest);
            } else {
                const u32 code = (i < 2 ? word : word >> 8) & (i % 2 == 0 ? 0x000f000fu : 0x00f000f0u);
                bits = code * (i % 2 == 0 ? 1u << UP | 1u << 12 : 1u << (UP - 4) | 1u << 8);
                bits &= 0x80008000u | 0x00070007u << UP;
            }
            a[i] = multiply_two<T>(bits, factor[i % 2]);
        }
    }
    template <typename T>
    static constexpr u32 ONE = IS_F16<T> ? 0x74007400u : 0x7e807e80u;  // 2^14, 2^126: the factor of a number itself
    template <typename T>
    static __device__ __forceinline__ void fragment(const Words& words, int chunk, const u32 (&)[2], u32 (&a)[4]) {
        times<T>(words, chunk, {ONE<T>, ONE<T>}, a);
    }
};

// Quantiles of a normal distribution; see quant/format.py.
__constant__ const float NF4_NUMBERS[16] = {-1.0f,
                                            -0.6961928009986877f,
                                            -0.5250730514526367f,
                                            -0.39491748809814453f,
                                            -0.28444138169288635f,
                                            -0.18477343022823334f,
                                            -0.09105003625154495f,
                                            0.0f,
                                            0.07958029955625534f,
                                            0.16093020141124725f,
                                            0.24611230194568634f,
                                            0.33791524171829224f,
                                            0.44070982933044434f,
                                            0.5626170039176941f,
                                            0.7229568362236023f,
                                            1.0f};

struct Nf4 : Codes<4>, NoMinus {
    static constexpr int BITS = 4;
    typedef LaneWords<4> Words;

    static __device__ __forceinline__ float number(u32 code) { return NF4_NUMBERS[code]; }

    // The numbers of four codes, rounded to T: their lower bytes and their upper ones. The table is in eight registers:
    // lower bytes of the numbers 0 .. 7, upper ones, and both of 8 .. 15. codes, upper: at bits 0, 4, 8 and 12 three
    // bits of a code, and 1 where its fourth is set.
    template <typename T>
    static __device__ __forceinline__ void look_up(u32 codes, u32 upper, u32 (&number)[2]) {
        constexpr u32 TABLE[2][2][4] = {{{0x52339200u, 0x00d4ea8du, 0xb6b8b9bcu, 0x00adb1b4u},
                                         {0x68e02618u, 0x00c9800du, 0x3533312du, 0x3c393837u}},
                                        {{0xca063280u, 0x00ba3d92u, 0xbebfbfbfu, 0x00bdbebeu},
                                         {0xad7c25a3u, 0x803910e2u, 0x3e3e3e3du, 0x3f3f3f3eu}}};
        constexpr int t = IS_F16<T> ? 0 : 1;
        const u32 mask = __byte_perm(0xff00u, 0, upper);
#pragma unroll
        for (int b = 0; b < 2; b++) {
            const u32 low = __byte_perm(TABLE[t][0][2 * b], TABLE[t][0][2 * b + 1], codes);
            const u32 high = __byte_perm(TABLE[t][1][2 * b], TABLE[t][1][2 * b + 1], codes);
            number[b] = (low & ~mask) | (high & mask);
        }
    }

    template <typename T>
    static __device__ __forceinline__ void fragment(const Words& words, int chunk, const u32 (&)[2], u32 (&a)[4]) {
        const u32 word = words.low[chunk], codes = word & 0x77777777u, upper = word >> 3 & 0x11111111u;
        u32 first[2], second[2];  // elements of the registers
        look_up<T>(codes, upper, first);
        look_up<T>(codes >> 16, upper >> 16, second);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const u32 both = i == 0 ? 0x5140 : 0x7362;  // lower and upper bytes of two numbers, side by side
            const u32 x = __byte_perm(first[0], first[1], both), y = __byte_perm(second[0], second[1], both);
            a[i] = __byte_perm(x, y, 0x5410), a[i + 1] = __byte_perm(x, y, 0x7632);
        }
    }
};

// One float of 16 or 32 bits an element.
template <typename S>
struct Plain : Codes<8 * sizeof(S)>, NoMinus {
    static constexpr int BITS = 8 * sizeof(S);
    typedef LaneWords<BITS> Words;

    static __device__ __forceinline__ float number(u32 code) {
        S x;
        memcpy(&x, &code, sizeof(S));
        return to_float(x);
    }

    template <typename T>
    static __device__ __forceinline__ void fragment(const Words& words, int chunk, const u32 (&)[2], u32 (&a)[4]) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (BITS == 16 && IS_F16<T> == IS_F16<S>) {
                a[i] = words.low[4 * chunk + i];
            } else {
                const T x[2] = {from_float<T>(number(words.code(chunk, i, 0))),
                                from_float<T>(number(words.code(chunk, i, 1)))};
                memcpy(&a[i], x, 4);
            }
        }
    }
};

#endif
