// pack_codes  blocks = the codes of a quantised weight [m,k], from a checkpoint's bytes; a block: 16 rows, 128 columns
// pack_part   blocks = what goes with them (scale, zero, ...), a number for each row and group of columns
//
// cuplama/quant/packed.py says what a block holds, and its `pack` is what both compute, bit for bit. Where a number
// lies is a sum, as cuplama/quant/fields.py has it: that of (row, column) begins at bit rows[row] + columns[column] of
// `raw`. A number has up to four planes, each with tables of its own, the lowest bits first. The tables lie in `raw`
// too, behind the checkpoint's bytes; their places there are the arguments `rows`, `columns` and `part`, in bytes:
//   rows i64 [planes, m], columns i64 [planes, parts, k], part i32 [m]: which table of columns a row has. A stack of
//   tensors (q, k and v in one weight) is parts whose columns lie differently.
// Rows and columns beyond the matrix are zero bytes.
//
// Mapping: pack_codes: a warp writes a block, lane by lane as a product reads it; the 8 warps of a thread block take 8
// blocks of rows one below the other, because the words of AWQ and GPTQ run along them. pack_part: a thread has a
// number, in the order of the blocks.
//
// Launched by cuplama/backends/cuda/loading.py. Test: tests/backends/cuda/test_loading.py. Benchmark:
// benchmarks/packed_loading.py.
// Tried: nothing else yet.
#include "common.cuh"

// A field of the weight: where its numbers lie, and what they are made of. widths: the bits of each plane, 8 bits for
// each, the lowest plane first; flip, add: as in fields.py.
struct Field {
    const u8* raw;
    i64 rows, columns, part;
    u32 widths, flip, add;
    int m, k, parts;
};

// A row of a field: its entry in the first plane's table of rows, and its part's in the table of columns. There is none
// beyond the matrix.
struct Line {
    const i64 *row, *columns;
    bool there;
};

__device__ __forceinline__ Line line_of(const Field& f, int row) {
    const bool there = row < f.m;
    const i64 part = there ? reinterpret_cast<const i32*>(f.raw + f.part)[row] : 0;
    return {reinterpret_cast<const i64*>(f.raw + f.rows) + row,
            reinterpret_cast<const i64*>(f.raw + f.columns) + part * f.k, there};
}

// The bits from bit `at` on; less than a byte lies within one, more begins at one.
__device__ __forceinline__ u32 bits_at(const u8* raw, i64 at, int bits) {
    const u8* byte = raw + (at >> 3);
    if (bits < 8) return u32(*byte) >> (at & 7) & ((1u << bits) - 1);
    u32 found = *byte;
    if (bits > 8) found |= u32(byte[1]) << 8;
    if (bits > 16) found |= u32(byte[2]) << 16 | u32(byte[3]) << 24;
    return found;
}

// Of two lines the numbers in columns `column` to column + COLUMNS - 1, found[line][column]; 0 beyond the matrix.
template <int LINES, int COLUMNS>
__device__ __forceinline__ void gather(const Field& f, const Line (&lines)[LINES], int column,
                                       u32 (&found)[LINES][COLUMNS]) {
    int shift = 0;
    i64 row = 0, columns = column;  // of a plane's tables
#pragma unroll 1
    for (u32 widths = f.widths; widths; widths >>= 8) {
        const int bits = widths & 255;
#pragma unroll
        for (int line = 0; line < LINES; line++) {
            const i64 begin = lines[line].there ? lines[line].row[row] : 0;
#pragma unroll
            for (int i = 0; i < COLUMNS; i++)
                if (lines[line].there && column + i < f.k)
                    found[line][i] |= bits_at(f.raw, begin + lines[line].columns[columns + i], bits) << shift;
        }
        shift += bits;
        row += f.m;
        columns += i64(f.parts) * f.k;
    }
    const u32 mask = 0xffffffffu >> (32 - shift);
#pragma unroll
    for (int line = 0; line < LINES; line++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++)
            if (lines[line].there && column + i < f.k) found[line][i] = ((found[line][i] ^ f.flip) + f.add) & mask;
}

// The words of a chunk of 16 columns, of which a lane has four in rows r and r + 8, as lane_codes of packed.py makes
// them. Of codes of 5 and 6 bits these are the lower four.
template <int BITS>
__device__ __forceinline__ void chunk_words(const u32 (&codes)[2][4], u32* words) {
    if constexpr (BITS <= 6) words[0] = 0;
    if constexpr (BITS == 8) words[0] = words[1] = 0;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int pair = i / 2, element = i % 2, number = 2 * pair + half;  // of an mma's registers
            if constexpr (BITS <= 6) words[0] |= (codes[half][i] & 15) << (4 * number + 16 * element);
            if constexpr (BITS == 8) words[half] |= codes[half][i] << (8 * pair + 16 * element);
            if constexpr (BITS == 16) words[number] = element ? words[number] | codes[half][i] << 16 : codes[half][i];
            if constexpr (BITS == 32) words[4 * half + i] = codes[half][i];
        }
}

// What codes of more than four bits have above them, in a chunk: bit HIGH * number + 16 * element on.
template <int HIGH>
__device__ __forceinline__ u32 chunk_above(const u32 (&codes)[2][4]) {
    u32 word = 0;
#pragma unroll
    for (int half = 0; half < 2; half++)
#pragma unroll
        for (int i = 0; i < 4; i++) word |= codes[half][i] >> 4 << (HIGH * (i / 2 * 2 + half) + i % 2 * 16);
    return word;
}

template <int BITS>
__global__ void __launch_bounds__(256, 4)
    pack_codes(u8* __restrict__ blocks, const u8* __restrict__ raw, i64 rows, i64 columns, i64 part, u32 widths,
               u32 flip, u32 add, int m, int k, int parts, int block_bytes) {
    constexpr int EACH = BITS <= 6 ? 1 : BITS / 4;  // words of a chunk
    constexpr int STEP = EACH >= 4 ? 1 : 4 / EACH;  // chunks whose words are stored together: whole vectors
    constexpr int HIGH = BITS <= 6 ? BITS - 4 : 0;  // bits of a code that lie apart
    const int lane = threadIdx.x % WARP, row_block = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    const int first = row_block * 16 + lane / 4;
    if (row_block * 16 >= m) return;
    const Field field{raw, rows, columns, part, widths, flip, add, m, k, parts};
    const Line lines[2] = {line_of(field, first), line_of(field, first + 8)};
    u8* block = blocks + (i64(row_block) * gridDim.y + blockIdx.y) * block_bytes;
    for (int chunk = 0; chunk < 8; chunk += STEP) {
        alignas(16) u32 words[STEP * EACH];
        u32 high[HIGH + 1] = {};
#pragma unroll
        for (int i = 0; i < STEP; i++) {
            u32 codes[2][4] = {};
            gather(field, lines, blockIdx.y * 128 + (chunk + i) * 16 + lane % 4 * 4, codes);
            chunk_words<BITS>(codes, words + i * EACH);
            if constexpr (HIGH > 0) high[i * HIGH / 4] |= chunk_above<HIGH>(codes) << (4 * HIGH * (i % (4 / HIGH)));
        }
#pragma unroll
        for (int i = 0; i < STEP * EACH; i += 4) {
            const int vector = (chunk * EACH + i) / 4;
            const Pack<u32, 4> four{words[i], words[i + 1], words[i + 2], words[i + 3]};
            store<4>(reinterpret_cast<u32*>(block) + (vector * WARP + lane) * 4, four);
        }
        if constexpr (HIGH > 0) {
            u32* above = reinterpret_cast<u32*>(block + 1024) + lane * 2 * HIGH + chunk / 4 * HIGH;
#pragma unroll
            for (int i = 0; i < HIGH; i++) above[i] = high[i];
        }
    }
}

// offset: of the part's numbers of the first block, and stride: from one block to the next, in bytes; each: numbers of
// a row of a block; wide: blocks side by side; paired: rows r and r + 8 are neighbours, else rows lie in their order.
template <int BYTES>
__global__ void __launch_bounds__(256)
    pack_part(u8* __restrict__ blocks, const u8* __restrict__ raw, i64 rows, i64 columns, i64 part, u32 widths,
              u32 flip, u32 add, int m, int k, int parts, i64 offset, int stride, int each, int wide, int paired) {
    const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int place = i % 16, group = i / 16 % each;
    const i64 block = i / 16 / each;
    const int row = int(block / wide) * 16 + (paired ? place / 2 + place % 2 * 8 : place);
    if (block / wide * 16 >= m) return;
    const Field field{raw, rows, columns, part, widths, flip, add, m, k, parts};
    const Line lines[1] = {line_of(field, row)};
    u32 numbers[1][1] = {};
    gather(field, lines, int(block % wide) * each + group, numbers);
    const u32 found = numbers[0][0];
    u8* to = blocks + offset + block * stride + (group * 16 + place) * BYTES;
    if constexpr (BYTES == 1) *to = found;
    if constexpr (BYTES == 2) *reinterpret_cast<unsigned short*>(to) = found;
    if constexpr (BYTES == 4) *reinterpret_cast<u32*>(to) = found;
}
