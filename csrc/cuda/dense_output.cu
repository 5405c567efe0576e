#include "parts.h"

namespace odenet::cuda {

namespace {

template <class T, int bytes>
__global__ void __launch_bounds__(kThreads, 3)
    dense_output_kernel(const __grid_constant__ Batch<DenseOutput<T>, bytes> batch) {
  constexpr int V = kPack<T>;
  unsigned block, blocks;
  const int leaf = batch.mine(block, blocks);
  const DenseOutput<T>& s = batch.leaf[leaf];
  const Parts<V> parts(s.rows, s.columns);
  parts.visit(block, blocks, [&](int64_t, int64_t row, int64_t first, int count) {
    if (count == 0) return;
    int64_t output, last;
    dense_output_range(s, row, output, last);  // most steps end here
    for (; output < last; ++output) {
      Weights<T, kAnyStages> w;
      const bool inside = dense_output_weights(s, row, output, w);
      T* to = s.ys + output * s.rows * s.columns;
      for (Share<V> share(parts, first, count, batch.wide[leaf]); share.has(0); share.go_on()) {
        Pack<T, V> y = share.read(inside ? s.y0 : s.y1);
        if (inside) {
          Accumulate<T> sum[V] = {};
#pragma unroll 4
          for (int j = 0; j < s.stages; ++j) {
            const Pack<T, V> slope = share.read(s.k[j]);
            for (int n = 0; n < V; ++n) sum[n] += w.of[j] * static_cast<Accumulate<T>>(slope.of[n]);
          }
          for (int n = 0; n < V; ++n) y.of[n] = static_cast<T>(static_cast<Accumulate<T>>(y.of[n]) + sum[n]);
        }
        share.write(to, y);
      }
    }
  });
}

template <class T>
bool all_in_packs(const DenseOutput<T>& s) {
  bool fit = s.columns % kPack<T> == 0 && aligned(s.ys) && aligned(s.y0) && aligned(s.y1);
  for (int j = 0; j < s.stages; ++j) fit = fit && aligned(s.k[j]);
  return fit;
}

}  // namespace

template <class T>
const char* dense_output(const DenseOutput<T>* leaves, int count, Stream stream) {
  const auto add = [](auto& batch, const DenseOutput<T>& s) {
    const Parts<kPack<T>> parts(s.rows, s.columns);
    if (parts.count > 0) batch.add(s, parts.blocks(), all_in_packs(s));
  };
  return in_batches(leaves, count, add, [&]<int bytes>(const Batch<DenseOutput<T>, bytes>& batch, bool) {
    return run<kThreads>(dense_output_kernel<T, bytes>, batch.blocks(), stream, batch);
  });
}

template const char* dense_output(const DenseOutput<float>*, int, Stream);
template const char* dense_output(const DenseOutput<double>*, int, Stream);
template const char* dense_output(const DenseOutput<Half>*, int, Stream);
template const char* dense_output(const DenseOutput<BFloat16>*, int, Stream);

}  // namespace odenet::cuda
