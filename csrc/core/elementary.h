// Elementary functions by polynomials: of a number, and of a vector of them, whose lanes have the bits of the number
// alone. Written without a branch but for what is rare, which the C library computes lane by lane. An error is 4 units
// in the last place at most (tests/native/elementary.cpp).
//
// They are those of Cody and Waite, Software manual for the elementary functions (1980): the argument is brought into a
// small interval by a constant whose first part has so few bits that its multiples are exact, there a polynomial that
// meets the function at Chebyshev nodes serves, and the result is put together by bits of the exponent.
#pragma once

#include "powers.h"

#if !defined(__CUDACC__)

namespace odenet {
namespace ODENET_LEVEL {

// What a vector is made of; a number is one of itself.
template <class V>
struct VectorParts {
  using Number = std::remove_cvref_t<decltype(V{}[0])>;
  using Bits = Vector<std::make_unsigned_t<IntegerOf<Number>>>;
};
template <>
struct VectorParts<float> {
  using Number = float;
  using Bits = uint32_t;
};
template <>
struct VectorParts<double> {
  using Number = double;
  using Bits = uint64_t;
};
template <class V>
using BitsOf = typename VectorParts<V>::Bits;
template <class V>
using NumberOf = typename VectorParts<V>::Number;

// More of how numbers are laid out. ln2_high: its last bits are 0, so that a whole number of them is exact.
template <class T>
struct Parts;
template <>
struct Parts<float> : Layout<float> {
  static constexpr int bias = 127;
  static constexpr uint32_t sign = 0x80000000, one = 0x3f800000, mantissa = 0x007fffff;
  static constexpr float ln2_high = 0x1.62ep-1f, ln2_low = 0x1.0bfbe8p-15f, smallest = 0x1p-126f;
  // Where results are 0, infinite, -1 and 1.
  static constexpr float least_exp = -104, most_exp = 89, least_expm1 = -18, most_tanh = 10;
};
template <>
struct Parts<double> : Layout<double> {
  static constexpr int bias = 1023;
  static constexpr uint64_t sign = 0x8000000000000000, one = 0x3ff0000000000000, mantissa = 0x000fffffffffffff;
  static constexpr double ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33, smallest = 0x1p-1022;
  static constexpr double least_exp = -746, most_exp = 710, least_expm1 = -38, most_tanh = 20;
};

// c + x (c' + x (...))
template <class V>
ODENET_HD V polynomial(V, double c) {
  return V{} + NumberOf<V>(c);
}
template <class V, class... C>
ODENET_HD V polynomial(V x, double c, C... rest) {
  return fused(polynomial(x, rest...), x, V{} + NumberOf<V>(c));
}

ODENET_HD bool in_all_lanes(int mask) {
  return mask != 0;
}
template <class M>
ODENET_HD bool in_all_lanes(const M& mask) {
  using T = std::conditional_t<sizeof(mask[0]) == 4, float, double>;
  return signs<T>(mask) == uint32_t((uint64_t{1} << kVectorBytes / sizeof(T)) - 1);
}
// y where `common`, else what the C library says of x.
template <class T, class F>
ODENET_CALLED Vector<T> mended(Vector<T> x, Vector<T> y, Vector<IntegerOf<T>> common, F library) {
  for (int i = 0; i < kVectorBytes / int(sizeof(T)); ++i) y[i] = common[i] ? y[i] : library(x[i]);
  return y;
}
template <class V, class M, class F>
ODENET_HD V unless_rare(V x, V y, M common, F library) {
  if (__builtin_expect(in_all_lanes(common), 1)) return y;
  if constexpr (std::is_same_v<V, NumberOf<V>>) {
    return library(x);
  } else {
    return mended<NumberOf<V>>(x, y, common, library);
  }
}

template <class V>
ODENET_HD V magnitude(V x) {
  return bit_cast<V>(bit_cast<BitsOf<V>>(x) & ~Parts<NumberOf<V>>::sign);
}
// y > 0 with the sign of x.
template <class V>
ODENET_HD V with_sign(V y, V x) {
  return bit_cast<V>(bit_cast<BitsOf<V>>(y) | (bit_cast<BitsOf<V>>(x) & Parts<NumberOf<V>>::sign));
}
// What is no number stays that.
template <class V>
ODENET_HD V no_more(V x, double limit) {
  const V most = V{} + NumberOf<V>(limit);
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
  if constexpr (std::is_same_v<V, Vector<float>>) return __builtin_ia32_minps256(most, x);
  if constexpr (std::is_same_v<V, Vector<double>>) return __builtin_ia32_minpd256(most, x);
#endif
  return most < x ? most : x;
}
template <class V>
ODENET_HD V no_less(V x, double limit) {
  const V least = V{} + NumberOf<V>(limit);
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__clang__)
  if constexpr (std::is_same_v<V, Vector<float>>) return __builtin_ia32_maxps256(least, x);
  if constexpr (std::is_same_v<V, Vector<double>>) return __builtin_ia32_maxpd256(least, x);
#endif
  return least > x ? least : x;
}

// x = n ln 2 + r,  |r| <= ln 2 / 2. bits: has n + offset in its last ones.
template <class V>
struct OfLn2 {
  using T = NumberOf<V>;
  using L = Parts<T>;
  V n, r;
  BitsOf<V> bits;
  ODENET_HD OfLn2(V x, int offset) {
    const V whole = fused(x, V{} + T(1.4426950408889634), V{} + (L::magic + T(offset)));
    n = whole - (L::magic + T(offset));
    r = fused(n, V{} - L::ln2_low, fused(n, V{} - L::ln2_high, x));
    bits = bit_cast<BitsOf<V>>(whole);
  }
};

// (e^r - 1) / r
template <class V>
ODENET_HD V expm1_series(V r) {
  if constexpr (sizeof(NumberOf<V>) == 4) {
    return polynomial(r, 1, 0.499999999984463445, 0.166665770084295767, 0.0416665561925311101, 0.00836317593353305672,
                      0.00139260074407108601);
  } else {
    return polynomial(r, 1, 0.5, 0.166666666666666675, 0.0416666666666241619, 0.00833333333333006445,
                      0.00138888889171967191, 0.000198412698630405453, 0.0000248015213223686933, 2.75572684803100255e-6,
                      2.76200758799833666e-7, 2.51003758325612337e-8);
  }
}

template <class V>
ODENET_HD V exp_of(V x) {
  using L = Parts<NumberOf<V>>;
  const OfLn2<V> of(no_less(no_more(x, L::most_exp), L::least_exp), 2 * L::bias);
  const V power = fused(expm1_series(of.r), of.r, V{} + NumberOf<V>(1));
  // 2^n in two parts: it may be larger than all numbers, or the result be below the normal ones.
  const BitsOf<V> half = of.bits >> 1;
  return power * bit_cast<V>(half << L::fraction) * bit_cast<V>((of.bits - half) << L::fraction);
}

// e^x - 1 = 2 (2^(n-1) (e^r - 1) + 2^(n-1) - 1/2). small: e^r - 1
template <class V>
ODENET_HD V expm1_of(V x) {
  using T = NumberOf<V>;
  using L = Parts<T>;
  const OfLn2<V> of(no_less(no_more(x, L::most_exp), L::least_expm1), L::bias - 1);
  const V small = expm1_series(of.r) * of.r, power = bit_cast<V>(of.bits << L::fraction);
  const V half = fused(power, small, power - T(0.5));
  return of.n == V{} ? small : half + half;
}

// y / (y + 1) of y = (e^2a - 1) / 2, where a = |x|. That ln 2 is rounded here counts for the less, the larger a is. In
// an order that lets little wait: what comes before and after waits for all of it.
template <class V>
ODENET_HD V tanh_of(V x) {
  using T = NumberOf<V>;
  using L = Parts<T>;
  constexpr T offset = L::magic + T(L::bias - 1);
  const V a = no_more(magnitude(x), L::most_tanh), whole = fused(a, V{} + T(2.8853900817779268), V{} + offset);
  const V r = fused(whole - offset, V{} - T(0.69314718055994531), a + a);
  const V power = bit_cast<V>(bit_cast<BitsOf<V>>(whole) << L::fraction);
  const V y = fused(power * r, expm1_series(r), power - T(0.5));
  return with_sign(y / (y + T(1)), x);
}

// x = m 2^e,  sqrt(1/2) <= m < sqrt(2),  for numbers from the smallest normal one on.
template <class V>
struct OfPowers {
  using T = NumberOf<V>;
  using L = Parts<T>;
  BitsOf<V> biased;
  V e, m;
  ODENET_HD explicit OfPowers(V x) {
    const BitsOf<V> moved = bit_cast<BitsOf<V>>(x) + (L::one - L::root);
    biased = moved >> L::fraction;
    e = bit_cast<V>(biased + L::bits_of_magic) - (L::magic + T(L::bias));
    m = bit_cast<V>((moved & L::mantissa) + L::root);
  }
};

// log(1 + f) + e ln 2, in double. log(1 + f) = 2 artanh(s),  s = f / (2 + f)
template <class V>
ODENET_HD V log_of_parts(V f, V e) {
  using L = Parts<double>;
  const V s = f / (f + 2.0), w = s * s, half = 0.5 * f * f;
  const V p = w * polynomial(w, 0.666666666666666969, 0.399999999998995045, 0.285714286259754849, 0.222222111347950799,
                             0.181828891252617221, 0.153317216005560413, 0.146164496850434059);
  return fused(e, V{} + L::ln2_high, f - (half - fused(s, half + p, e * L::ln2_low)));
}

template <class V>
ODENET_HD V log_of(V x) {
  using T = NumberOf<V>;
  const OfPowers<V> of(x);
  const V y = log_of_parts(of.m - T(1), of.e);
  return unless_rare(x, y, (x >= Parts<T>::smallest) & (x < T(INFINITY)), [](T x) { return std::log(x); });
}

// f = (1 + x) 2^-e - 1 rounded once, with the e of 1 + x rounded.
template <class V>
ODENET_HD V log1p_of(V x) {
  using T = NumberOf<V>;
  using L = Parts<T>;
  const OfPowers<V> of(x + T(1));
  const V power = bit_cast<V>((uint64_t{2 * L::bias} - of.biased) << L::fraction);
  const V y = log_of_parts(fused(x, power, power - T(1)), of.e);
  return unless_rare(x, x == V{} ? x : y, (x > T(-1)) & (x < T(0x1p60)), [](T x) { return std::log1p(x); });
}

// sin(r) for |r| <= pi/2, changed in sign where the last bit of `turns` is set.
template <class V>
ODENET_HD V sine(V r, BitsOf<V> turns) {
  using T = NumberOf<V>;
  const V z = r * r;
  V p;
  if constexpr (sizeof(T) == 4) {
    p = polynomial(z, 1, -0.166666659638211873, 0.00833324213509693876, -0.000198227394886311018,
                   2.63475639181178127e-6);
  } else {
    p = polynomial(z, 1, -0.166666666666666666, 0.00833333333333331587, -0.000198412698412549738,
                   2.75573192191632334e-6, -2.50521076169961829e-8, 1.60589773124640876e-10, -7.64397029679857205e-13,
                   2.73144476698639934e-15);
  }
  return bit_cast<V>(bit_cast<BitsOf<V>>(r * p) ^ (turns << (8 * sizeof(T) - 1)));
}

// x - n pi, for an n of at most 12 bits, or of 25 in double; it may have a half.
template <class V>
ODENET_HD V less_turns(V x, V n) {
  if constexpr (sizeof(NumberOf<V>) == 4) {
    x = fused(n, V{} - 0x1.92p+1f, x);
    x = fused(n, V{} - 0x1.fb4p-11f, x);
    x = fused(n, V{} - 0x1.444p-23f, x);
    return fused(n, V{} - 0x1.68c234p-38f, x);
  } else {
    x = fused(n, V{} - 0x1.921fb5p+1, x);
    x = fused(n, V{} - 0x1.110b46p-25, x);
    x = fused(n, V{} - 0x1.1a6263p-53, x);
    return fused(n, V{} - 0x1.8a2e03707344ap-80, x);
  }
}
template <class T>
constexpr T kMostOfSine = sizeof(T) == 4 ? T(1e4) : T(1e8);

template <class V>
ODENET_HD V sin_of(V x) {
  using T = NumberOf<V>;
  const V whole = fused(x, V{} + T(0.31830988618379067), V{} + Parts<T>::magic);
  const V y = sine(less_turns(x, whole - Parts<T>::magic), bit_cast<BitsOf<V>>(whole));
  return unless_rare(x, y, (x < kMostOfSine<T>)&(x > -kMostOfSine<T>), [](T x) { return std::sin(x); });
}

// cos(x) = -sin(x - pi/2)
template <class V>
ODENET_HD V cos_of(V x) {
  using T = NumberOf<V>;
  const V whole = fused(x, V{} + T(0.31830988618379067), V{} - T(0.5)) + Parts<T>::magic;
  const V y = sine(less_turns(x, whole - Parts<T>::magic + T(0.5)), bit_cast<BitsOf<V>>(whole) + 1);
  return unless_rare(x, y, (x < kMostOfSine<T>)&(x > -kMostOfSine<T>), [](T x) { return std::cos(x); });
}

}  // namespace ODENET_LEVEL
}  // namespace odenet

#endif
