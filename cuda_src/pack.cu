// pack_codes   the codes of a quantised weight [m,k], out of the bytes of a checkpoint into blocks of 16 rows x 128 columns
// pack_part    what goes with them (scale, zero, ...), one number for each row and group of columns, into the same blocks
//
// cuplama/quant/packed.py says what a block holds, and its `pack` is what both compute, bit for bit. Where a number lies
// is a sum, as cuplama/quant/fields.py has it: those of (row, column) begin at bit rows[row] + columns[column] of `raw`.
// A number has up to four planes, each with tables of its own, the lowest bits first. The tables lie in `raw` too, behind
// the checkpoint's bytes; their places there are the arguments `rows`, `columns` and `part`, in bytes:
//   rows i64 [planes, m], columns i64 [planes, parts, k], part i32 [m]: which table of columns a row has. A stack of
//   tensors (q, k and v in one weight) is parts whose columns lie differently.
// Rows and columns beyond the matrix are zero bytes.
//
// Mapping: pack_codes: a warp writes a block, lane by lane as a product reads it; the 8 warps of a thread block take 8
// blocks of rows one below the other, because the words of AWQ and GPTQ run along them. pack_part: a thread a number, in
// the order of the blocks.
//
// Launched by cuplama/backends/cuda/loading.py. Test: tests/backends/cuda/test_loading.py.
// Tried: nothing else yet.
#include "common.cuh"

typedef unsigned char u8;

// A field of the weight: where its numbers lie, and what they are made of. widths: the bits of each plane, 8 bits for
// each, the lowest plane first; flip, add: as in fields.py.
struct Field {
    const u8* raw;
    i64 rows, columns, part;
    u32 widths, flip, add;
    int m, k, parts;
};

// A row of a field: its entry in the first plane's table of rows, and its part's in the table of columns.
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

// The number in a column of the line, all planes together; 0 beyond the matrix.
__device__ __forceinline__ u32 number(const Field& f, const Line& line, int column) {
    if (!line.there || column >= f.k) return 0;
    u32 found = 0;
    int shift = 0;
    const i64 *row = line.row, *columns = line.columns + column;
    for (u32 widths = f.widths; widths; widths >>= 8) {
        found |= bits_at(f.raw, *row + *columns, widths & 255) << shift;
        shift += widths & 255;
        row += f.m;
        columns += i64(f.parts) * f.k;
    }
    return ((found ^ f.flip) + f.add) & (0xffffffffu >> (32 - shift));
}

// What a lane has of one chunk of 16 columns: the two elements of each of an mma's four registers, rows r and r + 8 in
// turn. column: the lane's first.
__device__ __forceinline__ void gather(const Field& f, const Line* lines, int column, u32 (&codes)[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i] = number(f, lines[i / 2 % 2], column + i / 4 * 2 + i % 2);
}

// The words of a chunk's codes, as lane_codes of packed.py makes them; of 5 and 6 bits only the lower four.
template <int BITS, int EACH>
__device__ __forceinline__ void chunk_words(const u32 (&codes)[8], u32* words) {
    if constexpr (BITS <= 6) {
        words[0] = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) words[0] |= (codes[i] & 15) << (i / 2 * 4 + i % 2 * 16);
    } else if constexpr (BITS == 8) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32 *first = codes + 2 * half, *second = codes + 4 + 2 * half;
            words[half] = first[0] | second[0] << 8 | first[1] << 16 | second[1] << 24;
        }
    } else if constexpr (BITS == 16) {
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = codes[2 * i] | codes[2 * i + 1] << 16;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] = codes[i / 2 % 2 * 4 + i / 4 * 2 + i % 2];
    }
}

template <int BITS>
__global__ void __launch_bounds__(256) pack_codes(u8* __restrict__ blocks, const u8* __restrict__ raw, i64 rows,
                                                  i64 columns, i64 part, u32 widths, u32 flip, u32 add, int m, int k,
                                                  int parts, int block_bytes) {
    constexpr int EACH = BITS <= 6 ? 1 : BITS / 4;    // words of a chunk
    constexpr int STEP = EACH >= 4 ? 1 : 4 / EACH;    // chunks whose words are stored together: whole vectors
    constexpr int HIGH = BITS <= 6 ? BITS - 4 : 0;    // bits of a code that lie apart
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
            u32 codes[8];
            gather(field, lines, blockIdx.y * 128 + (chunk + i) * 16 + lane % 4 * 4, codes);
            chunk_words<BITS, EACH>(codes, words + i * EACH);
            if constexpr (HIGH > 0) {
                constexpr int CHUNKS = 4 / HIGH;  // of a word
#pragma unroll
                for (int j = 0; j < 8; j++)
                    high[i / CHUNKS] |= codes[j] >> 4 << (HIGH * (i % CHUNKS * 4 + j / 2) + j % 2 * 16);
            }
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

// offset: of the part's numbers of the first block, and stride: from one block to the next, in bytes; each: numbers of a
// row of a block; wide: blocks side by side; paired: rows r and r + 8 are neighbours, else rows lie in their order.
template <int BYTES>
__global__ void __launch_bounds__(256) pack_part(u8* __restrict__ blocks, const u8* __restrict__ raw, i64 rows,
                                                 i64 columns, i64 part, u32 widths, u32 flip, u32 add, int m, int k,
                                                 int parts, i64 offset, int stride, int each, int wide, int paired) {
    const i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x;
    const int place = i % 16, group = i / 16 % each;
    const i64 block = i / 16 / each;
    const int row = int(block / wide) * 16 + (paired ? place / 2 + place % 2 * 8 : place);
    if (block / wide * 16 >= m) return;
    const Field field{raw, rows, columns, part, widths, flip, add, m, k, parts};
    const u32 found = number(field, line_of(field, row), int(block % wide) * each + group);
    u8* to = blocks + offset + block * stride + (group * 16 + place) * BYTES;
    if constexpr (BYTES == 1) *to = found;
    if constexpr (BYTES == 2) *reinterpret_cast<unsigned short*>(to) = found;
    if constexpr (BYTES == 4) *reinterpret_cast<u32*>(to) = found;
}
