#include "parallel.h"

namespace odenet::cpu::ODENET_LEVEL {

namespace {

constexpr int64_t kRowGrain = 1024;

}  // namespace

template <class R>
void step_size(const StepSize& args, R* times, ParallelFor parallel_for) {
  parallel(parallel_for, args.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      step_size_row(args, row, times);
    }
  });
}

template <class R>
void first_step(const StepSize& args, const FirstStep& first, R* times, ParallelFor parallel_for) {
  parallel(parallel_for, args.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      first_step_row(args, row, first.norms, first.size, first.phase, times);
    }
  });
}

template void step_size(const StepSize&, float*, ParallelFor);
template void step_size(const StepSize&, double*, ParallelFor);
template void step_size(const StepSize&, Half*, ParallelFor);
template void step_size(const StepSize&, BFloat16*, ParallelFor);
template void first_step(const StepSize&, const FirstStep&, float*, ParallelFor);
template void first_step(const StepSize&, const FirstStep&, double*, ParallelFor);
template void first_step(const StepSize&, const FirstStep&, Half*, ParallelFor);
template void first_step(const StepSize&, const FirstStep&, BFloat16*, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
