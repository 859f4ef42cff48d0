// CUDA's cuda_bf16.h for the emulator: the names that kernels use, over simt_float16.h.
#ifndef SIMT_CUDA_BF16_H
#define SIMT_CUDA_BF16_H
#include "simt_float16.h"

typedef simt::Float16<simt::BfloatFormat> __nv_bfloat16;
typedef simt::Float16x2<simt::BfloatFormat> __nv_bfloat162;
typedef __nv_bfloat16 nv_bfloat16;
typedef __nv_bfloat162 nv_bfloat162;
struct __nv_bfloat16_raw { unsigned short x; };

SIMT_FLOAT16_FUNCTIONS(__nv_bfloat16, __nv_bfloat162)

SIMT_FN __nv_bfloat16 __float2bfloat16(float f) { return __nv_bfloat16(f); }
SIMT_FN __nv_bfloat16 __float2bfloat16_rn(float f) { return __nv_bfloat16(f); }
SIMT_FN __nv_bfloat16 __double2bfloat16(double d) { return __nv_bfloat16(d); }
SIMT_FN __nv_bfloat16 __int2bfloat16_rn(int i) { return __nv_bfloat16(i); }
SIMT_FN float __bfloat162float(__nv_bfloat16 b) { return float(b); }
SIMT_FN int __bfloat162int_rn(__nv_bfloat16 b) { return int(__builtin_rintf(float(b))); }
SIMT_FN int __bfloat162int_rz(__nv_bfloat16 b) { return int(float(b)); }
SIMT_FN __nv_bfloat162 __float2bfloat162_rn(float f) { return __nv_bfloat162(__nv_bfloat16(f), __nv_bfloat16(f)); }
SIMT_FN __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return __nv_bfloat162(__nv_bfloat16(a), __nv_bfloat16(b));
}
SIMT_FN __nv_bfloat162 __float22bfloat162_rn(float2 f) { return __floats2bfloat162_rn(f.x, f.y); }
SIMT_FN float2 __bfloat1622float2(__nv_bfloat162 b) { return float2{float(b.x), float(b.y)}; }
SIMT_FN __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
SIMT_FN __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a) { return __nv_bfloat162(a, a); }
SIMT_FN __nv_bfloat162 make_bfloat162(__nv_bfloat16 a, __nv_bfloat16 b) { return __nv_bfloat162(a, b); }
SIMT_FN __nv_bfloat16 __low2bfloat16(__nv_bfloat162 b) { return b.x; }
SIMT_FN __nv_bfloat16 __high2bfloat16(__nv_bfloat162 b) { return b.y; }
SIMT_FN unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.__x; }
SIMT_FN short __bfloat16_as_short(__nv_bfloat16 b) { return short(b.__x); }
SIMT_FN __nv_bfloat16 __ushort_as_bfloat16(unsigned short u) { return __nv_bfloat16::from_bits(u); }
SIMT_FN __nv_bfloat16 __short_as_bfloat16(short u) { return __nv_bfloat16::from_bits((unsigned short)u); }
#endif
