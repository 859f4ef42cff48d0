// Toy kernels for the twins of ptx.cuh; OK = false has a fault at the line marked FAULT.

template <bool OK> __global__ void copy_async(const float* __restrict__ x, float* __restrict__ y) {
  __shared__ __align__(16) float a[128];
  cp_async_16(a + 4 * threadIdx.x, x + 4 * threadIdx.x);  // OTHER
  cp_async_commit();
  if (OK) cp_async_wait<0>();
  __syncthreads();
  float4 v = reinterpret_cast<const float4*>(a)[31 - threadIdx.x];  // FAULT
  reinterpret_cast<float4*>(y)[31 - threadIdx.x] = v;
}

template <bool OK> __global__ void copy_async_stages(const float* __restrict__ x, float* __restrict__ y, int stages) {
  __shared__ __align__(16) float a[2][128];
  int t = 4 * threadIdx.x;
  cp_async_16(&a[0][t], x + t);  // OTHER
  cp_async_commit();
  for (int i = 0; i < stages; ++i) {
    if (i + 1 < stages) cp_async_16(&a[(i + 1) % 2][t], x + (i + 1) * 128 + t);
    cp_async_commit();
    cp_async_wait<OK ? 1 : 2>();
    __syncthreads();
    float4 v = *reinterpret_cast<const float4*>(&a[i % 2][124 - t]);  // FAULT
    *reinterpret_cast<float4*>(y + i * 128 + 124 - t) = v;
    __syncthreads();
  }
}

// C[16, 8] = A[16, 16] B[16, 8] + C, all row-major; A and B as 16-bit words.
template <bool BFLOAT> __global__ void multiply(const unsigned short* __restrict__ A, const unsigned short* __restrict__ B,
                                                float* __restrict__ C) {
  __shared__ __align__(16) unsigned short a[16][24];
  __shared__ __align__(16) unsigned short b[16][8];
  int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) a[i / 16][i % 16] = A[i];
  for (int i = lane; i < 128; i += 32) b[i / 8][i % 8] = B[i];
  __syncwarp();
  unsigned fa[4], fb[2];
  ldmatrix_x4(fa, &a[lane % 16][lane / 16 * 8]);
  ldmatrix_x2_trans(fb, &b[lane % 16][0]);
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = C[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  if (BFLOAT) mma_m16n8k16_bf16(d, fa, fb);
  else mma_m16n8k16_f16(d, fa, fb);
  for (int i = 0; i < 4; ++i) C[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

// C[16, 8] += A[16, 8] B[8, 8] in tf32.
__global__ void multiply_tf32(const float* __restrict__ A, const float* __restrict__ B, float* __restrict__ C) {
  int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned a[4] = {__float_as_uint(A[g * 8 + t]), __float_as_uint(A[(g + 8) * 8 + t]), __float_as_uint(A[g * 8 + t + 4]),
                   __float_as_uint(A[(g + 8) * 8 + t + 4])};
  unsigned b[2] = {__float_as_uint(B[t * 8 + g]), __float_as_uint(B[(t + 4) * 8 + g])};
  float d[4];
  for (int i = 0; i < 4; ++i) d[i] = C[(g + i / 2 * 8) * 8 + t * 2 + i % 2];
  mma_m16n8k8_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) C[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

// Warp 0 fetches, warps 1 and 2 read; the two stages go round.
template <bool OK> __global__ void pipeline(const float* __restrict__ x, float* __restrict__ y, int stages) {
  __shared__ __align__(128) float a[2][64];
  __shared__ unsigned long long full[2], empty[2];
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) mbarrier_init(&full[i], 1), mbarrier_init(&empty[i], 64);
  __syncthreads();
  if (threadIdx.x < 32) {
    if (threadIdx.x == 0)
      for (int i = 0; i < stages; ++i) {
        if (i >= 2) mbarrier_wait(&empty[i % 2], (i / 2 - 1) & 1);
        mbarrier_arrive_expect_tx(&full[i % 2], 256);
        bulk_copy(a[i % 2], x + 64 * i, 256, &full[i % 2]);  // FAULT
      }
  } else {
    for (int i = 0; i < stages; ++i) {
      while (!mbarrier_try_wait(&full[i % 2], (i / 2) & 1)) {}
      if (!OK) mbarrier_arrive(&empty[i % 2]);
      y[64 * i + threadIdx.x - 32] = a[i % 2][(threadIdx.x - 32) ^ 1];  // OTHER
      if (OK) mbarrier_arrive(&empty[i % 2]);
    }
  }
}

// Warps 0 and 1 exchange values through a named barrier; warps 2 and 3 do so with another.
template <bool OK> __global__ void named(float* __restrict__ y) {
  __shared__ float a[128];
  a[threadIdx.x] = float(threadIdx.x);  // OTHER
  bar_sync(1 + threadIdx.x / 64, 64);
  y[threadIdx.x] = a[threadIdx.x ^ (OK ? 32 : 64)];  // FAULT
}

// A grid barrier, `rounds` times.
__global__ void grid_barrier(unsigned* arrived, int* __restrict__ x, int* __restrict__ y, int rounds) {
  for (int r = 0; r < rounds; ++r) {
    if (threadIdx.x == 0) {
      st_relaxed(&x[blockIdx.x], r + 1);
      __threadfence();
      atomicAdd(arrived, 1u);
      while (ld_acquire(arrived) < gridDim.x * (r + 1)) {}
    }
    __syncthreads();
    y[blockIdx.x * blockDim.x + threadIdx.x] += x[(blockIdx.x + 1) % gridDim.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      atomicAdd(arrived + 1, 1u);
      while (ld_acquire(arrived + 1) < gridDim.x * (r + 1)) {}
    }
  }
}
