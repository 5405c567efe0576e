// The whole solve of all tiles under joint control: they have one step size.
#pragma once

#include "grid.h"

namespace odenet {
namespace ODENET_LEVEL {

// A step of joint control, for one tile: what was accepted before is taken over, then the next step is tried.
template <class M, class P, class Team>
struct JointStep {
  const Team& team;
  const SolveCall& in;
  Row r;                  // of the step to try
  bool accepted = false;  // the step before
  Row before;             // and its row
  double last = 0;        // its time of the stages at its end
  double first = 0;       // the time of its first slope, if that was
  double fresh = 1;       // evaluated for it

  ODENET_HD void finish(Tile<M, P>& x, int64_t tile) const {
    using T = Number<P>;
    if (!accepted) return;
    const Row& b = before;
    if (b[kOutputBegin] < b[kOutputEnd]) {
      write_outputs(in, x, tile, static_cast<int64_t>(b[kOutputBegin]), static_cast<int64_t>(b[kOutputEnd]),
                    b[kLastTime], b[kLastDt], b[kTime]);
    }
    if (in.tape_count != nullptr) {
      Record<M, P>* record = next_record<M, P>(in, tile);
      if (record != nullptr) {
        write_record<M, P>(*record, x, P(T(first)), P(T(last)), b[kLastTime], b[kLastDt], b[kTime], P(T(fresh)),
                           [&](int i) { return tile * Lanes<P>::width + i; });
      }
    }
    if constexpr (M::taps > 0) add_taps_of_tile(team, in, x, tile, P(T(b[kLastDt])));
    accept_step(x, MaskOf<P>(true));
    if (b[kJumped] != 0) {
      M::field(in, P(stage_time<T>(b, 0.0)), x.y, x.arguments, x.k[0], x.taps[0]);
    }
  }

  // sums: to which the tile adds those of its error.
  ODENET_HD void attempt(Tile<M, P>& x, int64_t tile, double* sums) const {
    using T = Number<P>;
    const P dt = P(T(r[kDt]));
    try_step(in, x, dt, [&](double c) { return P(stage_time<T>(r, c)); });
    for (int leaf = 0; leaf < M::leaves; ++leaf) {
      sums[leaf] += own_sum(error_squares<M>(in, x, dt, leaf), tile, in.batch);
    }
  }
};

// max over leaves of the root mean square; which: of the three sums that the tiles have added to.
template <class M, class Tiles>
ODENET_HD double joint_norm(const SolveCall& in, const Tiles& tiles, int which) {
  double norm = 0;
  for (int leaf = 0; leaf < M::leaves; ++leaf) {
    const double sum = tiles.sum(which * M::leaves + leaf);
    norm = error_fold(norm, sum, static_cast<int64_t>(leaf_size<M>(leaf)) * in.batch, leaf == 0);
  }
  return norm;
}

// All tiles under joint control. tiles: tiles.each(body) does body(x, tile, sums) for every tile, perhaps in several
// threads or blocks, which meet after it; then tiles.sum(i) is what they have added to sums[i]. All members of all
// teams decide, alike.
template <class M, class P, class Team, class Tiles>
ODENET_HD int64_t solve_joint(const Team& team, const SolveCall& in, Tiles& tiles) {
  using T = Number<P>;
  const StepSize& s = in.step;
  JointStep<M, P, Team> step{team, in};
  if (in.begun == 0) {
    step.r = first_row(s, 0);
    double d0 = 0, d1 = 0;
    for (bool starts = true;; starts = false) {  // then the slope after an Euler step
      tiles.each([&](Tile<M, P>& x, int64_t tile, double* sums) {
        if (starts) {
          begin_tile(in, x, tile);
          if (in.tape_count != nullptr) in.tape_count[place_of(tile)] = 0;
        } else {
          euler(in, x, P(T(step.r[kStepEnd])), P(T(step.r[kDt])));
        }
        for (int leaf = 0; leaf < M::leaves; ++leaf) {
          P d[3];
          start_squares<M>(in, x.y, x.k[0], x.k[1], leaf, d[0], d[1], d[2]);
          for (int i = 0; i < 3; ++i) sums[i * M::leaves + leaf] += own_sum(d[i], tile, in.batch);
        }
      });
      if (!starts) break;
      d0 = joint_norm<M>(in, tiles, 0), d1 = joint_norm<M>(in, tiles, 1);
      if (in.first_step > 0) break;
      plan_first_step(s, step.r, d0, d1, 0.0, 0.0, 0);
    }
    plan_first_step(s, step.r, d0, d1, joint_norm<M>(in, tiles, 2), in.first_step, 1);
    step.first = stage_time<T>(step.r, 0.0);
  } else {
    const Kept<M, P>& kept = *static_cast<const Kept<M, P>*>(in.tiles);
    step.r = load_row(s, 0);
    step.fresh = kept.fresh;
    step.first = lane(kept.first, 0);
  }
  const auto next = [&] {
    if (!step.accepted) return;
    step.fresh = step.before[kJumped];
    if (step.fresh != 0) step.first = stage_time<T>(step.before, 0.0);
  };
  for (int64_t i = 0;; ++i) {
    const bool ends = i == in.max_steps || !step.r.running();
    tiles.each([&](Tile<M, P>& x, int64_t tile, double* sums) {
      step.finish(x, tile);
      if (ends) {
        end_tile(in, x, tile);
      } else {
        step.attempt(x, tile, sums);
      }
    });
    next();
    if (ends) break;
    step.last = stage_time<T>(step.r, 1.0);
    step.r[kErrorRatio] = joint_norm<M>(in, tiles, 0);
    control_step(s, step.r);
    step.accepted = step.r[kAccept] != 0;
    step.before = step.r;
  }
  if (tiles.leads()) {
    Kept<M, P>& kept = *static_cast<Kept<M, P>*>(in.tiles);
    kept.fresh = step.fresh;
    kept.first = P(T(step.first));
    store_row(s, step.r);
  }
  return step.r.running();
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
