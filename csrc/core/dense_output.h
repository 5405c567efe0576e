// The interpolant of a step, as a Runge-Kutta method whose weights are polynomials (Hairer, Norsett and Wanner I,
// II.6):
//
//   y(t0 + theta dt) = y0 + dt * sum_j b_j(theta) k_j,   b_j(theta) = sum_d p[j][d] theta^(d+1)
//
// Its gradient: dL/dy0 = g, dL/dk_j = dt b_j(theta) g, which is a stage again.
#pragma once

#include "stage.h"
#include "step_size.h"

namespace odenet {

template <class T>
struct DenseOutput {
  T* ys;                              // [num_outputs, rows, columns], written where outputs fall
  const T* y0;                        // [rows, columns]
  const T* y1;                        // [rows, columns]
  const T* k[kMaxStages];             // slopes, each [rows, columns]
  const double* state;                // [kNumFields, rows]
  const double* t;                    // [rows or 1, num_outputs]
  double p[kMaxStages * kMaxDegree];  // [stages, degree]
  int stages, degree;
  int64_t rows, columns;
  int64_t t_stride;  // of t, from a row to the next; 0: all rows have the same

  ODENET_HD double field(int name, int64_t row) const { return state[name * rows + row]; }
};

namespace ODENET_LEVEL {

// Outputs [begin, end) of a row that fall into the step just accepted.
template <class T>
ODENET_HD void dense_output_range(const DenseOutput<T>& s, int64_t row, int64_t& begin, int64_t& end) {
  begin = static_cast<int64_t>(s.field(kOutputBegin, row));
  end = static_cast<int64_t>(s.field(kOutputEnd, row));
}

// The weights dt * b_j(theta) of output `output` in a row; false where the output is the end of the step itself,
// which is y1 and needs no interpolant.
template <class T>
ODENET_HD bool dense_output_weights(const DenseOutput<T>& s, int64_t row, int64_t output, Weights<T, kAnyStages>& w) {
  const double time = s.t[row * s.t_stride + output];
  if (time == s.field(kTime, row)) return false;
  const double dt = s.field(kLastDt, row);
  const double theta = (time - s.field(kLastTime, row)) / dt;
  for (int j = 0; j < s.stages; ++j) {
    double b = 0;
    for (int d = s.degree - 1; d >= 0; --d) b = (b + s.p[j * s.degree + d]) * theta;
    w.of[j] = static_cast<Real<T>>(b * dt);
  }
  return true;
}

template <class T>
ODENET_HD T dense_output_element(const DenseOutput<T>& s, const Weights<T, kAnyStages>& w, int64_t i) {
  return static_cast<T>(static_cast<Accumulate<T>>(s.y0[i]) + weighted_sum(s.k, w, s.stages, i));
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
