// The rows of a leaf dealt among threads, for what depends on the row: its sums, its outputs.
//
// A row is cut into chunks; a chunk, or a whole row that is shorter, is a part. A part is the work of a team of
// threads: a power of two, enough for a pack each, at most a block. All of this depends on the columns alone, never on
// the other rows or on where the row lies in memory, so that a sum is the same to the last bit in every batch.
#pragma once

#include "grid.h"

namespace odenet::cuda {

constexpr int kChunk = 16 * kThreads;  // elements

ODENET_HD int64_t chunks_of(int64_t columns) {
  return (columns + kChunk - 1) / kChunk;
}

// V: elements of a pack.
template <int V>
struct Parts {
  int64_t columns, chunks, count;
  int shift;  // a team has 2^shift threads

  ODENET_HD Parts(int64_t rows, int64_t columns)
      : columns(columns), chunks(chunks_of(columns)), count(rows * chunks), shift(0) {
    while (team() < kThreads && team() * V < columns) ++shift;
  }
  ODENET_HD int team() const { return 1 << shift; }
  __host__ unsigned blocks() const { return blocks_for(count << shift); }
  __device__ int thread_of_team() const { return threadIdx.x & (team() - 1); }

  // Calls visit(part, row, first, count) in the threads of each team, for the parts of this block: the part's elements
  // are [first, first + count). All threads of a block make the same number of calls; those left over are of no
  // elements.
  template <class Visit>
  __device__ void visit(unsigned block, unsigned blocks, const Visit& visit) const {
    const int64_t teams = kThreads >> shift;
    for (int64_t at = block * teams; at < count; at += blocks * teams) {
      const int64_t part = at + (threadIdx.x >> shift);
      const int64_t row = chunks == 1 ? part : part / chunks, begin = (part - row * chunks) * kChunk;
      const int64_t left = columns - begin < kChunk ? columns - begin : kChunk;
      visit(part, row, row * columns + begin, part < count ? static_cast<int>(left) : 0);
    }
  }
};

// A thread's share of a part: packs of V elements, the same ones in the same order whatever their place in memory.
// wide: packs of neighbours, each read or written as one. Else neighbours lie in the lanes of a warp, so that these are
// read together.
template <int V>
class Share {
 public:
  __device__ Share(const Parts<V>& parts, int64_t first, int count, bool wide)
      : first_(first), count_(count), next_(parts.team() * V), wide_(wide) {
    const int thread = parts.thread_of_team(), lanes = parts.team() < kWarp ? parts.team() : kWarp;
    const int lane = thread & (lanes - 1);
    at_ = wide ? thread * V : (thread - lane) * V + lane;
    stride_ = wide ? 1 : lanes;
  }

  __device__ bool has(int n) const { return at_ + n * stride_ < count_; }  // the n-th element of this pack
  __device__ void go_on() { at_ += next_; }

  template <class T, int N>
  __device__ void read(Pack<T, V> (&packs)[N], const T* const* from) const {
    const int64_t i = first_ + at_;
    if (wide_ && has(V - 1)) {
#pragma unroll
      for (int j = 0; j < N; ++j) packs[j] = load<V>(from[j], i);
    } else {
#pragma unroll
      for (int n = 0; n < V; ++n) {
        const int64_t at = i + n * stride_;
#pragma unroll
        for (int j = 0; j < N; ++j) packs[j].of[n] = has(n) ? from[j][at] : T{};
      }
    }
  }
  template <class T>
  __device__ Pack<T, V> read(const T* from) const {
    Pack<T, V> pack[1];
    read(pack, &from);
    return pack[0];
  }
  template <class T>
  __device__ void write(T* to, const Pack<T, V>& pack) const {
    const int64_t i = first_ + at_;
    if (wide_ && has(V - 1)) {
      store(to, i, pack);
    } else {
      for (int n = 0; n < V; ++n) {
        if (has(n)) to[i + n * stride_] = pack.of[n];
      }
    }
  }

 private:
  int64_t first_;
  int at_, count_, next_, stride_;
  bool wide_;
};

// The sum over the packs of a team, in each of its threads; all threads of a block call it. Within a warp it is a tree
// over the elements in their order, wherever these lie: sums of neighbours, then of pairs of neighbours, and so on.
template <int V>
__device__ double team_sum(double (&of)[V], int team, bool wide) {
  const auto over_pack = [&] {
    for (int step = 1; step < V; step *= 2) {
      for (int n = 0; n < V; n += 2 * step) of[n] += of[n + step];
    }
  };
  const auto over_lanes = [&](double& x) {
    const int lanes = team < kWarp ? team : kWarp;
    for (int step = 1; step < lanes; step *= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  };
  if (wide) {
    over_pack();
    over_lanes(of[0]);
  } else {
    for (int n = 0; n < V; ++n) over_lanes(of[n]);
    over_pack();
  }
  if (team <= kWarp) return of[0];
  __shared__ double of_warp[kThreads / kWarp];
  __syncthreads();  // the sums before have been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = of[0];
  __syncthreads();
  const int warps = team / kWarp, first = threadIdx.x / kWarp & -warps;
  double sum = 0;
  for (int warp = first; warp < first + warps; ++warp) sum += of_warp[warp];
  return sum;
}

}  // namespace odenet::cuda
