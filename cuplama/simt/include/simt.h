// CUDA C++ as g++ sees it: included before the first line of an unchanged .cu file. Declarations only; the execution
// model (fibers, barriers, shadow memory) is in runtime.cpp. No standard header is included, as NVRTC has none.
#ifndef SIMT_H
#define SIMT_H

#define SIMT_EMULATOR 1
#define __CUDACC__ 1
#define __CUDACC_RTC__ 1
#include "simt_abi.h"

#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // each block has its own copy: see "shared memory" in runtime.cpp
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

// Every function here is inlined into its caller, so that a report's line is the caller's.
#define SIMT_FN static inline __attribute__((always_inline, unused))
#define SIMT_METHOD inline __attribute__((always_inline))
#define SIMT_TEMPLATE static inline __attribute__((always_inline, unused))
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;

// ---- vector types -------------------------------------------------------------------------------------------------
#define SIMT_VECTOR(T, name, align2, align4)                                                                     \
  struct name##1 { T x; };                                                                                       \
  struct alignas(align2) name##2 { T x, y; };                                                                    \
  struct name##3 { T x, y, z; };                                                                                 \
  struct alignas(align4) name##4 { T x, y, z, w; };                                                              \
  SIMT_FN name##1 make_##name##1(T x) { return name##1{x}; }                                                     \
  SIMT_FN name##2 make_##name##2(T x, T y) { return name##2{x, y}; }                                             \
  SIMT_FN name##3 make_##name##3(T x, T y, T z) { return name##3{x, y, z}; }                                     \
  SIMT_FN name##4 make_##name##4(T x, T y, T z, T w) { return name##4{x, y, z, w}; }
SIMT_VECTOR(signed char, char, 2, 4)
SIMT_VECTOR(unsigned char, uchar, 2, 4)
SIMT_VECTOR(short, short, 4, 8)
SIMT_VECTOR(unsigned short, ushort, 4, 8)
SIMT_VECTOR(int, int, 8, 16)
SIMT_VECTOR(unsigned, uint, 8, 16)
SIMT_VECTOR(float, float, 8, 16)
SIMT_VECTOR(long long, longlong, 16, 16)
SIMT_VECTOR(unsigned long long, ulonglong, 16, 16)
SIMT_VECTOR(double, double, 16, 16)
#undef SIMT_VECTOR
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// ---- the runtime ----------------------------------------------------------------------------------------------------
namespace simt {
typedef unsigned long long u64;
typedef unsigned u32;
}  // namespace simt

extern "C" {
__attribute__((const)) uint3 simt_thread_idx();
__attribute__((const)) uint3 simt_block_idx();
__attribute__((const)) uint3 simt_block_dim();
__attribute__((const)) uint3 simt_grid_dim();
__attribute__((const)) unsigned char* simt_dynamic_shared();
simt::Lane* simt_lane();                                             // this thread's collective slot
void simt_collective(unsigned mask, int op, const char* file, int line);
unsigned simt_active_mask();
int simt_barrier(int predicate, int reduce, const char* what, const char* file, int line);
void simt_named_barrier(int id, int threads, int wait, const char* file, int line);
simt::u64 simt_load(const void* p, unsigned bytes, int poll);        // checked; poll: let the others run first
void simt_store(void* p, unsigned bytes, simt::u64 bits);
simt::u64 simt_atomic_begin(void* p, unsigned bytes);
void simt_atomic_end(void* p, unsigned bytes, simt::u64 before, simt::u64 after);
void simt_yield();
simt::u64 simt_clock(int nanoseconds);
void simt_trap(const char* what, const char* file, int line);
void simt_cp_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes);
void simt_cp_async_commit();
void simt_cp_async_wait(int groups_left);
void simt_cp_async_mbarrier_arrive(void* bar, int noinc);
void simt_mbarrier_init(void* bar, unsigned count, const char* file, int line);
simt::u64 simt_mbarrier_arrive(void* bar, unsigned count, unsigned expect_bytes, int is_arrival, const char* file, int line);
int simt_mbarrier_test(void* bar, unsigned parity, int wait, const char* file, int line);
void simt_bulk_copy(void* shared, const void* global, unsigned bytes, void* bar, const char* file, int line);
}

namespace simt {
template <class To, class From> SIMT_TEMPLATE To as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, value);
}
template <unsigned bytes> struct Bits;
template <> struct Bits<1> { typedef unsigned char type; };
template <> struct Bits<2> { typedef unsigned short type; };
template <> struct Bits<4> { typedef unsigned type; };
template <> struct Bits<8> { typedef u64 type; };
template <class T> SIMT_TEMPLATE u64 to_bits(T v) { return as<typename Bits<sizeof(T)>::type>(v); }
template <class T> SIMT_TEMPLATE T from_bits(u64 b) { return as<T>(typename Bits<sizeof(T)>::type(b)); }
template <class T> struct Identity { typedef T type; };
template <class T> using same = typename Identity<T>::type;  // a parameter that does not take part in deduction
}  // namespace simt

#define threadIdx (simt_thread_idx())
#define blockIdx (simt_block_idx())
#define blockDim (simt_block_dim())
#define gridDim (simt_grid_dim())
#define warpSize 32
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(simt_dynamic_shared())

// ---- barriers, fences -----------------------------------------------------------------------------------------------
SIMT_FN void __syncthreads(SIMT_HERE) { simt_barrier(0, 0, "__syncthreads", file, line); }
SIMT_FN int __syncthreads_count(int p, SIMT_HERE) { return simt_barrier(p, 1, "__syncthreads_count", file, line); }
SIMT_FN int __syncthreads_and(int p, SIMT_HERE) { return simt_barrier(p, 2, "__syncthreads_and", file, line); }
SIMT_FN int __syncthreads_or(int p, SIMT_HERE) { return simt_barrier(p, 3, "__syncthreads_or", file, line); }
SIMT_FN void __threadfence() { asm volatile("" ::: "memory"); }
SIMT_FN void __threadfence_block() { asm volatile("" ::: "memory"); }
SIMT_FN void __threadfence_system() { asm volatile("" ::: "memory"); }
SIMT_FN void __nanosleep(unsigned) { simt_yield(); }
SIMT_FN long long clock64() { return (long long)simt_clock(0); }
SIMT_FN int clock() { return int(simt_clock(0)); }
SIMT_FN void __trap(SIMT_HERE) { simt_trap("trap", file, line); }
#if defined(__x86_64__)
SIMT_FN void __brkpt() { asm volatile("int3"); }  // gdb stops here
#else
SIMT_FN void __brkpt() { __builtin_trap(); }
#endif
SIMT_FN void simt_assert(bool ok, const char* text, SIMT_HERE) { if (!ok) simt_trap(text, file, line); }
#ifndef assert
#define assert(condition) simt_assert(static_cast<bool>(condition), "assertion failed: " #condition)
#endif

// ---- warp collectives -----------------------------------------------------------------------------------------------
SIMT_FN void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) { simt_collective(mask, simt::SYNCWARP, file, line); }
SIMT_FN unsigned __activemask() { return simt_active_mask(); }
namespace simt {
template <class T> SIMT_TEMPLATE T shuffle(Op op, u32 mask, T value, u32 arg, int width, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "__shfl_sync takes values of up to 8 bytes");
  Lane* lane = simt_lane();
  u64 bits = to_bits(value);
  lane->in[0] = u32(bits), lane->in[1] = u32(bits >> 32), lane->in[2] = arg, lane->in[3] = u32(width);
  simt_collective(mask, op, file, line);
  return from_bits<T>(u64(lane->out[0]) | u64(lane->out[1]) << 32);
}
SIMT_FN u32 vote(Op op, u32 mask, u32 value, const char* file, int line) {
  Lane* lane = simt_lane();
  lane->in[0] = value, lane->in[1] = 0;
  simt_collective(mask, op, file, line);
  return lane->out[0];
}
}  // namespace simt
template <class T> SIMT_TEMPLATE T __shfl_sync(unsigned mask, T v, int lane, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::SHFL_IDX, mask, v, unsigned(lane), width, file, line);
}
template <class T> SIMT_TEMPLATE T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::SHFL_UP, mask, v, delta, width, file, line);
}
template <class T> SIMT_TEMPLATE T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::SHFL_DOWN, mask, v, delta, width, file, line);
}
template <class T> SIMT_TEMPLATE T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, SIMT_HERE) {
  return simt::shuffle(simt::SHFL_XOR, mask, v, unsigned(lanes), width, file, line);
}
SIMT_FN unsigned __ballot_sync(unsigned mask, int p, SIMT_HERE) { return simt::vote(simt::BALLOT, mask, p != 0, file, line); }
SIMT_FN int __all_sync(unsigned mask, int p, SIMT_HERE) { return int(simt::vote(simt::ALL, mask, p != 0, file, line)); }
SIMT_FN int __any_sync(unsigned mask, int p, SIMT_HERE) { return int(simt::vote(simt::ANY, mask, p != 0, file, line)); }
template <class T> SIMT_TEMPLATE unsigned __match_any_sync(unsigned mask, T v, SIMT_HERE) {
  simt::u64 bits = simt::to_bits(v);
  simt::Lane* lane = simt_lane();
  lane->in[0] = unsigned(bits), lane->in[1] = unsigned(bits >> 32);
  simt_collective(mask, simt::MATCH_ANY, file, line);
  return lane->out[0];
}
template <class T> SIMT_TEMPLATE unsigned __match_all_sync(unsigned mask, T v, int* all, SIMT_HERE) {
  simt::u64 bits = simt::to_bits(v);
  simt::Lane* lane = simt_lane();
  lane->in[0] = unsigned(bits), lane->in[1] = unsigned(bits >> 32);
  simt_collective(mask, simt::MATCH_ALL, file, line);
  *all = lane->out[0] != 0;
  return lane->out[0];
}
#define SIMT_REDUCE(name, T, op)                                                                                 \
  SIMT_FN T name(unsigned mask, T v, SIMT_HERE) { return T(simt::vote(simt::op, mask, unsigned(v), file, line)); }
SIMT_REDUCE(__reduce_add_sync, int, REDUCE_ADD_S32)
SIMT_REDUCE(__reduce_add_sync, unsigned, REDUCE_ADD_U32)
SIMT_REDUCE(__reduce_min_sync, int, REDUCE_MIN_S32)
SIMT_REDUCE(__reduce_min_sync, unsigned, REDUCE_MIN_U32)
SIMT_REDUCE(__reduce_max_sync, int, REDUCE_MAX_S32)
SIMT_REDUCE(__reduce_max_sync, unsigned, REDUCE_MAX_U32)
SIMT_REDUCE(__reduce_and_sync, unsigned, REDUCE_AND)
SIMT_REDUCE(__reduce_or_sync, unsigned, REDUCE_OR)
SIMT_REDUCE(__reduce_xor_sync, unsigned, REDUCE_XOR)
#undef SIMT_REDUCE

// ---- atomics: one OS thread runs all fibers, so a plain update is atomic; one that changes nothing yields -------------
namespace simt {
template <class T, class F> SIMT_TEMPLATE T atomic(T* p, F update) {
  u64 before = simt_atomic_begin(p, sizeof(T));
  T old = from_bits<T>(before);
  simt_atomic_end(p, sizeof(T), before, to_bits(T(update(old))));
  return old;
}
template <class T> constexpr bool is_integer = false;
template <> constexpr bool is_integer<int> = true;
template <> constexpr bool is_integer<unsigned> = true;
template <> constexpr bool is_integer<unsigned long long> = true;
template <class T> SIMT_TEMPLATE T wrapping_add(T a, T b) {
  if constexpr (is_integer<T>) return T(u64(a) + u64(b));
  else return T(a + b);
}
}  // namespace simt
template <class T> SIMT_TEMPLATE T atomicAdd(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return simt::wrapping_add(a, v); });
}
template <class T> SIMT_TEMPLATE T atomicSub(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return T(simt::u64(a) - simt::u64(v)); });
}
template <class T> SIMT_TEMPLATE T atomicExch(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T) __attribute__((always_inline)) { return v; });
}
template <class T> SIMT_TEMPLATE T atomicMin(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return v < a ? v : a; });
}
template <class T> SIMT_TEMPLATE T atomicMax(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return a < v ? v : a; });
}
template <class T> SIMT_TEMPLATE T atomicAnd(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return T(a & v); });
}
template <class T> SIMT_TEMPLATE T atomicOr(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return T(a | v); });
}
template <class T> SIMT_TEMPLATE T atomicXor(T* p, simt::same<T> v) {
  return simt::atomic(p, [v](T a) __attribute__((always_inline)) { return T(a ^ v); });
}
SIMT_FN unsigned atomicInc(unsigned* p, unsigned v) {
  return simt::atomic(p, [v](unsigned a) __attribute__((always_inline)) { return a >= v ? 0u : a + 1u; });
}
SIMT_FN unsigned atomicDec(unsigned* p, unsigned v) {
  return simt::atomic(p, [v](unsigned a) __attribute__((always_inline)) { return a == 0 || a > v ? v : a - 1u; });
}
template <class T> SIMT_TEMPLATE T atomicCAS(T* p, simt::same<T> compare, simt::same<T> v) {
  return simt::atomic(p, [compare, v](T a) __attribute__((always_inline)) { return a == compare ? v : a; });
}

// ---- loads and stores with cache hints ------------------------------------------------------------------------------
#define SIMT_LOAD(name) template <class T> SIMT_TEMPLATE T name(const T* p) { return *p; }
SIMT_LOAD(__ldg) SIMT_LOAD(__ldcg) SIMT_LOAD(__ldca) SIMT_LOAD(__ldcs) SIMT_LOAD(__ldlu) SIMT_LOAD(__ldcv)
#undef SIMT_LOAD
#define SIMT_STORE(name) template <class T> SIMT_TEMPLATE void name(T* p, simt::same<T> v) { *p = v; }
SIMT_STORE(__stwb) SIMT_STORE(__stcg) SIMT_STORE(__stcs) SIMT_STORE(__stwt)
#undef SIMT_STORE
SIMT_FN size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }
SIMT_FN size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }

// ---- bits ------------------------------------------------------------------------------------------------------------
SIMT_FN int __float_as_int(float f) { return simt::as<int>(f); }
SIMT_FN unsigned __float_as_uint(float f) { return simt::as<unsigned>(f); }
SIMT_FN float __int_as_float(int i) { return simt::as<float>(i); }
SIMT_FN float __uint_as_float(unsigned i) { return simt::as<float>(i); }
SIMT_FN long long __double_as_longlong(double d) { return simt::as<long long>(d); }
SIMT_FN double __longlong_as_double(long long i) { return simt::as<double>(i); }
SIMT_FN int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
SIMT_FN int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll((unsigned long long)x); }
SIMT_FN int __ffs(int x) { return __builtin_ffs(x); }
SIMT_FN int __ffsll(long long x) { return __builtin_ffsll(x); }
SIMT_FN int __popc(unsigned x) { return __builtin_popcount(x); }
SIMT_FN int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
SIMT_FN unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= ((x >> i) & 1u) << (31 - i);
  return r;
}
SIMT_FN int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
SIMT_FN unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
SIMT_FN long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
SIMT_FN unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
SIMT_FN unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  unsigned long long bytes = (unsigned long long)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned sel = s >> (4 * i), byte = unsigned(bytes >> (8 * (sel & 7u))) & 0xffu;
    if (sel & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    r |= byte << (8 * i);
  }
  return r;
}
SIMT_FN unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) {
  return unsigned(((unsigned long long)hi << 32 | lo) << (s & 31u) >> 32);
}
SIMT_FN unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) {
  return unsigned(((unsigned long long)hi << 32 | lo) >> (s & 31u));
}
SIMT_FN int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int((signed char)(unsigned(a) >> (8 * i))) * int((signed char)(unsigned(b) >> (8 * i)));
  return c;
}
SIMT_FN unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> (8 * i) & 255u) * (b >> (8 * i) & 255u);
  return c;
}

// ---- mathematics -----------------------------------------------------------------------------------------------------
#define SIMT_MATH1(name) SIMT_FN float name##f(float x) { return __builtin_##name##f(x); }                      \
                         SIMT_FN double name(double x) { return __builtin_##name(x); }                          \
                         SIMT_FN float name(float x) { return __builtin_##name##f(x); }
SIMT_MATH1(exp) SIMT_MATH1(exp2) SIMT_MATH1(expm1) SIMT_MATH1(log) SIMT_MATH1(log2) SIMT_MATH1(log10) SIMT_MATH1(log1p)
SIMT_MATH1(sqrt) SIMT_MATH1(cbrt) SIMT_MATH1(sin) SIMT_MATH1(cos) SIMT_MATH1(tan) SIMT_MATH1(sinh) SIMT_MATH1(cosh)
SIMT_MATH1(tanh) SIMT_MATH1(asin) SIMT_MATH1(acos) SIMT_MATH1(atan) SIMT_MATH1(erf) SIMT_MATH1(erfc) SIMT_MATH1(floor)
SIMT_MATH1(ceil) SIMT_MATH1(trunc) SIMT_MATH1(round) SIMT_MATH1(rint) SIMT_MATH1(nearbyint) SIMT_MATH1(fabs)
#undef SIMT_MATH1
#define SIMT_MATH2(name) SIMT_FN float name##f(float x, float y) { return __builtin_##name##f(x, y); }          \
                         SIMT_FN double name(double x, double y) { return __builtin_##name(x, y); }             \
                         SIMT_FN float name(float x, float y) { return __builtin_##name##f(x, y); }
SIMT_MATH2(pow) SIMT_MATH2(fmod) SIMT_MATH2(fmax) SIMT_MATH2(fmin) SIMT_MATH2(atan2) SIMT_MATH2(copysign) SIMT_MATH2(hypot)
#undef SIMT_MATH2
SIMT_FN float exp10f(float x) { return __builtin_powf(10.0f, x); }
SIMT_FN float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SIMT_FN double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
SIMT_FN float rsqrtf(float x) { return float(1.0 / __builtin_sqrt(double(x))); }
SIMT_FN double rsqrt(double x) { return 1.0 / __builtin_sqrt(x); }
SIMT_FN float ldexpf(float x, int e) { return __builtin_ldexpf(x, e); }
SIMT_FN float scalbnf(float x, int e) { return __builtin_scalbnf(x, e); }
SIMT_FN float fdividef(float a, float b) { return a / b; }
SIMT_FN void sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x), *c = __builtin_cosf(x); }
SIMT_FN void __sincosf(float x, float* s, float* c) { *s = __builtin_sinf(x), *c = __builtin_cosf(x); }
SIMT_FN bool isnan(float x) { return __builtin_isnan(x); }
SIMT_FN bool isnan(double x) { return __builtin_isnan(x); }
SIMT_FN bool isinf(float x) { return __builtin_isinf(x) != 0; }
SIMT_FN bool isinf(double x) { return __builtin_isinf(x) != 0; }
SIMT_FN bool isfinite(float x) { return __builtin_isfinite(x); }
SIMT_FN bool isfinite(double x) { return __builtin_isfinite(x); }
SIMT_FN bool signbit(float x) { return __builtin_signbit(x) != 0; }
SIMT_FN int abs(int x) { return x < 0 ? -x : x; }
SIMT_FN long long llabs(long long x) { return x < 0 ? -x : x; }
#define SIMT_MINMAX(T)                                                                                           \
  SIMT_FN T min(T a, T b) { return b < a ? b : a; }                                                              \
  SIMT_FN T max(T a, T b) { return a < b ? b : a; }
SIMT_MINMAX(int) SIMT_MINMAX(unsigned) SIMT_MINMAX(long) SIMT_MINMAX(unsigned long) SIMT_MINMAX(long long)
SIMT_MINMAX(unsigned long long)
#undef SIMT_MINMAX
SIMT_FN unsigned min(int a, unsigned b) { return min(unsigned(a), b); }
SIMT_FN unsigned min(unsigned a, int b) { return min(a, unsigned(b)); }
SIMT_FN unsigned max(int a, unsigned b) { return max(unsigned(a), b); }
SIMT_FN unsigned max(unsigned a, int b) { return max(a, unsigned(b)); }
SIMT_FN float min(float a, float b) { return __builtin_fminf(a, b); }
SIMT_FN float max(float a, float b) { return __builtin_fmaxf(a, b); }
SIMT_FN double min(double a, double b) { return __builtin_fmin(a, b); }
SIMT_FN double max(double a, double b) { return __builtin_fmax(a, b); }

// The fast-math intrinsics give the exact functions: the GPU's are within a few ulp of them.
SIMT_FN float __expf(float x) { return __builtin_expf(x); }
SIMT_FN float __exp10f(float x) { return exp10f(x); }
SIMT_FN float __logf(float x) { return __builtin_logf(x); }
SIMT_FN float __log2f(float x) { return __builtin_log2f(x); }
SIMT_FN float __log10f(float x) { return __builtin_log10f(x); }
SIMT_FN float __sinf(float x) { return __builtin_sinf(x); }
SIMT_FN float __cosf(float x) { return __builtin_cosf(x); }
SIMT_FN float __tanf(float x) { return __builtin_tanf(x); }
SIMT_FN float __powf(float x, float y) { return __builtin_powf(x, y); }
SIMT_FN float __fdividef(float a, float b) { return a / b; }
SIMT_FN float __fadd_rn(float a, float b) { return a + b; }
SIMT_FN float __fsub_rn(float a, float b) { return a - b; }
SIMT_FN float __fmul_rn(float a, float b) { return a * b; }
SIMT_FN float __fdiv_rn(float a, float b) { return a / b; }
SIMT_FN float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SIMT_FN float __frcp_rn(float a) { return 1.0f / a; }
SIMT_FN float __fsqrt_rn(float a) { return __builtin_sqrtf(a); }
SIMT_FN float __frsqrt_rn(float a) { return rsqrtf(a); }
SIMT_FN float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }

// float -> integer saturates on the GPU and sends NaN to 0; a plain cast that would not fit is undefined in C++.
namespace simt {
template <class I> SIMT_TEMPLATE I saturate(double x, I low, I high) {
  if (x != x) return I(0);
  return x <= double(low) ? low : x >= double(high) ? high : I(x);
}
}  // namespace simt
SIMT_FN int __float2int_rn(float x) { return simt::saturate<int>(__builtin_rint(double(x)), -0x7fffffff - 1, 0x7fffffff); }
SIMT_FN int __float2int_rz(float x) { return simt::saturate<int>(__builtin_trunc(double(x)), -0x7fffffff - 1, 0x7fffffff); }
SIMT_FN int __float2int_rd(float x) { return simt::saturate<int>(__builtin_floor(double(x)), -0x7fffffff - 1, 0x7fffffff); }
SIMT_FN int __float2int_ru(float x) { return simt::saturate<int>(__builtin_ceil(double(x)), -0x7fffffff - 1, 0x7fffffff); }
SIMT_FN unsigned __float2uint_rn(float x) { return simt::saturate<unsigned>(__builtin_rint(double(x)), 0u, 0xffffffffu); }
SIMT_FN unsigned __float2uint_rz(float x) { return simt::saturate<unsigned>(__builtin_trunc(double(x)), 0u, 0xffffffffu); }
SIMT_FN float __int2float_rn(int x) { return float(x); }
SIMT_FN float __uint2float_rn(unsigned x) { return float(x); }
SIMT_FN float __ull2float_rn(unsigned long long x) { return float(x); }

// NVRTC knows these without a header. A size that is not a constant is copied unchecked.
extern "C" void* memcpy(void*, const void*, size_t);
extern "C" void* memset(void*, int, size_t);

// printf reaches the terminal; a committed kernel has none, but one being debugged may.
extern "C" int printf(const char*, ...) __attribute__((format(printf, 1, 2)));

// ---- kernel entry points --------------------------------------------------------------------------------------------
namespace simt {
struct Parameter { char kind; unsigned char flags; unsigned short bytes; };  // see _Object in emulator.py
template <class T> struct Describe {
  static constexpr Parameter value = {T(1) / T(2) != T(0) ? 'f' : T(-1) < T(0) ? 'i' : 'u', 0, sizeof(T)};
};
template <class T> struct Describe<T*> { static constexpr Parameter value = {'p', __is_class(T) ? 0 : 2, sizeof(T)}; };
template <class T> struct Describe<const T*> { static constexpr Parameter value = {'p', __is_class(T) ? 1 : 3, sizeof(T)}; };
template <> struct Describe<void*> { static constexpr Parameter value = {'p', 0, 1}; };
template <> struct Describe<const void*> { static constexpr Parameter value = {'p', 1, 1}; };
template <> struct Describe<bool> { static constexpr Parameter value = {'u', 0, 1}; };
template <class T> struct Plain { typedef T type; };
template <class T> struct Plain<const T> { typedef T type; };

template <int... I> struct Indices {};
template <class... P> struct Entry {
  template <int... I>
  __attribute__((no_sanitize("thread"), no_sanitize("undefined"))) static void call(void (*kernel)(P...), void** args, Indices<I...>) {
    kernel(*static_cast<typename Plain<P>::type*>(args[I])...);
  }
  __attribute__((no_sanitize("thread"), no_sanitize("undefined"))) static void run(void (*kernel)(P...), void** args) {
    call(kernel, args, Indices<__integer_pack(sizeof...(P))...>());
  }
  __attribute__((no_sanitize("thread"), no_sanitize("undefined"))) static int describe(void (*)(P...), Parameter* out) {
    Parameter all[] = {Describe<typename Plain<P>::type>::value..., Parameter{}};
    if (out != nullptr) for (unsigned i = 0; i < sizeof...(P); ++i) out[i] = all[i];
    return int(sizeof...(P));
  }
};
template <class... P> static Entry<P...> entry(void (*)(P...));
}  // namespace simt
#define SIMT_KERNEL(number, ...)                                                                                  \
  extern "C" __attribute__((no_sanitize("thread"), no_sanitize("undefined"), visibility("default")))              \
  void simt_kernel_##number(void** args) { decltype(simt::entry(&__VA_ARGS__))::run(&__VA_ARGS__, args); }        \
  extern "C" __attribute__((no_sanitize("thread"), no_sanitize("undefined"), visibility("default")))              \
  int simt_describe_##number(simt::Parameter* out) {                                                              \
    return decltype(simt::entry(&__VA_ARGS__))::describe(&__VA_ARGS__, out);                                      \
  }

#include "simt_ptx.h"

// CUDA takes `__shared__ alignas(16) float x[4]`; g++ wants a standard attribute first, but its own anywhere.
#define alignas(...) __attribute__((aligned(__VA_ARGS__)))
#endif
