// The only place that asks which compiler is at work.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ODENET_HD __host__ __device__ __forceinline__
#else
#define ODENET_HD inline __attribute__((always_inline))
#endif

namespace odenet {

constexpr int kMaxStages = 16;  // slopes in one linear combination (dopri8 has 14)
constexpr int kMaxDegree = 8;   // degree of an interpolant in theta

// Accumulate<T>: the type in which sums over T are formed (float for 16-bit types, T itself here).
// Real<T>: the type of the real coefficients that multiply T.
template <class T>
struct TypeTraits {
  using Accumulate = T;
  using Real = T;
};
template <class T>
using Accumulate = typename TypeTraits<T>::Accumulate;
template <class T>
using Real = typename TypeTraits<Accumulate<T>>::Real;

ODENET_HD bool is_finite(double x) {
  return x - x == 0;
}

}  // namespace odenet
