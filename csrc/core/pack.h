// A pack: one number for each of several samples, the lanes. On the CPU it is a few native vectors, whose operators
// work lane by lane; with one lane it is the number itself, as it is on CUDA, where every thread is a lane.
//
// Code over packs has no branch on a number: it selects, and asks `any` where work can be left out.
#pragma once

#include "host_device.h"

#if !defined(__CUDACC__) && defined(__x86_64__) && defined(__GLIBC_PREREQ)
#if __GLIBC_PREREQ(2, 35)
#define ODENET_LIBMVEC  // glibc's vector functions: 4 ulp
#endif
#endif

#if defined(__CUDACC__)
#define ODENET_UNROLL _Pragma("unroll")
#else
#define ODENET_UNROLL _Pragma("GCC unroll 16")
#endif

namespace odenet {
namespace ODENET_LEVEL {

// What a pack is made of: its numbers, how many, the type of a comparison, and the same pack of another type.
template <class P>
struct Lanes {
  using Number = P;
  using Mask = bool;
  template <class To>
  using With = To;
  static constexpr int width = 1;
};

template <class P>
using Number = typename Lanes<P>::Number;
template <class P>
using MaskOf = typename Lanes<P>::Mask;
template <class P, class To>
using With = typename Lanes<P>::template With<To>;

template <class T>
ODENET_HD T select(bool which, const T& x, const T& y) {
  return which ? x : y;
}
ODENET_HD bool any(bool mask) {
  return mask;
}
ODENET_HD bool all(bool mask) {
  return mask;
}

ODENET_HD bool negate(bool mask) {
  return !mask;
}

// The number of one lane.
template <class T>
ODENET_HD T lane(const T& x, int) {
  return x;
}
template <class T>
ODENET_HD void set_lane(T& x, int, T value) {
  x = value;
}
template <class To, class T>
ODENET_HD To convert(const T& x) {
  return static_cast<To>(x);
}

#define ODENET_SCALAR_FUNCTION(name)             \
  ODENET_HD float name(float x) { return ::name##f(x); } \
  ODENET_HD double name(double x) { return ::name(x); }
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
ODENET_SCALAR_FUNCTION(sinh)
ODENET_SCALAR_FUNCTION(cosh)
ODENET_SCALAR_FUNCTION(tanh)
ODENET_SCALAR_FUNCTION(asinh)
ODENET_SCALAR_FUNCTION(acosh)
ODENET_SCALAR_FUNCTION(atanh)
ODENET_SCALAR_FUNCTION(erf)
ODENET_SCALAR_FUNCTION(erfc)
ODENET_SCALAR_FUNCTION(floor)
ODENET_SCALAR_FUNCTION(ceil)
ODENET_SCALAR_FUNCTION(sqrt)
#undef ODENET_SCALAR_FUNCTION
ODENET_HD float abs(float x) {
  return ::fabsf(x);
}
ODENET_HD double abs(double x) {
  return ::fabs(x);
}
ODENET_HD float pow(float x, float y) {
  return ::powf(x, y);
}
ODENET_HD double pow(double x, double y) {
  return ::pow(x, y);
}
ODENET_HD float atan2(float y, float x) {
  return ::atan2f(y, x);
}
ODENET_HD double atan2(double y, double x) {
  return ::atan2(y, x);
}

#if !defined(__CUDACC__)

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes of a pack: two vectors of floats.
constexpr int kWidth = 2 * kVectorBytes / 4;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
struct IntegerOf {
  using type = int64_t;
};
template <>
struct IntegerOf<float> {
  using type = int32_t;
};

// Integers, all bits set where true; as wide as the numbers compared.
template <class T, int W>
struct Mask {
  using Integer = typename IntegerOf<T>::type;
  using V = Vector<Integer>;
  static constexpr int vectors = W * int(sizeof(T)) / kVectorBytes;
  V v[vectors];

  Mask() = default;
  ODENET_HD Mask(bool value) {
    ODENET_UNROLL
    for (int h = 0; h < vectors; ++h) v[h] = V{} - Integer{value};
  }
  template <class U>
  ODENET_HD Mask(const Mask<U, W>& other) {
    typename IntegerOf<U>::type from[W];
    Integer to[W];
    memcpy(from, other.v, sizeof(from));
    for (int i = 0; i < W; ++i) to[i] = static_cast<Integer>(from[i]);
    memcpy(v, to, sizeof(to));
  }
};

template <class T, int W>
struct Pack {
  using V = Vector<T>;
  static constexpr int vectors = W * int(sizeof(T)) / kVectorBytes;
  static constexpr int of_vector = kVectorBytes / int(sizeof(T));
  V v[vectors];

  Pack() = default;
  ODENET_HD Pack(T value) {
    ODENET_UNROLL
    for (int h = 0; h < vectors; ++h) v[h] = V{} + value;
  }
};

template <class T, int W>
struct Lanes<Pack<T, W>> {
  using Number = T;
  using Mask = odenet::ODENET_LEVEL::Mask<T, W>;
  template <class To>
  using With = Pack<To, W>;
  static constexpr int width = W;
};

#define ODENET_PACK_OPERATOR(op)                                            \
  template <class T, int W>                                                 \
  ODENET_HD Pack<T, W> operator op(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Pack<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) r.v[h] = x.v[h] op y.v[h];          \
    return r;                                                               \
  }                                                                         \
  template <class T, int W>                                                 \
  ODENET_HD Pack<T, W> operator op(const Pack<T, W>& x, T y) {              \
    Pack<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) r.v[h] = x.v[h] op y;               \
    return r;                                                               \
  }                                                                         \
  template <class T, int W>                                                 \
  ODENET_HD Pack<T, W> operator op(T x, const Pack<T, W>& y) {              \
    Pack<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) r.v[h] = x op y.v[h];               \
    return r;                                                               \
  }
ODENET_PACK_OPERATOR(+)
ODENET_PACK_OPERATOR(-)
ODENET_PACK_OPERATOR(*)
ODENET_PACK_OPERATOR(/)
#undef ODENET_PACK_OPERATOR
template <class T, int W>
ODENET_HD Pack<T, W> operator-(const Pack<T, W>& x) {
  Pack<T, W> r;
  ODENET_UNROLL
  for (int h = 0; h < r.vectors; ++h) r.v[h] = -x.v[h];
  return r;
}
template <class T, int W>
ODENET_HD Pack<T, W>& operator+=(Pack<T, W>& x, const Pack<T, W>& y) {
  return x = x + y;
}

#define ODENET_PACK_COMPARISON(op)                                          \
  template <class T, int W>                                                 \
  ODENET_HD Mask<T, W> operator op(const Pack<T, W>& x, const Pack<T, W>& y) { \
    Mask<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) r.v[h] = x.v[h] op y.v[h];          \
    return r;                                                               \
  }                                                                         \
  template <class T, int W>                                                 \
  ODENET_HD Mask<T, W> operator op(const Pack<T, W>& x, T y) {              \
    return x op Pack<T, W>(y);                                              \
  }                                                                         \
  template <class T, int W>                                                 \
  ODENET_HD Mask<T, W> operator op(T x, const Pack<T, W>& y) {              \
    return Pack<T, W>(x) op y;                                              \
  }
ODENET_PACK_COMPARISON(<)
ODENET_PACK_COMPARISON(<=)
ODENET_PACK_COMPARISON(>)
ODENET_PACK_COMPARISON(>=)
ODENET_PACK_COMPARISON(==)
ODENET_PACK_COMPARISON(!=)
#undef ODENET_PACK_COMPARISON

#define ODENET_MASK_OPERATOR(op)                                            \
  template <class T, int W>                                                 \
  ODENET_HD Mask<T, W> operator op(const Mask<T, W>& x, const Mask<T, W>& y) { \
    Mask<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) r.v[h] = x.v[h] op y.v[h];          \
    return r;                                                               \
  }
ODENET_MASK_OPERATOR(&)
ODENET_MASK_OPERATOR(|)
#undef ODENET_MASK_OPERATOR
template <class T, int W>
ODENET_HD Mask<T, W> operator!(const Mask<T, W>& x) {
  Mask<T, W> r;
  ODENET_UNROLL
  for (int h = 0; h < r.vectors; ++h) r.v[h] = ~x.v[h];
  return r;
}
template <class T, int W>
ODENET_HD Mask<T, W> negate(const Mask<T, W>& x) {
  return !x;
}
template <class T, int W>
ODENET_HD bool any(const Mask<T, W>& x) {
  typename Mask<T, W>::V all = x.v[0];
  ODENET_UNROLL
  for (int h = 1; h < x.vectors; ++h) all |= x.v[h];
  int64_t words[kVectorBytes / 8], found = 0;
  memcpy(words, &all, sizeof(words));
  for (int i = 0; i < kVectorBytes / 8; ++i) found |= words[i];
  return found != 0;
}
template <class T, int W>
ODENET_HD bool all(const Mask<T, W>& x) {
  return !any(!x);
}

template <class T, int W>
ODENET_HD Pack<T, W> select(const Mask<T, W>& which, const Pack<T, W>& x, const Pack<T, W>& y) {
  Pack<T, W> r;
  ODENET_UNROLL
  for (int h = 0; h < r.vectors; ++h) r.v[h] = which.v[h] ? x.v[h] : y.v[h];
  return r;
}
template <class T, int W>
ODENET_HD Mask<T, W> select(const Mask<T, W>& which, const Mask<T, W>& x, const Mask<T, W>& y) {
  return (which & x) | (!which & y);
}

template <class T, int W>
ODENET_HD T lane(const Pack<T, W>& x, int i) {
  return x.v[i / x.of_vector][i % x.of_vector];
}
template <class T, int W>
ODENET_HD bool lane(const Mask<T, W>& x, int i) {
  constexpr int of_vector = kVectorBytes / int(sizeof(T));
  return x.v[i / of_vector][i % of_vector] != 0;
}
template <class T, int W>
ODENET_HD void set_lane(Pack<T, W>& x, int i, T value) {
  x.v[i / x.of_vector][i % x.of_vector] = value;
}
template <class To, class T, int W>
ODENET_HD Pack<To, W> convert(const Pack<T, W>& x) {
  if constexpr (sizeof(To) == sizeof(T)) {
    return x;
  } else {
    T from[W];
    To to[W];
    memcpy(from, x.v, sizeof(from));
    for (int i = 0; i < W; ++i) to[i] = static_cast<To>(from[i]);
    Pack<To, W> r;
    memcpy(r.v, to, sizeof(to));
    return r;
  }
}

// Functions of one pack: by glibc's vector library, or lane by lane.
#if defined(ODENET_LIBMVEC)
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
#define ODENET_VECTOR_FUNCTION(name)                                        \
  extern "C" Vector<float> ODENET_MVEC(name, v)(Vector<float>);             \
  extern "C" Vector<double> ODENET_MVEC_DOUBLE(name, v)(Vector<double>);    \
  template <class T, int W>                                                 \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x) {                          \
    Pack<T, W> r;                                                           \
    ODENET_UNROLL                                                           \
    for (int h = 0; h < r.vectors; ++h) {                                   \
      if constexpr (sizeof(T) == 4) {                                       \
        r.v[h] = ODENET_MVEC(name, v)(x.v[h]);                              \
      } else {                                                              \
        r.v[h] = ODENET_MVEC_DOUBLE(name, v)(x.v[h]);                       \
      }                                                                     \
    }                                                                       \
    return r;                                                               \
  }
#define ODENET_VECTOR_FUNCTION_2(name)                                                    \
  extern "C" Vector<float> ODENET_MVEC(name, vv)(Vector<float>, Vector<float>);           \
  extern "C" Vector<double> ODENET_MVEC_DOUBLE(name, vv)(Vector<double>, Vector<double>); \
  template <class T, int W>                                                               \
  ODENET_HD Pack<T, W> name(const Pack<T, W>& x, const Pack<T, W>& y) {                   \
    Pack<T, W> r;                                                                         \
    ODENET_UNROLL                                                                         \
    for (int h = 0; h < r.vectors; ++h) {                                                 \
      if constexpr (sizeof(T) == 4) {                                                     \
        r.v[h] = ODENET_MVEC(name, vv)(x.v[h], y.v[h]);                                   \
      } else {                                                                            \
        r.v[h] = ODENET_MVEC_DOUBLE(name, vv)(x.v[h], y.v[h]);                            \
      }                                                                                   \
    }                                                                                     \
    return r;                                                                             \
  }
#endif

#define ODENET_LANE_FUNCTION(name)                                                 \
  template <class T, int W>                                                        \
  ODENET_HD Pack<T, W> name(Pack<T, W> x) {                                        \
    for (int i = 0; i < W; ++i) set_lane(x, i, T(name(T(lane(x, i)))));            \
    return x;                                                                      \
  }
#define ODENET_LANE_FUNCTION_2(name)                                                       \
  template <class T, int W>                                                                \
  ODENET_HD Pack<T, W> name(Pack<T, W> x, const Pack<T, W>& y) {                           \
    for (int i = 0; i < W; ++i) set_lane(x, i, T(name(T(lane(x, i)), T(lane(y, i)))));     \
    return x;                                                                              \
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
ODENET_VECTOR_FUNCTION(sinh)
ODENET_VECTOR_FUNCTION(cosh)
ODENET_VECTOR_FUNCTION(tanh)
ODENET_VECTOR_FUNCTION(asinh)
ODENET_VECTOR_FUNCTION(acosh)
ODENET_VECTOR_FUNCTION(atanh)
ODENET_VECTOR_FUNCTION(erf)
ODENET_VECTOR_FUNCTION(erfc)
ODENET_VECTOR_FUNCTION_2(pow)
ODENET_VECTOR_FUNCTION_2(atan2)
ODENET_LANE_FUNCTION(floor)
ODENET_LANE_FUNCTION(ceil)

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

// A number for all lanes.
template <class P>
ODENET_HD P broadcast(Number<P> value) {
  return P(value);
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

// p[index], lane by lane; index: whole numbers.
template <class D>
ODENET_HD D gather(const double* p, const D& index) {
  if constexpr (Lanes<D>::width == 1) {
    return p[static_cast<int64_t>(index)];
  } else {
    D r;
    for (int i = 0; i < Lanes<D>::width; ++i) set_lane(r, i, p[static_cast<int64_t>(lane(index, i))]);
    return r;
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
