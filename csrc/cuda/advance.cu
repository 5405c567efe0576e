#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int V, int bytes>
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ Batch<Advance<T>, bytes> batch) {
  unsigned block, blocks;
  const Advance<T>& s = batch.leaf[batch.mine(block, blocks)];
  visit_packs<V>(s.rows * s.columns, block, blocks, [&]<int N>(int64_t i, Width<N>) {
    if (s.accept[row_of(i, s.rows, s.columns)] == 0) return;
    const Pack<T, N> y1 = load<N>(s.y1, i), k1 = load<N>(s.k1, i);  // both on their way before a store waits
    store(s.y0, i, y1);
    store(s.k0, i, k1);
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
    const bool fit =
        packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.k0) && aligned(s.y1) && aligned(s.k1);
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
