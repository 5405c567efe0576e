// Blocks of 16-bit numbers as the floats in which they are summed, and back.
#pragma once

#include "../launch.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace odenet::cpu::ODENET_LEVEL {

constexpr int kVector = 8;  // numbers that one instruction converts

// to[i] = from[i]
template <class To, class From>
inline __attribute__((always_inline)) void convert(To* to, const From* from, int count) {
  int i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<From, Half> && std::is_same_v<To, float>) {
    for (; i + kVector <= count; i += kVector) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
  }
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, Half>) {
    for (; i + kVector <= count; i += kVector) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
  }
#endif
#pragma GCC ivdep
  for (; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

// from as numbers of the type in which sums are formed: itself, or converted into the buffer.
template <class T>
inline __attribute__((always_inline)) const Accumulate<T>* widened(const T* from, Accumulate<T>* buffer, int count) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return from;
  } else {
    convert(buffer, from, count);
    return buffer;
  }
}

}  // namespace odenet::cpu::ODENET_LEVEL
