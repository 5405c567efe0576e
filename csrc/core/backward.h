// Gradients of a solve.
//
// reverse_place: of the discrete solve, from the record of its steps. With Y_i the stages, k_i their slopes, L the
// loss:
//
//   dL/dk_i = dt (b_i dL/dy1 + sum_{j>i} a_ji m_j) + that of outputs inside the step,   m_i = (df/dy)^T dL/dk_i at Y_i
//   dL/dy0  = dL/dy1 + sum_i m_i + that of outputs
//
// The last slope serves the next step as its first, so its gradient is handed on from there.
//
// Adjoint: the adjoint equation da/dt = -a^T df/dy beside the state (Chen et al. 2018, arXiv:1806.07366), to be solved
// backwards as any other; its error norm leaves the parameters out (Kidger et al. 2021, arXiv:2009.09457).
#pragma once

#include "driver.h"
#include "gradient_sums.h"
#include "rosenbrock_back.h"

namespace odenet {
namespace ODENET_LEVEL {

template <class M>
struct Adjoint : M {
  static constexpr int state = 2 * M::state, parts = 2, leaves = 2 * M::leaves, taps = M::taps_of_product, events = 0;
  ODENET_HD static constexpr int leaf_end(int i) {
    return i < M::leaves ? M::leaf_end(i) : M::state + M::leaf_end(i - M::leaves);
  }
  template <class P>
  ODENET_HD static void field(const SolveCall& in, const P& t, const P* y, const P* arguments, P* dy,
                              P* taps_of_stage) {
    constexpr int half = own(M::state);
    M::slope_and_product(in, t, y, arguments, y + half, dy, dy + half, taps_of_stage);
    for (int n = half; n < 2 * half; ++n) dy[n] = -dy[n];
  }
};

// Undoes the step of a record but for the evaluation that was made for it alone. Where it is not present nothing
// changes.
template <class M, class P>
ODENET_HD void undo_step(const SolveCall& in, Reverse<M, P>& g, const Record<M, P>& record, bool present,
                         StepBack<M, P>& x) {
  using T = Number<P>;
  using D = With<P, double>;
  constexpr int N = kOwn<M>, S = M::stages;
  const P none(T(0));
  const MaskOf<D> accept = MaskOf<D>(present) & (record.dt != D(0.0));
  const MaskOf<P> counts = accept;
  const P dt = convert<T>(record.dt);
  const auto time_of = [&](double c) {
    return c == 1 ? record.last : convert<T>(time_within(record.time, c, record.dt));
  };
  // The stages again; the last slope has no part in them.
  for (int n = 0; n < N; ++n) {
    x.y[0][n] = record.y[n];
    x.k[0][n] = record.slope[n];
    x.dk[S - 1][n] = select(counts, g.slope[n], none);
    for (int i = 0; i < S - 1; ++i) x.dk[i][n] = none;
  }
  unrolled<S - 1>([&](auto before) {
    constexpr int i = before + 1;
    for (int n = 0; n < N; ++n) {
      x.y[i][n] = fused(dt, weigh<i>(x.k, n, [](int j) { return M::a(i, j); }), x.y[0][n]);
    }
    if constexpr (i < S - 1 && M::kept > 0) {
      M::field_and_keep(in, time_of(M::c(i)), x.y[i], g.arguments, x.k[i], x.kept[i]);
    } else if constexpr (i < S - 1) {
      M::field(in, time_of(M::c(i)), x.y[i], g.arguments, x.k[i], x.taps[i]);
    }
  });
  for (int n = 0; n < N; ++n) x.start[n] = none;
  add_outputs(in, g, record, accept, x);
  // The stages backwards.
  P product[N];
  const auto stage = [&](auto i) {
    if constexpr (i < S - 1 && M::kept > 0) {
      M::product_of_kept(in, time_of(M::c(i)), x.y[i], g.arguments, x.dk[i], x.kept[i], product, x.taps[i]);
    } else {
      M::product(in, time_of(M::c(i)), x.y[i], g.arguments, x.dk[i], product, x.taps[i]);
    }
  };
  if constexpr (M::fsal) {
    stage(Index<S - 1>{});
    for (int n = 0; n < N; ++n) g.y[n] = g.y[n] + select(counts, product[n], none);
  }
  for (int n = 0; n < N; ++n) {
    const P scaled = dt * g.y[n];
    unrolled<S>([&](auto j) {
      if constexpr (M::b(j) != 0) x.dk[j][n] = fused(scaled, T(M::b(j)), x.dk[j][n]);
    });
  }
  constexpr int last = M::fsal ? S - 2 : S - 1;
  unrolled<last>([&](auto above) {
    constexpr int i = last - above;
    stage(Index<i>{});
    for (int n = 0; n < N; ++n) {
      x.start[n] = x.start[n] + product[n];
      const P scaled = dt * product[n];
      unrolled<i>([&](auto j) {
        if constexpr (M::a(i, j) != 0) x.dk[j][n] = fused(scaled, T(M::a(i, j)), x.dk[j][n]);
      });
    }
  });
}

// The results of the samples in these lanes.
template <class M, class P>
ODENET_HD void store_gradients(const SolveCall& in, const Reverse<M, P>& g, const MaskOf<P>& lanes) {
  using T = Number<P>;
  P sums[M::arguments + 1];
  for (int n = 0; n < M::arguments; ++n) sums[n] = add_groups(g.arguments_grad[n]);
  const T* grad_ys = static_cast<const T*>(in.grad_ys);
  for_lanes(lanes, [&](int i) {
    const int64_t sample = lane(g.sample, i);
    if (sample < 0 || sample >= in.batch) return;
    for (int n = 0; n < kOwn<M>; ++n) {
      const int64_t place = sample * M::state + row_of<M>(n);
      if (row_of<M>(n) >= 0) static_cast<T*>(in.grad_y0)[place] = grad_ys[place] + lane(g.y[n], i);
    }
    for (int n = 0; n < M::arguments && group() == 0; ++n) {
      static_cast<T*>(in.grad_arguments)[sample * M::arguments + n] = lane(sums[n], i);
    }
  });
}

// The last output that a row has.
ODENET_HD int64_t last_output(const StepSize& s, int64_t row) {
  const double* t = s.t_of(row);
  int64_t output = s.num_outputs - 1;
  while (output > 0 && t[output] != t[output]) --output;
  return output;
}

// Lanes whose record is of another sample than the one before: that has come to its start, and this begins at its end.
template <class M, class P, class Team>
ODENET_HD void change_samples(const Team& team, const SolveCall& in, Reverse<M, P>& g, const Record<M, P>& record,
                              bool present) {
  using T = Number<P>;
  const auto other = With<P, int64_t>(record.sample) != g.sample;
  const MaskOf<P> change = MaskOf<P>(present) & MaskOf<P>(record.dt != With<P, double>(0.0)) & MaskOf<P>(other);
  if (!team.any(any(change))) return;
  store_gradients(in, g, change);
  for (int n = 0; n < kOwn<M>; ++n) {
    g.y[n] = select(change, P(T(0)), g.y[n]);
    g.slope[n] = select(change, P(T(0)), g.slope[n]);
  }
  for_lanes(change, [&](int i) {
    const int64_t sample = lane(record.sample, i), row = sample < in.batch ? sample : in.batch - 1;
    set_lane(g.sample, i, sample);
    g.output[i] = last_output(in.step, row);
    for (int n = 0; n < M::arguments; ++n) {
      set_lane(g.arguments[n], i, static_cast<const T*>(in.arguments)[row * M::arguments + n]);
      set_lane(g.arguments_grad[n], i, T(0));
    }
  });
}

// The next max_steps records of a place, backwards. Returns how many are left.
template <class M, class P, class Team>
ODENET_WHOLE int64_t reverse_place(const Team& team, const SolveCall& in, int64_t at) {
  using T = Number<P>;
  using D = With<P, double>;
  constexpr int N = kOwn<M>, S = M::stages;
  Reverse<M, P>& g = static_cast<Reverse<M, P>*>(in.tiles)[place_of(at)];
  T* sums = constant_sums<T>(in, at / in.chunk);
  const P none(T(0));
  if (in.begun == 0) {
    for (int n = 0; n < N; ++n) g.y[n] = g.slope[n] = none;
    for (int n = 0; n < M::arguments; ++n) g.arguments[n] = g.arguments_grad[n] = none;
    for (int i = 0; i < Lanes<P>::width; ++i) g.output[i] = 0;
    g.sample = With<P, int64_t>(int64_t{-1});
  }
  const int64_t count = in.tape_count[place_of(at)] - in.begun;
  const int64_t stop = count > in.max_steps ? count - in.max_steps : 0;
  StepBack<M, P> x;
  for (int64_t place = count - 1; team.any(place >= stop); --place) {
    const bool here = place >= stop;  // else another member of the team has a step left
    const Record<M, P>& record =
        static_cast<const Record<M, P>*>(in.tape)[place_of(at) * in.capacity + (here ? place : 0)];
    change_samples(team, in, g, record, here);
    P weights[S];
    for (int i = 0; i < S; ++i) weights[i] = P(T(here));
    if (here || kGroups > 1) {
      if constexpr (M::implicit) {
        undo_rosenbrock(in, g, record, here, x);
      } else {
        undo_step(in, g, record, here, x);
      }
    }
    if (!here) {
      for (int i = 0; i < S; ++i) {
        for (int n = 0; n < own(M::taps_of_product); ++n) x.taps[i][n] = none;
        for (int n = 0; n < own(M::taps_of_second); ++n) x.second[M::implicit ? i : 0][n] = none;
      }
    }
    M::template accumulate<S - 1>(team, x.taps + 1, weights, sums, g.arguments_grad);
    if constexpr (M::implicit) {
      M::template accumulate_second<S - 2>(team, x.second + 1, weights, sums, g.arguments_grad);
    }
    const MaskOf<P> counts = MaskOf<P>(here) & MaskOf<P>(record.dt != D(0.0));
    const MaskOf<P> fresh = counts & (record.fresh != none);
    if (team.any(any(fresh))) {
      P product[N];
      for (int n = 0; n < N; ++n) x.k[0][n] = select(fresh, x.dk[0][n], none);
      if (here || kGroups > 1) {
        M::product(in, record.first, x.y[0], g.arguments, x.k[0], product, x.taps[0]);
        for (int n = 0; n < N; ++n) x.start[n] = x.start[n] + select(fresh, product[n], none);
      }
      if (!here) {
        for (int n = 0; n < own(M::taps_of_product); ++n) x.taps[0][n] = none;
      }
      M::template accumulate<1>(team, x.taps, weights, sums, g.arguments_grad);
    }
    for (int n = 0; n < N; ++n) {
      g.slope[n] = select(counts, select(fresh, none, x.dk[0][n]), g.slope[n]);
      g.y[n] = g.y[n] + select(counts, x.start[n], none);
    }
  }
  if (team.any(stop == 0)) store_gradients(in, g, MaskOf<P>(stop == 0));
  return stop;
}

#if !defined(__CUDACC__)

template <class M, class P>
int64_t reverse(const SolveCall& in, ParallelFor parallel_for) {
  return for_chunks(in, parallel_for, [&](int64_t place) { return reverse_place<M, P>(Alone{}, in, place); });
}

#endif

}  // namespace ODENET_LEVEL
}  // namespace odenet
