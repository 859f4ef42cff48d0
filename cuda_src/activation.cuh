// The activations of one element, in f32; formulas and reasons are in activation.cu. T: of the result. Where it has 16
// bits, exp and division are the hardware's: wrong by a few units of f32, of which rounding leaves nothing.
#ifndef CUPLAMA_ACTIVATION_CUH
#define CUPLAMA_ACTIVATION_CUH

enum Act { NO_ACT, SILU_MUL, GELU_TANH, GELU_ERF, GELU_TANH_MUL, CLAMPED_SWIGLU };  // behind a product
// Before one. ADDED: a norm behind a sublayer, and the residual stream that this is added to; ADDED_NORM: and an RMSNorm
// of that.
enum Norm { NO_NORM, RMS_NORM, LAYER_NORM, ADDED, ADDED_NORM };

// Whether an activation takes two sums, of a gate and of what it is multiplied with: w then has 2m rows, gates first.
template <int ACT>
constexpr bool GATED = ACT == SILU_MUL || ACT == GELU_TANH_MUL || ACT == CLAMPED_SWIGLU;

// Rows of w that make a column of y.
template <int ACT>
constexpr int HALVES = GATED<ACT> ? 2 : 1;

// x / (1 + exp(-y))
template <typename T>
__device__ __forceinline__ float over_one_plus_exp(float x, float y) {
    if constexpr (sizeof(T) == 2) return __fdividef(x, 1.f + __expf(-y));
    return x / (1.f + expf(-y));
}

template <typename T>
__device__ __forceinline__ float silu_of(float x) {
    return over_one_plus_exp<T>(x, x);
}

template <typename T>
__device__ __forceinline__ float gelu_tanh_of(float x) {
    return over_one_plus_exp<T>(x, 1.5957691216f * (x + 0.044715f * x * x * x));
}

template <typename T>
__device__ __forceinline__ float gelu_erf_of(float x) {
    return 0.5f * x * erfcf(x * -0.7071067812f);
}

// g / (1 + exp(-alpha g)) * (u + 1), of g no more than the limit, of u no more in size. What is not a number stays so.
template <typename T>
__device__ __forceinline__ float clamped_swiglu_of(float gate, float up, float alpha, float limit) {
    const float g = gate > limit ? limit : gate, u = up > limit ? limit : up < -limit ? -limit : up;
    return over_one_plus_exp<T>(g, alpha * g) * (u + 1.f);
}

// A float that is not a number stays none.
__device__ __forceinline__ float relu_squared_of(float x) { return x < 0.f ? 0.f : x * x; }

// The activation of an element of y: of its sum, or of those of both halves of w.
template <int ACT, typename T, int PARTS>
__device__ __forceinline__ float activated(const float (&total)[PARTS]) {
    if constexpr (ACT == SILU_MUL) return silu_of<T>(total[0]) * total[1];
    if constexpr (ACT == GELU_TANH_MUL) return gelu_tanh_of<T>(total[0]) * total[1];
    if constexpr (ACT == GELU_TANH) return gelu_tanh_of<T>(total[0]);
    if constexpr (ACT == GELU_ERF) return gelu_erf_of<T>(total[0]);
    return total[0];
}

#endif
