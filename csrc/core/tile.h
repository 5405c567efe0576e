// A tile: as many samples as a pack has lanes, which go through all steps together. What a step does to one.
//
// M: the tableau and the equation, written by the emitter (odenet_cuda/compiled/emit.py), with
//   T, state, parts, arguments, stages, degree, leaves, fsal, timed, taps; a(i, j), b(j), c(i), e(j), p(j, d),
//   leaf_end(i): constants, field(in, t, y, arguments, dy, taps): the slope of a pack of samples, product(in, t, y,
//   arguments, g, dy, gy, taps): the slope, g^T df/dy, and taps, from which the gradients of constants and arguments
//   are made; of Rosenbrock methods also row(...): a row of df/dy, and second(in, t, y, arguments, g, v, rate, gy,
//   taps): the gradient of g . (df/dy v + df/dt rate), and its taps.
//
// Where a sample has several threads, a team's groups, each has some rows of everything [state] and [taps]: see row_of.
#pragma once

#include <type_traits>
#include <utility>

#include "dense_output.h"
#include "error.h"
#include "lanes.h"
#include "solve_call.h"
#include "team.h"

namespace odenet {
namespace ODENET_LEVEL {

// A number known at compile time, as an argument.
template <int value>
struct Index {
  ODENET_HD constexpr operator int() const { return value; }
};

template <int... I, class Body>
ODENET_HD void unrolled(std::integer_sequence<int, I...>, const Body& body) {
  (body(Index<I>{}), ...);
}
// body(Index<0>), ..., body(Index<count - 1>)
template <int count, class Body>
ODENET_HD void unrolled(const Body& body) {
  unrolled(std::make_integer_sequence<int, count>{}, body);
}

// Rows of the state that a member of the team has: of each part, the state and its adjoint, some.
template <class M>
constexpr int kOwn = M::parts * own(M::state / M::parts);

// The row of the state that a member has at place i, or -1: then the number there is of no use.
template <class M>
ODENET_HD int row_of(int i) {
  if constexpr (kGroups == 1) return i;
  constexpr int part = M::state / M::parts;
  const int row = i % own(part) * kGroups + group();
  return row < part ? i / own(part) * part + row : -1;
}

// body(i) for the places of a leaf's rows.
template <class M, class Body>
ODENET_HD void for_leaf(int leaf, const Body& body) {
  const int begin = leaf == 0 ? 0 : M::leaf_end(leaf - 1), end = M::leaf_end(leaf);
  if constexpr (kGroups == 1) {
    for (int n = begin; n < end; ++n) body(n);
  } else {
    for (int i = 0; i < kOwn<M>; ++i) {
      if (row_of<M>(i) >= begin && row_of<M>(i) < end) body(i);
    }
  }
}

template <class M, class P>
struct Tile {
  P y[kOwn<M>];   // at the start of the step
  P y1[kOwn<M>];  // at its end
  P k[M::stages][kOwn<M>];
  P arguments[M::arguments + 1];
  P arguments_grad[M::arguments + 1];                     // what this member of the team has added to it
  P taps[M::taps > 0 ? M::stages : 1][own(M::taps) + 1];  // beside each slope, where the solve integrates those too
};

// Where a member of the team keeps what a place has between calls, and its records.
ODENET_HD int64_t place_of(int64_t place) {
  return place * kGroups + group();
}

// What a tile keeps between calls.
template <class M, class P>
struct Kept {
  Tile<M, P> tile;
  P first;       // under joint control: time of the first slope of the next step,
  double fresh;  // and 1 where that was evaluated, not taken over from the last step
};

// One accepted step, lane by lane.
template <class M, class P>
struct Record {
  P y[kOwn<M>];
  P slope[kOwn<M>];
  P first, last;             // times of its first stage, and of those at its end
  With<P, double> time, dt;  // dt: 0 where the lane did not accept
  With<P, double> end;
  P fresh;  // 1: the first slope was evaluated, not taken over from the last step
  With<P, int64_t> sample;
};

// A lane beyond the batch repeats the last sample.
template <class P>
ODENET_HD int64_t sample_of(int64_t tile, int i, int64_t batch) {
  const int64_t sample = tile * Lanes<P>::width + i;
  return sample < batch ? sample : batch - 1;
}
template <class P, class Sample>
ODENET_HD void load_lanes(P* to, const void* from, int columns, const Sample& sample) {
  const Number<P>* p = static_cast<const Number<P>*>(from);
  for (int i = 0; i < Lanes<P>::width; ++i) {
    const int64_t row = sample(i);
    for (int n = 0; n < columns; ++n) set_lane(to[n], i, p[row * columns + n]);
  }
}
template <class P>
ODENET_HD void store_lanes(void* to, const P* from, int columns, int64_t tile, int64_t batch) {
  Number<P>* p = static_cast<Number<P>*>(to);
  for (int i = 0; i < Lanes<P>::width; ++i) {
    const int64_t sample = tile * Lanes<P>::width + i;
    if (sample >= batch) return;
    for (int n = 0; n < columns; ++n) p[sample * columns + n] = lane(from[n], i);
  }
}

// The rows of a state [batch, state], from and to memory.
template <class M, class P, class Sample>
ODENET_HD void load_state(P* to, const void* from, const Sample& sample) {
  if constexpr (kGroups == 1) return load_lanes(to, from, M::state, sample);
  const P* p = static_cast<const P*>(from) + sample(0) * M::state;
  for (int i = 0; i < kOwn<M>; ++i) to[i] = row_of<M>(i) < 0 ? P(0) : p[row_of<M>(i)];
}
template <class M, class P>
ODENET_HD void store_state(void* to, const P* from, int64_t tile, int64_t batch) {
  if constexpr (kGroups == 1) return store_lanes(to, from, M::state, tile, batch);
  if (tile >= batch) return;
  P* p = static_cast<P*>(to) + tile * M::state;
  for (int i = 0; i < kOwn<M>; ++i) {
    if (row_of<M>(i) >= 0) p[row_of<M>(i)] = from[i];
  }
}

// The first of `count` weights that is not 0.
template <int count, class Weight>
constexpr int first_weight() {
  int j = 0;
  while (j < count - 1 && Weight{}(j) == 0) ++j;
  return j;
}

// The numbers of one lane, which are those of a sample.
template <class M, class P>
ODENET_HD void store_lane(void* to, const P* from, int i, int64_t sample) {
  Number<P>* p = static_cast<Number<P>*>(to) + sample * M::state;
  for (int n = 0; n < kOwn<M>; ++n) {
    if (row_of<M>(n) >= 0) p[row_of<M>(n)] = lane(from[n], i);
  }
}

// sum_j weight(j) k[j][n] of the first `count` slopes; constants that are 0 cost nothing.
template <int count, class P, int N, class Weight>
ODENET_HD P weigh(const P (*k)[N], int n, Weight) {
  constexpr int first = first_weight<count, Weight>();
  constexpr double w0 = Weight{}(first);
  P sum = k[first][n] * Number<P>(w0);
  unrolled<count - 1 - first>([&](auto after) {
    constexpr int j = first + 1 + after;
    constexpr double w = Weight{}(j);
    if constexpr (w != 0) sum = fused(k[j][n], Number<P>(w), sum);
  });
  return sum;
}

// The sum of the squares of the scaled error in one leaf, lane by lane.
template <class M, class P>
ODENET_HD P error_squares(const SolveCall& in, const Tile<M, P>& x, const P& dt, int leaf) {
  using T = Number<P>;
  const T rtol = T(in.rtol[leaf]), atol = T(in.atol[leaf]);
  P sum(T(0));
  for_leaf<M>(leaf, [&](int n) {
    const P error = dt * weigh<M::stages>(x.k, n, [](int j) { return M::e(j); });
    const P size = maximum(abs(x.y[n]), abs(x.y1[n]));
    const P scaled = error / fused(size, rtol, P(atol));
    sum = fused(scaled, scaled, sum) + (size - size);
  });
  return add_groups(sum);
}

template <class M>
ODENET_HD double leaf_size(int leaf) {
  return M::leaf_end(leaf) - (leaf == 0 ? 0 : M::leaf_end(leaf - 1));
}

// The square of the error ratio of each lane.
template <class M, class P>
ODENET_HD P square_of_ratio(const SolveCall& in, const Tile<M, P>& x, const P& dt) {
  P square(Number<P>(0));
  for (int leaf = 0; leaf < M::leaves; ++leaf) {
    const P mean = error_squares<M>(in, x, dt, leaf) * Number<P>(1 / leaf_size<M>(leaf));
    square = leaf == 0 ? mean : maximum(mean, square);
  }
  return square;
}

// The weights of the slopes at theta, times dt.
template <class M, class P>
ODENET_HD void interpolant(const P& theta, const P& dt, P* weights) {
  using T = Number<P>;
  unrolled<M::stages>([&](auto j) {
    P b(T(0));
    unrolled<M::degree>([&](auto d) { b = (b + P(T(M::p(j, M::degree - 1 - d)))) * theta; });
    weights[j] = b * dt;
  });
}

// An output of each lane in `which`, at time `output` in the step from `time` over dt that ended at `reached`.
// number(i), sample(i): which output, of which sample.
template <class M, class P, class D, class Which, class Sample>
ODENET_HD void write_output(const SolveCall& in, const Tile<M, P>& x, const MaskOf<P>& which, const D& output,
                            const D& time, const D& dt, const D& reached, const Which& number, const Sample& sample) {
  using T = Number<P>;
  T* ys = static_cast<T*>(in.ys);
  const P theta = convert<T>((output - time) / dt);
  const MaskOf<P> landed = output == reached;
  P weights[M::stages];
  interpolant<M>(theta, convert<T>(dt), weights);
  for (int n = 0; n < kOwn<M>; ++n) {
    P sum = x.y[n];
    for (int j = 0; j < M::stages; ++j) sum = fused(weights[j], x.k[j][n], sum);
    sum = select(landed, x.y1[n], sum);
    const int row = row_of<M>(n);
    for_lanes(which, [&](int i) {
      if (row >= 0) ys[(number(i) * in.batch + sample(i)) * M::state + row] = lane(sum, i);
    });
  }
}

// The outputs [begin, end) of all samples of a tile, in the same step.
template <class M, class P>
ODENET_HD void write_outputs(const SolveCall& in, const Tile<M, P>& x, int64_t tile, int64_t begin, int64_t end,
                             double time, double dt, double reached) {
  using D = With<P, double>;
  MaskOf<P> valid(true);
  for (int i = Lanes<P>::width - 1; i >= 0 && tile * Lanes<P>::width + i >= in.batch; --i) set_lane(valid, i, false);
  for (int64_t output = begin; output < end; ++output) {
    write_output<M, P>(
        in, x, valid, D(in.step.t[output]), D(time), D(dt), D(reached), [&](int) { return output; },
        [&](int i) { return tile * Lanes<P>::width + i; });
  }
}

// Where the tape holds the next record of a tile, or null. Counts it in any case.
template <class M, class P>
ODENET_HD Record<M, P>* next_record(const SolveCall& in, int64_t tile) {
  const int64_t place = in.tape_count[place_of(tile)]++;
  if (in.tape == nullptr || place >= in.capacity) return nullptr;
  return static_cast<Record<M, P>*>(in.tape) + place_of(tile) * in.capacity + place;
}

// sample(i): of a lane.
template <class M, class P, class Sample>
ODENET_HD void write_record(Record<M, P>& record, const Tile<M, P>& x, const P& first, const P& last,
                            const With<P, double>& time, const With<P, double>& dt, const With<P, double>& end,
                            const P& fresh, const Sample& sample) {
  for (int n = 0; n < kOwn<M>; ++n) {
    record.y[n] = x.y[n];
    record.slope[n] = x.k[0][n];
  }
  record.first = first;
  record.last = last;
  record.time = time;
  record.dt = dt;
  record.end = end;
  record.fresh = fresh;
  for (int i = 0; i < Lanes<P>::width; ++i) set_lane(record.sample, i, sample(i));
}

template <class M, class P>
ODENET_HD void accept_step(Tile<M, P>& x, const MaskOf<P>& accept) {
  for (int n = 0; n < kOwn<M>; ++n) {
    x.y[n] = select(accept, x.y1[n], x.y[n]);
    x.k[0][n] = select(accept, x.k[M::stages - 1][n], x.k[0][n]);
  }
  for (int n = 0; n < own(M::taps); ++n) x.taps[0][n] = select(accept, x.taps[M::stages - 1][n], x.taps[0][n]);
}

// The sum over the valid lanes of a tile.
template <class P>
ODENET_HD double sum_lanes(const P& x, int64_t tile, int64_t batch) {
  double sum = 0;
  for (int i = 0; i < Lanes<P>::width && tile * Lanes<P>::width + i < batch; ++i) sum += lane(x, i);
  return sum;
}

// The same of what all groups of a lane know; it counts once.
template <class P>
ODENET_HD double own_sum(const P& x, int64_t tile, int64_t batch) {
  return group() == 0 ? sum_lanes(x, tile, batch) : 0;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
