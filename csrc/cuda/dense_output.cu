#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T>
__global__ void __launch_bounds__(kThreads) dense_output_kernel(const __grid_constant__ Batch<DenseOutput<T>> batch) {
  unsigned block, blocks;
  const DenseOutput<T>& s = batch.mine(block, blocks);
  const int64_t size = s.rows * s.columns;
  visit_packs<1>(size, block, blocks, [&](int64_t i, Width<1>) {
    const int64_t row = row_of(i, s.rows, s.columns);
    int64_t output, last;
    dense_output_range(s, row, output, last);
    for (; output < last; ++output) {
      Weights<T, kAnyStages> w;
      const bool inside = dense_output_weights(s, row, output, w);
      s.ys[output * size + i] = inside ? dense_output_element(s, w, i) : s.y1[i];
    }
  });
}

}  // namespace

template <class T>
const char* dense_output(const DenseOutput<T>* leaves, int count, Stream stream) {
  int i = 0;
  while (i < count) {
    Batch<DenseOutput<T>> batch;
    for (; i < count && batch.count < batch.kCapacity; ++i) {
      const int64_t size = leaves[i].rows * leaves[i].columns;
      if (size > 0) batch.add(leaves[i], blocks_for(size));
    }
    if (batch.count == 0) continue;
    if (const char* words = run<kThreads>(dense_output_kernel<T>, batch.blocks(), stream, batch)) return words;
  }
  return nullptr;
}

template const char* dense_output(const DenseOutput<float>*, int, Stream);
template const char* dense_output(const DenseOutput<double>*, int, Stream);
template const char* dense_output(const DenseOutput<Half>*, int, Stream);
template const char* dense_output(const DenseOutput<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
