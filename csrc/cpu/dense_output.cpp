#include <cstring>

#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

template <class T>
void dense_output(const DenseOutput<T>& args, ParallelFor parallel_for) {
  const int64_t size = args.rows * args.columns;
  parallel_rows(parallel_for, args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t end) {
    const DenseOutput<T> s = args;
    int64_t output, last;
    dense_output_range(s, row, output, last);
    for (; output < last; ++output) {
      T* y = s.ys + output * size;
      Weights<T, kAnyStages> w;
      if (!dense_output_weights(s, row, output, w)) {
        std::memcpy(y + begin, s.y1 + begin, (end - begin) * sizeof(T));
        continue;
      }
#pragma GCC ivdep
      for (int64_t i = begin; i < end; ++i) y[i] = dense_output_element(s, w, i);
    }
  });
}

template void dense_output(const DenseOutput<float>&, ParallelFor);
template void dense_output(const DenseOutput<double>&, ParallelFor);
template void dense_output(const DenseOutput<Half>&, ParallelFor);
template void dense_output(const DenseOutput<BFloat16>&, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
