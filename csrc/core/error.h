// The scaled error of a step and its norm, row by row (Hairer, Norsett and Wanner I, eq. II.4.11):
//
//   err_i = dt * sum_j e[j] k_j,i / (atol + rtol * max(|y0_i|, |y1_i|))
//   error_ratio = max over leaves of sqrt(mean_i err_i^2)
#pragma once

#include "stage.h"

namespace odenet {

template <class T>
struct Error {
  const T* y0;             // [rows, columns]
  const T* y1;             // [rows, columns]
  const T* k[kMaxStages];  // slopes, each [rows, columns]
  double e[kMaxStages];    // error weights: b minus the embedded b
  const double* dt;        // [rows]
  double rtol, atol;
  int stages;
  int64_t rows, columns;
};

namespace ODENET_LEVEL {

// The larger; not a number if either is, so that an overflow is never taken for a small error.
template <class R>
ODENET_HD R larger(R x, R y) {
  return (x >= y || x != x) ? x : y;
}

// |err_i|^2 of one element; sum: dt * sum_j e[j] k[j][i].
template <class T>
ODENET_HD Real<T> error_square(Accumulate<T> y0, Accumulate<T> y1, Accumulate<T> sum, Real<T> rtol, Real<T> atol) {
  const Real<T> size = larger(magnitude(y0), magnitude(y1));
  // size - size: 0; but not a number where the state is infinite, whose scale would hide any error
  return squared(divide(sum, atol + rtol * size)) + (size - size);
}

// Folds the sum of squares of one leaf's row into the ratio so far; `first` starts the maximum.
// A leaf without elements has no error.
ODENET_HD double error_fold(double ratio, double sum, int64_t columns, bool first) {
  const double norm = columns > 0 ? sqrt(sum / static_cast<double>(columns)) : 0.0;
  return first ? norm : larger(norm, ratio);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
