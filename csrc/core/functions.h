// Functions of numbers and of packs: those of elementary.h where they are faster than glibc's vector library, else of
// that, or of the C library where there is none.
#pragma once

#include "elementary.h"

#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 35)
#define ODENET_LIBMVEC  // glibc's vector functions: 4 ulp
#endif
#endif

namespace odenet {
namespace ODENET_LEVEL {

#define ODENET_LIBRARY_FUNCTION(name) \
  ODENET_HD float name(float x) {     \
    return ::name##f(x);              \
  }                                   \
  ODENET_HD double name(double x) {   \
    return ::name(x);                 \
  }
#define ODENET_LIBRARY_FUNCTION_2(name)       \
  ODENET_HD float name(float x, float y) {    \
    return ::name##f(x, y);                   \
  }                                           \
  ODENET_HD double name(double x, double y) { \
    return ::name(x, y);                      \
  }

#if defined(__CUDACC__)

#define ODENET_OF(name, T, of_library, of_vectors)
#define ODENET_FUNCTION ODENET_LIBRARY_FUNCTION
#define ODENET_FUNCTION_2 ODENET_LIBRARY_FUNCTION_2
#define ODENET_LANE_FUNCTION ODENET_LIBRARY_FUNCTION

#else

// name_of: of a vector, from the vector library or lane by lane, and of a number.
#if !defined(ODENET_LIBMVEC)
#define ODENET_OF(name, T, of_library, of_vectors)                                     \
  ODENET_HD T name##_of(T x) {                                                         \
    return ::of_library(x);                                                            \
  }                                                                                    \
  ODENET_HD Vector<T> name##_of(Vector<T> x) {                                         \
    for (int i = 0; i < kVectorBytes / int(sizeof(T)); ++i) x[i] = ::of_library(x[i]); \
    return x;                                                                          \
  }
#define ODENET_OF_2(name, T, of_library, of_vectors)                                         \
  ODENET_HD T name##_of(T x, T y) {                                                          \
    return ::of_library(x, y);                                                               \
  }                                                                                          \
  ODENET_HD Vector<T> name##_of(Vector<T> x, Vector<T> y) {                                  \
    for (int i = 0; i < kVectorBytes / int(sizeof(T)); ++i) x[i] = ::of_library(x[i], y[i]); \
    return x;                                                                                \
  }
#else
#if defined(__AVX512F__)
#define ODENET_MVEC(name, arguments) _ZGVeN16##arguments##_##name##f
#define ODENET_MVEC_DOUBLE(name, arguments) _ZGVeN8##arguments##_##name
#elif defined(__AVX2__)
#define ODENET_MVEC(name, arguments) _ZGVdN8##arguments##_##name##f
#define ODENET_MVEC_DOUBLE(name, arguments) _ZGVdN4##arguments##_##name
#else
#define ODENET_MVEC(name, arguments) _ZGVbN4##arguments##_##name##f
#define ODENET_MVEC_DOUBLE(name, arguments) _ZGVbN2##arguments##_##name
#endif
// ODENET_ONE_LANE: a number is a pack of one lane, and has the bits that it would have in a wider one.
#if defined(ODENET_ONE_LANE)
#define ODENET_FIRST(number, of_vector) of_vector[0]
#else
#define ODENET_FIRST(number, of_vector) number
#endif
#define ODENET_OF(name, T, of_library, of_vectors)                    \
  extern "C" Vector<T> of_vectors(Vector<T>);                         \
  ODENET_HD Vector<T> name##_of(Vector<T> x) {                        \
    return of_vectors(x);                                             \
  }                                                                   \
  ODENET_HD T name##_of(T x) {                                        \
    return ODENET_FIRST(::of_library(x), name##_of(x - Vector<T>{})); \
  }
#define ODENET_OF_2(name, T, of_library, of_vectors)                                      \
  extern "C" Vector<T> of_vectors(Vector<T>, Vector<T>);                                  \
  ODENET_HD Vector<T> name##_of(Vector<T> x, Vector<T> y) {                               \
    return of_vectors(x, y);                                                              \
  }                                                                                       \
  ODENET_HD T name##_of(T x, T y) {                                                       \
    return ODENET_FIRST(::of_library(x, y), name##_of(x - Vector<T>{}, y - Vector<T>{})); \
  }
#endif

#define ODENET_FUNCTION(name)                           \
  ODENET_HD float name(float x) {                       \
    return name##_of(x);                                \
  }                                                     \
  ODENET_HD double name(double x) {                     \
    return name##_of(x);                                \
  }                                                     \
  template <class T, int W>                             \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x) {      \
    Pack<T, W> r;                                       \
    ODENET_EACH(r.vectors, r.v[h] = name##_of(x.v[h])); \
    return r;                                           \
  }
#define ODENET_FUNCTION_2(name)                                         \
  ODENET_OF_2(name, float, name##f, ODENET_MVEC(name, vv))              \
  ODENET_OF_2(name, double, name, ODENET_MVEC_DOUBLE(name, vv))         \
  ODENET_HD float name(float x, float y) {                              \
    return name##_of(x, y);                                             \
  }                                                                     \
  ODENET_HD double name(double x, double y) {                           \
    return name##_of(x, y);                                             \
  }                                                                     \
  template <class T, int W>                                             \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Pack<T, W> r;                                                       \
    ODENET_EACH(r.vectors, r.v[h] = name##_of(x.v[h], y.v[h]));         \
    return r;                                                           \
  }
#define ODENET_LANE_FUNCTION(name)                                      \
  ODENET_LIBRARY_FUNCTION(name)                                         \
  template <class T, int W>                                             \
  ODENET_HD Pack<T, W> name(Pack<T, W> x) {                             \
    for (int i = 0; i < W; ++i) set_lane(x, i, T(name(T(lane(x, i))))); \
    return x;                                                           \
  }

#endif

#define ODENET_OF_FLOATS(name) ODENET_OF(name, float, name##f, ODENET_MVEC(name, v))
#define ODENET_OF_DOUBLES(name) ODENET_OF(name, double, name, ODENET_MVEC_DOUBLE(name, v))
#define ODENET_OF_BOTH(name) \
  ODENET_OF_FLOATS(name)     \
  ODENET_OF_DOUBLES(name)    \
  ODENET_FUNCTION(name)

ODENET_FUNCTION(exp)
ODENET_FUNCTION(expm1)
ODENET_FUNCTION(sin)
ODENET_FUNCTION(cos)
ODENET_FUNCTION(tanh)
ODENET_OF_FLOATS(log)
ODENET_FUNCTION(log)
ODENET_OF_FLOATS(log1p)
ODENET_FUNCTION(log1p)
ODENET_OF_BOTH(exp2)
ODENET_OF_BOTH(log2)
ODENET_OF_BOTH(log10)
ODENET_OF_BOTH(tan)
ODENET_OF_BOTH(asin)
ODENET_OF_BOTH(acos)
ODENET_OF_BOTH(atan)
ODENET_OF_BOTH(asinh)
ODENET_OF_BOTH(acosh)
ODENET_OF_BOTH(atanh)
ODENET_OF_BOTH(erf)
ODENET_OF_BOTH(erfc)
ODENET_FUNCTION_2(pow)
ODENET_FUNCTION_2(atan2)
ODENET_LANE_FUNCTION(sinh)  // those of the vector library overflow early
ODENET_LANE_FUNCTION(cosh)
ODENET_LANE_FUNCTION(floor)
ODENET_LANE_FUNCTION(ceil)
ODENET_LANE_FUNCTION(rint)
ODENET_LIBRARY_FUNCTION(sqrt)

ODENET_HD float abs(float x) {
  return ::fabsf(x);
}
ODENET_HD double abs(double x) {
  return ::fabs(x);
}
ODENET_HD float fmod(float x, float y) {
  return ::fmodf(x, y);
}
ODENET_HD double fmod(double x, double y) {
  return ::fmod(x, y);
}

#if !defined(__CUDACC__)

template <class T, int W>
ODENET_HD Pack<T, W> fmod(Pack<T, W> x, const Pack<T, W>& y) {
  for (int i = 0; i < W; ++i) set_lane(x, i, fmod(lane(x, i), lane(y, i)));
  return x;
}
template <class T, int W>
ODENET_HD Pack<T, W> sqrt(const Pack<T, W>& x) {
  T numbers[W];
  Pack<T, W> r;
  memcpy(numbers, x.v, sizeof(numbers));
  for (int i = 0; i < W; ++i) numbers[i] = sqrt(numbers[i]);
  memcpy(r.v, numbers, sizeof(numbers));
  return r;
}
template <class T, int W>
ODENET_HD Pack<T, W> abs(const Pack<T, W>& x) {
  Pack<T, W> r;
  using V = typename Mask<T, W>::V;
  const V sign = V{} + (typename Mask<T, W>::Integer{1} << (8 * sizeof(T) - 1));
  ODENET_EACH(r.vectors, r.v[h] = (Vector<T>)((V)x.v[h] & ~sign));
  return r;
}

#endif  // !defined(__CUDACC__)

// 1 / (1 + e^-x); e^|x| may be larger than all numbers.
template <class P>
ODENET_HD P sigmoid(const P& x) {
  const P none{Number<P>(0)}, one{Number<P>(1)}, power = exp(-abs(x));
  return select(x < none, power, one) / (one + power);
}

// x where both compare, and not a number where either is: as torch's maximum and minimum.
template <class P>
ODENET_HD P maximum(const P& x, const P& y) {
  return select((x >= y) | (x != x), x, y);
}
template <class P>
ODENET_HD P minimum(const P& x, const P& y) {
  return select((x <= y) | (x != x), x, y);
}

// The remainder that has the sign of the divisor.
template <class P>
ODENET_HD P modulo(const P& x, const P& y) {
  const P rest = fmod(x, y), none{Number<P>(0)};
  return select(((rest < none) & (y > none)) | ((rest > none) & (y < none)), rest + y, rest);
}

// The largest whole number that is not above the quotient, though that be rounded.
template <class P>
ODENET_HD P floor_divide(const P& x, const P& y) {
  const P rest = fmod(x, y), none{Number<P>(0)}, one{Number<P>(1)}, quotient = x / y;
  const P exact = (x - rest) / y;
  const P whole = select(((rest < none) & (y > none)) | ((rest > none) & (y < none)), exact - one, exact);
  const P below = floor(whole);
  const P nearest = select(whole - below > P{Number<P>(0.5)}, below + one, below);
  return select(y == none, quotient, select(whole == none, none * quotient, nearest));
}

// sqrt(x x + y y) where the squares are too large, or too small.
template <class P>
ODENET_HD P hypotenuse(const P& x, const P& y) {
  using T = Number<P>;
  // Braces: INFINITY is a call in glibc, and infinite(T(INFINITY)) would declare a function.
  const P a = abs(x), b = abs(y), large = maximum(a, b), none{T(0)}, infinite{T(INFINITY)};
  const P ratio = minimum(a, b) / select(large > none, large, P(T(1)));
  return select((a == infinite) | (b == infinite), infinite, large * sqrt(P(T(1)) + ratio * ratio));
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
