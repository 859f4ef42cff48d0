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

// Words of a [rows, columns] matrix in shared memory as wgmma_matrix has them: panels of 64 columns in rows of 128 bytes
// with exchanged vectors of 16.
__device__ void put_panels(unsigned short* to, const unsigned short* from, int rows, int columns) {
  for (int i = threadIdx.x; i < rows * columns; i += 128) {
    int row = i / columns, column = i % columns;
    to[column / 64 * rows * 64 + row * 64 + (column % 64 / 8 ^ row % 8) * 8 + column % 8] = from[i];
  }
}

// D[64, 64], where element i of a thread's sums is.
__device__ int square_at(int i) {
  int lane = threadIdx.x % 32;
  return (threadIdx.x / 32 * 16 + lane / 4 + i / 2 % 2 * 8) * 64 + i / 4 * 8 + lane % 4 * 2 + i % 2;
}

// D[64, 64] = A[64, 16] B[64, 16]^T + D, with A and B in shared memory, rows across the sum; if COLUMNS, A and B are
// [16, 64] and D = A^T B + D.
template <bool BFLOAT, bool COLUMNS, bool ADD> __global__ void multiply_square(const unsigned short* __restrict__ A,
                                                                               const unsigned short* __restrict__ B,
                                                                               float* __restrict__ D) {
  __shared__ __align__(1024) unsigned short a[64 * 64];
  __shared__ __align__(1024) unsigned short b[64 * 64];
  put_panels(a, A, COLUMNS ? 16 : 64, COLUMNS ? 64 : 16);
  put_panels(b, B, COLUMNS ? 16 : 64, COLUMNS ? 64 : 16);
  float d[32];
  for (int i = 0; i < 32; ++i) d[i] = D[square_at(i)];
  __syncthreads();
  unsigned long long left = wgmma_matrix(a, 1), right = wgmma_matrix(b, 1);
  if constexpr (COLUMNS && BFLOAT) wgmma_columns_bf16(d, left, right, ADD);
  else if constexpr (COLUMNS) wgmma_columns_f16(d, left, right, ADD);
  else if constexpr (BFLOAT) wgmma_n64_bf16(d, left, right, ADD);
  else wgmma_n64_f16(d, left, right, ADD);
  for (int i = 0; i < 32; ++i) D[square_at(i)] = d[i];
}

// D[64, N] = A[64, 16] B[16, N] + D, with A in registers and rows of B, in shared memory, along the sum.
template <bool BFLOAT, int N> __global__ void add_products(const unsigned short* __restrict__ A,
                                                           const unsigned short* __restrict__ B,
                                                           float* __restrict__ D) {
  __shared__ __align__(1024) unsigned short b[2 * 16 * 64];
  put_panels(b, B, 16, N);
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = threadIdx.x / 32 * 16;
  unsigned a[4];
  for (int i = 0; i < 4; ++i) {
    const unsigned short* from = A + (first + g + i % 2 * 8) * 16 + i / 2 * 8 + t * 2;
    a[i] = from[0] | unsigned(from[1]) << 16;
  }
  float d[N / 2];
  auto at = [&](int i) { return (first + g + i / 2 % 2 * 8) * N + i / 4 * 8 + t * 2 + i % 2; };
  for (int i = 0; i < N / 2; ++i) d[i] = D[at(i)];
  __syncthreads();
  unsigned long long matrix = wgmma_matrix(b, 16 * 64 * 2);
  if constexpr (BFLOAT) wgmma_bf16(d, a, matrix);
  else wgmma_f16(d, a, matrix);
  for (int i = 0; i < N / 2; ++i) D[at(i)] = d[i];
}
