// The whole solve of a tile on a grid of steps; and what all solves do with the tile they end with.
#pragma once

#include "start.h"
#include "step.h"
#include "team.h"

namespace odenet {
namespace ODENET_LEVEL {

// Where what belongs to that chunk adds to the gradients of the constants.
template <class T>
ODENET_HD T* constant_sums(const SolveCall& in, int64_t chunk) {
  return static_cast<T*>(in.grad_constants) + chunk * in.grad_size;
}

// Adds what a step over dt of a solve backwards, lane by lane, brings to the gradients of constants and arguments.
template <class M, class P, class Team>
ODENET_HD void add_taps(const Team& team, const SolveCall& in, Tile<M, P>& x, int64_t chunk, const P& dt) {
  P weights[M::stages];
  unrolled<M::stages>([&](auto j) { weights[j] = -dt * Number<P>(M::b(j)); });
  Number<P>* sums = constant_sums<Number<P>>(in, chunk);
  M::template accumulate<M::stages>(team, x.taps, weights, sums, x.arguments_grad);
}

// The same of the samples of a tile.
template <class M, class P, class Team>
ODENET_HD void add_taps_of_tile(const Team& team, const SolveCall& in, Tile<M, P>& x, int64_t tile, P dt) {
  for (int i = Lanes<P>::width - 1; i >= 0 && tile * Lanes<P>::width + i >= in.batch; --i) {
    set_lane(dt, i, Number<P>(0));
  }
  add_taps(team, in, x, tile / in.chunk, dt);
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

// One tile on the grid `nodes`: up to max_steps steps. Returns how many are left.
template <class M, class P, class Team>
ODENET_WHOLE int64_t solve_grid(const Team& team, const SolveCall& in, int64_t tile) {
  using T = Number<P>;
  using D = With<P, double>;
  const StepSize& s = in.step;
  const double direction = direction_of(s, 0);
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
    if (first < output) write_outputs(in, x, tile, first, output, time, dt, end);
    if (in.tape_count != nullptr) {
      Record<M, P>* record = next_record<M, P>(in, tile);
      if (record != nullptr) {
        write_record<M, P>(*record, x, P(T(time)), P(T(end)), D(time), D(dt), D(end), P(T(fresh)),
                           [&](int i) { return tile * Lanes<P>::width + i; });
      }
    }
    if constexpr (M::taps > 0) add_taps_of_tile(team, in, x, tile, P(T(dt)));
    accept_step(x, MaskOf<P>(true));
  }
  end_tile(in, x, tile);
  const int64_t left = in.num_nodes - 1 - step;
  if (left > 0) kept.tile = x;  // else the memory is never touched
  return left;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
