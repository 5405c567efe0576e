// Error ratio -> accept the step? the next dt? where does it end? and the first step of a solve.
// Pure scalar functions on the solver state of one row.
//
// Controller: dt_next = dt * clamp(safety * r0^b0 * r1^b1 * r2^b2), r = 1 / error_ratio of the last three
// accepted steps (Soderlind 2003, doi 10.1145/641876.641877); b1 = b2 = 0 is the classical I controller.
#pragma once

#include "types.h"

namespace odenet {

// The solver state: a float64 tensor [kNumFields, rows]. Counters are exact up to 2^53.
enum Field : int {
  kTime,        // time reached
  kDt,          // signed step to try next; 0 once the row has ended
  kStepEnd,     // time where that step ends: exactly a stop when it lands on one
  kStatus,      // see Status
  kAccept,      // 1: the last step tried was accepted
  kJumped,      // 1: the last step ended on a discontinuity of f
  kLastTime,    // start of the last step tried
  kLastDt,      // its signed size
  kErrorRatio,  // its error ratio, written by `error`
  kInverse1,    // 1 / error_ratio of the accepted step before
  kInverse2,    // and of the one before that
  kNumAccepted,
  kNumRejected,
  kOutputBegin,  // outputs [kOutputBegin, kOutputEnd) fell into the last step
  kOutputEnd,
  kNextStop,  // index of the next stop
  kStepsSinceOutput,
  kProposal,  // step size the controller asked for, before landing shortened it
  kNumFields
};

enum Status : int { kRunning, kSuccess, kUnderflow, kNonFinite, kMaxSteps };
enum Stop : int { kStopStep, kStopJump, kStopEnd };

struct Controller {
  double direction;  // +1: time increases, -1: it decreases
  double order, safety, ifactor, dfactor;
  double b0, b1, b2;    // exponents of r0, r1, r2
  double accept_floor;  // least factor after an accepted step
  double min_step, max_step;
  double max_num_steps;  // tries per output interval
};
constexpr int kControllerSize = sizeof(Controller) / sizeof(double);

struct StepSize {
  double* state;         // [kNumFields, rows]
  const double* stops;   // [2, num_stops]: times in the direction of the solve, kinds (Stop); the last is the end
  const double* t;       // [num_outputs]
  double c[kMaxStages];  // nodes of the tableau
  Controller controller;
  int64_t rows, num_stops, num_outputs;
  int stages;

  ODENET_HD double& field(int name, int64_t row) const { return state[name * rows + row]; }
  ODENET_HD bool running(int64_t row) const { return static_cast<int>(field(kStatus, row)) == kRunning; }
};

namespace ODENET_LEVEL {

ODENET_HD double clamp_step(const Controller& q, double size) {
  const double lower = size > q.min_step ? size : q.min_step;
  return lower < q.max_step ? lower : q.max_step;
}

// Ends the row: it is held where it is, with steps of size 0.
ODENET_HD void end_row(const StepSize& s, int64_t row, Status status) {
  s.field(kStatus, row) = status;
  s.field(kDt, row) = 0;
  s.field(kStepEnd, row) = s.field(kTime, row);
}

// Chooses the step to try: `size`, or what is left to the next stop if that is not more. A remainder smaller than
// a billionth of the step is taken along, so that rounding never leaves a sliver.
ODENET_HD void plan_step(const StepSize& s, int64_t row, double size) {
  const double time = s.field(kTime, row);
  const double direction = s.controller.direction;
  const double stop = s.stops[static_cast<int64_t>(s.field(kNextStop, row))];
  const double left = direction * (stop - time);
  s.field(kProposal, row) = size;
  if (size * (1 + 1e-9) >= left) {
    s.field(kDt, row) = stop - time;
    s.field(kStepEnd, row) = stop;
    return;
  }
  const double end = time + direction * size;
  if (!(direction * (end - time) > 0)) {
    end_row(s, row, is_finite(s.field(kErrorRatio, row)) ? kUnderflow : kNonFinite);
    return;
  }
  s.field(kDt, row) = direction * size;
  s.field(kStepEnd, row) = end;
}

ODENET_HD double step_factor(const StepSize& s, int64_t row, double ratio, bool accept) {
  const Controller& q = s.controller;
  if (!is_finite(ratio)) return q.dfactor;
  if (ratio == 0) return q.ifactor;
  double factor, floor = q.dfactor;
  if (accept) {
    factor = q.safety * pow(1 / ratio, q.b0);
    if (q.b1 != 0) factor *= pow(s.field(kInverse1, row), q.b1);
    if (q.b2 != 0) factor *= pow(s.field(kInverse2, row), q.b2);
    if (ratio < 1) floor = q.accept_floor;
  } else {
    factor = q.safety * pow(1 / ratio, 1 / q.order);
  }
  if (!(factor > floor)) factor = floor;
  return factor < q.ifactor ? factor : q.ifactor;
}

// After `error`: accepts or rejects the step of one row and plans the next.
ODENET_HD void step_size_row(const StepSize& s, int64_t row) {
  const Controller& q = s.controller;
  s.field(kJumped, row) = 0;
  s.field(kOutputBegin, row) = s.field(kOutputEnd, row);
  if (!s.running(row)) {
    s.field(kAccept, row) = 0;
    return;
  }
  const double dt = s.field(kDt, row);
  const double size = q.direction * dt;
  const double ratio = s.field(kErrorRatio, row);
  // Landing may have stretched a step of min_step by a sliver: what was asked for counts too.
  const bool smallest = size <= q.min_step || (q.min_step > 0 && s.field(kProposal, row) <= q.min_step);
  const bool accept = ratio <= 1 || (smallest && is_finite(ratio));
  s.field(kAccept, row) = accept;
  s.field(kLastTime, row) = s.field(kTime, row);
  s.field(kLastDt, row) = dt;
  const double next = clamp_step(q, size * step_factor(s, row, ratio, accept));
  s.field(kStepsSinceOutput, row) += 1;
  if (accept) {
    s.field(kNumAccepted, row) += 1;
    s.field(kInverse2, row) = s.field(kInverse1, row);
    s.field(kInverse1, row) = ratio > 1e-10 ? 1 / ratio : 1e10;
    const double time = s.field(kStepEnd, row);
    s.field(kTime, row) = time;
    int64_t output = static_cast<int64_t>(s.field(kOutputEnd, row));
    while (output < s.num_outputs && q.direction * (time - s.t[output]) >= 0) ++output;
    if (output != static_cast<int64_t>(s.field(kOutputEnd, row))) s.field(kStepsSinceOutput, row) = 0;
    s.field(kOutputEnd, row) = static_cast<double>(output);
    const int64_t stop = static_cast<int64_t>(s.field(kNextStop, row));
    if (time == s.stops[stop]) {
      const int kind = static_cast<int>(s.stops[s.num_stops + stop]);
      if (kind == kStopEnd) {
        end_row(s, row, kSuccess);
        return;
      }
      s.field(kJumped, row) = kind == kStopJump;
      s.field(kNextStop, row) = static_cast<double>(stop + 1);
    }
  } else {
    s.field(kNumRejected, row) += 1;
    if (smallest) {  // not finite, and no smaller step is allowed
      end_row(s, row, kNonFinite);
      return;
    }
  }
  if (s.field(kStepsSinceOutput, row) >= q.max_num_steps) {
    end_row(s, row, kMaxSteps);
    return;
  }
  plan_step(s, row, next);
}

// The first step (Hairer, Norsett and Wanner I, II.4). Phase 0 turns d0 = |y0|, d1 = |f0| (norms scaled by the
// tolerance) into a small explicit Euler step, whose end the caller evaluates; phase 1 turns d2 = |f1 - f0| into the
// step to try. A given first step, size > 0, replaces both.
ODENET_HD void first_step_row(const StepSize& s, int64_t row, const double* norms, double size, int phase) {
  const Controller& q = s.controller;
  const double d0 = norms[row], d1 = norms[s.rows + row];
  if (!s.running(row)) return;
  if (d0 != d0 || d1 != d1) {
    end_row(s, row, kNonFinite);
    return;
  }
  if (size <= 0) {
    double h0 = (d0 < 1e-5 || d1 < 1e-5) ? 1e-6 : 0.01 * d0 / d1;
    const double left = q.direction * (s.stops[static_cast<int64_t>(s.field(kNextStop, row))] - s.field(kTime, row));
    if (!(h0 > 0)) h0 = 1e-6;  // |f0| overflows
    if (h0 > left) h0 = left;
    if (phase == 0) {
      s.field(kDt, row) = q.direction * h0;
      s.field(kStepEnd, row) = s.field(kTime, row) + q.direction * h0;
      return;
    }
    const double d2 = norms[2 * s.rows + row] / h0;
    const double largest = d1 > d2 ? d1 : d2;
    const double h1 = largest <= 1e-15 ? (h0 * 1e-3 > 1e-6 ? h0 * 1e-3 : 1e-6) : pow(0.01 / largest, 1 / q.order);
    size = 100 * h0 < h1 ? 100 * h0 : h1;
    if (!(size > 0)) size = h0;  // d2 is not finite: start from the small step
  }
  plan_step(s, row, clamp_step(q, size));
}

// The time at which stage i of the planned step is evaluated, in the state's real type. Beside a discontinuity of f
// the stage on it is moved to the side on which the step lies.
template <class R>
ODENET_HD R stage_time(const StepSize& s, int64_t row, int i) {
  const double time = s.field(kTime, row), direction = s.controller.direction;
  if (s.c[i] == 0) {
    return s.field(kJumped, row) != 0 ? next_after(round_to<R>(time), direction) : round_to<R>(time);
  }
  if (s.c[i] != 1) return round_to<R>(time + s.c[i] * s.field(kDt, row));
  const double end = s.field(kStepEnd, row);
  const int64_t stop = static_cast<int64_t>(s.field(kNextStop, row));
  const bool jump =
      s.running(row) && end == s.stops[stop] && static_cast<int>(s.stops[s.num_stops + stop]) == kStopJump;
  return jump ? next_after(round_to<R>(end), -direction) : round_to<R>(end);
}

// times [stages, rows]: those of one row.
template <class R>
ODENET_HD void write_times(const StepSize& s, int64_t row, R* times) {
  for (int i = 0; i < s.stages; ++i) times[i * s.rows + row] = stage_time<R>(s, row, i);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
