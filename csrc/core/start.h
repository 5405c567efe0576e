// The start of a solve: the first slopes, and the norms from which the first step follows.
#pragma once

#include "tile.h"

namespace odenet {
namespace ODENET_LEVEL {

// Norms of the start, lane by lane, as squares of leaf `leaf`: of y0, f0, and of f1 - f0.
template <class M, class P>
ODENET_HD void start_squares(const SolveCall& in, const P* y, const P* f0, const P* f1, int leaf, P& d0, P& d1, P& d2) {
  using T = Number<P>;
  d0 = d1 = d2 = P(T(0));
  for_leaf<M>(leaf, [&](int n) {
    const P scale = fused(abs(y[n]), T(in.rtol[leaf]), P(T(in.atol[leaf])));
    const P size = y[n] / scale, slope = f0[n] / scale, change = (f1[n] - f0[n]) / scale;
    d0 = fused(size, size, d0);
    d1 = fused(slope, slope, d1);
    d2 = fused(change, change, d2);
  });
  d0 = add_groups(d0), d1 = add_groups(d1), d2 = add_groups(d2);
}

// The time of a row's first slope.
template <class T>
ODENET_HD T first_time(const SolveCall& in, int64_t row) {
  return stage_time<T>(first_row(in.step, row), 0.0);
}

template <class M, class P>
ODENET_HD void begin_tile(const SolveCall& in, Tile<M, P>& x, int64_t tile) {
  const auto sample = [&](int i) { return sample_of<P>(tile, i, in.batch); };
  load_state<M>(x.y, in.y0, sample);
  for (int n = 0; n <= M::arguments; ++n) x.arguments[n] = x.arguments_grad[n] = P(Number<P>(0));
  if constexpr (M::arguments > 0) load_lanes(x.arguments, in.arguments, M::arguments, sample);
  store_state<M>(in.ys, x.y, tile, in.batch);
  M::field(in, P(first_time<Number<P>>(in, 0)), x.y, x.arguments, x.k[0], x.taps[0]);
  if constexpr (M::stages > 1) {
    for (int n = 0; n < kOwn<M>; ++n) x.k[1][n] = x.k[0][n];
  }
}

// The slope after an explicit Euler step, into k[1].
template <class M, class P>
ODENET_HD void euler(const SolveCall& in, Tile<M, P>& x, const P& time, const P& dt) {
  for (int n = 0; n < kOwn<M>; ++n) x.y1[n] = fused(dt, x.k[0][n], x.y[n]);
  M::field(in, time, x.y1, x.arguments, x.k[1], x.taps[M::taps > 0]);
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
