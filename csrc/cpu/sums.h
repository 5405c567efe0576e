// Weighted sums of slopes over a block of elements, in a buffer that stays in the first cache: for types that must be
// converted, and where the number of slopes is known at run time only.
#pragma once

#include "convert.h"
#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

constexpr int kBlock = 256;  // elements

// sum[i] = sum_j w[j] k[j][begin + i], one slope after the other.
template <class T>
inline __attribute__((always_inline)) void sum_block(Accumulate<T>* sum, const T* const* k,
                                                     const Weights<T, kAnyStages>& w, int stages, int64_t begin,
                                                     int count) {
  Accumulate<T> buffer[kBlock];
  for (int i = 0; i < count; ++i) sum[i] = Accumulate<T>{};
  for (int j = 0; j < stages; ++j) {
    const Accumulate<T>* slope = widened(k[j] + begin, buffer, count);
    const Real<T> weight = w.of[j];
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) sum[i] += weight * slope[i];
  }
}

// y[i] = y0[i] + sum[i], rounded to T; y0 may be null: zero. y may be y0.
template <class T>
inline __attribute__((always_inline)) void add_block(T* y, const T* y0, Accumulate<T>* sum, int count) {
  if (y0) {
    Accumulate<T> buffer[kBlock];
    const Accumulate<T>* base = widened(y0, buffer, count);
    if constexpr (std::is_same_v<T, Accumulate<T>>) {
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) y[i] = base[i] + sum[i];
      return;
    }
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) sum[i] = base[i] + sum[i];
  }
  convert(y, sum, count);
}

// As dispatch_stages; the types that must be converted, or are pairs, have no loops of their own.
template <class T, class Visit>
void dispatch_sums(int stages, const Visit& visit) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    dispatch_stages<kMaxStages>(stages, visit);
  } else {
    visit.template operator()<kAnyStages>();
  }
}

}  // namespace odenet::cpu::ODENET_LEVEL
