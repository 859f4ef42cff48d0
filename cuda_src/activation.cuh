// The activations of one element, in f32; formulas and reasons are in activation.cu.
#ifndef CUPLAMA_ACTIVATION_CUH
#define CUPLAMA_ACTIVATION_CUH

enum Act { NO_ACT, SILU_MUL, GELU_TANH, GELU_ERF };  // behind a product

__device__ __forceinline__ float silu_of(float x) { return x / (1.f + expf(-x)); }

__device__ __forceinline__ float gelu_tanh_of(float x) {
    const float a = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x / (1.f + expf(-2.f * a));
}

__device__ __forceinline__ float gelu_erf_of(float x) { return 0.5f * x * erfcf(x * -0.7071067812f); }

#endif
