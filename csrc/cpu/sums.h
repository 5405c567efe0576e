// Weighted sums of slopes over a block of elements, in a buffer that stays in the first cache.
#pragma once

#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

constexpr int kBlock = 256;  // elements

// sum[i] = sum_j w[j] k[j][begin + i]. Up to kUnrolled slopes are read side by side, more one after the other.
template <int S, class T>
inline __attribute__((always_inline)) void sum_block(Accumulate<T>* sum, const T* const* k, const Weights<T, S>& w,
                                                     int stages, int64_t begin, int count) {
  if constexpr (S != kAnyStages) {
    const T* slopes[S > 0 ? S : 1];
    for (int j = 0; j < S; ++j) slopes[j] = k[j] + begin;
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) sum[i] = weighted_sum<S>(slopes, w, S, i);
  } else {
    for (int i = 0; i < count; ++i) sum[i] = Accumulate<T>{};
    for (int j = 0; j < stages; ++j) {
      const T* slope = k[j] + begin;
      const Real<T> weight = w.of[j];
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) sum[i] += weight * static_cast<Accumulate<T>>(slope[i]);
    }
  }
}

// As dispatch_stages; the types that must be converted, or are pairs, have no loops of their own.
template <class T, class Visit>
void dispatch_sums(int stages, const Visit& visit) {
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    dispatch_stages(stages, visit);
  } else {
    visit.template operator()<kAnyStages>();
  }
}

}  // namespace odenet::cpu::ODENET_LEVEL
