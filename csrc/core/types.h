// The element types of a state: float, double, Half, BFloat16, and Complex of float and double, laid out as torch does.
#pragma once

#include "host_device.h"

namespace odenet {

struct Half;
struct BFloat16;

namespace ODENET_LEVEL {
ODENET_HD float half_to_float(uint16_t bits);
ODENET_HD uint16_t float_to_half(float x);
ODENET_HD float bfloat16_to_float(uint16_t bits);
ODENET_HD uint16_t float_to_bfloat16(float x);
}  // namespace ODENET_LEVEL

// IEEE 754 binary16, and the upper half of a float. Numbers are rounded to nearest, ties to even.
struct Half {
  uint16_t bits;
  Half() = default;
  ODENET_HD explicit Half(float x) : bits(float_to_half(x)) {}
  ODENET_HD explicit operator float() const { return half_to_float(bits); }
};
struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  ODENET_HD explicit BFloat16(float x) : bits(float_to_bfloat16(x)) {}
  ODENET_HD explicit operator float() const { return bfloat16_to_float(bits); }
};

template <class R>
struct Complex {
  R re, im;
};

// Accumulate<T>: the type in which sums over T are formed. Real<T>: the type of the real numbers that multiply T.
template <class T>
struct TypeTraits {
  using Accumulate = T;
  using Real = T;
};
template <>
struct TypeTraits<Half> {
  using Accumulate = float;
};
template <>
struct TypeTraits<BFloat16> {
  using Accumulate = float;
};
template <class R>
struct TypeTraits<Complex<R>> {
  using Accumulate = Complex<R>;
  using Real = R;
};
template <class T>
using Accumulate = typename TypeTraits<T>::Accumulate;
template <class T>
using Real = typename TypeTraits<Accumulate<T>>::Real;

namespace ODENET_LEVEL {

// Branch-free, so that loops over them vectorise where the machine has no instruction for it.
ODENET_HD float half_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t wide = magnitude + ((127 - 15) << 23);  // the exponent's bias is 127 in a float, 15 here
  const uint32_t special = wide + ((127 - 15) << 23);    // infinite or not a number
  // Below 2^-14: the fraction without a leading one.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude | 0x38800000u) - 0x1p-14f);
  const uint32_t normal = magnitude >= (31u << 23) ? special : wide;
  return bit_cast<float>(sign | (magnitude < (1u << 23) ? small : normal));
#endif
}

ODENET_HD uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t all = bit_cast<uint32_t>(x);
  const uint32_t sign = (all >> 16) & 0x8000, magnitude = all & 0x7fffffff;
  const uint32_t odd = (magnitude >> 13) & 1;
  const uint32_t normal = (magnitude - ((127 - 15) << 23) + 0xfff + odd) >> 13;
  // Below 2^-14: 0.5 has the spacing 2^-24 of the smallest numbers, so that adding it rounds.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;  // not a number; infinite or too large
  const uint32_t finite = magnitude < 0x38800000 ? small : normal;
  return static_cast<uint16_t>(sign | (magnitude >= 0x47800000 ? special : finite));
#endif
}

ODENET_HD float bfloat16_to_float(uint16_t bits) {
  return bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

ODENET_HD uint16_t float_to_bfloat16(float x) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
#else
  const uint32_t all = bit_cast<uint32_t>(x);
  const uint32_t rounded = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((all & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
#endif
}

template <class R>
ODENET_HD Complex<R> operator*(R x, Complex<R> z) {
  return {x * z.re, x * z.im};
}
template <class R>
ODENET_HD Complex<R>& operator+=(Complex<R>& z, Complex<R> w) {
  z.re += w.re;
  z.im += w.im;
  return z;
}

template <class R>
ODENET_HD R divide(R x, R y) {
  return x / y;
}
template <class R>
ODENET_HD Complex<R> divide(Complex<R> z, R y) {
  return {z.re / y, z.im / y};
}

// |x|, and |x|^2 of a scaled error.
ODENET_HD float magnitude(float x) {
  return ::fabsf(x);
}
ODENET_HD double magnitude(double x) {
  return ::fabs(x);
}
ODENET_HD float square_root(float x) {
  return ::sqrtf(x);
}
ODENET_HD double square_root(double x) {
  return ::sqrt(x);
}
template <class R>
ODENET_HD R magnitude(Complex<R> z) {  // without overflow on the way
  const R x = magnitude(z.re), y = magnitude(z.im);
  const R large = x > y ? x : y, small = x > y ? y : x;
  const R ratio = large > 0 ? small / large : large;
  const R size = large * square_root(1 + ratio * ratio);
  return size + (x - x) + (y - y);  // not a number where a part is infinite or not a number
}

ODENET_HD float squared(float x) {
  return x * x;
}
ODENET_HD double squared(double x) {
  return x * x;
}
template <class R>
ODENET_HD R squared(Complex<R> z) {
  return z.re * z.re + z.im * z.im;
}

// The next number after x in the direction of `towards` (+1, -1).
ODENET_HD float next_after(float x, double towards) {
  return ::nextafterf(x, static_cast<float>(towards * HUGE_VAL));
}
ODENET_HD double next_after(double x, double towards) {
  return ::nextafter(x, towards * HUGE_VAL);
}
template <class T>
ODENET_HD T next_after(T x, double towards) {  // of 16 bits
  const bool negative = (x.bits & 0x8000) != 0, up = towards > 0;
  if ((x.bits & 0x7fff) == 0) {
    x.bits = up ? 1 : 0x8001;
  } else {
    x.bits = static_cast<uint16_t>(negative == up ? x.bits - 1 : x.bits + 1);
  }
  return x;
}

// A time, in double, as the real type of the state.
template <class R>
ODENET_HD R round_to(double x) {
  return static_cast<R>(x);
}
template <>
ODENET_HD Half round_to<Half>(double x) {
  return Half(static_cast<float>(x));
}
template <>
ODENET_HD BFloat16 round_to<BFloat16>(double x) {
  return BFloat16(static_cast<float>(x));
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
