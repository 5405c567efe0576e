#include "grid.h"

namespace odenet::cuda {

namespace {

template <class R>
__global__ void step_size_kernel(const StepSize s, R* times) {
  visit_packs<1>(s.rows, blockIdx.x, gridDim.x, [&](int64_t row, Width<1>) { step_size_row(s, row, times); });
}

template <class R>
__global__ void first_step_kernel(const StepSize s, const FirstStep first, R* times) {
  visit_packs<1>(s.rows, blockIdx.x, gridDim.x,
                 [&](int64_t row, Width<1>) { first_step_row(s, row, first.norms, first.size, first.phase, times); });
}

}  // namespace

template <class R>
const char* step_size(const StepSize& args, R* times, Stream stream) {
  if (args.rows == 0) return nullptr;
  return run<kThreads>(step_size_kernel<R>, blocks_for(args.rows), stream, args, times);
}

template <class R>
const char* first_step(const StepSize& args, const FirstStep& first, R* times, Stream stream) {
  if (args.rows == 0) return nullptr;
  return run<kThreads>(first_step_kernel<R>, blocks_for(args.rows), stream, args, first, times);
}

template const char* step_size(const StepSize&, float*, Stream);
template const char* step_size(const StepSize&, double*, Stream);
template const char* step_size(const StepSize&, Half*, Stream);
template const char* step_size(const StepSize&, BFloat16*, Stream);
template const char* first_step(const StepSize&, const FirstStep&, float*, Stream);
template const char* first_step(const StepSize&, const FirstStep&, double*, Stream);
template const char* first_step(const StepSize&, const FirstStep&, Half*, Stream);
template const char* first_step(const StepSize&, const FirstStep&, BFloat16*, Stream);

const char* architectures() {
  return ODENET_ARCHITECTURES;
}

}  // namespace odenet::cuda
