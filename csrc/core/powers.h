// Powers for the control of a step: log2 and 2^x by a few terms of their series, inlined; the same bits for a number
// and for the lanes of a pack.
//
//   log2(m 2^e) = e + 2 / ln 2 * (s + s^3 / 3 + s^5 / 5 + ...),   s = (m - 1) / (m + 1),  |s| < 0.1716
//   2^(n + x)   = 2^n * (1 + x ln 2 + (x ln 2)^2 / 2! + ...),     |x| <= 1/2
//
// The error is some units in the last place. A number below the normal ones is taken for another that is as small.
#pragma once

#include <bit>

#include "pack.h"

namespace odenet {
namespace ODENET_LEVEL {

// How numbers are laid out: n + magic has the integer n in its last bits. And how many terms they need.
template <class T>
struct Layout;
template <>
struct Layout<float> {
  static constexpr int fraction = 23, log_terms = 5, power_terms = 7;
  static constexpr float magic = 0x1.8p23f;
  static constexpr int32_t bits_of_magic = 0x4b400000, root = 0x3f3504f3;  // root: sqrt(1/2)
};
template <>
struct Layout<double> {
  static constexpr int fraction = 52, log_terms = 10, power_terms = 13;
  static constexpr double magic = 0x1.8p52;
  static constexpr int64_t bits_of_magic = 0x4338000000000000, root = 0x3fe6a09e667f3bcd;
};

constexpr double log_coefficient(int i) {
  return 1.0 / (2 * i + 1);
}
constexpr double power_coefficient(int i) {
  return i == 0 ? 1.0 : power_coefficient(i - 1) * 0.69314718055994531 / i;
}

// The sum of c_i x^i for begin <= i < end, over x^begin, by halves, so that few operations wait for each other. V: a
// number T, or a vector of them. powers: x, x^2, x^4, ...
template <int begin, int end, class T, class V, class Coefficient>
ODENET_HD V series(const V* powers, const Coefficient& c) {
  constexpr int count = end - begin;
  if constexpr (count == 1) {
    return V{} + T(Coefficient{}(begin));
  } else {
    constexpr int level = std::bit_width(unsigned(count - 1)) - 1, middle = begin + (1 << level);
    return fused(series<middle, end, T>(powers, c), powers[level], series<begin, middle, T>(powers, c));
  }
}
template <int terms, class T, class V, class Coefficient>
ODENET_HD V series(const V& x, const Coefficient& c) {
  constexpr int levels = std::bit_width(unsigned(terms - 1));
  V powers[levels];
  powers[0] = x;
  for (int i = 1; i < levels; ++i) powers[i] = powers[i - 1] * powers[i - 1];
  return series<0, terms, T>(powers, c);
}

// I: an integer, or a vector of them, as wide.
template <class T, class I, class V>
ODENET_HD V log2_of(V x) {
  using L = Layout<T>;
  const I bits = bit_cast<I>(x), e = (bits - L::root) >> L::fraction;
  const V m = bit_cast<V>(bits - (e << L::fraction)), exponent = bit_cast<V>(e + L::bits_of_magic) - L::magic;
  const V s = (m - T(1)) / (m + T(1));
  const V sum = series<L::log_terms, T>(s * s, [](int i) { return log_coefficient(i); });
  return fused(s * sum, V{} + T(2.8853900817779268), exponent);
}
template <class T, class I, class V>
ODENET_HD V exp2_of(V x) {
  using L = Layout<T>;
  const V whole = x + L::magic;
  const V part = series<L::power_terms + 1, T>(x - (whole - L::magic), [](int i) { return power_coefficient(i); });
  return bit_cast<V>(bit_cast<I>(part) + ((bit_cast<I>(whole) - L::bits_of_magic) << L::fraction));
}

// log2(x) where x > 0.
ODENET_HD float binary_log(float x) {
  return log2_of<float, int32_t>(x);
}
ODENET_HD double binary_log(double x) {
  return log2_of<double, int64_t>(x);
}
// 2^x where |x| <= 126.
ODENET_HD float power_of_two(float x) {
  return exp2_of<float, int32_t>(x);
}
ODENET_HD double power_of_two(double x) {
  return exp2_of<double, int64_t>(x);
}

#if !defined(__CUDACC__)
template <class T, int W>
ODENET_HD Pack<T, W> binary_log(const Pack<T, W>& x) {
  Pack<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = log2_of<T, Vector<IntegerOf<T>>>(x.v[h]));
  return r;
}
template <class T, int W>
ODENET_HD Pack<T, W> power_of_two(const Pack<T, W>& x) {
  Pack<T, W> r;
  ODENET_EACH(r.vectors, r.v[h] = exp2_of<T, Vector<IntegerOf<T>>>(x.v[h]));
  return r;
}
#endif

}  // namespace ODENET_LEVEL
}  // namespace odenet
