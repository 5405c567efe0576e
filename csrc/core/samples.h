// The samples of a chunk on their way through the lanes of a pack: when one ends its lane takes the next. They are made
// ready, with their first slopes and steps, as many at a time as there are lanes. On CUDA the lanes are those of a
// block.
#pragma once

#include "events.h"
#include "grid.h"

namespace odenet {
namespace ODENET_LEVEL {

// Samples that have not begun, as many as a pack has lanes.
template <class M, class P>
struct Ready {
  P y[kOwn<M>], slope[kOwn<M>];
  P arguments[M::arguments + 1];
  P taps[own(M::taps) + 1];
  With<P, double> size;  // of the first step, or not a number where the start has no norm
};

// What is kept between calls.
template <class M, class P>
struct Samples {
  Tile<M, P> x;
  Paces<P> paces;
  Places<P> places;
  P first, fresh;  // as in a record, of the next step
  Happened<M, P> happened;
  Ready<M, P> ready;
  int64_t taken;        // of those that are ready; alike for all lanes of a block, as the next two
  int64_t next, count;  // the first that is not ready, and those ready
};

// body(i, turn) for the lanes that are set, of all members of the team, with their turns. Returns how many there are.
template <class Mask, class Body>
ODENET_HD int64_t deal(const Alone&, const Mask& lanes, const Body& body) {
  int64_t turn = 0;
  for_lanes(lanes, [&](int i) { body(i, turn++); });
  return turn;
}
#if defined(ODENET_BLOCKS)
template <class Body>
ODENET_HD int64_t deal(const Block& team, bool set, const Body& body) {
  unsigned char* all = static_cast<unsigned char*>(team_memory(kStaged));
  team.sync();
  if (group() == 0) all[team.lane()] = set;
  team.sync();
  int64_t before = 0, count = 0;
  for (int i = 0; i < kTeam; ++i) {
    before += i < team.lane() ? all[i] : 0;
    count += all[i];
  }
  if (set) body(0, before);
  team.sync();
  return count;
}
#endif

// The size of the first step from these states, with their slopes; not a number where there is no norm. left: to the
// next stop.
template <class M, class P>
ODENET_HD With<P, double> size_of_first_step(const SolveCall& in, const P* y, const P* own_slope, const P* arguments,
                                             const With<P, double>& time, const With<P, double>& left,
                                             const With<P, double>& direction) {
  using T = Number<P>;
  using D = With<P, double>;
  const Controller& q = in.step.controller;
  P between[kOwn<M>], slope[kOwn<M>], taps[own(M::taps) + 1];
  const auto norms = [&](D& d0, D& d1, D& d2) {
    d0 = d1 = d2 = D(0.0);
    for (int leaf = 0; leaf < M::leaves; ++leaf) {
      P squares[3];
      start_squares<M>(in, y, own_slope, slope, leaf, squares[0], squares[1], squares[2]);
      const auto fold = [&](D& d, const P& square) {
        d = maximum(convert<double>(sqrt(square * T(1 / leaf_size<M>(leaf)))), d);
      };
      fold(d0, squares[0]), fold(d1, squares[1]), fold(d2, squares[2]);
    }
  };
  for (int n = 0; n < kOwn<M>; ++n) slope[n] = own_slope[n];
  D d0, d1, d2;
  norms(d0, d1, d2);
  const auto defined = (d0 == d0) & (d1 == d1);
  D size = D(in.first_step);
  if (!(in.first_step > 0)) {
    const D h0 = size_of_euler(d0, d1, left);
    const P dt = convert<T>(h0 * direction);
    for (int n = 0; n < kOwn<M>; ++n) between[n] = fused(dt, own_slope[n], y[n]);
    M::field(in, convert<T>(time + h0 * direction), between, arguments, slope, taps);
    norms(d0, d1, d2);
    size = first_size(h0, d1, d2, [&](const D& x) {
      return select(x > D(0.0), power_of_log(binary_log(x) * (1 / q.order)), D(0.0));
    });
  }
  return select(defined, clamp_step(q, size), D(NAN));
}

// Makes samples ready, from `next` on.
template <class M, class P, class Team>
ODENET_WHOLE void make_ready(const Team& team, const SolveCall& in, Samples<M, P>& kept, int64_t end) {
  using T = Number<P>;
  using D = With<P, double>;
  const StepSize& s = in.step;
  Ready<M, P>& r = kept.ready;
  const int64_t begin = kept.next + team.lane() * Lanes<P>::width, lanes = Lanes<P>::width * (Team::size / kGroups);
  kept.count = end - kept.next < lanes ? end - kept.next : lanes;
  kept.next += kept.count;
  kept.taken = 0;
  const auto sample = [&](int i) { return begin + i < end ? begin + i : end - 1; };
  load_state<M>(r.y, in.y0, sample);
  if constexpr (M::arguments > 0) load_lanes(r.arguments, in.arguments, M::arguments, sample);
  for (int i = 0; i < Lanes<P>::width && begin + i < end; ++i) store_lane<M>(in.ys, r.y, i, begin + i);
  D time, left, direction;
  P first;
  for (int i = 0; i < Lanes<P>::width; ++i) {
    const Row row = first_row(s, sample(i));
    set_lane(time, i, row[kTime]);
    set_lane(left, i, row[kDirection] * (row.stop - row[kTime]));
    set_lane(direction, i, row[kDirection]);
    set_lane(first, i, stage_time<T>(row, 0.0));
  }
  M::field(in, first, r.y, r.arguments, r.slope, r.taps);
  r.size = size_of_first_step<M>(in, r.y, r.slope, r.arguments, time, left, direction);
}

// Sample j of those that the team has ready goes into lane i. place: of the team's first lane.
template <class M, class P>
ODENET_HD void take(const SolveCall& in, const Samples<M, P>& kept, Tile<M, P>& x, Paces<P>& c, Places<P>& at, int i,
                    int64_t place, int64_t j) {
  const Ready<M, P>& r = static_cast<const Samples<M, P>*>(in.tiles)[place_of(place + j / Lanes<P>::width)].ready;
  const int from = static_cast<int>(j % Lanes<P>::width);
  for (int n = 0; n < kOwn<M>; ++n) {
    set_lane(x.y[n], i, lane_in_memory(r.y[n], from));
    set_lane(x.k[0][n], i, lane_in_memory(r.slope[n], from));
  }
  for (int n = 0; n < M::arguments; ++n) {
    set_lane(x.arguments[n], i, lane_in_memory(r.arguments[n], from));
    set_lane(x.arguments_grad[n], i, Number<P>(0));
  }
  for (int n = 0; n < own(M::taps); ++n) set_lane(x.taps[0][n], i, lane_in_memory(r.taps[n], from));
  begin_lane(in.step, c, at, i, kept.next - kept.count + j, lane_in_memory(r.size, from));
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
