// One step of a tile: its stages, by the family of the method.
#pragma once

#include "rosenbrock.h"

namespace odenet {
namespace ODENET_LEVEL {

// The stages of one step: time_of(c) is the time of a node.
template <class M, class P, class TimeOf>
ODENET_HD void try_step(const SolveCall& in, Tile<M, P>& x, const P& dt, const TimeOf& time_of) {
  if constexpr (M::implicit) {
    try_rosenbrock(in, x, dt);
    return;
  }
  unrolled<M::stages - 1>([&](auto before) {
    constexpr int i = before + 1;
    constexpr bool end = M::fsal && i == M::stages - 1;
    P between[end ? 1 : kOwn<M>];
    P* y = end ? x.y1 : between;
    for (int n = 0; n < kOwn<M>; ++n) {
      y[n] = fused(dt, weigh<i>(x.k, n, [](int j) { return M::a(i, j); }), x.y[n]);
    }
    const P time = M::timed ? time_of(M::c(i)) : P(Number<P>(0));
    M::field(in, time, y, x.arguments, x.k[i], x.taps[M::taps > 0 ? i : 0]);
  });
  if constexpr (!M::fsal) {
    for (int n = 0; n < kOwn<M>; ++n) {
      x.y1[n] = fused(dt, weigh<M::stages>(x.k, n, [](int j) { return M::b(j); }), x.y[n]);
    }
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
