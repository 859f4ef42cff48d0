// Random numbers by counter: Philox 4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).
#ifndef CUPLAMA_PHILOX_CUH
#define CUPLAMA_PHILOX_CUH

#include "common.cuh"

// Four random words, of the counter (block, position, 0, 0) and the key `seed`.
__device__ __forceinline__ void philox(u32 block, u32 position, u64 seed, u32 (&word)[4]) {
    u32 c0 = block, c1 = position, c2 = 0, c3 = 0, k0 = u32(seed), k1 = u32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const u32 high0 = __umulhi(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
        const u32 high1 = __umulhi(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

#endif
