// The seam between the bindings, which know tensors, and the drivers, which know machines: raw pointers, sizes, a
// stream. No torch type, no CUDA type. One launcher per op and device; `core/` defines what each struct means.
#pragma once

#include "core/advance.h"
#include "core/dense_output.h"
#include "core/error.h"
#include "core/stage.h"
#include "core/step_size.h"

namespace odenet {

// Splits [begin, end) into ranges of at least `grain` and runs `body` on each, perhaps in several threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

struct FirstStep {
  const double* norms;  // [3, rows]: |y0|, |f0|, |f1 - f0|, scaled by the tolerance
  double size;          // > 0: the first step given by the user
  int phase;
};

namespace cpu {
template <class T>
void stage(const Stage<T>& args, ParallelFor parallel_for);
template <class T>
void error(const Error<T>& args, double* ratio, bool first, ParallelFor parallel_for);
template <class R>  // R: the type of the stage times
void step_size(const StepSize& args, R* times, ParallelFor parallel_for);
template <class R>
void first_step(const StepSize& args, const FirstStep& first, R* times, ParallelFor parallel_for);
template <class T>
void dense_output(const DenseOutput<T>& args, ParallelFor parallel_for);
template <class T>
void advance(const Advance<T>& args, ParallelFor parallel_for);
}  // namespace cpu

// Each returns null, or the CUDA runtime's words for what went wrong.
namespace cuda {
using Stream = void*;
template <class T>
const char* stage(const Stage<T>& args, Stream stream);
// workspace: float64 [rows * error_chunks(columns)]
int64_t error_chunks(int64_t columns);
template <class T>
const char* error(const Error<T>& args, double* ratio, bool first, double* workspace, Stream stream);
template <class R>
const char* step_size(const StepSize& args, R* times, Stream stream);
template <class R>
const char* first_step(const StepSize& args, const FirstStep& first, R* times, Stream stream);
template <class T>
const char* dense_output(const DenseOutput<T>& args, Stream stream);
template <class T>
const char* advance(const Advance<T>& args, Stream stream);
const char* architectures();  // what the kernels were compiled for: "90 100+PTX"
}  // namespace cuda

}  // namespace odenet
