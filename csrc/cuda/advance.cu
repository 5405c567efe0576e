#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T>
__global__ void advance_kernel(const Advance<T> s) {
  ODENET_GRID_STRIDE(i, s.rows * s.columns) {
    if (s.accept[s.rows == 1 ? 0 : i / s.columns] != 0) advance_element(s, i);
  }
}

}  // namespace

template <class T>
const char* advance(const Advance<T>& args, Stream stream) {
  const int64_t size = args.rows * args.columns;
  if (size == 0) return nullptr;
  advance_kernel<<<blocks_for(size), kThreads, 0, native(stream)>>>(args);
  return launch_error();
}

template const char* advance(const Advance<float>&, Stream);
template const char* advance(const Advance<double>&, Stream);

}  // namespace odenet::cuda
