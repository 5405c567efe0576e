#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads) advance_kernel(const __grid_constant__ Batch<Advance<T>> batch) {
  unsigned block, blocks;
  const Advance<T>& s = batch.mine(block, blocks);
  visit_packs<V>(s.rows * s.columns, block, blocks, [&]<int N>(int64_t i, Width<N>) {
    if (s.accept[row_of(i, s.rows, s.columns)] == 0) return;
    store(s.y0, i, load<N>(s.y1, i));
    store(s.k0, i, load<N>(s.k1, i));
  });
}

}  // namespace

template <class T>
const char* advance(const Advance<T>* leaves, int count, Stream stream) {
  int i = 0;
  while (i < count) {
    Batch<Advance<T>> batch;
    bool fit = true;
    for (; i < count && batch.count < batch.kCapacity; ++i) {
      const Advance<T>& s = leaves[i];
      if (s.rows * s.columns == 0) continue;
      fit = fit && packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.k0) && aligned(s.y1) && aligned(s.k1);
      batch.add(s, blocks_for((s.rows * s.columns + kPack<T> - 1) / kPack<T>));
    }
    if (batch.count == 0) continue;
    const auto kernel = fit ? advance_kernel<T, kPack<T>> : advance_kernel<T, 1>;
    if (const char* words = run<kThreads>(kernel, batch.blocks(), stream, batch)) return words;
  }
  return nullptr;
}

template const char* advance(const Advance<float>*, int, Stream);
template const char* advance(const Advance<double>*, int, Stream);
template const char* advance(const Advance<Half>*, int, Stream);
template const char* advance(const Advance<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
