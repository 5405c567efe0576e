// How the tiles of a solve are visited: by the threads of the CPU, or by blocks of threads on CUDA.
#pragma once

#include "joint.h"
#include "per_sample.h"

namespace odenet {

enum Control : int { kPerSample, kJoint, kGrid };

namespace ODENET_LEVEL {

#if defined(ODENET_BLOCKS)

inline unsigned blocks_of(const SolveCall& in, int64_t tiles) {
  return static_cast<unsigned>((tiles + in.chunk - 1) / in.chunk);
}

// body(tile) for the tiles of a block, which are those of one chunk, a lane a tile. The sum of what it gives.
template <class Body>
ODENET_HD int64_t for_block(const SolveCall& in, const Body& body) {
  int64_t left = 0;
  const int64_t begin = blockIdx.x * in.chunk;
  const int lane = Block{}.lane();
  for (int64_t tile = begin; tile < begin + in.chunk && tile < in.places; tile += kTeam) left += body(tile + lane);
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
  } else if constexpr (control == kGrid) {
    return for_block(in, [&](int64_t tile) { return solve_grid<M, P>(team, in, tile); });
  } else {
    const int64_t chunk = blockIdx.x, begin = chunk * in.chunk;
    const int64_t end = begin + in.chunk < in.batch ? begin + in.chunk : in.batch;
    return solve_samples<M, P>(team, in, chunk * kTeam + team.lane(), chunk, begin, end);
  }
}

#endif

#if !defined(__CUDACC__)

// body(i) for 0 <= i < count, in the threads that parallel_for has: each takes the next from one counter. The sum of
// what it gives.
template <class Body>
int64_t for_counted(int64_t count, ParallelFor parallel_for, const Body& body) {
  if (count == 1) return body(int64_t{0});
  int64_t next = 0, left = 0;
  auto take = [&] {
    int64_t own = 0;
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < count;) own += body(i);
    if (own > 0) __atomic_fetch_add(&left, own, __ATOMIC_RELAXED);
  };
  parallel_for(0, count, 1, [](int64_t, int64_t, void* context) { (*static_cast<decltype(take)*>(context))(); }, &take);
  return left;
}

// body(tile) for all tiles; a chunk of them is one thread's. The sum of what it gives.
template <class Body>
int64_t for_chunks(const SolveCall& in, ParallelFor parallel_for, const Body& body) {
  return for_counted((in.places + in.chunk - 1) / in.chunk, parallel_for, [&](int64_t chunk) {
    int64_t left = 0;
    for (int64_t tile = chunk * in.chunk; tile < (chunk + 1) * in.chunk && tile < in.places; ++tile) left += body(tile);
    return left;
  });
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
    auto range = [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin * in.chunk; tile < end * in.chunk && tile < count; ++tile) {
        for (int i = 0; i < 3 * M::leaves; ++i) sums(tile)[i] = 0;
        body(kept[tile].tile, tile, sums(tile));
      }
    };
    parallel_for(
        0, (count + in.chunk - 1) / in.chunk, in.grain,
        [](int64_t begin, int64_t end, void* context) { (*static_cast<decltype(range)*>(context))(begin, end); },
        &range);
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
  } else if constexpr (control == kGrid) {
    return for_chunks(in, parallel_for, [&](int64_t tile) { return solve_grid<M, P>(Alone{}, in, tile); });
  } else {
    return for_counted(in.places, parallel_for, [&](int64_t chunk) {
      const int64_t samples = in.chunk * width, begin = chunk * samples;
      const int64_t end = begin + samples < in.batch ? begin + samples : in.batch;
      return solve_samples<M, P>(Alone{}, in, chunk, chunk, begin, end);
    });
  }
}

#endif

}  // namespace ODENET_LEVEL
}  // namespace odenet
