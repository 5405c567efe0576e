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

#include "host_device.h"

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

// The weights dt * a[j] of one row, formed in double and rounded once to the type that multiplies.
template <int S, class T>
ODENET_HD void stage_weights(const Stage<T>& s, int64_t row, Real<T> (&w)[S > 0 ? S : 1]) {
  for (int j = 0; j < S; ++j) w[j] = static_cast<Real<T>>(s.a[j] * s.dt[row]);
}

// One element; S is the number of slopes, known at compile time so that the loop unrolls.
template <int S, class T>
ODENET_HD T stage_element(const Stage<T>& s, const Real<T> (&w)[S > 0 ? S : 1], int64_t i) {
  Accumulate<T> sum = 0;
  for (int j = 0; j < S; ++j) sum += w[j] * static_cast<Accumulate<T>>(s.k[j][i]);
  return static_cast<T>(s.y0 ? static_cast<Accumulate<T>>(s.y0[i]) + sum : sum);
}

// Calls visit.template operator()<S>() with S = stages.
template <class Visit>
auto dispatch_stages(int stages, Visit&& visit) {
  switch (stages) {
    // clang-format off
#define ODENET_CASE(S) case S: return visit.template operator()<S>();
    ODENET_CASE(0) ODENET_CASE(1) ODENET_CASE(2) ODENET_CASE(3) ODENET_CASE(4) ODENET_CASE(5)
    ODENET_CASE(6) ODENET_CASE(7) ODENET_CASE(8) ODENET_CASE(9) ODENET_CASE(10) ODENET_CASE(11)
    ODENET_CASE(12) ODENET_CASE(13) ODENET_CASE(14) ODENET_CASE(15)
        // clang-format on
        default : return visit.template operator()<kMaxStages>();
#undef ODENET_CASE
  }
}

}  // namespace odenet
