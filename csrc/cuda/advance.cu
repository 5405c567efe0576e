#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int V, int bytes>
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ Batch<Advance<T>, bytes> batch) {
  unsigned block, blocks;
  const Advance<T>& s = batch.leaf[batch.mine(block, blocks)];
  visit_packs<V>(s.rows * s.columns, block, blocks, [&]<int N>(int64_t i, Width<N>) {
    const int64_t row = row_of(i, s.rows, s.columns);
    const bool accept = s.accept[row] != 0;
    if (!accept && s.y == nullptr) return;
    // Both are on their way before a store waits for either.
    const Pack<T, N> y0 = load<N>(accept ? s.y1 : s.y0, i), k0 = load<N>(accept ? s.k1 : s.k0, i);
    if (accept) {
      store(s.y0, i, y0);
      store(s.k0, i, k0);
    }
    if (s.y == nullptr) return;
    const Weights<T, 1> w = first_weight(s, row);
    Pack<T, N> y;
    for (int n = 0; n < N; ++n) y.of[n] = first_stage(w, y0.of[n], k0.of[n]);
    store(s.y, i, y);
  });
}

template <int V, class T, int bytes>
const char* launch(const Batch<Advance<T>, bytes>& batch, Stream stream) {
  return run<kThreads>(advance_kernel<T, V, bytes>, batch.blocks(), stream, batch);
}

}  // namespace

template <class T>
const char* advance(const Advance<T>* leaves, int count, Stream stream) {
  const auto add = [](auto& batch, const Advance<T>& s) {
    const int64_t size = s.rows * s.columns;
    if (size == 0) return;
    const bool fit = packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.k0) && aligned(s.y1) &&
                     aligned(s.k1) && aligned(s.y);
    batch.add(s, blocks_for((size + kPack<T> - 1) / kPack<T>), fit);
  };
  return in_batches(leaves, count, add, [&](const auto& batch, bool) {
    return batch.all_wide() ? launch<kPack<T>>(batch, stream) : launch<1>(batch, stream);
  });
}

template const char* advance(const Advance<float>*, int, Stream);
template const char* advance(const Advance<double>*, int, Stream);
template const char* advance(const Advance<Half>*, int, Stream);
template const char* advance(const Advance<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
