// unpack_codes  codes[16 R, 128 C] = the 8-bit codes of a packed weight, row by row     R, C: blocks of rows, of columns
// read_codes    y[unit, lane] = all words that a lane reads of its unit, combined by xor
//
// unpack_codes: what an 8-bit product of cuBLAS needs of a weight in blocks (cuplama/quant/packed.py). A block of the
// weight, 2 KB, to a warp; through shared memory, so that rows are written in pieces of 128 bytes.
// read_codes: whether a kernel of few rows could read the codes row by row as fast as in blocks. A warp has a unit, RUN
// blocks side by side, and reads them as linear_packed.cu would: a lane 16 bytes of a row, four times a block.
// Used by benchmarks/fp8_products.py alone.
#include "common.cuh"

constexpr int PITCH = 144;  // bytes between the rows of a block in shared memory: no two lanes meet in a bank

__global__ void __launch_bounds__(128)
    unpack_codes(const uint4* __restrict__ w, uint4* __restrict__ codes, int blocks, int columns) {
    __shared__ __align__(16) unsigned char rows[4][16 * PITCH];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, block = blockIdx.x * 4 + warp;
    const int r = lane / 4, t = lane % 4;
    if (block >= blocks) return;  // a whole warp
    unsigned char* mine = rows[warp];
    uint4 v[4];
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = w[i64(block) * 128 + i * WARP + lane];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
        for (int j = 0; j < 4; j++) {  // chunk 2 i + j / 2, row r or r + 8; bytes are the columns 0, 2, 1, 3
            const int row = r + 8 * (j % 2), column = (2 * i + j / 2) * 16 + 4 * t;
            *reinterpret_cast<u32*>(mine + row * PITCH + column) = __byte_perm(words[j], 0, 0x3120);
        }
    }
    __syncwarp();
    const i64 at = i64(block / columns) * 16 * columns + block % columns;  // of the block's first row, in 128 bytes
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = i * 4 + lane / 8, piece = lane % 8;
        codes[(at + i64(row) * columns) * 8 + piece] = *reinterpret_cast<uint4*>(mine + row * PITCH + piece * 16);
    }
}

template <bool ROWS, int RUN>
__global__ void __launch_bounds__(256)
    read_codes(const uint4* __restrict__ w, u32* __restrict__ y, int units, int columns) {
    constexpr int AHEAD = 4;  // blocks that a lane asks for at once
    const int lane = threadIdx.x % WARP, warps = gridDim.x * (blockDim.x / WARP);
    const int r = lane / 4, t = lane % 4, runs = columns / RUN;
    for (int unit = (blockIdx.x * blockDim.x + threadIdx.x) / WARP; unit < units; unit += warps) {
        const i64 block = i64(unit / runs) * columns + unit % runs * RUN;
        const i64 row = i64(unit / runs) * 16 * columns + unit % runs * RUN;  // in 128 bytes
        u32 sum = 0;
        for (int first = 0; first < RUN; first += AHEAD) {
            uint4 v[AHEAD][4];
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    v[j][i] = ROWS ? w[(row + i64(r + i % 2 * 8) * columns + first + j) * 8 + i / 2 * 4 + t]
                                   : w[(block + first + j) * 128 + i * WARP + lane];
            }
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) sum ^= v[j][i].x ^ v[j][i].y ^ v[j][i].z ^ v[j][i].w;
            }
        }
        y[unit * WARP + lane] = sum;
    }
}
