#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

template <class T>
void advance(const Advance<T>& args, ParallelFor parallel_for) {
  parallel_rows(parallel_for, args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t end) {
    if (args.accept[row] == 0) return;
    for (int64_t i = begin; i < end; ++i) advance_element(args, i);
  });
}

template void advance(const Advance<float>&, ParallelFor);
template void advance(const Advance<double>&, ParallelFor);
template void advance(const Advance<Half>&, ParallelFor);
template void advance(const Advance<BFloat16>&, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
