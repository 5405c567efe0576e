// The step of a Rosenbrock method, for stiff systems (Hairer and Wanner, Solving Ordinary Differential Equations II,
// IV.7): all stages solve linear systems with one matrix, that of each lane.
//
//   (1 - gamma dt f_y) k_i = gamma (f(t0 + c_i dt, y0 + dt sum_j a_ij k_j) + sum_j g_ij k_j + d_i dt f_t)
//
// and y1 = y0 + dt sum_i b_i k_i. k_0 = f(t0, y0) and the last slope, f(t1, y1), stand beside the k_i, so that error,
// interpolant and control are those of explicit methods.
#pragma once

#include "tile.h"

namespace odenet {
namespace ODENET_LEVEL {

// A matrix as lower and upper triangle. rows: which row each was exchanged with. The diagonal holds its reciprocals.
template <class P, int N>
struct Factors {
  P at[N][N], rows[N];
};

template <class P>
ODENET_HD void exchange(const MaskOf<P>& which, P& x, P& y) {
  const P kept = x;
  x = select(which, y, x);
  y = select(which, kept, y);
}

// In place, each lane by its own largest pivots. A matrix that is singular gives what is no number.
template <class P, int N>
ODENET_CALLED void factorise(Factors<P, N>& f) {
  using T = Number<P>;
  for (int c = 0; c < N; ++c) {
    P largest = abs(f.at[c][c]), row(static_cast<T>(c));
    for (int r = c + 1; r < N; ++r) {
      const MaskOf<P> larger = largest < abs(f.at[r][c]);
      largest = select(larger, abs(f.at[r][c]), largest);
      row = select(larger, P(static_cast<T>(r)), row);
    }
    f.rows[c] = row;
    for (int r = c + 1; r < N; ++r) {
      const MaskOf<P> here = row == static_cast<T>(r);
      if (!any(here)) continue;
      for (int j = 0; j < N; ++j) exchange(here, f.at[c][j], f.at[r][j]);
    }
    f.at[c][c] = T(1) / f.at[c][c];
    for (int r = c + 1; r < N; ++r) {
      f.at[r][c] = f.at[r][c] * f.at[c][c];
      for (int j = c + 1; j < N; ++j) f.at[r][j] = fused(-f.at[r][c], f.at[c][j], f.at[r][j]);
    }
  }
}

// x = the solution for the right side x.
template <class P, int N>
ODENET_CALLED void solve_factorised(const Factors<P, N>& f, P* x) {
  using T = Number<P>;
  for (int c = 0; c < N; ++c) {  // all exchanges first: later ones have moved what is below the diagonal
    for (int r = c + 1; r < N; ++r) {
      const MaskOf<P> here = f.rows[c] == static_cast<T>(r);
      if (any(here)) exchange(here, x[c], x[r]);
    }
  }
  for (int c = 0; c < N; ++c) {
    for (int r = c + 1; r < N; ++r) x[r] = fused(-f.at[r][c], x[c], x[r]);
  }
  for (int c = N - 1; c >= 0; --c) {
    x[c] = x[c] * f.at[c][c];
    for (int r = 0; r < c; ++r) x[r] = fused(-f.at[r][c], x[c], x[r]);
  }
}

// 1 - gamma dt f_y, row by row: each is a product with a unit vector. by_time: dt f_t, where f depends on the time.
template <class M, class P>
ODENET_CALLED void matrix_of_step(const SolveCall& in, const P* y, const P* arguments, const P& dt, const P& time,
                                  Factors<P, M::state>& f, P* by_time) {
  using T = Number<P>;
  const P scale = dt * T(-M::gamma);
  P one[M::state];
  for (int n = 0; n < M::state; ++n) one[n] = P(T(0));
  for (int r = 0; r < M::state; ++r) {
    one[r] = P(T(1));
    M::row(in, time, y, arguments, one, f.at[r], by_time + r);
    if constexpr (M::by_time) by_time[r] = by_time[r] * dt;
    one[r] = P(T(0));
    for (int j = 0; j < M::state; ++j) f.at[r][j] = f.at[r][j] * scale;
    f.at[r][r] = f.at[r][r] + T(1);
  }
}

// The stages from y0, whose slope is k[0]: k[1] to k[S - 2]. f: the factors of their matrix; slope: the last one of
// theirs. at(i, y): is handed where each is evaluated. time_at: the time of a node.
template <class M, class P, class TimeAt, class At>
ODENET_HD void rosenbrock_stages(const SolveCall& in, const P* y0, const P* arguments, const P& dt,
                                 const TimeAt& time_at, P (*k)[M::state], Factors<P, M::state>& f, P* slope, P* taps,
                                 const At& at) {
  using T = Number<P>;
  constexpr int N = M::state, S = M::stages;
  P by_time[N];
  matrix_of_step<M>(in, y0, arguments, dt, time_at(0), f, by_time);
  factorise(f);
  unrolled<S - 2>([&](auto before) {
    constexpr int i = before + 1;
    if constexpr (i == 1) {
      for (int n = 0; n < N; ++n) k[i][n] = slope[n] = k[0][n];
    } else {
      P y[N];
      for (int n = 0; n < N; ++n) y[n] = fused(dt, weigh<i>(k, n, [](int j) { return M::a(i, j); }), y0[n]);
      at(Index<i>{}, y);
      M::field(in, time_at(M::c(i)), y, arguments, slope, taps);
      for (int n = 0; n < N; ++n) k[i][n] = slope[n] + weigh<i>(k, n, [](int j) { return M::g(i, j); });
    }
    if constexpr (M::by_time && M::d(i) != 0) {
      for (int n = 0; n < N; ++n) k[i][n] = fused(by_time[n], T(M::d(i)), k[i][n]);
    }
    solve_factorised(f, k[i]);
    for (int n = 0; n < N; ++n) k[i][n] = k[i][n] * T(M::gamma);
  });
}

template <class M, class P, class TimeOf>
ODENET_HD void try_rosenbrock(const SolveCall& in, Tile<M, P>& x, const P& dt, const TimeOf& time_of) {
  using T = Number<P>;
  constexpr int N = M::state, S = M::stages;
  const auto time_at = [&](double node) { return M::timed ? time_of(node) : P(T(0)); };
  Factors<P, N> f;
  P slope[N];
  rosenbrock_stages<M>(in, x.y, x.arguments, dt, time_at, x.k, f, slope, x.taps[0], [](auto, const P*) {});
  for (int n = 0; n < N; ++n) {
    x.y1[n] = fused(dt, weigh<S - 1>(x.k, n, [](int j) { return M::b(j); }), x.y[n]);
  }
  if constexpr (M::ends_in_y1) {
    for (int n = 0; n < N; ++n) x.k[S - 1][n] = slope[n];
  } else {
    M::field(in, time_at(1), x.y1, x.arguments, x.k[S - 1], x.taps[0]);
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
