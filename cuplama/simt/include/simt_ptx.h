// The twins of the functions in cuda_src/ptx.cuh, which holds all inline PTX; defining its guard keeps it out. Same
// names, same parameters: tests/simt/test_emulator.py compares the two files. The rest, for kernels to come, has its toy
// kernels in tests/simt/kernels/ptx.cu.
#ifndef SIMT_PTX_H
#define SIMT_PTX_H
#define CUPLAMA_PTX_CUH

// ---- loads and stores -----------------------------------------------------------------------------------------------
// Kernels run one after the other here.
SIMT_FN void launch_dependents() {}
SIMT_FN void pdl_wait() {}
SIMT_FN void fence_gpu() { __threadfence(); }

// Volatile, acquire and relaxed loads are how threads wait for one another, so they let the others run first. Memory is
// sequentially consistent here: that an acquire or a release is missing is not found.
template <class T> SIMT_TEMPLATE T ld_volatile(const T* p) { return simt::from_bits<T>(simt_load(p, sizeof(T), 1)); }
template <class T> SIMT_TEMPLATE T ld_acquire(const T* p) { return simt::from_bits<T>(simt_load(p, sizeof(T), 1)); }
SIMT_FN unsigned ld_acquire(const unsigned* p) { return simt_load(p, 4, 1); }
template <class T> SIMT_TEMPLATE T ld_relaxed(const T* p) { return simt::from_bits<T>(simt_load(p, sizeof(T), 1)); }
template <class T> SIMT_TEMPLATE void st_volatile(T* p, simt::same<T> v) { simt_store(p, sizeof(T), simt::to_bits(v)); }
template <class T> SIMT_TEMPLATE void st_release(T* p, simt::same<T> v) { simt_store(p, sizeof(T), simt::to_bits(v)); }
template <class T> SIMT_TEMPLATE void st_relaxed(T* p, simt::same<T> v) { simt_store(p, sizeof(T), simt::to_bits(v)); }

SIMT_FN void red_add_4(float* p, float x, float y, float z, float w) { p[0] += x, p[1] += y, p[2] += z, p[3] += w; }

SIMT_FN unsigned lane_id() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }
SIMT_FN unsigned long long globaltimer() { return simt_clock(1); }

// ---- bits ---------------------------------------------------------------------------------------------------------------
SIMT_FN unsigned and_or(unsigned x, unsigned mask, unsigned bits) { return (x & mask) | bits; }
SIMT_FN unsigned not_and_or(unsigned x, unsigned mask, unsigned bits) { return (~x & mask) | bits; }
SIMT_FN unsigned hidden(unsigned x) { return x; }

// ---- asynchronous copies: the bytes arrive in the wait, not before ------------------------------------------------------
SIMT_FN void cp_async_16(void* shared, const void* global) { simt_cp_async(shared, global, 16, 16); }
SIMT_FN void cp_async_16(void* shared, const void* global, bool valid) { simt_cp_async(shared, global, 16, valid ? 16 : 0); }
SIMT_FN void cp_async_8(void* shared, const void* global, bool valid) { simt_cp_async(shared, global, 8, valid ? 8 : 0); }
SIMT_FN void cp_async_commit() { simt_cp_async_commit(); }
template <int N> SIMT_TEMPLATE void cp_async_wait() { simt_cp_async_wait(N); }
SIMT_FN void cp_async_wait_all() { simt_cp_async_wait(-1); }

// ---- matrices -------------------------------------------------------------------------------------------------------
namespace simt {
SIMT_FN void matrix_load(Op op, unsigned* r, int count, const void* row, const char* file, int line) {
  Lane* lane = simt_lane();
  u64 address = u64(reinterpret_cast<size_t>(row));
  lane->in[0] = u32(address), lane->in[1] = u32(address >> 32), lane->in[2] = u32(count);
  simt_collective(0xffffffffu, op, file, line);
  for (int i = 0; i < count; ++i) r[i] = lane->out[i];
}
template <int A, int B> SIMT_TEMPLATE void multiply(Op op, float* d, const unsigned* a, const unsigned* b, const float* c,
                                                    const char* file, int line) {
  Lane* lane = simt_lane();
  for (int i = 0; i < A; ++i) lane->in[i] = a[i];
  for (int i = 0; i < B; ++i) lane->in[4 + i] = b[i];
  for (int i = 0; i < 4; ++i) lane->in[8 + i] = as<u32>(c[i]);
  simt_collective(0xffffffffu, op, file, line);
  for (int i = 0; i < 4; ++i) d[i] = as<float>(lane->out[i]);
}
}  // namespace simt

SIMT_FN void ldmatrix_x1(unsigned (&r)[1], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX, r, 1, row, file, line); }
SIMT_FN void ldmatrix_x2(unsigned (&r)[2], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX, r, 2, row, file, line); }
SIMT_FN void ldmatrix_x4(unsigned (&r)[4], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX, r, 4, row, file, line); }
SIMT_FN void ldmatrix_x1_trans(unsigned (&r)[1], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX_TRANS, r, 1, row, file, line); }
SIMT_FN void ldmatrix_x2_trans(unsigned (&r)[2], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX_TRANS, r, 2, row, file, line); }
SIMT_FN void ldmatrix_x4_trans(unsigned (&r)[4], const void* row, SIMT_HERE) { simt::matrix_load(simt::LDMATRIX_TRANS, r, 4, row, file, line); }

// d += a b, fp32 accumulators; fragments as in the PTX ISA. The sum is taken in double and rounded once.
SIMT_FN void mma_m16n8k16_f16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIMT_HERE) {
  simt::multiply<4, 2>(simt::MMA_F16_16816, d, a, b, d, file, line);
}
SIMT_FN void mma_m16n8k16_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIMT_HERE) {
  simt::multiply<4, 2>(simt::MMA_BF16_16816, d, a, b, d, file, line);
}
SIMT_FN void mma_m16n8k8_f16(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1], SIMT_HERE) {
  simt::multiply<2, 1>(simt::MMA_F16_1688, d, a, b, d, file, line);
}
SIMT_FN void mma_m16n8k8_bf16(float (&d)[4], const unsigned (&a)[2], const unsigned (&b)[1], SIMT_HERE) {
  simt::multiply<2, 1>(simt::MMA_BF16_1688, d, a, b, d, file, line);
}
SIMT_FN void mma_m16n8k8_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIMT_HERE) {
  simt::multiply<4, 2>(simt::MMA_TF32_1688, d, a, b, d, file, line);
}

// ---- 8-bit floats -----------------------------------------------------------------------------------------------------
#include "simt_float16.h"

namespace simt {
SIMT_FN unsigned e4m3_widened(unsigned x) {  // to the bits of an f16
  float size = (x & 0x78u) ? as<float>(((x & 0x7fu) << 20) + (120u << 23)) : float(x & 7u) * 0x1p-9f;
  if ((x & 0x7fu) == 0x7fu) return 0x7fffu;
  return HalfFormat::narrow(x & 0x80u ? -size : size);
}
SIMT_FN unsigned e4m3_narrowed(float f) {
  float size = __builtin_fabsf(f);
  if (f != f) return 0x7fu;
  unsigned sign = as<unsigned>(f) >> 31 << 7;
  if (size >= 448.f) return sign | 0x7eu;
  int exponent = size < 0x1p-6f ? -6 : int(as<unsigned>(size) >> 23) - 127;
  unsigned units = unsigned(__builtin_rintf(__builtin_ldexpf(size, 3 - exponent)));  // of 2^(exponent - 3); ties to even
  return sign | (unsigned(exponent + 6) * 8u + units);
}
}  // namespace simt

SIMT_FN void e4m3x4_to_f16(unsigned x, unsigned& low, unsigned& high) {
  low = simt::e4m3_widened(x & 0xffu) | simt::e4m3_widened(x >> 8 & 0xffu) << 16;
  high = simt::e4m3_widened(x >> 16 & 0xffu) | simt::e4m3_widened(x >> 24) << 16;
}
SIMT_FN unsigned e4m3x2_from_f32(float low, float high) {
  return simt::e4m3_narrowed(low) | simt::e4m3_narrowed(high) << 8;
}

// ---- mbarriers and bulk copies -----------------------------------------------------------------------------------------
SIMT_FN void mbarrier_init(void* bar, unsigned count, SIMT_HERE) { simt_mbarrier_init(bar, count, file, line); }
SIMT_FN void mbarrier_arrive(void* bar, SIMT_HERE) { simt_mbarrier_arrive(bar, 1, 0, 1, file, line); }
SIMT_FN void mbarrier_expect_tx(void* bar, unsigned bytes, SIMT_HERE) { simt_mbarrier_arrive(bar, 0, bytes, 0, file, line); }
SIMT_FN void mbarrier_arrive_expect_tx(void* bar, unsigned bytes, SIMT_HERE) { simt_mbarrier_arrive(bar, 1, bytes, 1, file, line); }
SIMT_FN bool mbarrier_try_wait(void* bar, unsigned parity, SIMT_HERE) { return simt_mbarrier_test(bar, parity, 0, file, line) != 0; }
SIMT_FN void mbarrier_wait(void* bar, unsigned parity, SIMT_HERE) { simt_mbarrier_test(bar, parity, 1, file, line); }
// Nothing comes, but what is asked for has to be there: its first and its last bytes are looked at.
SIMT_FN void prefetch_l2(const void* global, unsigned bytes) {
  const char* p = static_cast<const char*>(global);
  simt_load(p, 8, 0), simt_load(p + bytes - 8, 8, 0);
}
SIMT_FN void bulk_copy(void* shared, const void* global, unsigned bytes, void* bar, SIMT_HERE) {
  simt_bulk_copy(shared, global, bytes, bar, file, line);
}

// ---- named barriers: bar.sync and bar.arrive ----------------------------------------------------------------------------
SIMT_FN void bar_sync(int id, int threads, SIMT_HERE) { simt_named_barrier(id, threads, 1, file, line); }

// ---- warpgroup matrices ---------------------------------------------------------------------------------------------
// Done when they are issued, each thread for its own sums; waiting has nothing to wait for. That operands are left alone
// until then is not checked. A matrix is its address / 16, as the kernel counts, and above it the distance of its panels.
#include "simt_float16.h"

namespace simt {
// A 16-bit element `bytes` behind the start of a matrix in rows of 128 bytes with exchanged 16-byte units.
template <class Format> SIMT_TEMPLATE float element(u64 matrix, unsigned bytes) {
  size_t at = size_t(matrix << 16 >> 12) + bytes;
  return Format::widen(*reinterpret_cast<const unsigned short*>(at ^ (at >> 7 & 7) << 4));
}
template <class Format, int N> SIMT_TEMPLATE void warpgroup_scores(float (&d)[N], u64 a, u64 b, bool add) {
  unsigned lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  for (unsigned half = 0; half < 2; ++half) {
    float left[16];
    for (unsigned k = 0; k < 16; ++k) left[k] = element<Format>(a, (row + 8 * half) * 128 + 2 * k);
    for (unsigned i = 0; i < N / 2; ++i) {
      float& sum = d[i / 2 * 4 + 2 * half + i % 2];
      double total = add ? sum : 0.f;
      for (unsigned k = 0; k < 16; ++k)
        total += double(left[k]) * element<Format>(b, (i / 2 * 8 + lane % 4 * 2 + i % 2) * 128 + 2 * k);
      sum = float(total);
    }
  }
}
template <class Format, int N> SIMT_TEMPLATE void warpgroup_columns(float (&d)[N], u64 a, u64 b, bool add) {
  unsigned lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
  for (unsigned half = 0; half < 2; ++half) {
    float left[16];
    for (unsigned k = 0; k < 16; ++k) left[k] = element<Format>(a, k * 128 + (row + 8 * half) * 2);
    for (unsigned i = 0; i < N / 2; ++i) {
      float& sum = d[i / 2 * 4 + 2 * half + i % 2];
      double total = add ? sum : 0.f;
      for (unsigned k = 0; k < 16; ++k)
        total += double(left[k]) * element<Format>(b, k * 128 + (i / 2 * 8 + lane % 4 * 2 + i % 2) * 2);
      sum = float(total);
    }
  }
}
// The rows of A that a thread's sums need, out of the registers of the lanes that have them.
template <class Format> SIMT_TEMPLATE void warpgroup_left(float (&left)[2][16], const unsigned (&a)[4]) {
  for (unsigned q = 0; q < 4; ++q)
    for (unsigned i = 0; i < 4; ++i) {
      unsigned both = __shfl_sync(0xffffffffu, a[i], int(threadIdx.x % 32 / 4 * 4 + q));
      for (unsigned e = 0; e < 2; ++e)
        left[i % 2][i / 2 * 8 + 2 * q + e] = Format::widen((unsigned short)(both >> 16 * e));
    }
}
template <class Format, int N>
SIMT_TEMPLATE void warpgroup_sum(float (&d)[N], const unsigned (&a)[4], u64 b) {
  unsigned lane = threadIdx.x % 32;
  float left[2][16];
  warpgroup_left<Format>(left, a);
  for (unsigned i = 0; i < N / 2; ++i) {
    unsigned column = i / 2 * 8 + lane % 4 * 2 + i % 2;
    double total[2] = {d[i / 2 * 4 + i % 2], d[i / 2 * 4 + 2 + i % 2]};
    for (unsigned k = 0; k < 16; ++k) {
      float right = element<Format>(b, unsigned(b >> 48) * 16 * (column / 64) + k * 128 + column % 64 * 2);
      total[0] += double(left[0][k]) * right, total[1] += double(left[1][k]) * right;
    }
    d[i / 2 * 4 + i % 2] = float(total[0]), d[i / 2 * 4 + 2 + i % 2] = float(total[1]);
  }
}
template <class Format, int N>
SIMT_TEMPLATE void warpgroup_rows(float (&d)[N], const unsigned (&a)[4], u64 b, bool add) {
  float left[2][16];
  warpgroup_left<Format>(left, a);
  for (unsigned i = 0; i < N / 2; ++i) {
    unsigned column = i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
    float& low = d[i / 2 * 4 + i % 2];
    float& high = d[i / 2 * 4 + 2 + i % 2];
    double total[2] = {add ? low : 0.f, add ? high : 0.f};
    for (unsigned k = 0; k < 16; ++k) {
      float right = element<Format>(b, column * 128 + 2 * k);
      total[0] += double(left[0][k]) * right, total[1] += double(left[1][k]) * right;
    }
    low = float(total[0]), high = float(total[1]);
  }
}
}  // namespace simt

SIMT_FN void keep(int& x) {}
SIMT_FN void fence_proxy_async() {}
SIMT_FN void wgmma_fence() {}
SIMT_FN void wgmma_commit() {}
template <int N> SIMT_TEMPLATE void wgmma_wait() { __syncwarp(); }  // .sync.aligned
template <int N> SIMT_TEMPLATE void wgmma_done(float (&d)[N]) {}
template <int N> SIMT_TEMPLATE void registers_more() {}
template <int N> SIMT_TEMPLATE void registers_fewer() {}
SIMT_FN unsigned long long wgmma_matrix(const void* shared, unsigned next) {
  return reinterpret_cast<size_t>(shared) >> 4 | (unsigned long long)(next >> 4) << 48;
}
SIMT_FN void wgmma_n128_f16(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_scores<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_n128_bf16(float (&d)[64], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_scores<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_n64_f16(float (&d)[32], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_scores<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_n64_bf16(float (&d)[32], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_scores<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_columns_f16(float (&d)[32], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_columns<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_columns_bf16(float (&d)[32], unsigned long long a, unsigned long long b, bool add) {
  simt::warpgroup_columns<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_f16(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::HalfFormat>(d, a, b);
}
SIMT_FN void wgmma_f16(float (&d)[48], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::HalfFormat>(d, a, b);
}
SIMT_FN void wgmma_f16(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::HalfFormat>(d, a, b);
}
SIMT_FN void wgmma_bf16(float (&d)[32], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::BfloatFormat>(d, a, b);
}
SIMT_FN void wgmma_bf16(float (&d)[48], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::BfloatFormat>(d, a, b);
}
SIMT_FN void wgmma_bf16(float (&d)[64], const unsigned (&a)[4], unsigned long long b) {
  simt::warpgroup_sum<simt::BfloatFormat>(d, a, b);
}

SIMT_FN void wgmma_rows_f16(float (&d)[8], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[8], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[16], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[16], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[24], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[24], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[32], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[48], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[48], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[64], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[80], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[80], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[96], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[96], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[112], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[112], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_f16(float (&d)[128], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::HalfFormat>(d, a, b, add);
}
SIMT_FN void wgmma_rows_bf16(float (&d)[128], const unsigned (&a)[4], unsigned long long b, bool add) {
  simt::warpgroup_rows<simt::BfloatFormat>(d, a, b, add);
}

#endif
