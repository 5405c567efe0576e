// The whole solve of a chunk of samples under per-sample control: each has its own step size, and no lane is idle as
// long as samples wait.
#pragma once

#include "samples.h"

namespace odenet {
namespace ODENET_LEVEL {

// One pack, or on CUDA a lane of a block, on its way through the samples of a chunk, together with its team.
template <class M, class P, class Team>
struct PerSample {
  using T = Number<P>;
  using D = With<P, double>;
  const Team& team;
  const SolveCall& in;
  int64_t place, first_place;  // where it keeps what is its own; where the team's first lane does
  int64_t chunk, end;          // behind the last sample
  Samples<M, P>& kept;
  Tile<M, P>& x;
  Paces<P>& c;
  Places<P>& at;
  P &first, &fresh;
  Happened<M, P>& happened;

  ODENET_HD Events<M, P> events() const { return {in, x, c, at, happened}; }

  // Before the first step: no lane has a sample.
  ODENET_HD void start(int64_t begin) const {
    const StepSize& s = in.step;
    if (in.tape_count != nullptr) in.tape_count[place_of(place)] = 0;
    kept.next = begin;
    kept.count = kept.taken = 0;
    c.tries = c.limit = 0;
    c.jumps = false;
    for (int64_t row = begin; row < end && (row == begin || s.stops_stride != 0); ++row) {
      const double* kinds = s.stops_of(row) + s.num_stops;
      for (int64_t i = 0; i < s.num_stops; ++i) c.jumps = c.jumps || kinds[i] == kStopJump || kinds[i] == kStopEndJump;
    }
    Row r = first_row(s, begin);
    end_row(r, kSuccess);
    c.square = c.log1 = c.log2 = first = fresh = P(T(0));
    c.accepted = typename Paces<P>::Count(0);
    c.proposal = D(0.0);
    for (int i = 0; i < Lanes<P>::width; ++i) {
      at.sample[i] = begin;
      set_pace(c, i, r);
    }
    for (int n = 0; n < kOwn<M>; ++n) x.y[n] = x.k[0][n] = P(T(0));
    for (int n = 0; n < M::arguments; ++n) x.arguments[n] = P(T(0));
    for (int n = 0; n < own(M::taps); ++n) x.taps[0][n] = P(T(0));
  }

  // One step of all lanes. Returns those that have ended.
  ODENET_HD MaskOf<P> advance() const {
    const StepSize& s = in.step;
    const P dt = convert<T>(c.dt);
    const bool taped = in.tape_count != nullptr;
    const P last = M::timed || taped ? end_times<P>(c, at) : P(T(0));
    try_step(in, x, dt, [&](double node) {
      const P time = convert<T>(time_within(c.time, node, c.dt));
      return node == 1 ? last : node == 0 ? select(fresh != P(T(0)), first, time) : time;
    });
    c.square = square_of_ratio(in, x, dt);
    MaskOf<P> accept, smallest, ended(false), jumped(false), output(false);
    MaskOf<P> rare = control_lanes(s, c, at, dt, accept, smallest), crossed(false);
    if constexpr (M::events > 0) {
      crossed = events().find(accept, dt);
      rare = rare | crossed;
    }
    if (any(rare)) {
      for_lanes(rare, [&](int i) {
        const Row& r = at.rows[i];
        look_at(s, c, at, i, lane(accept, i), lane(smallest, i), lane(fresh, i) == 0);
        if constexpr (M::events > 0) {
          if (lane(crossed, i)) events().note(i) ? finish(i) : revive(i);
        }
        if (!r.running()) set_lane(ended, i, true);
        if (r[kAccept] != 0 && r[kJumped] != 0) set_lane(jumped, i, true);
        if (r[kOutputBegin] < r[kOutputEnd]) set_lane(output, i, true);
      });
      if (any(output)) write(output);
    }
    if (taped && any(accept)) record(accept, last);
    if constexpr (M::taps > 0) add(accept, dt);
    accept_step(x, accept);
    set(accept, fresh, P(T(0)));
    if (c.jumps && team.any(any(jumped))) jump(jumped);
    if constexpr (M::events > 0) {
      const MaskOf<P> on = crossed & c.running;
      if (any(on)) go_on_from_events(on, ended);
    }
    return ended;
  }

  // Lanes that have come to an event go on as from a start. ended: to which those are added that cannot.
  ODENET_HD void go_on_from_events(const MaskOf<P>& on, MaskOf<P>& ended) const {
    events().change(on);
    jump(on);
    D left(0.0), direction(1.0);
    for_lanes(on, [&](int i) {
      const Row& r = at.rows[i];
      set_lane(direction, i, r[kDirection]);
      set_lane(left, i, r[kDirection] * (r.stop - r[kTime]));
    });
    const D size = size_of_first_step<M>(in, x.y, x.k[0], x.arguments, c.time, left, direction);
    for_lanes(on, [&](int i) {
      Row& r = at.rows[i];
      start_step(c, r, i, lane(size, i));
      if (!r.running()) set_lane(ended, i, true);
    });
  }

  // From its event a sample takes a first step of its own, whatever the next step of before, or their number, would be.
  ODENET_HD void revive(int i) const {
    Row& r = at.rows[i];
    if (r.running() || r[kStatus] == kSuccess) return;
    r[kStatus] = kRunning;
    set_lane(c.running, i, true);
  }

  // An event ends the sample in this lane.
  ODENET_HD void finish(int i) const {
    end_row(at.rows[i], kSuccess);
    set_pace(c, i, at.rows[i]);
  }

  // The outputs of these lanes inside the step, or at its end.
  ODENET_HD void write(MaskOf<P> left) const {
    int64_t number[Lanes<P>::width];
    for_lanes(left, [&](int i) { number[i] = static_cast<int64_t>(at.rows[i][kOutputBegin]); });
    while (any(left)) {
      D output(0.0);
      for_lanes(left, [&](int i) { set_lane(output, i, in.step.t_of(at.sample[i])[number[i]]); });
      write_output<M, P>(
          in, x, left, output, c.last_time, c.last_dt, c.last_end, [&](int i) { return number[i]; },
          [&](int i) { return at.sample[i]; });
      for_lanes(left, [&](int i) { set_lane(left, i, ++number[i] < at.rows[i][kOutputEnd]); });
    }
  }

  ODENET_HD void record(const MaskOf<P>& accept, const P& last) const {
    Record<M, P>* record = next_record<M, P>(in, place);
    if (record == nullptr) return;
    const D dt = select(MaskOf<D>(accept), c.last_dt, D(0.0));
    write_record<M, P>(*record, x, first, last, c.last_time, dt, c.last_end, fresh,
                       [&](int i) { return at.sample[i]; });
  }

  // To the sums of gradients. What was rejected may be infinite: it is not weighted with 0, it is none.
  ODENET_HD void add(const MaskOf<P>& accept, const P& dt) const {
    if (!all(accept)) {
      for (int i = 1; i < M::stages; ++i) {
        for (int n = 0; n < own(M::taps); ++n) x.taps[i][n] = select(accept, x.taps[i][n], P(T(0)));
      }
    }
    add_taps(team, in, x, chunk, select(accept, dt, P(T(0))));
  }

  // Lanes that have come to a discontinuity go on with the slope on its other side.
  ODENET_HD void jump(const MaskOf<P>& jumped) const {
    set(jumped, fresh, P(T(1)));
    for_lanes(jumped, [&](int i) { set_lane(first, i, stage_time<T>(at.rows[i], 0.0)); });
    M::field(in, first, x.y, x.arguments, x.k[1], x.taps[M::taps > 0]);
    for (int n = 0; n < kOwn<M>; ++n) x.k[0][n] = select(jumped, x.k[1][n], x.k[0][n]);
    for (int n = 0; n < own(M::taps); ++n) x.taps[0][n] = select(jumped, x.taps[1][n], x.taps[0][n]);
  }

  // The results of the samples in these lanes, which have ended.
  ODENET_HD void store(const MaskOf<P>& ended) const {
    P sums[M::arguments + 1];
    if constexpr (M::taps > 0) {
      for (int n = 0; n < M::arguments; ++n) sums[n] = add_groups(x.arguments_grad[n]);
    }
    for_lanes(ended, [&](int i) {
      store_lane<M>(in.y_last, x.y, i, at.sample[i]);
      if (group() != 0) return;
      end_lane(in.step, c, at, i);
      if constexpr (M::events > 0) in.events.count[at.sample[i]] = happened.count[i];
      if constexpr (M::taps > 0) {
        T* to = static_cast<T*>(in.grad_arguments) + at.sample[i] * M::arguments;
        for (int n = 0; n < M::arguments; ++n) to[n] = lane(sums[n], i);
      }
    });
  }

  // Samples that wait go into these lanes, as far as there are some; one that ends at its start is followed by another.
  ODENET_HD void refill(MaskOf<P> free) const {
    do {
      if (kept.taken == kept.count) {
        if (kept.next >= end) break;
        make_ready<M, P>(team, in, kept, end);
      }
      const int64_t from = kept.taken, left = kept.count - from;
      MaskOf<P> begun(false);
      const int64_t wanted = deal(team, free, [&](int i, int64_t turn) {
        if (turn >= left) return;
        take(in, kept, x, c, at, i, first_place, from + turn);
        set_lane(first, i, stage_time<T>(at.rows[i], 0.0));
        set_lane(begun, i, true);
      });
      kept.taken += wanted < left ? wanted : left;
      set(begun, fresh, P(T(1)));
      if constexpr (M::events > 0) {
        if (any(begun)) events().begin(begun, first);
      }
      const MaskOf<P> ended = begun & negate(c.running);
      if (team.any(any(ended))) store(ended);
      free = (free & negate(begun)) | ended;
    } while (team.any(any(free)));
    if (any(free)) idle(free);
  }

  // Lanes that have no sample repeat one that runs: what they compute is of no use, but it is sound.
  ODENET_HD void idle(const MaskOf<P>& free) const {
    if constexpr (Lanes<P>::width == 1) {
      for (int n = 0; n < own(M::taps); ++n) x.taps[0][n] = P(0);
    } else if (any(c.running)) {
      const int from = __builtin_ctz(bits_of(c.running));
      const auto repeat = [&](P& numbers) { numbers = select(free, P(lane(numbers, from)), numbers); };
      for (int n = 0; n < kOwn<M>; ++n) repeat(x.y[n]), repeat(x.k[0][n]);
      for (int n = 0; n < M::arguments; ++n) repeat(x.arguments[n]);
      for (int n = 0; n < own(M::taps); ++n) repeat(x.taps[0][n]);
      set(MaskOf<D>(free), c.time, D(lane(c.time, from)));
      set(MaskOf<D>(free), c.end, c.time);
      set(MaskOf<D>(free), c.stop, c.time);
    }
  }
};

// The samples [begin, end) of a chunk: up to max_steps steps. Returns how many of the lanes still run.
template <class M, class P, class Team>
ODENET_WHOLE int64_t solve_samples(const Team& team, const SolveCall& in, int64_t place, int64_t chunk, int64_t begin,
                                   int64_t end) {
  Samples<M, P>& kept = static_cast<Samples<M, P>*>(in.tiles)[place_of(place)];
  Tile<M, P> x;
  Paces<P> c;
  Places<P> at;
  P first, fresh;
  Happened<M, P> happened;
  const PerSample<M, P, Team> solve{team,  in,    place,   place - team.lane(), chunk, end, kept, x, c, at,
                                    first, fresh, happened};
  MaskOf<P> free(in.begun == 0);
  if (in.begun == 0) {
    solve.start(begin);
  } else {
    if (!team.any(any(kept.paces.running))) return 0;
    x = kept.x, c = kept.paces, at = kept.places, first = kept.first, fresh = kept.fresh, happened = kept.happened;
  }
  bool some = true;
  for (int64_t step = 0;; ++step) {
    if (team.any(any(free))) {
      if (step > 0) solve.store(free);
      solve.refill(free);
      some = team.any(any(c.running));
    }
    if (!some || step == in.max_steps) break;
    free = solve.advance();
  }
  kept.paces.running = c.running;
  if (some) {
    kept.x = x, kept.paces = c, kept.places = at, kept.first = first, kept.fresh = fresh, kept.happened = happened;
  }
  int64_t running = 0;
  for_lanes(c.running, [&](int) { ++running; });
  return group() == 0 ? running : 0;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
