// hard_tanh    y[n,d] = min(max(x[n,d], -cap), cap)        x, y: f32
//
// Mapping: one long row of n * d elements, one element per thread.
//
// Op and reference: hard_tanh.py beside this file.
__global__ void __launch_bounds__(256)
    hard_tanh(const float* __restrict__ x, float* __restrict__ y, int n, int d, float cap) {
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < (long long)n * d) y[i] = fminf(fmaxf(x[i], -cap), cap);
}
