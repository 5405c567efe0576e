#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T>
__global__ void dense_output_kernel(const DenseOutput<T> s) {
  const int64_t size = s.rows * s.columns;
  ODENET_GRID_STRIDE(i, size) {
    const int64_t row = s.rows == 1 ? 0 : i / s.columns;
    int64_t output, last;
    dense_output_range(s, row, output, last);
    for (; output < last; ++output) {
      Real<T> w[kMaxStages];
      const bool inside = dense_output_weights(s, row, output, w);
      s.ys[output * size + i] = inside ? dense_output_element(s, w, i) : s.y1[i];
    }
  }
}

}  // namespace

template <class T>
const char* dense_output(const DenseOutput<T>& args, Stream stream) {
  const int64_t size = args.rows * args.columns;
  if (size == 0) return nullptr;
  dense_output_kernel<<<blocks_for(size), kThreads, 0, native(stream)>>>(args);
  return launch_error();
}

template const char* dense_output(const DenseOutput<float>&, Stream);
template const char* dense_output(const DenseOutput<double>&, Stream);

}  // namespace odenet::cuda
