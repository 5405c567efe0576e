#include "grid.h"

namespace odenet::cuda {

namespace {

template <class T, int S>
__global__ void stage_kernel(const Stage<T> s) {
  Real<T> w[S > 0 ? S : 1];
  int64_t row = -1;
  ODENET_GRID_STRIDE(i, s.rows * s.columns) {
    const int64_t next = s.rows == 1 ? 0 : i / s.columns;
    if (next != row) stage_weights<S>(s, row = next, w);
    s.y[i] = stage_element<S>(s, w, i);
  }
}

}  // namespace

template <class T>
const char* stage(const Stage<T>& args, Stream stream) {
  const int64_t size = args.rows * args.columns;
  if (size == 0) return nullptr;
  dispatch_stages(args.stages,
                  [&]<int S>() { stage_kernel<T, S><<<blocks_for(size), kThreads, 0, native(stream)>>>(args); });
  return launch_error();
}

template const char* stage(const Stage<float>&, Stream);
template const char* stage(const Stage<double>&, Stream);

}  // namespace odenet::cuda
