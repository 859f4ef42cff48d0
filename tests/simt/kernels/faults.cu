// One kernel per kind of fault that the emulator finds. With OK = true the fault is repaired and the kernel passes.
// The comment `// FAULT` marks the line that the report must name.
#include <cuda_fp16.h>

template <bool OK> __global__ void read_past_end(const float* __restrict__ x, float* __restrict__ y, int n) {
  int i = threadIdx.x;
  if (OK ? i < n : i <= n)
    y[i % n] = x[i];  // FAULT
}

template <bool OK> __global__ void write_past_end(float* __restrict__ y, int n) {
  int i = threadIdx.x;
  if (OK ? i < n : i <= n)
    y[i] = 1.0f;  // FAULT
}

template <bool OK> __global__ void write_before_start(float* __restrict__ y, int n) {
  int i = int(threadIdx.x) - (OK ? 0 : 1);
  y[i] = 1.0f;  // FAULT
}

template <bool OK> __global__ void write_input(const float* __restrict__ x, float* __restrict__ y) {
  float* p = OK ? y : const_cast<float*>(x);
  p[threadIdx.x] = 1.0f;  // FAULT
}

template <bool OK> __global__ void null_pointer(const float* x, float* __restrict__ y) {
  if (!OK || x != nullptr)
    y[threadIdx.x] = x[threadIdx.x];  // FAULT
}

__device__ float element(const float* p, int i) {
  return p[i];  // FAULT
}
template <bool OK> __global__ void read_past_shared(float* __restrict__ y) {
  __shared__ float a[32];
  __shared__ float b[32];
  a[threadIdx.x] = 1.0f;
  b[threadIdx.x] = 2.0f;
  __syncthreads();
  y[threadIdx.x] = element(a, threadIdx.x + (OK ? 0 : 1)) + b[0];
}

template <bool OK> __global__ void index_past_shared(float* __restrict__ y) {
  __shared__ float a[32];
  a[threadIdx.x + (OK ? 0 : 1)] = 1.0f;  // FAULT
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void write_past_dynamic(float* __restrict__ y) {
  DYNAMIC_SHARED(float, a);
  a[threadIdx.x + (OK ? 0 : 1)] = 1.0f;  // FAULT
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void uninitialised(float* __restrict__ y) {
  __shared__ float a[32];
  if (OK || threadIdx.x != 7) a[threadIdx.x] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = a[31 - threadIdx.x];  // FAULT
}

template <bool OK> __global__ void divergent_barrier(float* __restrict__ y) {
  if (OK || threadIdx.x < 40)
    __syncthreads();  // FAULT
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void exit_before_barrier(float* __restrict__ y, int n) {
  int i = threadIdx.x;
  if (!OK && i >= n) return;
  __syncthreads();  // FAULT
  if (i < n) y[i] = 1.0f;
}

template <bool OK> __global__ void two_barriers(float* __restrict__ y) {
  if (OK || threadIdx.x < 32)
    __syncthreads();  // FAULT
  else
    __syncthreads();
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void lanes_never_meet(float* __restrict__ y) {
  if (threadIdx.x < 16)
    __syncwarp(OK ? 0xffffu : 0xffffffffu);
  __syncthreads();  // FAULT
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void mask_without_caller(float* __restrict__ y) {
  unsigned mask = OK ? 0xffffffffu : 0x7fffffffu;
  float v = __shfl_xor_sync(mask, float(threadIdx.x), 1);  // FAULT
  y[threadIdx.x] = v;
}

template <bool OK> __global__ void masks_differ(float* __restrict__ y) {
  unsigned mask = OK || threadIdx.x < 16 ? 0xffffffffu : 0xffff8000u;
  float v = __shfl_xor_sync(mask, float(threadIdx.x), 1);  // FAULT
  y[threadIdx.x] = v;
}

template <bool OK> __global__ void reads_absent_lane(float* __restrict__ y) {
  if (!OK && threadIdx.x >= 24) return;
  float v = __shfl_down_sync(0xffffffffu, float(threadIdx.x), 1);  // FAULT
  y[threadIdx.x] = v;
}

template <bool OK> __global__ void misaligned_vector(const float* __restrict__ x, float* __restrict__ y) {
  const float* p = x + (OK ? 4 : 3);
  float4 v = *reinterpret_cast<const float4*>(p);  // FAULT
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

template <bool OK> __global__ void signed_overflow(const int* __restrict__ x, int* __restrict__ y) {
  int a = x[0];
  y[threadIdx.x] = OK ? int(unsigned(a) * 3u) : a * 3;  // FAULT
}

template <bool OK> __global__ void shift_too_far(const int* __restrict__ x, unsigned* __restrict__ y) {
  int n = x[0];
  y[threadIdx.x] = OK ? 0u : 1u << n;  // FAULT
}

template <bool OK> __global__ void divide_by_zero(const int* __restrict__ x, int* __restrict__ y) {
  int n = x[0];
  y[threadIdx.x] = OK ? 0 : 7 / n;  // FAULT
}

template <bool OK> __global__ void race_read_after_write(float* __restrict__ y) {
  __shared__ float a[64];
  a[threadIdx.x] = 1.0f;  // OTHER
  if (OK) __syncthreads();
  y[threadIdx.x] = a[63 - threadIdx.x];  // FAULT
}

template <bool OK> __global__ void race_write_after_read(float* __restrict__ y) {
  __shared__ float a[64];
  a[threadIdx.x] = 1.0f;
  __syncthreads();
  float v = a[63 - threadIdx.x];  // OTHER
  if (OK) __syncthreads();
  a[threadIdx.x] = v + 1.0f;  // FAULT
  y[threadIdx.x] = v;
}

template <bool OK> __global__ void race_write_write(float* __restrict__ y) {
  __shared__ float a[64];
  a[OK ? threadIdx.x : threadIdx.x / 2] = float(threadIdx.x);  // FAULT
  __syncthreads();
  y[threadIdx.x] = a[threadIdx.x / 2];
}

template <bool OK> __global__ void race_in_warp(float* __restrict__ y) {
  __shared__ float a[32];
  a[threadIdx.x] = 1.0f;  // OTHER
  if (OK) __syncwarp();
  y[threadIdx.x] = a[threadIdx.x ^ 1];  // FAULT
}

template <bool OK> __global__ void race_in_half_warp(float* __restrict__ y) {
  __shared__ float a[32];
  a[threadIdx.x] = 1.0f;  // OTHER
  __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  y[threadIdx.x] = a[threadIdx.x ^ (OK ? 8 : 16)];  // FAULT
}

template <bool OK> __global__ void race_between_warps(float* __restrict__ y) {
  __shared__ float a[64];
  a[threadIdx.x] = 1.0f;  // OTHER
  if (OK) __syncthreads();
  else __syncwarp();
  y[threadIdx.x] = a[threadIdx.x ^ 32];  // FAULT
}

template <bool OK> __global__ void race_of_halves(float* __restrict__ y) {
  __shared__ __half a[64];
  a[threadIdx.x] = __float2half(1.0f);  // OTHER
  if (OK) __syncthreads();
  y[threadIdx.x] = __half2float(a[threadIdx.x ^ 32]);  // FAULT
}

template <bool OK> __global__ void race_with_atomic(int* __restrict__ y) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;  // OTHER
  if (OK) __syncthreads();
  atomicAdd(&count, 1);  // FAULT
  __syncthreads();
  y[threadIdx.x] = count;
}

template <bool OK> __global__ void race_in_loop(float* __restrict__ y) {
  __shared__ float a[64];
  float sum = 0;
  for (int i = 0; i < 3; ++i) {
    a[threadIdx.x] = float(i);  // FAULT
    __syncthreads();
    sum += a[63 - threadIdx.x];  // OTHER
    if (OK) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

template <bool OK> __global__ void assertion(float* __restrict__ y) {
  assert(OK || threadIdx.x < 5);  // FAULT
  y[threadIdx.x] = 1.0f;
}

template <bool OK> __global__ void endless_loop(float* __restrict__ y) {
  float v = y[0];
  while (!OK) {
    v = v * 0.5f + 1.0f;
    asm volatile("" : "+m"(v));
  }
  y[threadIdx.x] = v;
}

// Block 0 waits for all others.
template <bool OK> __global__ void wait_for_blocks(int* flags, int* __restrict__ y) {
  if (blockIdx.x != 0) {
    if (OK || blockIdx.x != 3) *(volatile int*)&flags[blockIdx.x] = 1;
  } else {
    for (int i = threadIdx.x + 1; i < (int)gridDim.x; i += blockDim.x)
      while (*(volatile int*)&flags[i] == 0) {}  // FAULT
  }
  y[blockIdx.x] = 1;
}
