// A toy kernel for the products of warpgroups in ptx.cuh.

// D[64, N] = A[64, 16] B[N, 16]^T + D, on a warpgroup; A, B: 16-bit words, row-major. B in rows of 128 bytes with
// exchanged vectors of 16, A in the registers of mma.m16n8k16 per warp. If !ADD, D is not read.
template <bool BFLOAT, int N, bool ADD> __global__ void multiply_rows(const unsigned short* __restrict__ A,
                                                                      const unsigned short* __restrict__ B,
                                                                      float* __restrict__ D) {
  __shared__ __align__(1024) unsigned short b[N][64];
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = threadIdx.x / 32 * 16;
  for (int i = threadIdx.x; i < N * 16; i += 128) b[i / 16][(i % 16 / 8 ^ i / 16 % 8) * 8 + i % 8] = B[i];
  unsigned a[4];
  for (int i = 0; i < 4; ++i) {
    const unsigned short* from = A + (first + g + i % 2 * 8) * 16 + i / 2 * 8 + t * 2;
    a[i] = from[0] | unsigned(from[1]) << 16;
  }
  float d[N / 2];
  auto at = [&](int i) { return (first + g + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2; };
  for (int i = 0; i < N / 2; ++i) d[i] = D[at(i)];
  __syncthreads();
  unsigned long long matrix = wgmma_matrix(b, 1);
  if constexpr (BFLOAT) wgmma_rows_bf16(d, a, matrix, ADD);
  else wgmma_rows_f16(d, a, matrix, ADD);
  for (int i = 0; i < N / 2; ++i) D[at(i)] = d[i];
}
