#include <cstring>

#include "sums.h"

namespace odenet::cpu::ODENET_LEVEL {

namespace {

// Elements [begin, end) of one row.
template <class T>
void write_outputs(const DenseOutput<T>& s, int64_t row, int64_t begin, int64_t end) {
  const int64_t size = s.rows * s.columns;
  int64_t output, last;
  dense_output_range(s, row, output, last);
  for (; output < last; ++output) {
    T* to = s.ys + output * size;
    Weights<T, kAnyStages> w;
    if (!dense_output_weights(s, row, output, w)) {
      std::memcpy(static_cast<void*>(to + begin), s.y1 + begin, (end - begin) * sizeof(T));
      continue;
    }
    Accumulate<T> sum[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int count = static_cast<int>(end - at < kBlock ? end - at : kBlock);
      sum_block(sum, s.k, w, s.stages, at, count);
      add_block(to + at, s.y0 + at, sum, count);
    }
  }
}

}  // namespace

template <class T>
void dense_output(const DenseOutput<T>& args, ParallelFor parallel_for) {
  parallel_rows(parallel_for, args.rows, args.columns,
                [&](int64_t row, int64_t begin, int64_t end) { write_outputs(args, row, begin, end); });
}

template void dense_output(const DenseOutput<float>&, ParallelFor);
template void dense_output(const DenseOutput<double>&, ParallelFor);
template void dense_output(const DenseOutput<Half>&, ParallelFor);
template void dense_output(const DenseOutput<BFloat16>&, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
