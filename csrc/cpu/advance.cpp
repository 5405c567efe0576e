#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

template <class T>
void advance(const Advance<T>& args, ParallelFor parallel_for) {
  parallel_rows(parallel_for, args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t end) {
    const Advance<T> s = args;
    if (s.accept[row] != 0) {
      for (int64_t i = begin; i < end; ++i) {
        s.y0[i] = s.y1[i];
        s.k0[i] = s.k1[i];
      }
    }
    if (s.y == nullptr) return;
    const Weights<T, 1> w = first_weight(s, row);
    for (int64_t i = begin; i < end; ++i) s.y[i] = first_stage(w, s.y0[i], s.k0[i]);
  });
}

template void advance(const Advance<float>&, ParallelFor);
template void advance(const Advance<double>&, ParallelFor);
template void advance(const Advance<Half>&, ParallelFor);
template void advance(const Advance<BFloat16>&, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
