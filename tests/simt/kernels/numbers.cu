// Conversions, arithmetic and warp functions, to be compared with NumPy.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

__global__ void widen(const __half* __restrict__ h, const __nv_bfloat16* __restrict__ b, float* __restrict__ fh,
                      float* __restrict__ fb, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) fh[i] = __half2float(h[i]), fb[i] = __bfloat162float(b[i]);
}

__global__ void narrow(const float* __restrict__ x, __half* __restrict__ h, __nv_bfloat16* __restrict__ b, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) h[i] = __float2half_rn(x[i]), b[i] = __float2bfloat16_rn(x[i]);
}

template <typename T> __global__ void arithmetic(const T* __restrict__ a, const T* __restrict__ b, const T* __restrict__ c,
                                                 T* __restrict__ sum, T* __restrict__ product, T* __restrict__ quotient,
                                                 T* __restrict__ fma, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  sum[i] = __hadd(a[i], b[i]);
  product[i] = __hmul(a[i], b[i]);
  quotient[i] = a[i] / b[i];
  fma[i] = __hfma(a[i], b[i], c[i]);
}

__global__ void pairs(const float2* __restrict__ x, __half2* __restrict__ h, __nv_bfloat162* __restrict__ b,
                      float2* __restrict__ y) {
  int i = threadIdx.x;
  h[i] = __float22half2_rn(x[i]);
  b[i] = __floats2bfloat162_rn(x[i].x, x[i].y);
  float2 u = __half22float2(h[i]), v = __bfloat1622float2(b[i]);
  y[i] = make_float2(u.x + v.y, __low2float(h[i]) + __high2float(b[i]));
}

// out: rows of 64 values, one per function.
__global__ void warp(const int* __restrict__ x, int* __restrict__ out) {
  const unsigned all = 0xffffffffu;
  int t = threadIdx.x, v = x[t];
  int results[] = {
      __shfl_sync(all, v, 5),          __shfl_sync(all, v, t + 3, 8),      __shfl_up_sync(all, v, 3),
      __shfl_up_sync(all, v, 3, 8),    __shfl_down_sync(all, v, 5),        __shfl_down_sync(all, v, 5, 16),
      __shfl_xor_sync(all, v, 9),      __shfl_xor_sync(all, v, 4, 8),      int(__ballot_sync(all, v & 1)),
      __all_sync(all, v > 0),          __any_sync(all, v > 90),            __reduce_add_sync(all, v),
      __reduce_min_sync(all, v),       __reduce_max_sync(all, v),          int(__match_any_sync(all, v % 4)),
      int(__reduce_xor_sync(all, unsigned(v))),
      int(__shfl_xor_sync(all, double(v), 1)),
      __half2float(__shfl_xor_sync(all, __float2half(float(v)), 2)) == x[t ^ 2],
      __syncthreads_count(v & 1), __syncthreads_and(v > 0), __syncthreads_or(v > 99),
  };
  for (int i = 0; i < 21; ++i) out[64 * i + t] = results[i];
}

__global__ void half_masks(const int* __restrict__ x, int* __restrict__ out) {
  int t = threadIdx.x;
  unsigned mask = t < 16 ? 0xffffu : 0xffff0000u;
  int sum = x[t];
  if (t < 16)
    for (int s = 8; s > 0; s /= 2) sum += __shfl_xor_sync(mask, sum, s);
  else
    for (int s = 1; s < 16; s *= 2) sum += __shfl_xor_sync(mask, sum, s);
  out[t] = sum;
}

__global__ void atomics(int* __restrict__ i, unsigned* __restrict__ u, unsigned long long* __restrict__ l, float* __restrict__ f) {
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&i[0], t), atomicMin(&i[1], -t), atomicMax(&i[2], t), atomicSub(&i[3], 1);
  atomicOr(&u[0], 1u << (t % 32)), atomicAnd(&u[1], ~(1u << (t % 7))), atomicXor(&u[2], unsigned(t)), atomicInc(&u[3], 99);
  atomicAdd(l, 1ull << 33);
  atomicAdd(f, 0.5f);
  for (int old = i[4], seen; (seen = atomicCAS(&i[4], old, old + 2)) != old; old = seen) {}
  __shared__ int shared;
  if (threadIdx.x == 0) shared = 0;
  __syncthreads();
  atomicAdd(&shared, 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicExch(&i[5 + blockIdx.x], shared);
}

__global__ void bits(const unsigned* __restrict__ x, unsigned* __restrict__ out) {
  unsigned v = x[threadIdx.x], w = x[63 - threadIdx.x];
  unsigned results[] = {unsigned(__clz(int(v))), unsigned(__ffs(int(v))), unsigned(__popc(v)), __brev(v), __umulhi(v, w),
                        __byte_perm(v, w, 0x5140), unsigned(__mul64hi((long long)v << 31, (long long)w << 30)),
                        __funnelshift_l(v, w, 5), __float_as_uint(__uint_as_float(v))};
  for (int i = 0; i < 9; ++i) out[64 * i + threadIdx.x] = results[i];
}
