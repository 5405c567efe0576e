// One Runge-Kutta stage, or any other linear combination of slopes:
//
//   y = y0 + dt * sum_j a[j] k[j]
//
// Its gradient has the same form. With mu_i = dL/dY_i, the cotangent of the stage inputs Y_i:
//
//   dL/dk_j = sum_{i>j} dt a_ij mu_i        (y0 absent, the mu_i in place of the slopes, dt the same)
//   dL/dy0  = sum_i mu_i                    (all coefficients 1, dt = 1)
//
// so the backward walk of a solve calls this same combination.
#pragma once

#include "types.h"

namespace odenet {

template <class T>
struct Stage {
  T* y;                    // [rows, columns], written; may be y0
  const T* y0;             // [rows, columns], or null: zero
  const T* k[kMaxStages];  // slopes, each [rows, columns]
  double a[kMaxStages];    // their coefficients: one row of the tableau
  const double* dt;        // [rows]
  int stages;              // how many slopes count
  int64_t rows, columns;
};

constexpr int kAnyStages = -1;  // a number of slopes that is not known at compile time

namespace ODENET_LEVEL {

// Calls visit.template operator()<S>() with S = stages, or kAnyStages where they are more than Most.
template <int Most, int S = 0, class Visit>
auto dispatch_stages(int stages, const Visit& visit) {
  if constexpr (S > Most) {
    return visit.template operator()<kAnyStages>();
  } else {
    return stages == S ? visit.template operator()<S>() : dispatch_stages<Most, S + 1>(stages, visit);
  }
}

// Weights, one a slope.
template <class T, int S>
struct Weights {
  Real<T> of[S == kAnyStages ? kMaxStages : S > 0 ? S : 1];
};

// dt * coefficient of one slope, and of each, formed in double and rounded once to the type that multiplies.
template <class T>
ODENET_HD Real<T> scaled_weight(double coefficient, double dt) {
  return static_cast<Real<T>>(coefficient * dt);
}
template <class T, int S>
ODENET_HD Weights<T, S> scaled_weights(const double* coefficients, int stages, double dt) {
  Weights<T, S> w{};
  const int count = S == kAnyStages ? stages : S;
  for (int j = 0; j < count; ++j) w.of[j] = scaled_weight<T>(coefficients[j], dt);
  return w;
}

// sum_j w[j] k[j][i]
template <int S, class T>
ODENET_HD Accumulate<T> weighted_sum(const T* const* k, const Weights<T, S>& w, int stages, int64_t i) {
  Accumulate<T> sum{};
  const int count = S == kAnyStages ? stages : S;
  for (int j = 0; j < count; ++j) sum += w.of[j] * static_cast<Accumulate<T>>(k[j][i]);
  return sum;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
