#include "parallel.h"

namespace odenet::cpu {

namespace {

// Elements [begin, end) of one row.
template <int S, class T>
ODENET_CLONES void stage_range(const Stage<T>& args, int64_t row, int64_t begin, int64_t end) {
  const Stage<T> s = args;  // a local copy: the compiler then knows that writing y changes none of it
  Real<T> w[S > 0 ? S : 1];
  stage_weights<S>(s, row, w);
  T* y = s.y;
  if (s.y0) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) y[i] = stage_element<S>(s, w, i);
  } else {
    Stage<T> zero = s;
    zero.y0 = nullptr;
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) y[i] = stage_element<S>(zero, w, i);
  }
}

}  // namespace

template <class T>
void stage(const Stage<T>& args, ParallelFor parallel_for) {
  dispatch_stages(args.stages, [&]<int S>() {
    parallel_rows(parallel_for, args.rows, args.columns,
                  [&](int64_t row, int64_t begin, int64_t end) { stage_range<S>(args, row, begin, end); });
  });
}

template void stage(const Stage<float>&, ParallelFor);
template void stage(const Stage<double>&, ParallelFor);

}  // namespace odenet::cpu
