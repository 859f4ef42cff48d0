// advance  input_ids = max(token, 0)
//          positions, seq_lens, rope_rows += 1
//          slot_mapping[i] = page_table[i, positions[i] / S] * S + positions[i] % S
//          of rows i that belong to a sequence: where seq_lens[i] is not 0
//          ring[step % R] = token; step += 1
//          input_ids, positions, slot_mapping, seq_lens, rope_rows, token [b], page_table[b,M], ring[R,b], step[1]: i32
//
// The inputs of the next decode step, made on the GPU so that no step waits for the host. The ring lies in host memory
// that the GPU can write; the host reads it once the step's event has passed.
// Mapping: one block; a thread takes every blockDim.x-th sequence.
//
// Op and reference: cuplama/ops/advance.py. Test: tests/ops/. Tried: nothing else; it is a few hundred bytes.
#include "common.cuh"

__global__ void advance(i32* __restrict__ input_ids, i32* __restrict__ positions, i32* __restrict__ slot_mapping,
                        i32* __restrict__ seq_lens, i32* __restrict__ rope_rows, i32* __restrict__ ring,
                        i32* __restrict__ step, const i32* __restrict__ token, const i32* __restrict__ page_table,
                        int b, int M, int S, int R) {
    const int now = *step;
    __syncthreads();  // every thread has read the step before one of them changes it
    for (int i = threadIdx.x; i < b; i += blockDim.x) {
        ring[i64(now % R) * b + i] = token[i];
        if (seq_lens[i] == 0) continue;
        const int at = positions[i] + 1;
        input_ids[i] = max(token[i], 0);  // -1 stands for none: the host ends the run there, some steps later
        positions[i] = at;
        seq_lens[i] += 1;
        rope_rows[i] += 1;
        slot_mapping[i] = page_table[i64(i) * M + min(at / S, M - 1)] * S + at % S;
    }
    if (threadIdx.x == 0) *step = now + 1;
}
