// Rows whose step was accepted move on:  y0 <- y1,  k0 <- k1 (first same as last). Rejected and ended rows stay. Then,
// if it is asked for, the first stage of the step that follows, of every row:  y = y0 + dt a k0.
#pragma once

#include "stage.h"

namespace odenet {

template <class T>
struct Advance {
  T* y0;                 // [rows, columns], written
  T* k0;                 // [rows, columns], written
  const T* y1;           // [rows, columns]
  const T* k1;           // [rows, columns]
  const double* accept;  // [rows]
  int64_t rows, columns;
  T* y;              // [rows, columns], written; or null: no stage. May be y1
  double a;          // the coefficient of k0
  const double* dt;  // [rows]
};

namespace ODENET_LEVEL {

template <class T>
ODENET_HD Weights<T, 1> first_weight(const Advance<T>& s, int64_t row) {
  return s.y ? scaled_weights<T, 1>(&s.a, 1, s.dt[row]) : Weights<T, 1>{};
}

// y of an element that has moved on; rounded as by `stage`.
template <class T>
ODENET_HD T first_stage(const Weights<T, 1>& w, T y0, T k0) {
  Accumulate<T> sum{};
  sum += w.of[0] * static_cast<Accumulate<T>>(k0);
  return static_cast<T>(static_cast<Accumulate<T>>(y0) + sum);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
