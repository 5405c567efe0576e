// Error norms on CUDA, row by row, and the step that is decided by them. Compiled in one file a type, side by side.
#pragma once

#include <utility>

#include "../dtype.h"
#include "parts.h"

namespace odenet::cuda {

namespace {

constexpr int64_t kChunksAlone = 32;            // a row of more is added up by a whole block
constexpr int64_t kRowsOfLastBlock = kThreads;  // more have blocks of their own, in a launch of its own

// What follows the norms. control.state is null: nothing.
template <class T>
struct Decision {
  StepSize control;
  RealPart<T>* times;
};

// Sums of squares of the parts of this block, to the leaf's part of the workspace.
template <int S, class T>
__device__ void sum_parts(const Error<T>& s, bool wide, unsigned block, unsigned blocks, double* sums) {
  constexpr int V = kPack<T>;
  const Real<T> rtol = static_cast<Real<T>>(s.rtol), atol = static_cast<Real<T>>(s.atol);
  const Parts<V> parts(s.rows, s.columns);
  parts.visit(block, blocks, [&](int64_t part, int64_t row, int64_t first, int count) {
    Real<T> squares[V] = {};
    if (count > 0) {
      const double dt = s.dt[row];
      Weights<T, S> w{};
      if constexpr (S != kAnyStages) w = scaled_weights<T, S>(s.e, s.stages, dt);
      for (Share<V> share(parts, first, count, wide); share.has(0); share.go_on()) {
        const auto read = [&](auto& packs, const T* const* from) { share.read(packs, from); };
        const T* const ends[] = {s.y0, s.y1};
        Pack<T, V> y[2];
        read(y, ends);
        Accumulate<T> sum[V];
        sum_slopes<S>(sum, s.k, s.e, s.stages, dt, w, read);
        for (int n = 0; n < V; ++n) {
          const Real<T> square = error_square<T>(static_cast<Accumulate<T>>(y[0].of[n]),
                                                 static_cast<Accumulate<T>>(y[1].of[n]), sum[n], rtol, atol);
          if (share.has(n)) squares[n] += square;
        }
      }
    }
    double of[V];
    for (int n = 0; n < V; ++n) of[n] = static_cast<double>(squares[n]);
    const double sum = team_sum(of, parts.team(), wide);
    if (count > 0 && parts.thread_of_team() == 0) sums[part] = sum;
  });
}

// The norms of the rows [begin, end), of all leaves, and then what follows. By one block. The kernels call it, for it
// is large and the same whatever the number of slopes.
template <class T, int bytes>
__device__ __attribute__((noinline)) void fold(const Batch<Error<T>, bytes>& batch, int64_t begin, int64_t end,
                                               bool first, const double* sums, double* ratio,
                                               const Decision<T>& decision) {
  for (int leaf = 0; leaf < batch.count; ++leaf) {
    const Error<T>& s = batch.leaf[leaf];
    const int64_t chunks = chunks_of(s.columns);
    const bool alone = chunks > kChunksAlone;
    const int threads = alone ? kThreads : 1, mine = threadIdx.x % threads;
    for (int64_t row = begin + threadIdx.x / threads; row < end; row += kThreads / threads) {
      double sum[1] = {0};
      for (int64_t i = mine; i < chunks; i += threads) sum[0] += __ldcg(sums + row * chunks + i);
      if (alone) sum[0] = team_sum(sum, kThreads, true);
      if (mine == 0) ratio[row] = error_fold(ratio[row], sum[0], s.columns, first && leaf == 0);
    }
    __syncthreads();  // what another thread has written of a row
    sums += s.rows * chunks;
  }
  const StepSize& control = decision.control;
  if (control.state == nullptr) return;
  for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) step_size_row(control, row, decision.times);
}

template <class T, int bytes>
__global__ void __launch_bounds__(kThreads)
    fold_kernel(const __grid_constant__ Batch<Error<T>, bytes> batch, bool first, const double* sums, double* ratio,
                const __grid_constant__ Decision<T> decision) {
  const int64_t rows = batch.leaf[0].rows;
  for (int64_t begin = blockIdx.x * kThreads; begin < rows; begin += gridDim.x * kThreads) {
    fold(batch, begin, begin + kThreads < rows ? begin + kThreads : rows, first, sums, ratio, decision);
  }
}

// done: null, or a counter, 0, which is left 0: the block that ends last folds all rows. 80 registers a thread, for
// three blocks on a multiprocessor.
template <class T, int S, int bytes>
__global__ void __launch_bounds__(kThreads, 3)
    error_kernel(const __grid_constant__ Batch<Error<T>, bytes> batch, bool first, double* sums, double* ratio,
                 unsigned* done, const __grid_constant__ Decision<T> decision) {
  unsigned block, blocks;
  const int leaf = batch.mine(block, blocks);
  double* of_leaf = sums;
  for (int i = 0; i < leaf; ++i) of_leaf += batch.leaf[i].rows * chunks_of(batch.leaf[i].columns);
  sum_parts<S>(batch.leaf[leaf], batch.wide[leaf], block, blocks, of_leaf);
  if (done == nullptr) return;
  __shared__ bool last;
  __threadfence();  // what this block wrote is seen before its ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  fold(batch, 0, batch.leaf[0].rows, first, sums, ratio, decision);
  if (threadIdx.x == 0) *done = 0;
}

template <class T>
bool all_in_packs(const Error<T>& s) {
  bool fit = packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.y1);
  for (int j = 0; j < s.stages; ++j) fit = fit && aligned(s.k[j]);
  return fit;
}

// done: null where nothing is decided, or where that has a launch of its own.
template <class T>
const char* launch(const Error<T>* leaves, int count, double* ratio, bool first, double* sums, unsigned* done,
                   const Decision<T>& decision, Stream stream) {
  const auto add = [](auto& batch, const Error<T>& s) {
    batch.add(s, Parts<kPack<T>>(s.rows, s.columns).blocks(), all_in_packs(s));
  };
  return in_batches(leaves, count, add, [&]<int bytes>(const Batch<Error<T>, bytes>& batch, bool last) {
    const bool start = std::exchange(first, false);
    const Decision<T> then = last ? decision : Decision<T>{};
    unsigned* ticket = last ? done : nullptr;
    const auto sum_up = [&]<int S>() {
      return run<kThreads>(error_kernel<T, S, bytes>, batch.blocks(), stream, batch, start, sums, ratio, ticket, then);
    };
    const char* words;
    if constexpr (std::is_same_v<T, Real<T>> && bytes == kFew) {  // loops of their own
      words = dispatch_stages<kUnrolled>(batch.leaf[0].stages, sum_up);
    } else {
      words = sum_up.template operator()<kAnyStages>();
    }
    if (words || ticket) return words;
    const unsigned blocks = blocks_for(batch.leaf[0].rows);
    return run<kThreads>(fold_kernel<T, bytes>, blocks, stream, batch, start, sums, ratio, then);
  });
}

}  // namespace

template <class T>
int64_t error_workspace(const Error<T>* leaves, int count) {
  int64_t size = 0;
  for (int i = 0; i < count; ++i) size += leaves[i].rows * chunks_of(leaves[i].columns);
  return size;
}

template <class T>
const char* error(const Error<T>* leaves, int count, double* ratio, bool first, double* workspace, Stream stream) {
  if (leaves[0].rows == 0) return nullptr;
  return launch(leaves, count, ratio, first, workspace, nullptr, Decision<T>{}, stream);
}

template <class T, class R>
const char* error_and_step_size(const Error<T>* leaves, int count, double* workspace, unsigned* done,
                                const StepSize& args, R* times, Stream stream) {
  if (args.rows == 0) return nullptr;
  double* ratio = args.state + kErrorRatio * args.rows;
  return launch(leaves, count, ratio, true, workspace, args.rows > kRowsOfLastBlock ? nullptr : done,
                Decision<T>{args, times}, stream);
}

// The functions of a type. R: of the stage times, the real part of T.
#define ODENET_ERROR_OF(T, R)                                                       \
  template int64_t error_workspace(const Error<T>*, int);                           \
  template const char* error(const Error<T>*, int, double*, bool, double*, Stream); \
  template const char* error_and_step_size(const Error<T>*, int, double*, unsigned*, const StepSize&, R*, Stream);

}  // namespace odenet::cuda
