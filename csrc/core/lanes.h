// Per-sample control of a pack: every lane is a row of the solver state, with a time and a step of its own. As
// control_step, for all lanes at once; what is rare, outputs, stops and endings, is looked at lane by lane.
#pragma once

#include "functions.h"
#include "powers.h"
#include "step_size.h"

namespace odenet {
namespace ODENET_LEVEL {

template <class P>
struct Paces {
  using T = Number<P>;
  using D = With<P, double>;
  using Count = With<P, IntegerOf<T>>;
  MaskOf<P> running;               // lanes whose sample has not ended; the others try steps of size 0
  D time, dt, end;                 // as kTime, kDt and kStepEnd
  D last_time, last_dt, last_end;  // of the step tried last
  D proposal;                      // as kProposal, signed
  D stop, event;                   // the next stop, and what comes first, that or the next output
  P square;                        // of the error ratio
  P log1, log2;                    // log2 of 1 / error ratio: of the accepted step before, and of the one before that
  Count accepted;                  // steps of the sample
  int64_t tries;                   // steps that the pack has tried
  int64_t limit;                   // tries before which no lane can have come to max_num_steps
  bool jumps;                      // f is discontinuous at a stop
};

// The sample in each lane; its solver state as it was when it was looked at last; tries at its start, at its last
// output.
template <class P>
struct Places {
  static constexpr int width = Lanes<P>::width;
  int64_t sample[width];
  Row rows[width];
  int64_t began[width], since[width];
};

template <class P>
ODENET_HD void set(const MaskOf<P>& which, P& place, const P& value) {
  place = select(which, value, place);
}

// x^b of numbers whose log2 is known.
template <class P>
ODENET_HD P power_of_log(const P& log) {
  using T = Number<P>;
  const P low = select(log > P(T(-126)), log, P(T(-126)));
  return power_of_two(select(low < P(T(126)), low, P(T(126))));
}

// As step_factor.
template <class P>
ODENET_HD P lane_factor(const Controller& q, Paces<P>& c, const MaskOf<P>& accept) {
  using T = Number<P>;
  const P log = binary_log(c.square) * T(-0.5), least = log * T(1 / q.order);
  const MaskOf<P> perfect = c.square == P(T(0)), finite = c.square - c.square == P(T(0));
  // Known before the factor is, which much waits for.
  P lower = select(accept & (c.square < P(T(1))), P(T(q.accept_floor)), P(T(q.dfactor)));
  lower = select(perfect, P(T(q.ifactor)), lower);
  const P upper = select(finite, P(T(q.ifactor)), P(T(q.dfactor)));
  P sum = log * T(q.b0);
  if (q.b1 != 0 || q.b2 != 0) {
    sum = sum + c.log1 * T(q.b1) + c.log2 * T(q.b2);
    set(accept, c.log2, c.log1);
    const T most(33.2192809488736);  // log2(1e10)
    set(accept, c.log1, select(log < P(most), log, P(most)));
  }
  P factor = power_of_log(select(accept, sum, least)) * T(q.safety);
  factor = select(factor > lower, factor, lower);
  return select(factor < upper, factor, upper);
}

// The lanes that have tried as many steps since their last output as they may, and when that is to be asked again.
template <class P>
ODENET_HD MaskOf<P> lanes_of_many(const Controller& q, Paces<P>& c, const Places<P>& at) {
  MaskOf<P> many(false);
  c.limit = INT64_MAX;
  for_lanes(c.running, [&](int i) {
    const bool here = static_cast<double>(c.tries - at.since[i]) >= q.max_num_steps;
    const double left = here ? q.max_num_steps : q.max_num_steps - static_cast<double>(c.tries - at.since[i]);
    const int64_t next = left < 1e15 ? c.tries + static_cast<int64_t>(left) : INT64_MAX;
    if (here) set_lane(many, i, true);
    if (next < c.limit) c.limit = next;
  });
  return many;
}

// A lane goes on as its row says.
template <class P>
ODENET_HD void set_pace(Paces<P>& c, int i, const Row& r) {
  const bool output_first = r[kDirection] * (r.stop - r.next_output) > 0;
  set_lane(c.running, i, r.running());
  set_lane(c.time, i, r[kTime]);
  set_lane(c.dt, i, r[kDt]);
  set_lane(c.end, i, r[kStepEnd]);
  set_lane(c.stop, i, r.stop);
  set_lane(c.event, i, output_first ? r.next_output : r.stop);
}

// Accepts or rejects the step of every lane and plans the next. dt: of the step. Returns the lanes that come to an
// output, a stop or an end: what is planned for those does not hold, see look_at.
template <class P>
ODENET_HD MaskOf<P> control_lanes(const StepSize& s, Paces<P>& c, const Places<P>& at, const P& dt, MaskOf<P>& accept,
                                  MaskOf<P>& smallest) {
  using T = Number<P>;
  using D = With<P, double>;
  const Controller& q = s.controller;
  accept = c.running & (c.square <= P(T(1)));
  smallest = MaskOf<P>(false);
  if (q.min_step > 0) {
    const MaskOf<D> small = (abs(c.dt) <= D(q.min_step)) | (abs(c.proposal) <= D(q.min_step));
    smallest = MaskOf<P>(small) & c.running;
    accept = accept | (smallest & (c.square - c.square == P(T(0))));
  }
  D size = convert<double>(dt * lane_factor(q, c, accept));
  if (q.min_step > 0 || q.max_step < HUGE_VAL) {
    size = clamp_step(q, abs(size));
    size = select(c.dt < D(0.0), -size, size);
  }
  c.last_time = c.time;
  c.last_dt = c.dt;
  c.last_end = c.end;
  add_ones(c.accepted, accept);
  c.proposal = size;
  set(MaskOf<D>(accept), c.time, c.end);
  const D left = c.stop - c.time, end = c.time + size;
  const MaskOf<D> lands = abs(size) * kStretch >= abs(left);  // they have one sign
  c.dt = select(lands, left, size);
  c.end = select(lands, c.stop, end);
  ++c.tries;
  // By the sign of the step. A product that is too small for a number only has a lane looked at that is not there yet.
  const MaskOf<P> come = MaskOf<P>((c.time - c.event) * c.last_dt >= D(0.0)) & accept;
  MaskOf<P> rare = come | (MaskOf<P>(c.end == c.time) & c.running) | (smallest & !accept);
  if (c.tries >= c.limit) rare = rare | lanes_of_many(q, c, at);
  return rare;
}

// What is rare, of one lane after its step. first_kept: its first slope is the last of the step before.
template <class P>
ODENET_HD void look_at(const StepSize& s, Paces<P>& c, Places<P>& at, int i, bool accept, bool smallest,
                       bool first_kept) {
  Row& r = at.rows[i];
  r[kOutputBegin] = r[kOutputEnd];
  r[kTime] = r[kLastTime] = lane(c.last_time, i);
  r[kDt] = r[kLastDt] = lane(c.last_dt, i);
  r[kStepEnd] = lane(c.last_end, i);
  r[kErrorRatio] = sqrt(lane(c.square, i));
  r[kAccept] = accept;
  r[kAcceptedDt] = accept ? r[kDt] : 0;
  r[kStepsSinceOutput] = static_cast<double>(c.tries - at.since[i]);
  if (first_kept) r[kJumped] = 0;
  go_on(s, r, accept, smallest, r[kDirection] * lane(c.proposal, i));
  if (r[kStepsSinceOutput] == 0) at.since[i] = c.tries;
  set_pace(c, i, r);
}

// A lane takes a first step of that size; not a number: there is no norm.
template <class P>
ODENET_HD void start_step(Paces<P>& c, Row& r, int i, double size) {
  using T = Number<P>;
  if (r.running() && size != size) end_row(r, kNonFinite);
  if (r.running()) plan_step(r, size);
  set_lane(c.square, i, T(0));
  set_lane(c.log1, i, T(0));
  set_lane(c.log2, i, T(0));
  set_lane(c.proposal, i, r[kDirection] * r[kProposal]);
  set_pace(c, i, r);
}

// A sample whose first step has that size begins in a lane.
template <class P>
ODENET_HD void begin_lane(const StepSize& s, Paces<P>& c, Places<P>& at, int i, int64_t sample, double size) {
  using T = Number<P>;
  Row& r = at.rows[i] = first_row(s, sample);
  at.sample[i] = sample;
  at.began[i] = at.since[i] = c.tries;
  set_lane(c.accepted, i, IntegerOf<T>(0));
  start_step(c, r, i, size);
}

// The solver state of the sample in a lane that has ended.
template <class P>
ODENET_HD void end_lane(const StepSize& s, Paces<P>& c, Places<P>& at, int i) {
  Row& r = at.rows[i];
  const double accepted = static_cast<double>(lane(c.accepted, i));
  r[kNumAccepted] = accepted;
  r[kNumRejected] = static_cast<double>(c.tries - at.began[i]) - accepted;
  r[kInverse1] = power_of_two(static_cast<double>(lane(c.log1, i)));
  r[kInverse2] = power_of_two(static_cast<double>(lane(c.log2, i)));
  store_row(s, r);
}

// The time at the end of the step, as stage_time(r, 1).
template <class P>
ODENET_HD P end_times(const Paces<P>& c, const Places<P>& at) {
  using T = Number<P>;
  P end = convert<T>(c.end);
  if (c.jumps) {
    for_lanes(c.running & MaskOf<P>(c.end == c.stop), [&](int i) {
      const int kind = at.rows[i].stop_kind;
      if (kind == kStopJump || kind == kStopEndJump) {
        set_lane(end, i, next_after(lane(end, i), -at.rows[i][kDirection]));
      }
    });
  }
  return end;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
