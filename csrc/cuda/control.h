// The step control of one row, by the kernels that do it.
#pragma once

#include "grid.h"

namespace odenet::cuda {

template <class R>
__device__ void write_times(const StepSize& s, int64_t row, R* times) {
  for (int i = 0; i < s.stages; ++i) times[i * s.rows + row] = stage_time<R>(s, row, i);
}

}  // namespace odenet::cuda
