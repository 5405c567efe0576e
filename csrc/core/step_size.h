// Error ratio -> accept the step? the next dt? where does it end? and the first step of a solve.
// Pure functions on the solver state of one row, or of a pack of rows: D is double or a pack of doubles.
//
// Controller: dt_next = dt * clamp(safety * r0^b0 * r1^b1 * r2^b2), r = 1 / error_ratio of the last three
// accepted steps (Soderlind 2003, doi 10.1145/641876.641877); b1 = b2 = 0 is the classical I controller.
#pragma once

#include "functions.h"
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
  kProposal,  // step size the controller asked for, before landing shortened it
  kNumFields
};

enum Status : int { kRunning, kSuccess, kUnderflow, kNonFinite, kMaxSteps };
enum Stop : int { kStopStep, kStopJump, kStopEnd, kStopEndJump };  // the last: the end lies on a discontinuity

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
  const double* stops;   // [2, num_stops]: times in the direction of the solve, kinds (Stop); the last is the end, and
                         // the first is t[0] where f is discontinuous there
  const double* t;       // [num_outputs]
  double c[kMaxStages];  // nodes of the tableau
  Controller controller;
  int64_t rows, num_stops, num_outputs;
  int stages;

  ODENET_HD double& field(int name, int64_t row) const { return state[name * rows + row]; }
  ODENET_HD bool running(int64_t row) const { return static_cast<int>(field(kStatus, row)) == kRunning; }
};

namespace ODENET_LEVEL {

ODENET_HD bool finite(double x) {
  return is_finite(x);
}
template <class D>
ODENET_HD MaskOf<D> finite(const D& x) {
  return x - x == D(0);
}

// The solver state of a row, or of several, side by side. Not in memory: what its place among stops and outputs means.
template <class D>
struct Row {
  D field[kNumFields];
  D stop, stop_kind;  // the next stop
  D next_output;      // time of output `output_end`; infinite after the last

  ODENET_HD D& operator[](int name) { return field[name]; }
  ODENET_HD const D& operator[](int name) const { return field[name]; }
  ODENET_HD MaskOf<D> running() const { return field[kStatus] == D(kRunning); }
};

template <class D>
ODENET_HD void set(const MaskOf<D>& which, D& place, const D& value) {
  place = select(which, value, place);
}

template <class D>
ODENET_HD void find_stop(const StepSize& s, Row<D>& r) {
  r.stop = gather(s.stops, r[kNextStop]);
  r.stop_kind = gather(s.stops + s.num_stops, r[kNextStop]);
}

template <class D>
ODENET_HD void find_output(const StepSize& s, Row<D>& r) {
  const D count = D(static_cast<double>(s.num_outputs));
  const MaskOf<D> left = r[kOutputEnd] < count;
  const D time = gather(s.t, select(left, r[kOutputEnd], count - D(1.0)));
  r.next_output = select(left, time, D(s.controller.direction * HUGE_VAL));
}

ODENET_HD Row<double> load_row(const StepSize& s, int64_t row) {
  Row<double> r;
  for (int name = 0; name < kNumFields; ++name) r[name] = s.field(name, row);
  find_stop(s, r);
  find_output(s, r);
  return r;
}
ODENET_HD void store_row(const StepSize& s, int64_t row, const Row<double>& r) {
  for (int name = 0; name < kNumFields; ++name) s.field(name, row) = r[name];
}

template <class D>
ODENET_HD D clamp_step(const Controller& q, const D& size) {
  const D lower = select(size > D(q.min_step), size, D(q.min_step));
  return select(lower < D(q.max_step), lower, D(q.max_step));
}

// Ends rows: they are held where they are, with steps of size 0.
template <class D>
ODENET_HD void end_rows(Row<D>& r, const MaskOf<D>& which, Status status) {
  set(which, r[kStatus], D(status));
  set(which, r[kDt], D(0));
  set(which, r[kStepEnd], r[kTime]);
}

// Chooses the step to try: `size`, or what is left to the next stop if that is not more. A remainder smaller than
// a billionth of the step is taken along, so that rounding never leaves a sliver.
template <class D>
ODENET_HD void plan_step(const Controller& q, Row<D>& r, const MaskOf<D>& which, const D& size) {
  const D left = D(q.direction) * (r.stop - r[kTime]);
  const D end = r[kTime] + D(q.direction) * size;
  const MaskOf<D> lands = size * D(1 + 1e-9) >= left;
  const MaskOf<D> stuck = which & !lands & !(D(q.direction) * (end - r[kTime]) > D(0));
  set(which, r[kProposal], size);
  set(which, r[kDt], select(lands, r.stop - r[kTime], D(q.direction) * size));
  set(which, r[kStepEnd], select(lands, r.stop, end));
  if (any(stuck)) {
    const MaskOf<D> small = finite(r[kErrorRatio]);
    end_rows(r, stuck & small, kUnderflow);
    end_rows(r, stuck & !small, kNonFinite);
  }
}

// F: the type in which powers are taken.
template <class F, class D>
ODENET_HD D step_factor(const Controller& q, const Row<D>& r, const D& ratio, const MaskOf<D>& accept) {
  using P = With<D, F>;
  const P inverse = convert<F>(D(1) / ratio);
  P factor = P(F(q.safety)) * pow(inverse, P(F(q.b0)));
  if (q.b1 != 0) factor = factor * pow(convert<F>(r[kInverse1]), P(F(q.b1)));
  if (q.b2 != 0) factor = factor * pow(convert<F>(r[kInverse2]), P(F(q.b2)));
  D result = convert<double>(factor);
  const double least = 1 / q.order;
  if ((q.b0 != least || q.b1 != 0 || q.b2 != 0) && any(r.running() & !accept)) {
    const P after_rejection = P(F(q.safety)) * pow(inverse, P(F(least)));
    result = select(accept, result, convert<double>(after_rejection));
  }
  const D floor = select(accept & (ratio < D(1)), D(q.accept_floor), D(q.dfactor));
  result = select(result > floor, result, floor);
  result = select(result < D(q.ifactor), result, D(q.ifactor));
  result = select(ratio == D(0), D(q.ifactor), result);
  return select(finite(ratio), result, D(q.dfactor));
}

// After `error`: accepts or rejects steps and plans the next.
template <class F, class D>
ODENET_HD void control_step(const StepSize& s, Row<D>& r) {
  const Controller& q = s.controller;
  r[kOutputBegin] = r[kOutputEnd];
  const MaskOf<D> running = r.running();
  const D dt = r[kDt], size = D(q.direction) * dt, ratio = r[kErrorRatio];
  // Landing may have stretched a step of min_step by a sliver: what was asked for counts too.
  MaskOf<D> smallest = size <= D(q.min_step);
  if (q.min_step > 0) smallest = smallest | (r[kProposal] <= D(q.min_step));
  const MaskOf<D> accept = running & ((ratio <= D(1)) | (smallest & finite(ratio)));
  const MaskOf<D> reject = running & !accept;
  r[kAccept] = select(accept, D(1), D(0));
  set(running, r[kLastTime], r[kTime]);
  set(running, r[kLastDt], dt);
  r[kAcceptedDt] = select(accept, dt, D(0));
  const D next = clamp_step(q, size * step_factor<F>(q, r, ratio, accept));
  r[kStepsSinceOutput] = r[kStepsSinceOutput] + select(running, D(1), D(0));
  r[kNumAccepted] = r[kNumAccepted] + r[kAccept];
  r[kNumRejected] = r[kNumRejected] + select(reject, D(1), D(0));
  set(accept, r[kInverse2], r[kInverse1]);
  set(accept, r[kInverse1], select(ratio > D(1e-10), D(1) / ratio, D(1e10)));
  set(accept, r[kTime], r[kStepEnd]);
  set(accept, r[kJumped], D(0));
  MaskOf<D> output = accept & (D(q.direction) * (r[kTime] - r.next_output) >= D(0));
  if (any(output)) {
    set(output, r[kStepsSinceOutput], D(0));
    do {
      r[kOutputEnd] = r[kOutputEnd] + select(output, D(1), D(0));
      find_output(s, r);
      output = accept & (D(q.direction) * (r[kTime] - r.next_output) >= D(0));
    } while (any(output));
  }
  const MaskOf<D> lands = accept & (r[kTime] == r.stop);
  if (any(lands)) {
    const MaskOf<D> ends = lands & (r.stop_kind >= D(kStopEnd));
    set(lands & (r.stop_kind == D(kStopJump)), r[kJumped], D(1));
    end_rows(r, ends, kSuccess);
    r[kNextStop] = r[kNextStop] + select(lands & !ends, D(1), D(0));
    find_stop(s, r);
  }
  if (any(reject & smallest)) end_rows(r, reject & smallest, kNonFinite);  // and no smaller step is allowed
  const MaskOf<D> many = r.running() & (r[kStepsSinceOutput] >= D(q.max_num_steps));
  if (any(many)) end_rows(r, many, kMaxSteps);
  plan_step(q, r, r.running(), next);
}

// The first step (Hairer, Norsett and Wanner I, II.4). Phase 0 turns d0 = |y0|, d1 = |f0| (norms scaled by the
// tolerance) into a small explicit Euler step, whose end the caller evaluates; phase 1 turns d2 = |f1 - f0| into the
// step to try. A given first step, size > 0, replaces both.
template <class D>
ODENET_HD void plan_first_step(const StepSize& s, Row<D>& r, const D& d0, const D& d1, const D& d2, double given,
                               int phase) {
  const Controller& q = s.controller;
  const MaskOf<D> undefined = r.running() & ((d0 != d0) | (d1 != d1));
  if (any(undefined)) end_rows(r, undefined, kNonFinite);
  const MaskOf<D> running = r.running();
  if (given > 0) {
    plan_step(q, r, running, clamp_step(q, D(given)));
    return;
  }
  D h0 = select((d0 < D(1e-5)) | (d1 < D(1e-5)), D(1e-6), D(0.01) * d0 / d1);
  const D left = D(q.direction) * (r.stop - r[kTime]);
  set(!(h0 > D(0)), h0, D(1e-6));  // |f0| overflows
  set(h0 > left, h0, left);
  if (phase == 0) {
    set(running, r[kDt], D(q.direction) * h0);
    set(running, r[kStepEnd], r[kTime] + D(q.direction) * h0);
    return;
  }
  const D change = d2 / h0;
  const D largest = select(d1 > change, d1, change);
  const D least = select(h0 * D(1e-3) > D(1e-6), h0 * D(1e-3), D(1e-6));
  const D h1 = select(largest <= D(1e-15), least, pow(D(0.01) / largest, D(1 / q.order)));
  D size = select(D(100) * h0 < h1, D(100) * h0, h1);
  set(!(size > D(0)), size, h0);  // d2 is not finite: start from the small step
  plan_step(q, r, running, clamp_step(q, size));
}

template <class P>
ODENET_HD P next_after_lanes(P x, double towards) {
  for (int i = 0; i < Lanes<P>::width; ++i) set_lane(x, i, next_after(Number<P>(lane(x, i)), towards));
  return x;
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
// discontinuity of f the stage on it is moved to the side on which the step lies.
template <class R, class D>
ODENET_HD With<D, R> stage_time(const StepSize& s, const Row<D>& r, double c) {
  using P = With<D, R>;
  if (c == 0) {
    const P time = convert<R>(r[kTime]);
    const MaskOf<P> moved = r[kJumped] != D(0);
    return any(moved) ? select(moved, next_after_lanes(time, s.controller.direction), time) : time;
  }
  if (c != 1) return convert<R>(time_within(r[kTime], c, r[kDt]));
  const P end = convert<R>(r[kStepEnd]);
  const MaskOf<D> on_jump = (r.stop_kind == D(kStopJump)) | (r.stop_kind == D(kStopEndJump));
  const MaskOf<P> jump = r.running() & (r[kStepEnd] == r.stop) & on_jump;
  return any(jump) ? select(jump, next_after_lanes(end, -s.controller.direction), end) : end;
}

// Rows of the stepper, whose state is in memory. times [stages, rows]: of the step that is to be tried.
template <class R>
ODENET_HD void store_row_and_times(const StepSize& s, int64_t row, const Row<double>& r, R* times) {
  store_row(s, row, r);
  for (int i = 0; i < s.stages; ++i) times[i * s.rows + row] = stage_time<R>(s, r, s.c[i]);
}

template <class R>
ODENET_HD void step_size_row(const StepSize& s, int64_t row, R* times) {
  Row<double> r = load_row(s, row);
  control_step<double>(s, r);
  store_row_and_times(s, row, r, times);
}

template <class R>
ODENET_HD void first_step_row(const StepSize& s, int64_t row, const double* norms, double size, int phase, R* times) {
  Row<double> r = load_row(s, row);
  plan_first_step(s, r, norms[row], norms[s.rows + row], norms[2 * s.rows + row], size, phase);
  store_row_and_times(s, row, r, times);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
