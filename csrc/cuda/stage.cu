#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int S, int V, int bytes>
__global__ void __launch_bounds__(kThreads) stage_kernel(const __grid_constant__ Batch<Stage<T>, bytes> batch) {
  unsigned block, blocks;
  const Stage<T>& s = batch.leaf[batch.mine(block, blocks)];
  Weights<T, S> w{};
  double dt = 0;
  int64_t row = -1;
  visit_packs<V>(s.rows * s.columns, block, blocks, [&]<int N>(int64_t i, Width<N>) {
    const int64_t next = row_of(i, s.rows, s.columns);
    if (next != row) {
      row = next;
      dt = s.dt[row];
      if constexpr (S != kAnyStages) w = scaled_weights<T, S>(s.a, s.stages, dt);
    }
    Accumulate<T> sum[N];
    sum_slopes<S>(sum, s.k, s.a, s.stages, dt, w, [&]<int M>(Pack<T, N>(&packs)[M], const T* const* k) {
      for (int j = 0; j < M; ++j) packs[j] = load<N>(k[j], i);
    });
    Pack<T, N> y;
    if (s.y0) {
      y = load<N>(s.y0, i);
      for (int n = 0; n < N; ++n) y.of[n] = static_cast<T>(static_cast<Accumulate<T>>(y.of[n]) + sum[n]);
    } else {
      for (int n = 0; n < N; ++n) y.of[n] = static_cast<T>(sum[n]);
    }
    store(s.y, i, y);
  });
}

template <class T>
bool all_in_packs(const Stage<T>& s) {
  bool fit = packs_fit<T>(s.rows, s.columns) && aligned(s.y) && aligned(s.y0);
  for (int j = 0; j < s.stages; ++j) fit = fit && aligned(s.k[j]);
  return fit;
}

// Loops of their own for few leaves only: many are small, as those of parameters.
template <int V, class T, int bytes>
const char* launch(const Batch<Stage<T>, bytes>& batch, Stream stream) {
  const auto unrolled = [&]<int S>() {
    return run<kThreads>(stage_kernel<T, S, V, bytes>, batch.blocks(), stream, batch);
  };
  if constexpr (bytes == kFew) {
    return dispatch_stages<kUnrolled>(batch.leaf[0].stages, unrolled);
  } else {
    return unrolled.template operator()<kAnyStages>();
  }
}

}  // namespace

template <class T>
const char* stage(const Stage<T>* leaves, int count, Stream stream) {
  const auto add = [](auto& batch, const Stage<T>& s) {
    const int64_t size = s.rows * s.columns;
    if (size > 0) batch.add(s, blocks_for((size + kPack<T> - 1) / kPack<T>), all_in_packs(s));
  };
  return in_batches(leaves, count, add, [&](const auto& batch, bool) {
    return batch.all_wide() ? launch<kPack<T>>(batch, stream) : launch<1>(batch, stream);
  });
}

template const char* stage(const Stage<float>*, int, Stream);
template const char* stage(const Stage<double>*, int, Stream);
template const char* stage(const Stage<Half>*, int, Stream);
template const char* stage(const Stage<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
