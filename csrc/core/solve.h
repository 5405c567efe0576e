// The whole solve: adaptive steps, each sample with its own step size or all with one, or steps on a grid.
#pragma once

#include "team.h"
#include "tile.h"

namespace odenet {

enum Control : int { kPerSample, kJoint, kGrid };

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
  P first = P(T(s.t[0]));
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
    try_step(in, x, dt, [&](double c) { return c == 1 ? last : convert<T>(time + D(c) * r[kDt]); });
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
    const MaskOf<D> jumped = r[kJumped] != D(0.0);
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

// A step of joint control, for one tile: what was accepted before is taken over, then the next step is tried.
template <class M, class P, class Team>
struct JointStep {
  const Team& team;
  const SolveCall& in;
  Row<double> r;          // of the step to try
  bool accepted = false;  // the step before
  Row<double> before;     // and its row
  double last = 0;        // its time of the stages at its end
  double first = 0;       // the time of its first slope, if that was
  double fresh = 1;       // evaluated for it

  ODENET_HD void finish(Tile<M, P>& x, int64_t tile) const {
    using T = Number<P>;
    using D = With<P, double>;
    if (!accepted) return;
    const Row<double>& b = before;
    if (b[kOutputBegin] < b[kOutputEnd]) {
      write_outputs<M, P, D>(in, x, tile, b[kOutputBegin], b[kOutputEnd], b[kLastTime], b[kLastDt], b[kTime]);
    }
    if (in.tape_count != nullptr) {
      Record<M, P>* record = next_record<M, P>(in, tile);
      if (record != nullptr) {
        write_record<M, P, D>(*record, x, T(first), T(last), b[kLastTime], b[kLastDt], b[kTime], fresh);
      }
    }
    if constexpr (M::taps > 0) add_taps(team, in, x, tile, P(T(b[kLastDt])));
    accept_step(x, MaskOf<P>(true));
    if (b[kJumped] != 0) {
      M::field(in, P(stage_time<T>(in.step, b, 0.0)), x.y, x.arguments, x.k[0], x.taps[0]);
    }
  }

  // sums: to which the tile adds those of its error.
  ODENET_HD void attempt(Tile<M, P>& x, int64_t tile, double* sums) const {
    using T = Number<P>;
    const P dt = P(T(r[kDt]));
    try_step(in, x, dt, [&](double c) { return P(stage_time<T>(in.step, r, c)); });
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
    step.r = first_row<double>(s);
    const auto norms = [&](Tile<M, P>& x, int64_t tile, double* sums) {
      for (int leaf = 0; leaf < M::leaves; ++leaf) {
        P d[3];
        start_squares<M>(in, x, leaf, d[0], d[1], d[2]);
        for (int i = 0; i < 3; ++i) sums[i * M::leaves + leaf] += own_sum(d[i], tile, in.batch);
      }
    };
    tiles.each([&](Tile<M, P>& x, int64_t tile, double* sums) {
      begin_tile(in, x, tile);
      norms(x, tile, sums);
      if (in.tape_count != nullptr) in.tape_count[place_of(tile)] = 0;
    });
    const double d0 = joint_norm<M>(in, tiles, 0), d1 = joint_norm<M>(in, tiles, 1);
    if (!(in.first_step > 0)) {
      plan_first_step(s, step.r, d0, d1, 0.0, 0.0, 0);
      tiles.each([&](Tile<M, P>& x, int64_t tile, double* sums) {
        euler(in, x, P(T(step.r[kStepEnd])), P(T(step.r[kDt])));
        norms(x, tile, sums);
      });
    }
    plan_first_step(s, step.r, d0, d1, joint_norm<M>(in, tiles, 2), in.first_step, 1);
    step.first = s.t[0];
  } else {
    const Kept<M, P>& kept = *static_cast<const Kept<M, P>*>(in.tiles);
    step.r = load_row(s, 0);
    step.fresh = lane(kept.fresh, 0);
    step.first = lane(kept.first, 0);
  }
  const auto next = [&] {
    if (!step.accepted) return;
    step.fresh = step.before[kJumped];
    if (step.fresh != 0) step.first = stage_time<T>(s, step.before, 0.0);
  };
  for (int64_t i = 0; i < in.max_steps && step.r.running(); ++i) {
    tiles.each([&](Tile<M, P>& x, int64_t tile, double* sums) {
      step.finish(x, tile);
      step.attempt(x, tile, sums);
    });
    next();
    step.last = stage_time<T>(s, step.r, 1.0);
    step.r[kErrorRatio] = joint_norm<M>(in, tiles, 0);
    control_step<double>(s, step.r);
    step.accepted = step.r[kAccept] != 0;
    step.before = step.r;
  }
  tiles.each([&](Tile<M, P>& x, int64_t tile, double*) {
    step.finish(x, tile);
    end_tile(in, x, tile);
  });
  next();
  if (tiles.leads()) {
    Kept<M, P>& kept = *static_cast<Kept<M, P>*>(in.tiles);
    kept.fresh = With<P, double>(step.fresh);
    kept.first = P(T(step.first));
    store_row(s, 0, step.r);
  }
  return step.r.running();
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
    try_step(in, x, P(T(dt)), [&](double c) { return P(T(c == 1 ? end : time + c * dt)); });
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
  kept.tile = x;
  end_tile(in, x, tile);
  return in.num_nodes - 1 - step;
}

#if defined(ODENET_BLOCKS)

inline unsigned blocks_of(const SolveCall& in) {
  return static_cast<unsigned>((in.batch + in.chunk - 1) / in.chunk);
}

// body(tile) for the tiles of a block, which are those of one chunk, a lane a tile. The sum of what it gives.
template <class Body>
ODENET_HD int64_t for_block(const SolveCall& in, const Body& body) {
  int64_t left = 0;
  const int64_t begin = blockIdx.x * in.chunk;
  const int lane = Block{}.lane();
  for (int64_t tile = begin; tile < begin + in.chunk && tile < in.batch; tile += kTeam) left += body(tile + lane);
  return left;
}

// The tiles of joint control: each block has those of a chunk, and all blocks run at once. Their sums lie there twice,
// so that a block that is ahead leaves those alone that another still reads.
template <class M, class P>
struct BlockTiles {
  const SolveCall& in;
  unsigned* met;  // how often a block has come to a meeting
  unsigned meetings = 0;

  ODENET_HD bool leads() const { return blockIdx.x == 0 && Block{}.leads(); }
  ODENET_HD double* sums(unsigned meeting, unsigned block) const {
    return in.sums + (meeting % 2 * int64_t(gridDim.x) + block) * 3 * M::leaves;
  }

  ODENET_HD void meet() {
    const Block team;
    ++meetings;
    team.sync();
    if (team.leads()) {
      __threadfence();
      atomicAdd(met, 1u);
      while (read_through(met) < meetings * gridDim.x) {
      }
      __threadfence();
    }
    team.sync();
  }

  template <class Body>
  ODENET_HD void each(const Body& body) {
    const Block team;
    Kept<M, P>* kept = static_cast<Kept<M, P>*>(in.tiles);
    double own[3 * M::leaves] = {};
    const int64_t begin = blockIdx.x * in.chunk;
    for (int64_t first = begin; first < begin + in.chunk && first < in.batch; first += kTeam) {
      const int64_t tile = first + team.lane();
      body(kept[place_of(tile)].tile, tile, own);
    }
    for (int i = 0; i < 3 * M::leaves; ++i) {
      const double sum = team.add(own[i]);
      if (team.leads()) sums(meetings + 1, blockIdx.x)[i] = sum;
    }
    meet();
  }

  ODENET_HD double sum(int i) const {
    double own = 0;
    for (unsigned block = Block{}.thread(); block < gridDim.x; block += Block::size) {
      own += read_through(sums(meetings, block) + i);
    }
    return Block{}.add(own);
  }
};

// All of it on CUDA. met: 0, where blocks meet under joint control.
template <class M, class P, int control>
ODENET_HD int64_t solve_block(const SolveCall& in, unsigned* met) {
  const Block team;
  if constexpr (control == kJoint) {
    BlockTiles<M, P> tiles{in, met};
    const int64_t left = solve_joint<M, P>(team, in, tiles);
    return tiles.leads() ? left : 0;
  } else {
    return for_block(in, [&](int64_t tile) {
      return control == kGrid ? solve_grid<M, P>(team, in, tile) : solve_tile<M, P>(team, in, tile);
    });
  }
}

#endif

#if !defined(__CUDACC__)

// body(tile) for all tiles, in the threads that parallel_for has; a chunk of tiles is one thread's.
template <class P, class Body>
void for_chunks(const SolveCall& in, ParallelFor parallel_for, const Body& body) {
  constexpr int width = Lanes<P>::width;
  const int64_t tiles = (in.batch + width - 1) / width;
  if (tiles == 1) return body(int64_t{0});
  auto range = [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin * in.chunk; tile < end * in.chunk && tile < tiles; ++tile) body(tile);
  };
  parallel_for(
      0, (tiles + in.chunk - 1) / in.chunk, in.grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<decltype(range)*>(context))(begin, end); }, &range);
}

// The tiles of joint control on the CPU, in the threads that parallel_for has.
template <class M, class P>
struct ThreadTiles {
  const SolveCall& in;
  ParallelFor parallel_for;
  int64_t count;

  bool leads() const { return true; }
  double* sums(int64_t tile) const { return in.sums + tile * 3 * M::leaves; }
  template <class Body>
  void each(const Body& body) const {
    Kept<M, P>* kept = static_cast<Kept<M, P>*>(in.tiles);
    for_chunks<P>(in, parallel_for, [&](int64_t tile) {
      for (int i = 0; i < 3 * M::leaves; ++i) sums(tile)[i] = 0;
      body(kept[tile].tile, tile, sums(tile));
    });
  }
  double sum(int i) const {
    double sum = 0;
    for (int64_t tile = 0; tile < count; ++tile) sum += sums(tile)[i];
    return sum;
  }
};

// The only one: it and its sums stay in registers.
template <class M, class P>
struct OneTile {
  Tile<M, P> x;
  double sums[3 * M::leaves];

  bool leads() const { return true; }
  double sum(int i) const { return sums[i]; }
  template <class Body>
  ODENET_HD void each(const Body& body) {
    for (double& sum : sums) sum = 0;
    body(x, 0, sums);
  }
};

// All of it on the CPU. Returns how much is left: rows, or steps.
template <class M, class P, int control>
int64_t solve(const SolveCall& in, ParallelFor parallel_for) {
  constexpr int width = Lanes<P>::width;
  if constexpr (control == kJoint) {
    if (in.batch > width) {
      ThreadTiles<M, P> tiles{in, parallel_for, (in.batch + width - 1) / width};
      return solve_joint<M, P>(Alone{}, in, tiles);
    }
    Kept<M, P>& kept = *static_cast<Kept<M, P>*>(in.tiles);
    OneTile<M, P> tile{kept.tile, {}};
    const int64_t left = solve_joint<M, P>(Alone{}, in, tile);
    kept.tile = tile.x;
    return left;
  } else {
    int64_t left = 0;
    for_chunks<P>(in, parallel_for, [&](int64_t tile) {
      const int64_t rows = control == kGrid ? solve_grid<M, P>(Alone{}, in, tile) : solve_tile<M, P>(Alone{}, in, tile);
      if (rows > 0) __atomic_fetch_add(&left, rows, __ATOMIC_RELAXED);
    });
    return left;
  }
}

#endif

}  // namespace ODENET_LEVEL
}  // namespace odenet
