// A Rosenbrock step undone, for the gradient of the discrete solve. With W = 1 - gamma dt f_y of rosenbrock.h and L the
// loss, each stage backwards:
//
//   u_i = gamma W^-T dL/dk_i                               by which the slope at Y_i and what else W k_i is made of
//   count dL/dk_j += g_ij u_i + dt a_ij (df/dy at Y_i)^T u_i     the stages before dL/dy0  += (df/dy at Y_i)^T u_i
//   where the slope is taken dL/dy0  += d/dy0 of dt u_i . (f_y k_i + d_i f_t)       W itself, by second derivatives
#pragma once

#include "rosenbrock.h"
#include "step_back.h"

namespace odenet {
namespace ODENET_LEVEL {

// x = the solution of the transposed system for the right side x.
template <class P, int N>
ODENET_CALLED void solve_transposed(const Factors<P, N>& f, P* x) {
  using T = Number<P>;
  for (int c = 0; c < N; ++c) {
    for (int r = 0; r < c; ++r) x[c] = fused(-f.at[r][c], x[r], x[c]);
    x[c] = x[c] * f.at[c][c];
  }
  for (int c = N - 1; c >= 0; --c) {
    for (int r = c + 1; r < N; ++r) x[c] = fused(-f.at[r][c], x[r], x[c]);
  }
  for (int c = N - 1; c >= 0; --c) {
    for (int r = N - 1; r > c; --r) {
      const MaskOf<P> here = f.rows[c] == static_cast<T>(r);
      if (any(here)) exchange(here, x[c], x[r]);
    }
  }
}

// As `undo_step`, see backward.h.
template <class M, class P>
ODENET_HD void undo_rosenbrock(const SolveCall& in, Reverse<M, P>& g, const Record<M, P>& record, bool present,
                               StepBack<M, P>& x) {
  using T = Number<P>;
  using D = With<P, double>;
  constexpr int N = M::state, S = M::stages;
  const P none(T(0));
  const MaskOf<D> accept = MaskOf<D>(present) & (record.dt != D(0.0));
  const MaskOf<P> counts = accept;
  const P dt = convert<T>(record.dt);
  const auto time_at = [&](double c) {
    if (!M::timed) return none;
    const P time = convert<T>(time_within(record.time, c, record.dt));
    return c == 1 ? record.last : c == 0 ? select(record.fresh != none, record.first, time) : time;
  };
  // The stages again.
  for (int n = 0; n < N; ++n) {
    x.y[0][n] = record.y[n];
    x.k[0][n] = record.slope[n];
    x.dk[S - 1][n] = select(counts, g.slope[n], none);
    x.start[n] = none;
    for (int i = 0; i < S - 1; ++i) x.dk[i][n] = none;
  }
  Factors<P, N> f;
  P last[N], product[N];
  rosenbrock_stages<M>(in, x.y[0], g.arguments, dt, time_at, x.k, f, last, x.taps[0], [&](auto i, const P* y) {
    for (int n = 0; n < N; ++n) x.y[i][n] = y[n];
  });
  add_outputs(in, g, record, accept, x);
  // The end, and the slope there.
  for (int n = 0; n < own(M::taps_of_product); ++n) x.taps[1][n] = x.taps[S - 1][n] = none;
  if constexpr (!M::ends_in_y1) {
    for (int n = 0; n < N; ++n) {
      x.y[S - 1][n] = fused(dt, weigh<S - 1>(x.k, n, [](int j) { return M::b(j); }), x.y[0][n]);
    }
    M::product(in, time_at(1), x.y[S - 1], g.arguments, x.dk[S - 1], product, x.taps[S - 1]);
    for (int n = 0; n < N; ++n) g.y[n] = g.y[n] + select(counts, product[n], none);
  }
  for (int n = 0; n < N; ++n) {
    const P scaled = dt * g.y[n];
    unrolled<S - 1>([&](auto j) {
      if constexpr (M::b(j) != 0) x.dk[j][n] = fused(scaled, T(M::b(j)), x.dk[j][n]);
    });
  }
  // The stages backwards.
  unrolled<S - 2>([&](auto above) {
    constexpr int i = S - 2 - above;
    P u[N], of_slope[N];
    for (int n = 0; n < N; ++n) u[n] = x.dk[i][n];
    solve_transposed(f, u);
    for (int n = 0; n < N; ++n) {
      u[n] = u[n] * T(M::gamma);
      of_slope[n] = M::ends_in_y1 && i == S - 2 ? u[n] + x.dk[S - 1][n] : u[n];
    }
    if constexpr (i == 1) {
      for (int n = 0; n < N; ++n) x.dk[0][n] = x.dk[0][n] + of_slope[n];
    } else {
      M::product(in, time_at(M::c(i)), x.y[i], g.arguments, of_slope, product, x.taps[i]);
      for (int n = 0; n < N; ++n) {
        x.start[n] = x.start[n] + product[n];
        const P scaled = dt * product[n];
        unrolled<i>([&](auto j) {
          if constexpr (M::a(i, j) != 0) x.dk[j][n] = fused(scaled, T(M::a(i, j)), x.dk[j][n]);
          if constexpr (M::g(i, j) != 0) x.dk[j][n] = fused(u[n], T(M::g(i, j)), x.dk[j][n]);
        });
      }
    }
    for (int n = 0; n < N; ++n) u[n] = u[n] * dt;
    M::second(in, time_at(0), x.y[0], g.arguments, u, x.k[i], P(T(M::d(i))), product, x.second[i]);
    for (int n = 0; n < N; ++n) x.start[n] = x.start[n] + product[n];
  });
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
