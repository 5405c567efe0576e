// Functions of a pack: by glibc's vector library where there is one, else lane by lane.
#pragma once

#include "pack.h"

#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 35)
#define ODENET_LIBMVEC  // glibc's vector functions: 4 ulp
#endif
#endif

namespace odenet {
namespace ODENET_LEVEL {

#if !defined(__CUDACC__) && defined(ODENET_LIBMVEC)
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
#define ODENET_DECLARE(name)                                    \
  extern "C" Vector<float> ODENET_MVEC(name, v)(Vector<float>); \
  extern "C" Vector<double> ODENET_MVEC_DOUBLE(name, v)(Vector<double>);
#define ODENET_DECLARE_2(name)                                                  \
  extern "C" Vector<float> ODENET_MVEC(name, vv)(Vector<float>, Vector<float>); \
  extern "C" Vector<double> ODENET_MVEC_DOUBLE(name, vv)(Vector<double>, Vector<double>);
#endif

// ODENET_ONE_LANE: a number is a pack of one lane, and has the bits that it would have in a wider one.
#if defined(ODENET_ONE_LANE) && defined(ODENET_LIBMVEC)
#define ODENET_SCALAR_FUNCTION(name)                             \
  ODENET_DECLARE(name)                                           \
  ODENET_HD float name(float x) {                                \
    return ODENET_MVEC(name, v)(x - Vector<float>{})[0];         \
  }                                                              \
  ODENET_HD double name(double x) {                              \
    return ODENET_MVEC_DOUBLE(name, v)(x - Vector<double>{})[0]; \
  }
#define ODENET_SCALAR_FUNCTION_2(name)                                                  \
  ODENET_DECLARE_2(name)                                                                \
  ODENET_HD float name(float x, float y) {                                              \
    return ODENET_MVEC(name, vv)(x - Vector<float>{}, y - Vector<float>{})[0];          \
  }                                                                                     \
  ODENET_HD double name(double x, double y) {                                           \
    return ODENET_MVEC_DOUBLE(name, vv)(x - Vector<double>{}, y - Vector<double>{})[0]; \
  }
#else
#define ODENET_SCALAR_FUNCTION ODENET_LIBRARY_FUNCTION
#define ODENET_SCALAR_FUNCTION_2(name)        \
  ODENET_HD float name(float x, float y) {    \
    return ::name##f(x, y);                   \
  }                                           \
  ODENET_HD double name(double x, double y) { \
    return ::name(x, y);                      \
  }
#endif
#define ODENET_LIBRARY_FUNCTION(name) \
  ODENET_HD float name(float x) {     \
    return ::name##f(x);              \
  }                                   \
  ODENET_HD double name(double x) {   \
    return ::name(x);                 \
  }
ODENET_SCALAR_FUNCTION(exp)
ODENET_SCALAR_FUNCTION(exp2)
ODENET_SCALAR_FUNCTION(expm1)
ODENET_SCALAR_FUNCTION(log)
ODENET_SCALAR_FUNCTION(log2)
ODENET_SCALAR_FUNCTION(log10)
ODENET_SCALAR_FUNCTION(log1p)
ODENET_SCALAR_FUNCTION(sin)
ODENET_SCALAR_FUNCTION(cos)
ODENET_SCALAR_FUNCTION(tan)
ODENET_SCALAR_FUNCTION(asin)
ODENET_SCALAR_FUNCTION(acos)
ODENET_SCALAR_FUNCTION(atan)
ODENET_SCALAR_FUNCTION(tanh)
ODENET_SCALAR_FUNCTION(asinh)
ODENET_SCALAR_FUNCTION(acosh)
ODENET_SCALAR_FUNCTION(atanh)
ODENET_SCALAR_FUNCTION(erf)
ODENET_SCALAR_FUNCTION(erfc)
ODENET_SCALAR_FUNCTION_2(pow)
ODENET_SCALAR_FUNCTION_2(atan2)
ODENET_LIBRARY_FUNCTION(sinh)
ODENET_LIBRARY_FUNCTION(cosh)
ODENET_LIBRARY_FUNCTION(floor)
ODENET_LIBRARY_FUNCTION(ceil)
ODENET_LIBRARY_FUNCTION(rint)
ODENET_LIBRARY_FUNCTION(sqrt)
#undef ODENET_SCALAR_FUNCTION
#undef ODENET_SCALAR_FUNCTION_2
#undef ODENET_LIBRARY_FUNCTION
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

#if defined(ODENET_LIBMVEC)
#define ODENET_VECTOR_FUNCTION(name)                  \
  ODENET_DECLARE(name)                                \
  template <class T, int W>                           \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x) {    \
    Pack<T, W> r;                                     \
    ODENET_UNROLL                                     \
    for (int h = 0; h < r.vectors; ++h) {             \
      if constexpr (sizeof(T) == 4) {                 \
        r.v[h] = ODENET_MVEC(name, v)(x.v[h]);        \
      } else {                                        \
        r.v[h] = ODENET_MVEC_DOUBLE(name, v)(x.v[h]); \
      }                                               \
    }                                                 \
    return r;                                         \
  }
#define ODENET_VECTOR_FUNCTION_2(name)                                  \
  ODENET_DECLARE_2(name)                                                \
  template <class T, int W>                                             \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Pack<T, W> r;                                                       \
    ODENET_UNROLL                                                       \
    for (int h = 0; h < r.vectors; ++h) {                               \
      if constexpr (sizeof(T) == 4) {                                   \
        r.v[h] = ODENET_MVEC(name, vv)(x.v[h], y.v[h]);                 \
      } else {                                                          \
        r.v[h] = ODENET_MVEC_DOUBLE(name, vv)(x.v[h], y.v[h]);          \
      }                                                                 \
    }                                                                   \
    return r;                                                           \
  }
#endif

#define ODENET_LANE_FUNCTION(name)                                      \
  template <class T, int W>                                             \
  ODENET_HD Pack<T, W> name(Pack<T, W> x) {                             \
    for (int i = 0; i < W; ++i) set_lane(x, i, T(name(T(lane(x, i))))); \
    return x;                                                           \
  }
#define ODENET_LANE_FUNCTION_2(name)                                                   \
  template <class T, int W>                                                            \
  ODENET_HD Pack<T, W> name(Pack<T, W> x, const Pack<T, W>& y) {                       \
    for (int i = 0; i < W; ++i) set_lane(x, i, T(name(T(lane(x, i)), T(lane(y, i))))); \
    return x;                                                                          \
  }
#if !defined(ODENET_LIBMVEC)
#define ODENET_VECTOR_FUNCTION ODENET_LANE_FUNCTION
#define ODENET_VECTOR_FUNCTION_2 ODENET_LANE_FUNCTION_2
#endif
ODENET_VECTOR_FUNCTION(exp)
ODENET_VECTOR_FUNCTION(exp2)
ODENET_VECTOR_FUNCTION(expm1)
ODENET_VECTOR_FUNCTION(log)
ODENET_VECTOR_FUNCTION(log2)
ODENET_VECTOR_FUNCTION(log10)
ODENET_VECTOR_FUNCTION(log1p)
ODENET_VECTOR_FUNCTION(sin)
ODENET_VECTOR_FUNCTION(cos)
ODENET_VECTOR_FUNCTION(tan)
ODENET_VECTOR_FUNCTION(asin)
ODENET_VECTOR_FUNCTION(acos)
ODENET_VECTOR_FUNCTION(atan)
ODENET_VECTOR_FUNCTION(tanh)
ODENET_VECTOR_FUNCTION(asinh)
ODENET_VECTOR_FUNCTION(acosh)
ODENET_VECTOR_FUNCTION(atanh)
ODENET_VECTOR_FUNCTION(erf)
ODENET_VECTOR_FUNCTION(erfc)
ODENET_VECTOR_FUNCTION_2(pow)
ODENET_VECTOR_FUNCTION_2(atan2)
ODENET_LANE_FUNCTION(sinh)  // those of the vector library overflow early
ODENET_LANE_FUNCTION(cosh)
ODENET_LANE_FUNCTION(floor)
ODENET_LANE_FUNCTION(ceil)
ODENET_LANE_FUNCTION(rint)
ODENET_LANE_FUNCTION_2(fmod)

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
  ODENET_UNROLL
  for (int h = 0; h < r.vectors; ++h) r.v[h] = (Vector<T>)((V)x.v[h] & ~sign);
  return r;
}

#endif  // !defined(__CUDACC__)

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
