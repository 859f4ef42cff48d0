// The gates of a gated delta rule and its unit vectors, which both ways to compute it share.
#ifndef CUPLAMA_GATED_DELTA_CUH
#define CUPLAMA_GATED_DELTA_CUH

#include "common.cuh"
#include "ptx.cuh"

__device__ __forceinline__ float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }

// What a vector with that sum of squares is multiplied with.
__device__ __forceinline__ float unit(float squares) { return 1.f / sqrtf(squares + 1e-6f); }

// What a value head has of its own.
struct Head {
    float rate, shift;  // -exp(A_log), dt_bias

    __device__ __forceinline__ Head(const f32* A_log, const f32* dt_bias, int head)
        : rate(-expf(A_log[head])), shift(dt_bias[head]) {}

    // The logarithm of what the state is multiplied with, of a token's a. From 20 on log(1 + exp(x)) is x.
    __device__ __forceinline__ float log_decay(float a) const {
        const float x = a + shift;
        return rate * (x > 20.f ? x : log1pf(expf(x)));
    }
};

#endif
