// Toy kernels of the emulator's own tests: plain execution.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
typedef __nv_bfloat16 bf16;
typedef float f32;

template <typename T, int D>
__global__ void __launch_bounds__(64) scale(const T* __restrict__ x, T* __restrict__ y, int n, float factor) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = T(float(x[i]) * factor * D);
}

__global__ void block_sum(const float* __restrict__ x, float* __restrict__ y, int n) {
  __shared__ float part[8];
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
  for (int s = 16; s > 0; s /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, s);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0;
    for (int w = 0; w < (int)blockDim.x / 32; ++w) total += part[w];
    y[blockIdx.x] = total;
  }
}
