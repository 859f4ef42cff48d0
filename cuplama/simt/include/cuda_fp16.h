// CUDA's cuda_fp16.h for the emulator: the names that kernels use, over simt_float16.h.
#ifndef SIMT_CUDA_FP16_H
#define SIMT_CUDA_FP16_H
#include "simt_float16.h"

typedef simt::Float16<simt::HalfFormat> __half;
typedef simt::Float16x2<simt::HalfFormat> __half2;
typedef __half half;
typedef __half2 half2;
struct __half_raw { unsigned short x; };

SIMT_FLOAT16_FUNCTIONS(__half, __half2)

SIMT_FN __half __float2half(float f) { return __half(f); }
SIMT_FN __half __float2half_rn(float f) { return __half(f); }
SIMT_FN __half __double2half(double d) { return __half(d); }
SIMT_FN __half __int2half_rn(int i) { return __half(i); }
SIMT_FN __half __uint2half_rn(unsigned i) { return __half(i); }
SIMT_FN float __half2float(__half h) { return float(h); }
SIMT_FN int __half2int_rn(__half h) { return int(__builtin_rintf(float(h))); }
SIMT_FN int __half2int_rz(__half h) { return int(float(h)); }
SIMT_FN __half2 __float2half2_rn(float f) { return __half2(__half(f), __half(f)); }
SIMT_FN __half2 __floats2half2_rn(float a, float b) { return __half2(__half(a), __half(b)); }
SIMT_FN __half2 __float22half2_rn(float2 f) { return __half2(__half(f.x), __half(f.y)); }
SIMT_FN float2 __half22float2(__half2 h) { return float2{float(h.x), float(h.y)}; }
SIMT_FN __half2 __halves2half2(__half a, __half b) { return __half2(a, b); }
SIMT_FN __half2 __half2half2(__half a) { return __half2(a, a); }
SIMT_FN __half2 make_half2(__half a, __half b) { return __half2(a, b); }
SIMT_FN __half __low2half(__half2 h) { return h.x; }
SIMT_FN __half __high2half(__half2 h) { return h.y; }
SIMT_FN __half2 __low2half2(__half2 h) { return __half2(h.x, h.x); }
SIMT_FN __half2 __high2half2(__half2 h) { return __half2(h.y, h.y); }
SIMT_FN unsigned short __half_as_ushort(__half h) { return h.__x; }
SIMT_FN short __half_as_short(__half h) { return short(h.__x); }
SIMT_FN __half __ushort_as_half(unsigned short u) { return __half::from_bits(u); }
SIMT_FN __half __short_as_half(short u) { return __half::from_bits((unsigned short)u); }
#endif
