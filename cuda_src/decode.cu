// advance  ids = max(token, 0); pos, lengths, rows += 1; slots = blocks[i, pos / S] * S + pos % S; ring[step % R] = token; step += 1
//          ids, pos, slots, lengths, rows, token [b], blocks[b,M], ring[R,b], step[1]: i32
//
// The inputs of the next decode step, made on the GPU so that no step waits for the host. The ring lies in host memory
// that the GPU can write; the host reads it once the step's event has passed.
// Mapping: one block; a thread takes every blockDim.x-th sequence.
//
// Op and reference: cuplama/ops/decode.py. Test: tests/ops/. Tried: nothing else; it is a few hundred bytes.
#include "common.cuh"

__global__ void advance(i32* __restrict__ ids, i32* __restrict__ pos, i32* __restrict__ slots,
                        i32* __restrict__ lengths, i32* __restrict__ rows, i32* __restrict__ ring,
                        i32* __restrict__ step, const i32* __restrict__ token, const i32* __restrict__ blocks, int b,
                        int M, int S, int R) {
    const int now = *step;
    __syncthreads();  // every thread has read the step before one of them changes it
    for (int i = threadIdx.x; i < b; i += blockDim.x) {
        const int at = pos[i] + 1;
        ids[i] = max(token[i], 0);  // -1 stands for none: the host ends the run there, some steps later
        pos[i] = at;
        lengths[i] += 1;
        rows[i] += 1;
        slots[i] = blocks[i64(i) * M + min(at / S, M - 1)] * S + at % S;
        ring[i64(now % R) * b + i] = token[i];
    }
    if (threadIdx.x == 0) *step = now + 1;
}
