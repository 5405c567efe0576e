#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int V, int bytes>
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ Batch<Advance<T>, bytes> batch) {
  unsigned block, blocks;
  const Advance<T>& s = batch.mine(block, blocks);
  visit_packs<V>(s.rows * s.columns, block, blocks, [&]<int N>(int64_t i, Width<N>) {
    if (s.accept[row_of(i, s.rows, s.columns)] == 0) return;
    store(s.y0, i, load<N>(s.y1, i));
    store(s.k0, i, load<N>(s.k1, i));
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
    if (size > 0) batch.add(s, blocks_for((size + kPack<T> - 1) / kPack<T>));
    return size == 0 ||
           (packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.k0) && aligned(s.y1) && aligned(s.k1));
  };
  return in_batches(leaves, count, add, [&](const auto& batch, bool fit, bool) {
    return fit ? launch<kPack<T>>(batch, stream) : launch<1>(batch, stream);
  });
}

template const char* advance(const Advance<float>*, int, Stream);
template const char* advance(const Advance<double>*, int, Stream);
template const char* advance(const Advance<Half>*, int, Stream);
template const char* advance(const Advance<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
