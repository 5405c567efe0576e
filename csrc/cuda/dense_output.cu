#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int bytes>
__global__ void __launch_bounds__(kThreads)
    dense_output_kernel(const __grid_constant__ Batch<DenseOutput<T>, bytes> batch) {
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
  const auto add = [](auto& batch, const DenseOutput<T>& s) {
    const int64_t size = s.rows * s.columns;
    if (size > 0) batch.add(s, blocks_for(size));
    return false;
  };
  return in_batches(leaves, count, add, [&]<int bytes>(const Batch<DenseOutput<T>, bytes>& batch, bool, bool) {
    return run<kThreads>(dense_output_kernel<T, bytes>, batch.blocks(), stream, batch);
  });
}

template const char* dense_output(const DenseOutput<float>*, int, Stream);
template const char* dense_output(const DenseOutput<double>*, int, Stream);
template const char* dense_output(const DenseOutput<Half>*, int, Stream);
template const char* dense_output(const DenseOutput<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
