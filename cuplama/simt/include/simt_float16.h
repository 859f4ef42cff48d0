// The two 16-bit float types of CUDA, from one template: a format says how its 16 bits become a float and how a
// float is rounded (to nearest, ties to even) into them. Arithmetic is done in float and rounded once; float has
// more than twice the bits plus two, so that is correctly rounded (Figueroa 1995).
#ifndef SIMT_FLOAT16_H
#define SIMT_FLOAT16_H

namespace simt {

struct HalfFormat {
  SIMT_FN double wide(unsigned short h) { return double(widen(h)); }
  SIMT_FN float widen(unsigned short h) {
    unsigned sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 0x3ffu;
    if (exponent == 31) return as<float>(sign | 0x7f800000u | mantissa << 13);
    if (exponent != 0) return as<float>(sign | (exponent + 112) << 23 | mantissa << 13);
    return as<float>(as<unsigned>(float(int(mantissa)) * 0x1p-24f) | sign);
  }
  SIMT_FN unsigned short narrow(float f) {
    unsigned bits = as<unsigned>(f), sign = (bits >> 16) & 0x8000u, x = bits & 0x7fffffffu;
    if (x > 0x7f800000u) return 0x7fff;                        // CUDA's canonical NaN
    if (x >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    if (x >= 0x38800000u) return (unsigned short)(sign | ((x - 0x38000000u + 0xfffu + ((x >> 13) & 1u)) >> 13));
    unsigned shift = 126u - (x >> 23);                         // below 2^-14: units of 2^-24
    if (shift > 24u) return (unsigned short)sign;
    unsigned m = (x & 0x7fffffu) | 0x800000u, low = m & ((1u << shift) - 1u), half = 1u << (shift - 1u);
    unsigned r = m >> shift;
    return (unsigned short)(sign | (r + unsigned(low > half || (low == half && (r & 1u)))));
  }
};

struct BfloatFormat {
  // A subnormal one is a subnormal float, which arithmetic takes for zero as kernels do (-ftz=true); that of bf16 does not.
  SIMT_FN double wide(unsigned short b) {
    if ((b & 0x7f80u) != 0) return double(widen(b));
    double size = double(int(b & 0x7fu)) * 0x1p-133;
    return b & 0x8000u ? -size : size;
  }
  SIMT_FN float widen(unsigned short b) { return as<float>(unsigned(b) << 16); }
  SIMT_FN unsigned short narrow(float f) {
    unsigned x = as<unsigned>(f);
    if ((x & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (unsigned short)((x + 0x7fffu + ((x >> 16) & 1u)) >> 16);
  }
};

// double -> 16 bits with one rounding: first to float by round-to-odd, then to nearest even.
SIMT_FN float round_to_odd(double d) {
  float f = float(d);
  if (double(f) == d || f != f || __builtin_isinf(d)) return f;
  unsigned x = as<unsigned>(f);
  bool away = __builtin_fabs(double(f)) > __builtin_fabs(d);
  if (away) x -= 1;
  return as<float>(x | 1u);
}
// a * b + c in double, the product being exact, with the sum rounded to odd.
SIMT_FN double fma_to_odd(double a, double b, double c) {
  double p = a * b, s = p + c, t = s - p;
  double error = (p - (s - t)) + (c - t);
  if (error == 0 || s != s || __builtin_isinf(s)) return s;
  unsigned long long x = as<unsigned long long>(s);
  if ((x & 1u) == 0) x += ((error > 0) == (s > 0)) ? 1ull : -1ull;
  return as<double>(x);
}

template <class Format> struct Float16 {
  unsigned short __x;
  Float16() = default;
  SIMT_METHOD Float16(float f) : __x(Format::narrow(f)) {}
  SIMT_METHOD Float16(double d) : __x(Format::narrow(round_to_odd(d))) {}
  SIMT_METHOD Float16(int i) : __x(Format::narrow(round_to_odd(double(i)))) {}
  SIMT_METHOD Float16(unsigned i) : __x(Format::narrow(round_to_odd(double(i)))) {}
  SIMT_METHOD operator float() const { return Format::widen(__x); }
  SIMT_METHOD double wide() const { return Format::wide(__x); }
  SIMT_METHOD explicit operator int() const { return int(Format::widen(__x)); }
  SIMT_METHOD static Float16 from_bits(unsigned short bits) { Float16 h; h.__x = bits; return h; }

  SIMT_METHOD friend Float16 operator+(const Float16& a, const Float16& b) { return Float16(float(a) + float(b)); }
  SIMT_METHOD friend Float16 operator-(const Float16& a, const Float16& b) { return Float16(float(a) - float(b)); }
  SIMT_METHOD friend Float16 operator*(const Float16& a, const Float16& b) {
    return Float16(Format::wide(a.__x) * Format::wide(b.__x));  // exact, and rounded once
  }
  SIMT_METHOD friend Float16 operator/(const Float16& a, const Float16& b) { return Float16(float(a) / float(b)); }
  SIMT_METHOD friend Float16 operator-(const Float16& a) { return from_bits((unsigned short)(a.__x ^ 0x8000u)); }
  SIMT_METHOD Float16& operator+=(const Float16& b) { return *this = *this + b; }
  SIMT_METHOD Float16& operator-=(const Float16& b) { return *this = *this - b; }
  SIMT_METHOD Float16& operator*=(const Float16& b) { return *this = *this * b; }
  SIMT_METHOD Float16& operator/=(const Float16& b) { return *this = *this / b; }
  SIMT_METHOD friend bool operator==(const Float16& a, const Float16& b) { return float(a) == float(b); }
  SIMT_METHOD friend bool operator!=(const Float16& a, const Float16& b) { return float(a) != float(b); }
  SIMT_METHOD friend bool operator<(const Float16& a, const Float16& b) { return float(a) < float(b); }
  SIMT_METHOD friend bool operator>(const Float16& a, const Float16& b) { return float(a) > float(b); }
  SIMT_METHOD friend bool operator<=(const Float16& a, const Float16& b) { return float(a) <= float(b); }
  SIMT_METHOD friend bool operator>=(const Float16& a, const Float16& b) { return float(a) >= float(b); }
};

template <class Format> struct alignas(4) Float16x2 {
  Float16<Format> x, y;
  Float16x2() = default;
  SIMT_METHOD Float16x2(const Float16<Format>& a, const Float16<Format>& b) : x(a), y(b) {}
};

}  // namespace simt

// Functions whose names do not contain the type, for one format.
#define SIMT_FLOAT16_FUNCTIONS(H, H2)                                                                            \
  SIMT_FN H __hadd(H a, H b) { return a + b; }                                                                   \
  SIMT_FN H __hsub(H a, H b) { return a - b; }                                                                   \
  SIMT_FN H __hmul(H a, H b) { return a * b; }                                                                   \
  SIMT_FN H __hdiv(H a, H b) { return a / b; }                                                                   \
  SIMT_FN H __hneg(H a) { return -a; }                                                                           \
  SIMT_FN H __habs(H a) { return H::from_bits((unsigned short)(a.__x & 0x7fffu)); }                              \
  SIMT_FN H __hfma(H a, H b, H c) { return H(simt::fma_to_odd(a.wide(), b.wide(), c.wide())); }                  \
  SIMT_FN H __hmax(H a, H b) { return H(__builtin_fmaxf(float(a), float(b))); }                                  \
  SIMT_FN H __hmin(H a, H b) { return H(__builtin_fminf(float(a), float(b))); }                                  \
  SIMT_FN bool __heq(H a, H b) { return a == b; }                                                                \
  SIMT_FN bool __hne(H a, H b) { return a != b; }                                                                \
  SIMT_FN bool __hlt(H a, H b) { return a < b; }                                                                 \
  SIMT_FN bool __hgt(H a, H b) { return a > b; }                                                                 \
  SIMT_FN bool __hle(H a, H b) { return a <= b; }                                                                \
  SIMT_FN bool __hge(H a, H b) { return a >= b; }                                                                \
  SIMT_FN bool __hisnan(H a) { return __builtin_isnan(float(a)); }                                               \
  SIMT_FN H2 __hadd2(H2 a, H2 b) { return H2(a.x + b.x, a.y + b.y); }                                            \
  SIMT_FN H2 __hsub2(H2 a, H2 b) { return H2(a.x - b.x, a.y - b.y); }                                            \
  SIMT_FN H2 __hmul2(H2 a, H2 b) { return H2(a.x * b.x, a.y * b.y); }                                            \
  SIMT_FN H2 __hneg2(H2 a) { return H2(-a.x, -a.y); }                                                            \
  SIMT_FN H2 __hfma2(H2 a, H2 b, H2 c) { return H2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }              \
  SIMT_FN H2 __hmax2(H2 a, H2 b) { return H2(__hmax(a.x, b.x), __hmax(a.y, b.y)); }                              \
  SIMT_FN H2 __hmin2(H2 a, H2 b) { return H2(__hmin(a.x, b.x), __hmin(a.y, b.y)); }                              \
  SIMT_FN float __low2float(H2 a) { return float(a.x); }                                                         \
  SIMT_FN float __high2float(H2 a) { return float(a.y); }

#endif
