// The whole solve of a tile: adaptive steps, each sample with its own step size, or steps on a grid.
#pragma once

#include "team.h"
#include "tile.h"

namespace odenet {
namespace ODENET_LEVEL {

// Where the tile adds to the gradients of the constants.
template <class T>
ODENET_HD T* constant_sums(const SolveCall& in, int64_t tile) {
  return static_cast<T*>(in.grad_constants) + tile / in.chunk * in.grad_size;
}

// Adds what a step over dt of a solve backwards, lane by lane, brings to the gradients of constants and arguments.
template <class M, class P, class Team>
ODENET_HD void add_taps(const Team& team, const SolveCall& in, Tile<M, P>& x, int64_t tile, P dt) {
  for (int i = Lanes<P>::width - 1; i >= 0 && tile * Lanes<P>::width + i >= in.batch; --i) {
    set_lane(dt, i, Number<P>(0));
  }
  P weights[M::stages];
  unrolled<M::stages>([&](auto j) { weights[j] = -dt * Number<P>(M::b(j)); });
  Number<P>* sums = constant_sums<Number<P>>(in, tile);
  M::template accumulate<M::stages>(team, x.taps, weights, sums, x.arguments_grad);
}

// Writes the gradients of the arguments, once the members of the team have added up theirs.
template <class M, class P>
ODENET_HD void store_arguments_grad(const SolveCall& in, const P* grad, int64_t tile) {
  if constexpr (M::arguments > 0) {
    P sums[M::arguments];
    for (int n = 0; n < M::arguments; ++n) sums[n] = add_groups(grad[n]);
    if (group() == 0) store_lanes(in.grad_arguments, sums, M::arguments, tile, in.batch);
  }
}

// Writes where the tile has got to.
template <class M, class P>
ODENET_HD void end_tile(const SolveCall& in, const Tile<M, P>& x, int64_t tile) {
  store_state<M>(in.y_last, x.y, tile, in.batch);
  if constexpr (M::taps > 0) store_arguments_grad<M>(in, x.arguments_grad, tile);
}

// Whether a row of the tile has not ended yet, by the solver state.
template <class P>
ODENET_HD bool tile_runs(const SolveCall& in, int64_t tile) {
  bool some = false;
  for (int i = 0; i < Lanes<P>::width && tile * Lanes<P>::width + i < in.batch; ++i) {
    some |= static_cast<int>(in.step.state[kStatus * in.batch + tile * Lanes<P>::width + i]) == kRunning;
  }
  return some;
}

// One tile under per-sample control: up to max_steps steps. Returns how many of its rows still run.
template <class M, class P, class Team>
ODENET_HD int64_t solve_tile(const Team& team, const SolveCall& in, int64_t tile) {
  using T = Number<P>;
  using D = With<P, double>;
  const StepSize& s = in.step;
  Kept<M, P>& kept = static_cast<Kept<M, P>*>(in.tiles)[place_of(tile)];
  if (in.begun != 0 && !team.any(tile_runs<P>(in, tile))) return 0;
  Tile<M, P> x;
  Row<D> r;
  D fresh = D(1.0);
  P first = first_time<P>(in);
  if (in.begun == 0) {
    begin_tile(in, x, tile);
    r = first_row<D>(s);
    const auto norms = [&](D& d0, D& d1, D& d2) {
      d0 = d1 = d2 = D(0.0);
      for (int leaf = 0; leaf < M::leaves; ++leaf) {
        P q0, q1, q2;
        start_squares<M>(in, x, leaf, q0, q1, q2);
        const auto fold = [&](D& d, const P& q) {
          d = maximum(convert<double>(sqrt(q * T(1 / leaf_size<M>(leaf)))), d);
        };
        fold(d0, q0), fold(d1, q1), fold(d2, q2);
      }
    };
    D d0, d1, d2;
    norms(d0, d1, d2);
    if (!(in.first_step > 0)) {
      plan_first_step(s, r, d0, d1, d2, 0.0, 0);
      euler(in, x, convert<T>(r[kStepEnd]), convert<T>(r[kDt]));
      norms(d0, d1, d2);
    }
    plan_first_step(s, r, d0, d1, d2, in.first_step, 1);
    if (in.tape_count != nullptr) in.tape_count[place_of(tile)] = 0;
  } else {
    x = kept.tile;
    r = kept.row;
    fresh = kept.fresh;
    first = kept.first;
  }
  for (int64_t step = 0; step < in.max_steps && team.any(any(r.running())); ++step) {
    const D time = r[kTime];
    const P dt = convert<T>(r[kDt]);
    const P last = stage_time<T>(s, r, 1.0);
    try_step(in, x, dt, [&](double c) { return c == 1 ? last : convert<T>(time_within(time, c, r[kDt])); });
    r[kErrorRatio] = convert<double>(error_ratio(in, x, dt));
    control_step<T>(s, r);
    const MaskOf<D> accept = r[kAccept] != D(0.0);
    if (any(r[kOutputBegin] < r[kOutputEnd])) {
      write_outputs(in, x, tile, r[kOutputBegin], r[kOutputEnd], r[kLastTime], r[kLastDt], r[kTime]);
    }
    if (in.tape_count != nullptr && any(accept)) {
      Record<M, P>* record = next_record<M, P>(in, tile);
      if (record != nullptr) {
        write_record(*record, x, first, last, time, select(accept, r[kLastDt], D(0.0)), r[kTime], fresh);
      }
    }
    if constexpr (M::taps > 0) add_taps(team, in, x, tile, select(MaskOf<P>(accept), dt, P(T(0))));
    accept_step(x, accept);
    fresh = select(accept, r[kJumped], fresh);
    const MaskOf<D> jumped = accept & (r[kJumped] != D(0.0));
    if (team.any(any(jumped))) {
      Tile<M, P> after = x;
      first = select(MaskOf<P>(jumped), stage_time<T>(s, r, 0.0), first);
      M::field(in, first, x.y, x.arguments, after.k[0], after.taps[0]);
      for (int n = 0; n < kOwn<M>; ++n) x.k[0][n] = select(MaskOf<P>(jumped), after.k[0][n], x.k[0][n]);
      for (int n = 0; n < own(M::taps); ++n) x.taps[0][n] = select(MaskOf<P>(jumped), after.taps[0][n], x.taps[0][n]);
    }
  }
  end_tile(in, x, tile);
  int64_t running = 0;
  for (int i = 0; i < Lanes<P>::width; ++i) {
    const int64_t row = tile * Lanes<P>::width + i;
    if (row >= in.batch) break;
    if (group() != 0) continue;
    for (int name = 0; name < kNumFields; ++name) s.state[name * in.batch + row] = lane(r[name], i);
    running += lane(r.running(), i);
  }
  if (team.any(running > 0)) {  // else the memory is never touched
    kept.tile = x;
    kept.row = r;
    kept.fresh = fresh;
    kept.first = first;
  }
  return running;
}

// One tile on the grid `nodes`: up to max_steps steps. Returns how many are left.
template <class M, class P, class Team>
ODENET_HD int64_t solve_grid(const Team& team, const SolveCall& in, int64_t tile) {
  using T = Number<P>;
  using D = With<P, double>;
  const StepSize& s = in.step;
  const double direction = s.controller.direction;
  Kept<M, P>& kept = static_cast<Kept<M, P>*>(in.tiles)[place_of(tile)];
  Tile<M, P> x;
  if (in.begun == 0) {
    begin_tile(in, x, tile);
    if (in.tape_count != nullptr) in.tape_count[place_of(tile)] = 0;
  } else {
    x = kept.tile;
  }
  int64_t output = 1;
  int64_t step = in.begun;
  while (output < s.num_outputs && direction * (in.nodes[step] - s.t[output]) >= 0) ++output;
  for (; step < in.num_nodes - 1 && step < in.begun + in.max_steps; ++step) {
    const double time = in.nodes[step], end = in.nodes[step + 1], dt = end - time;
    const bool fresh = step == 0 || !M::fsal;
    if (fresh && step > 0) M::field(in, P(T(time)), x.y, x.arguments, x.k[0], x.taps[0]);
    try_step(in, x, P(T(dt)), [&](double c) { return P(T(c == 1 ? end : time_within(time, c, dt))); });
    const int64_t first = output;
    while (output < s.num_outputs && direction * (end - s.t[output]) >= 0) ++output;
    if (first < output) {
      write_outputs<M, P, D>(in, x, tile, D(double(first)), D(double(output)), D(time), D(dt), D(end));
    }
    if (in.tape_count != nullptr) {
      Record<M, P>* record = next_record<M, P>(in, tile);
      if (record != nullptr) {
        write_record<M, P, D>(*record, x, P(T(time)), P(T(end)), D(time), D(dt), D(end), D(double(fresh)));
      }
    }
    if constexpr (M::taps > 0) add_taps(team, in, x, tile, P(T(dt)));
    accept_step(x, MaskOf<P>(true));
  }
  end_tile(in, x, tile);
  const int64_t left = in.num_nodes - 1 - step;
  if (left > 0) kept.tile = x;  // else the memory is never touched
  return left;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
