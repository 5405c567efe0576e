// Error ratio -> accept the step? the next dt? where does it end? and the first step of a solve.
// Pure functions on the solver state of one row; lanes.h has those of a pack of rows.
//
// Controller: dt_next = dt * clamp(safety * r0^b0 * r1^b1 * r2^b2), r = 1 / error_ratio of the last three
// accepted steps (Soderlind 2003, doi 10.1145/641876.641877); b1 = b2 = 0 is the classical I controller.
#pragma once

#include "pack.h"
#include "types.h"

namespace odenet {

// The solver state: a float64 tensor [kNumFields, rows]. Counters are exact up to 2^53.
enum Field : int {
  kTime,        // time reached
  kDt,          // signed step to try next; 0 once the row has ended
  kStepEnd,     // time where that step ends: exactly a stop when it lands on one
  kStatus,      // see Status
  kAccept,      // 1: the last step tried was accepted
  kJumped,      // 1: the row stands on a discontinuity of f, and goes on from its other side
  kLastTime,    // start of the last step tried
  kLastDt,      // its signed size
  kAcceptedDt,  // the same, or 0 where it was not accepted
  kErrorRatio,  // its error ratio, written by `error`
  kInverse1,    // 1 / error_ratio of the accepted step before
  kInverse2,    // and of the one before that
  kNumAccepted,
  kNumRejected,
  kOutputBegin,  // outputs [kOutputBegin, kOutputEnd) fell into the last step
  kOutputEnd,
  kNextStop,  // index of the next stop
  kStepsSinceOutput,
  kProposal,   // step size the controller asked for, before landing shortened it
  kDirection,  // +1: time increases, -1: it decreases
  kNextSize,   // step size that the controller goes on with, also where the row has ended: a solve that resumes begins
               // so
  kNumFields
};

// kOutside: no step is small enough to end in the domain of the user; written by whoever knows that.
enum Status : int { kRunning, kSuccess, kUnderflow, kNonFinite, kMaxSteps, kOutside };
enum Stop : int { kStopStep, kStopJump, kStopEnd, kStopEndJump };  // the last: the end lies on a discontinuity

struct Controller {
  double order, safety, ifactor, dfactor;
  double b0, b1, b2;    // exponents of r0, r1, r2
  double accept_floor;  // least factor after an accepted step
  double min_step, max_step;
  double max_num_steps;  // tries per output interval
};
constexpr int kControllerSize = sizeof(Controller) / sizeof(double);

struct StepSize {
  double* state;         // [kNumFields, rows]
  const double* stops;   // [rows or 1, 2, num_stops]: times in the direction of the row, kinds (Stop); the last is the
                         // end, and the first is t[0] where f is discontinuous there
  const double* t;       // [rows or 1, num_outputs]; not a number where a row has fewer
  double c[kMaxStages];  // nodes of the tableau
  Controller controller;
  int64_t rows, num_stops, num_outputs;
  int64_t stops_stride, t_stride;  // from a row to the next; 0: all rows have the same
  int stages;

  ODENET_HD double& field(int name, int64_t row) const { return state[name * rows + row]; }
  ODENET_HD bool running(int64_t row) const { return static_cast<int>(field(kStatus, row)) == kRunning; }
  ODENET_HD const double* stops_of(int64_t row) const { return stops + row * stops_stride; }
  ODENET_HD const double* t_of(int64_t row) const { return t + row * t_stride; }
};

namespace ODENET_LEVEL {

// The solver state of a row. Not in memory: what its place among stops and outputs means.
struct Row {
  double field[kNumFields];
  int64_t number;
  double stop;         // the next stop,
  int stop_kind;       // and what it is: see Stop
  double next_output;  // time of output `output_end`; infinite after the last

  ODENET_HD double& operator[](int name) { return field[name]; }
  ODENET_HD const double& operator[](int name) const { return field[name]; }
  ODENET_HD bool running() const { return static_cast<int>(field[kStatus]) == kRunning; }
};

ODENET_HD void find_stop(const StepSize& s, Row& r) {
  const double* at = s.stops_of(r.number) + static_cast<int64_t>(r[kNextStop]);
  r.stop = at[0];
  r.stop_kind = static_cast<int>(at[s.num_stops]);
}

ODENET_HD void find_output(const StepSize& s, Row& r) {
  const int64_t output = static_cast<int64_t>(r[kOutputEnd]);
  r.next_output = output < s.num_outputs ? s.t_of(r.number)[output] : r[kDirection] * HUGE_VAL;
}

ODENET_HD Row load_row(const StepSize& s, int64_t row) {
  Row r;
  r.number = row;
  for (int name = 0; name < kNumFields; ++name) r[name] = s.field(name, row);
  find_stop(s, r);
  find_output(s, r);
  return r;
}
ODENET_HD void store_row(const StepSize& s, const Row& r) {
  for (int name = 0; name < kNumFields; ++name) s.field(name, r.number) = r[name];
}

ODENET_HD double direction_of(const StepSize& s, int64_t row) {
  return s.stops_of(row)[s.num_stops - 1] < s.t_of(row)[0] ? -1 : 1;
}

// A row that has no time but its first has ended.
ODENET_HD Row first_row(const StepSize& s, int64_t row) {
  Row r;
  r.number = row;
  for (int name = 0; name < kNumFields; ++name) r[name] = 0;
  const double* stops = s.stops_of(row);
  const double time = s.t_of(row)[0];
  r[kDirection] = direction_of(s, row);
  r[kTime] = r[kStepEnd] = r[kLastTime] = time;
  r[kInverse1] = r[kInverse2] = r[kOutputBegin] = r[kOutputEnd] = 1;
  if (stops[s.num_stops - 1] == time) {
    r[kStatus] = kSuccess;
  } else if (stops[0] == time) {
    r[kJumped] = r[kNextStop] = 1;
  }
  find_stop(s, r);
  find_output(s, r);
  return r;
}

// Of a number, or of each lane of a pack.
template <class D>
ODENET_HD D clamp_step(const Controller& q, const D& size) {
  const D lower = select(size > D(q.min_step), size, D(q.min_step));
  return select(lower < D(q.max_step), lower, D(q.max_step));
}

// Ends a row: it is held where it is, with steps of size 0.
ODENET_HD void end_row(Row& r, Status status) {
  r[kStatus] = status;
  r[kDt] = 0;
  r[kStepEnd] = r[kTime];
}

// Within a billionth: a remainder smaller than that is taken along, so that rounding never leaves a sliver.
constexpr double kStretch = 1 + 1e-9;

// Chooses the step to try: `size`, or what is left to the next stop if that is not more.
ODENET_HD void plan_step(Row& r, double size) {
  const double direction = r[kDirection], left = r.stop - r[kTime], end = r[kTime] + direction * size;
  const bool lands = size * kStretch >= direction * left;
  r[kProposal] = size;
  r[kDt] = lands ? left : direction * size;
  r[kStepEnd] = lands ? r.stop : end;
  if (!lands && !(direction * (end - r[kTime]) > 0)) end_row(r, is_finite(r[kErrorRatio]) ? kUnderflow : kNonFinite);
}

ODENET_HD double step_factor(const Controller& q, const Row& r, double ratio, bool accept) {
  if (!is_finite(ratio)) return q.dfactor;
  if (ratio == 0) return q.ifactor;
  double factor = q.safety * pow(1 / ratio, accept ? q.b0 : 1 / q.order);
  if (accept && q.b1 != 0) factor *= pow(r[kInverse1], q.b1);
  if (accept && q.b2 != 0) factor *= pow(r[kInverse2], q.b2);
  const double floor = accept && ratio < 1 ? q.accept_floor : q.dfactor;
  factor = factor > floor ? factor : floor;
  return factor < q.ifactor ? factor : q.ifactor;
}

// After a running row's step was accepted or rejected: the outputs and stops that it has come to, its end, or the next
// step, of that size. smallest: the step was of the least size allowed.
ODENET_HD void go_on(const StepSize& s, Row& r, bool accept, bool smallest, double next) {
  r[kNextSize] = next;
  if (accept) {
    r[kTime] = r[kStepEnd];
    r[kJumped] = 0;
    while (r[kDirection] * (r[kTime] - r.next_output) >= 0) {
      r[kStepsSinceOutput] = 0;
      r[kOutputEnd] += 1;
      find_output(s, r);
    }
    if (r[kTime] == r.stop) {
      if (r.stop_kind >= kStopEnd) {
        end_row(r, kSuccess);
      } else {
        r[kJumped] = r.stop_kind == kStopJump;
        r[kNextStop] += 1;
        find_stop(s, r);
      }
    }
  } else if (smallest) {
    end_row(r, kNonFinite);  // and no smaller step is allowed
  }
  if (r.running() && r[kStepsSinceOutput] >= s.controller.max_num_steps) end_row(r, kMaxSteps);
  if (r.running()) plan_step(r, next);
}

// After `error`: accepts or rejects the step and plans the next.
ODENET_HD void control_step(const StepSize& s, Row& r) {
  const Controller& q = s.controller;
  r[kOutputBegin] = r[kOutputEnd];
  r[kAccept] = r[kAcceptedDt] = 0;
  if (!r.running()) return;
  const double dt = r[kDt], size = r[kDirection] * dt, ratio = r[kErrorRatio];
  // Landing may have stretched a step of min_step by a sliver: what was asked for counts too.
  const bool smallest = size <= q.min_step || (q.min_step > 0 && r[kProposal] <= q.min_step);
  const bool accept = ratio <= 1 || (smallest && is_finite(ratio));
  const double next = clamp_step(q, size * step_factor(q, r, ratio, accept));
  r[kLastTime] = r[kTime];
  r[kLastDt] = dt;
  r[kStepsSinceOutput] += 1;
  r[accept ? kNumAccepted : kNumRejected] += 1;
  if (accept) {
    r[kAccept] = 1;
    r[kAcceptedDt] = dt;
    r[kInverse2] = r[kInverse1];
    r[kInverse1] = ratio > 1e-10 ? 1 / ratio : 1e10;
  }
  go_on(s, r, accept, smallest, next);
}

// The first step (Hairer, Norsett and Wanner I, II.4), of a number or of each lane. From d0 = |y0| and d1 = |f0|, norms
// scaled by the tolerance, the size of a small explicit Euler step; left: to the next stop.
template <class D>
ODENET_HD D size_of_euler(const D& d0, const D& d1, const D& left) {
  D h0 = select((d0 < D(1e-5)) | (d1 < D(1e-5)), D(1e-6), D(0.01) * d0 / d1);
  h0 = select(h0 > D(0.0), h0, D(1e-6));  // |f0| overflows
  return select(h0 > left, left, h0);
}

// And from d2 = |f1 - f0|, where f1 is the slope at its end, that of the step to try. root(x): x^(1 / order).
template <class D, class Root>
ODENET_HD D first_size(const D& h0, const D& d1, const D& d2, const Root& root) {
  const D change = d2 / h0;
  const D largest = select(d1 > change, d1, change);
  const D least = select(h0 * D(1e-3) > D(1e-6), h0 * D(1e-3), D(1e-6));
  const D h1 = select(largest <= D(1e-15), least, root(D(0.01) / largest));
  const D size = select(D(100.0) * h0 < h1, D(100.0) * h0, h1);
  return select(size > D(0.0), size, h0);  // d2 is not finite: start from the small step
}

// Phase 0 plans the Euler step, whose end the caller evaluates; phase 1 the step to try. A given first step, size > 0,
// replaces both. Phase 2 plans that of kNextSize alone.
ODENET_HD void plan_first_step(const StepSize& s, Row& r, double d0, double d1, double d2, double given, int phase) {
  const Controller& q = s.controller;
  if (r.running() && (d0 != d0 || d1 != d1)) end_row(r, kNonFinite);
  if (!r.running()) return;
  if (phase == 2) return plan_step(r, clamp_step(q, r[kNextSize]));
  if (given > 0) return plan_step(r, clamp_step(q, given));
  const double h0 = size_of_euler(d0, d1, r[kDirection] * (r.stop - r[kTime]));
  if (phase == 0) {
    r[kDt] = r[kDirection] * h0;
    r[kStepEnd] = r[kTime] + r[kDirection] * h0;
    return;
  }
  const double size = first_size(h0, d1, d2, [&](double x) { return pow(x, 1 / q.order); });
  plan_step(r, clamp_step(q, size));
}

// time + c dt, rounded twice, as on the CPU: nvcc would make one operation of it.
template <class D>
ODENET_HD D time_within(const D& time, double c, const D& dt) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(time, __dmul_rn(c, dt));
#else
  return time + D(c) * dt;
#endif
}

// The time at which the stage with node c of the planned step is evaluated, in the state's real type. Beside a
// discontinuity of f the stage on it is moved to the side on which the step lies, and so is one with a node beyond 1.
template <class R>
ODENET_HD R stage_time(const Row& r, double c) {
  if (c == 0) {
    const R time = round_to<R>(r[kTime]);
    return r[kJumped] != 0 ? next_after(time, r[kDirection]) : time;
  }
  const bool jump = r.stop_kind == kStopJump || r.stop_kind == kStopEndJump;
  const bool on_jump = c >= 1 && r.running() && r[kStepEnd] == r.stop && jump;
  if (c != 1 && !on_jump) return round_to<R>(time_within(r[kTime], c, r[kDt]));
  const R end = round_to<R>(r[kStepEnd]);
  return on_jump ? next_after(end, -r[kDirection]) : end;
}

// Rows of the stepper, whose state is in memory. times [stages, rows]: of the step that is to be tried.
template <class R>
ODENET_HD void store_row_and_times(const StepSize& s, const Row& r, R* times) {
  store_row(s, r);
  for (int i = 0; i < s.stages; ++i) times[i * s.rows + r.number] = stage_time<R>(r, s.c[i]);
}

template <class R>
ODENET_HD void step_size_row(const StepSize& s, int64_t row, R* times) {
  Row r = load_row(s, row);
  control_step(s, r);
  store_row_and_times(s, r, times);
}

template <class R>
ODENET_HD void first_step_row(const StepSize& s, int64_t row, const double* norms, double size, int phase, R* times) {
  Row r = load_row(s, row);
  plan_first_step(s, r, norms[row], norms[s.rows + row], norms[2 * s.rows + row], size, phase);
  store_row_and_times(s, r, times);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
