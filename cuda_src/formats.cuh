// Packed weights as kernels read them: what cuplama/quant/packed.py writes, taken apart.
//
// A weight is a row of blocks after the other, each of 16 rows by 128 columns (Packed). Of an element w(row, column):
//
//     w = scale * (number(code) - zero) + offset
//
// Code says how codes lie and what they stand for: Whole<BITS, BIAS>, E4m3, E2m1, Nf4, Plain<T>. Scales says what a group of
// GROUP columns of a row has in common: Direct<GROUP, S, ZERO, OFFSET>, or Nested<GROUP, S, LEAST>, whose scale is a
// product; or Unscaled, nothing. GROUP 0: a float32 scale for each whole row, behind the last block (row_scales).
//
// A lane 4 r + t of a warp owns the codes of rows r and r + 8, of each chunk of 16 columns those at 4 t .. 4 t + 3. It
// takes its share of a block with one call of `lane`, and from that, chunk by chunk,
//
//     fragment<T>   the A of mma.m16n8k16 in f16 or bf16: register i has columns 4 t + i / 2 * 2 and the next of row
//                   r + 8 (i % 2). So k is permuted: B has columns 4 t .. 4 t + 3 of the chunk, in that order, in its
//                   two registers.
//     raw           the same, but numbers are to be multiplied by RAW<T> still.
//     floats        the same eight as f32: columns 4 t .. 4 t + 3 of row r, then of row r + 8.
//
// They give number(code) - zero, before the scale. fragment is exact where T holds the number: all of Whole, E4m3 and
// E2m1 is; Nf4 is rounded to T. Nearly all of the work is in the 16-bit path, so it is counted: instructions a chunk of 8
// codes in bf16, and 8 bits of an f16's mantissa, where they are fewer:
//
//     Whole<4>  3 shifts, 4 logic, 4 packed subtractions (f16: 1 shift)     Whole<8>  2, 8, 4 (f16: 2, 4, 4)
//     Whole<6>  6, 8, 4 (f16: 5)                                            E4m3      6, 8, 4 packed products
//     Nf4       about 4, 9, and 18 byte permutations                        E2m1      7, 8, 4 packed products
//     raw: Whole<4> in bf16 1 shift, 4 logic, 4 packed multiply-adds; all others as above
//
// Shifts, logic and permutations run at half the rate of the packed arithmetic on sm_80 to sm_90.
//
// A NaN of E4m3 (0x7f, 0xff) is taken for 480, one of e8m0 for infinity, and 2^-127 for zero. Test: tests/quant/test_formats_cuh.py.
#ifndef CUPLAMA_FORMATS_CUH
#define CUPLAMA_FORMATS_CUH

#include "formats_codes.cuh"

// ---- the parts of a block, behind the codes -------------------------------------------------------------------------
// [groups][8 r][rows r and r + 8] of S; nothing if there are no groups. PART tells parts of a block apart.
struct Two32 {
    float v[2];  // of rows r and r + 8
};

template <int PART, typename S, int GROUPS>
struct Part {
    S values[GROUPS * BLOCK_ROWS];
    __device__ __forceinline__ Two32 pair(int group, int r) const {
        const Pack<S, 2> two = load<2>(values + (group * 8 + r) * 2);
        return {{part_float(two.v[0]), part_float(two.v[1])}};
    }
    static __device__ __forceinline__ float part_float(u8 x) { return whole_float(x); }
    static __device__ __forceinline__ float part_float(i8 x) { return float(x); }
    static __device__ __forceinline__ float part_float(e8m0 x) { return __int_as_float(int(x.bits) << 23); }
    template <typename F>
    static __device__ __forceinline__ float part_float(F x) {
        return to_float(x);
    }
};
template <int PART, typename S>
struct Part<PART, S, 0> {
    __device__ __forceinline__ Two32 pair(int, int) const { return {{0.f, 0.f}}; }
};

template <typename S>
constexpr bool IS_POWER = false;
template <>
constexpr bool IS_POWER<e8m0> = true;

// A scale of S for each group, and perhaps a zero point, or an offset of S.
template <int GROUP_, typename S, bool ZERO_, bool OFFSET_>
struct Direct : Part<0, S, GROUP_ == 0 ? 0 : BLOCK_COLUMNS / (GROUP_ == 0 ? 1 : GROUP_)>,
                Part<1, u8, ZERO_ ? BLOCK_COLUMNS / GROUP_ : 0>,
                Part<2, S, OFFSET_ ? BLOCK_COLUMNS / GROUP_ : 0> {
    static constexpr int GROUP = GROUP_, GROUPS = GROUP_ == 0 ? 0 : BLOCK_COLUMNS / (GROUP_ == 0 ? 1 : GROUP_);
    static constexpr bool SCALED = true, ZERO = ZERO_, OFFSET = OFFSET_, NESTED = false, POWERS = IS_POWER<S>;

    __device__ __forceinline__ Two32 scales(int group, int r) const { return Part<0, S, GROUPS>::pair(group, r); }
    __device__ __forceinline__ Two32 offsets(int group, int r) const {
        return Part < 2, S, OFFSET ? GROUPS : 0 > ::pair(group, r);
    }
    __device__ __forceinline__ Two32 inner(int group, int r) const { return scales(group, r); }
    __device__ __forceinline__ Two32 inner_offset(int group, int r) const { return offsets(group, r); }
    // Scales that are powers of two, as bf16: that of row r in the lower half of a register, that of row r + 8 above.
    __device__ __forceinline__ u32 powers(int group, int r) const {
        unsigned short bits;
        memcpy(&bits, Part<0, S, GROUPS>::values + (group * 8 + r) * 2, 2);
        return __byte_perm(bits, 0, 0x4140) << 7;
    }
    __device__ __forceinline__ u32 zero(int group, int r, int half) const {
        if constexpr (ZERO) return Part<1, u8, GROUPS>::values[(group * 8 + r) * 2 + half];
        return 0;
    }
};

// A float16 for each row of a block, times a whole number for each group; the same once more for what is taken off.
template <int GROUP_, typename S, bool LEAST>
struct Nested : Part<0, f16, 1>,
                Part<1, S, BLOCK_COLUMNS / GROUP_>,
                Part<2, f16, LEAST ? 1 : 0>,
                Part<3, u8, LEAST ? BLOCK_COLUMNS / GROUP_ : 0> {
    static constexpr int GROUP = GROUP_, GROUPS = BLOCK_COLUMNS / GROUP_;
    static constexpr bool SCALED = true, ZERO = false, OFFSET = LEAST, NESTED = true, POWERS = false;

    // The two factors of a scale and of an offset, for rows r and r + 8.
    __device__ __forceinline__ Two32 outer(int r) const { return Part<0, f16, 1>::pair(0, r); }
    __device__ __forceinline__ Two32 inner(int group, int r) const { return Part<1, S, GROUPS>::pair(group, r); }
    __device__ __forceinline__ Two32 outer_offset(int r) const {
        const Two32 a = Part < 2, f16, LEAST ? 1 : 0 > ::pair(0, r);
        return {{-a.v[0], -a.v[1]}};
    }
    __device__ __forceinline__ Two32 inner_offset(int group, int r) const {
        return Part < 3, u8, LEAST ? GROUPS : 0 > ::pair(group, r);
    }

    __device__ __forceinline__ Two32 scales(int group, int r) const {
        const Two32 a = outer(r), b = inner(group, r);
        return {{a.v[0] * b.v[0], a.v[1] * b.v[1]}};
    }
    __device__ __forceinline__ Two32 offsets(int group, int r) const {
        const Two32 a = outer_offset(r), b = inner_offset(group, r);
        return {{a.v[0] * b.v[0], a.v[1] * b.v[1]}};
    }
    __device__ __forceinline__ u32 zero(int, int, int) const { return 0; }
};

// Codes that are the numbers: a weight of a plain format that lies between packed ones.
struct Unscaled : Direct<0, f32, false, false> {
    static constexpr bool SCALED = false;
};

// ---- a block --------------------------------------------------------------------------------------------------------
template <typename Code, typename Scales>
struct alignas(16) Packed : Code, Scales {
    typedef typename Code::Words Words;
    static constexpr int GROUP = Scales::GROUP;                          // columns; 0: all of a row
    static constexpr int GROUPS = GROUP == 0 ? 1 : Scales::GROUPS;       // of a block's row
    static constexpr int GROUP_CHUNKS = BLOCK_CHUNKS / GROUPS;           // chunks of a group, within a block
    static constexpr bool ZERO = Scales::ZERO, OFFSET = Scales::OFFSET;  // whether there are some
    static constexpr bool NESTED = Scales::NESTED;                       // scales are products: outer times inner
    static constexpr bool ROW_SCALES = GROUP == 0 && Scales::SCALED;     // of whole rows, behind the last block
    static_assert(!ZERO || Code::ZEROS, "only whole numbers without a bias have zero points");

    // What `fragment` wants to know of a group's zero points, for rows r and r + 8.
    template <typename T>
    __device__ __forceinline__ void minus(int group, int r, u32 (&of)[2]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) of[half] = Code::template minus<T>(Scales::zero(group, r, half), half);
    }

    // The same and `fragment` for numbers that are multiplied by RAW<T> later: with it a sum of products is what it
    // would be with `fragment`.
    template <typename T>
    __device__ __forceinline__ void raw_minus(int group, int r, u32 (&of)[2]) const {
        if constexpr (Code::template RAW<T> == 1.f) {
            minus<T>(group, r, of);
        } else {
#pragma unroll
            for (int half = 0; half < 2; half++) of[half] = Code::raw_minus(Scales::zero(group, r, half));
        }
    }
    template <typename T>
    static __device__ __forceinline__ void raw(const Words& words, int chunk, const u32 (&minus)[2], u32 (&a)[4]) {
        if constexpr (Code::template RAW<T> == 1.f)
            Code::template fragment<T>(words, chunk, minus, a);
        else
            Code::raw(words, chunk, minus, a);
    }

    // Scales that are powers of two are exact as bf16, which has all of them, and so are their products with numbers:
    // `folded` is `fragment` times scale, over 2^32. So a scale of up to 2^33 has a product with what makes numbers of
    // codes; a larger one counts as infinite, and with one below 2^-93 numbers lose digits, or are 0.
    template <typename T>
    static constexpr bool FOLDS = Scales::POWERS && sizeof(T) == 2 && !IS_F16<T>;
    static constexpr float FOLDED = 4294967296.f;
    __device__ __forceinline__ void factors(int group, int r, u32 (&factor)[2]) const {
        const u32 both = multiply_two<bf16>(Scales::powers(group, r), Code::template ONE<bf16> - (32u << 7) * 0x10001u);
        factor[0] = __byte_perm(both, 0, 0x1010);
        factor[1] = __byte_perm(both, 0, 0x3232);
    }
    static __device__ __forceinline__ void folded(const Words& words, int chunk, const u32 (&factor)[2], u32 (&a)[4]) {
        Code::template times<bf16>(words, chunk, factor, a);
    }

    // number(code) - zero of a chunk, as f32: columns 4 t .. 4 t + 3 of row r, then of row r + 8.
    __device__ __forceinline__ void floats(const Words& words, int chunk, int r, float (&number)[8]) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float zero = ZERO ? whole_float(Scales::zero(chunk / GROUP_CHUNKS, r, half)) : 0.f;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float found = Code::number(words.code(chunk, j / 2 * 2 + half, j % 2));
                number[4 * half + j] = ZERO ? found - zero : found;
            }
        }
    }

    // An element of the weight, whichever thread asks for it. row_scale: that of its row, where whole rows have one.
    __device__ __forceinline__ float element(int row, int column, float row_scale = 1.f) const {
        const int r = row % 8, half = row / 8, group = column / CHUNK_COLUMNS / GROUP_CHUNKS;
        float found = Code::number(Code::code(row, column));
        if (ZERO) found -= whole_float(Scales::zero(group, r, half));
        if (!Scales::SCALED) return found;
        if (GROUP == 0) return found * row_scale;
        found *= Scales::scales(group, r).v[half];
        return OFFSET ? found + Scales::offsets(group, r).v[half] : found;
    }

    // Blocks of a row of blocks of a weight with k columns.
    static __device__ __forceinline__ int columns(int k) { return (k + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS; }

    // The scales of whole rows, of a weight [rows, k] of such blocks.
    static __device__ __forceinline__ const f32* row_scales(const Packed* w, int rows, int k) {
        return reinterpret_cast<const f32*>(w + i64((rows + BLOCK_ROWS - 1) / BLOCK_ROWS) * columns(k));
    }
};

#endif
