// What is needed to undo a step, and what of the gradients of its outputs falls to it.
#pragma once

#include "grid.h"

namespace odenet {
namespace ODENET_LEVEL {

// What a place keeps on the way back.
template <class M, class P>
struct Reverse {
  P y[kOwn<M>];      // dL/dy1
  P slope[kOwn<M>];  // dL/dk of the last slope, from the step after
  P arguments[M::arguments + 1], arguments_grad[M::arguments + 1];
  With<P, int64_t> sample;          // -1: none yet
  int64_t output[Lanes<P>::width];  // the last output not yet taken in
};

// What is needed of a step on the way back: its stages, their slopes and gradients, and what those of constants and
// arguments are made of.
template <class M, class P>
struct StepBack {
  P y[M::stages][kOwn<M>], k[M::stages][kOwn<M>], dk[M::stages][kOwn<M>];
  P taps[M::stages][own(M::taps_of_product) + 1];
  P second[M::implicit ? M::stages : 1][own(M::taps_of_second) + 1];  // those of second derivatives
  P kept[M::kept > 0 ? M::stages : 1][M::kept + 1];  // of each stage, what the way back needs of the way there
  P start[kOwn<M>];                                  // dL/dy0 so far
};

// Adds the gradients of the outputs in the step of a record, in lanes that accepted it.
template <class M, class P>
ODENET_HD void add_outputs(const SolveCall& in, Reverse<M, P>& g, const Record<M, P>& record,
                           const MaskOf<With<P, double>>& accept, StepBack<M, P>& x) {
  using T = Number<P>;
  using D = With<P, double>;
  constexpr int N = kOwn<M>, S = M::stages;
  const T* grad_ys = static_cast<const T*>(in.grad_ys);
  const P none(T(0)), dt = convert<T>(record.dt);
  MaskOf<P> left = accept;
  for (;;) {
    D time = record.time;
    for_lanes(left, [&](int i) {
      const int64_t sample = lane(record.sample, i), row = sample < in.batch ? sample : in.batch - 1;
      const double output = g.output[i] > 0 ? in.step.t_of(row)[g.output[i]] : lane(record.time, i);
      set_lane(time, i, output);
      set_lane(left, i, lane(record.dt, i) > 0 ? output > lane(record.time, i) : output < lane(record.time, i));
    });
    if (!any(left)) return;
    const MaskOf<P> landed = left & MaskOf<P>(time == record.end);
    const P theta = convert<T>((time - record.time) / select(accept, record.dt, D(1.0)));
    P b[S];
    interpolant<M>(theta, dt, b);
    for (int n = 0; n < N; ++n) {
      P grad = none;
      const int row = row_of<M>(n);
      for_lanes(left, [&](int i) {
        const int64_t sample = lane(record.sample, i);
        if (sample < in.batch && row >= 0)
          set_lane(grad, i, grad_ys[(g.output[i] * in.batch + sample) * M::state + row]);
      });
      g.y[n] = g.y[n] + select(landed, grad, none);
      x.start[n] = x.start[n] + select(landed, none, grad);
      for (int j = 0; j < S; ++j) x.dk[j][n] = fused(select(landed, none, b[j]), grad, x.dk[j][n]);
    }
    for_lanes(left, [&](int i) { --g.output[i]; });
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
