// The machine's vectors, of which packs are made: their sizes, conversions between them, and x y + z rounded once.
//
// Compiled fields are compiled without contraction, so that a number has the same bits alone and in a vector of any
// width; where a multiplication and an addition are to be one operation the code says so, by `fused`.
#pragma once

#include <type_traits>
#include <utility>

#include "host_device.h"

#if defined(__CUDACC__)
#define ODENET_UNROLL _Pragma("unroll")
#else
#define ODENET_UNROLL _Pragma("GCC unroll 16")
#endif

// A statement for each vector h of a pack, of which there are 1, 2 or 4; the second: but for the first of them.
#define ODENET_EACH(count, ...)                  \
  do {                                           \
    {                                            \
      constexpr int h = 0;                       \
      __VA_ARGS__;                               \
    }                                            \
    ODENET_EACH_AFTER_FIRST(count, __VA_ARGS__); \
  } while (false)
#define ODENET_EACH_AFTER_FIRST(count, ...) \
  do {                                      \
    if constexpr (count > 1) {              \
      constexpr int h = 1;                  \
      __VA_ARGS__;                          \
    }                                       \
    if constexpr (count > 2) {              \
      constexpr int h = 2;                  \
      __VA_ARGS__;                          \
    }                                       \
    if constexpr (count > 3) {              \
      constexpr int h = 3;                  \
      __VA_ARGS__;                          \
    }                                       \
  } while (false)

namespace odenet {
namespace ODENET_LEVEL {

// An integer as wide as T.
template <class T>
using IntegerOf = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// x * y + z, rounded once where vectors can do that too.
ODENET_HD float fused(float x, float y, float z) {
#if defined(__FMA__) && !defined(__CUDACC__)
  return __builtin_fmaf(x, y, z);
#else
  return x * y + z;
#endif
}
ODENET_HD double fused(double x, double y, double z) {
#if defined(__FMA__) && !defined(__CUDACC__)
  return __builtin_fma(x, y, z);
#else
  return x * y + z;
#endif
}

#if !defined(__CUDACC__)

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Lanes of a pack: two vectors. Of more, what a step keeps on the way back does not stay in the first cache.
template <class T>
constexpr int kWidth = 2 * kVectorBytes / int(sizeof(T));

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T half __attribute__((vector_size(kVectorBytes / 2)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
using HalfVector = typename VectorOf<T>::half;

ODENET_HD Vector<float> fused(Vector<float> x, Vector<float> y, Vector<float> z) {
#if !defined(__FMA__)
  return x * y + z;
#elif defined(__AVX512F__) && !defined(__clang__)
  return __builtin_ia32_vfmaddps512_mask(x, y, z, static_cast<unsigned short>(-1),
                                         4);  // 4: round as the machine is set
#elif defined(__AVX2__) && !defined(__clang__)
  return __builtin_ia32_vfmaddps256(x, y, z);
#else
  for (int i = 0; i < kVectorBytes / 4; ++i) x[i] = __builtin_fmaf(x[i], y[i], z[i]);
  return x;
#endif
}
ODENET_HD Vector<double> fused(Vector<double> x, Vector<double> y, Vector<double> z) {
#if !defined(__FMA__)
  return x * y + z;
#elif defined(__AVX512F__) && !defined(__clang__)
  return __builtin_ia32_vfmaddpd512_mask(x, y, z, static_cast<unsigned char>(-1), 4);
#elif defined(__AVX2__) && !defined(__clang__)
  return __builtin_ia32_vfmaddpd256(x, y, z);
#else
  for (int i = 0; i < kVectorBytes / 8; ++i) x[i] = __builtin_fma(x[i], y[i], z[i]);
  return x;
#endif
}

// Two halves, side by side.
template <class T, int... I>
ODENET_HD Vector<T> joined(HalfVector<T> low, HalfVector<T> high, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(low, high, I...);
#else
  constexpr int half = sizeof...(I) / 2;
  return Vector<T>{(I < half ? low[I % half] : high[I % half])...};
#endif
}

// Of the numbers of two vectors, one behind the other, those at these places.
template <class V, int... I>
ODENET_HD V shuffled(const V& x, const V& y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, I...);
#else
  using Places = decltype(x < y);
  return __builtin_shuffle(x, y, Places{I...});
#endif
}

// The numbers of some vectors as another type: `width` of them.
template <class To, class From, int width>
ODENET_HD void resize(Vector<To>* to, const Vector<From>* from) {
  constexpr int count = width * int(sizeof(To)) / kVectorBytes;
  if constexpr (sizeof(To) == sizeof(From)) {
    ODENET_UNROLL
    for (int h = 0; h < count; ++h) to[h] = __builtin_convertvector(from[h], Vector<To>);
  } else if constexpr (sizeof(To) > sizeof(From)) {
    ODENET_UNROLL
    for (int h = 0; h < count; ++h) {
      HalfVector<From> part;
      memcpy(&part, reinterpret_cast<const char*>(from) + h * sizeof(part), sizeof(part));
      to[h] = __builtin_convertvector(part, Vector<To>);
    }
  } else {
    ODENET_UNROLL
    for (int h = 0; h < count; ++h) {
      to[h] = joined<To>(__builtin_convertvector(from[2 * h], HalfVector<To>),
                         __builtin_convertvector(from[2 * h + 1], HalfVector<To>),
                         std::make_integer_sequence<int, kVectorBytes / int(sizeof(To))>{});
    }
  }
}

// The place of each number in a vector.
template <class T, int... I>
ODENET_HD Vector<IntegerOf<T>> places(std::integer_sequence<int, I...>) {
  return Vector<IntegerOf<T>>{I...};
}
template <class T>
ODENET_HD Vector<IntegerOf<T>> places() {
  return places<T>(std::make_integer_sequence<int, kVectorBytes / int(sizeof(T))>{});
}

// A bit for each number of a mask's vector, set where its sign is.
template <class T>
ODENET_HD uint32_t signs(Vector<IntegerOf<T>> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return static_cast<unsigned short>(__builtin_ia32_cvtd2mask512((Vector<int>)x));
  } else {
    return static_cast<unsigned char>(__builtin_ia32_cvtq2mask512((Vector<long long>)x));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return __builtin_ia32_movmskps256((Vector<float>)x);
  } else {
    return __builtin_ia32_movmskpd256((Vector<double>)x);
  }
#elif defined(__SSE2__)
  if constexpr (sizeof(T) == 4) {
    return __builtin_ia32_movmskps((Vector<float>)x);
  } else {
    return __builtin_ia32_movmskpd((Vector<double>)x);
  }
#else
  uint32_t bits = 0;
  for (int i = 0; i < kVectorBytes / int(sizeof(T)); ++i) bits |= uint32_t{x[i] < 0} << i;
  return bits;
#endif
}

#endif  // !defined(__CUDACC__)

}  // namespace ODENET_LEVEL
}  // namespace odenet
