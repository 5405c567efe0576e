// The seam between the bindings, which know tensors, and the drivers, which know machines: raw pointers, sizes, a
// stream. No torch type, no CUDA type. One launcher per op and device; `core/` defines what each struct means.
//
// T: float, double, Half or BFloat16; `error` takes Complex<float> and Complex<double> too. To the other ops, which are
// linear over the real numbers, a complex leaf is a real one of twice the columns. R: the type of the stage times.
#pragma once

#include "core/advance.h"
#include "core/dense_output.h"
#include "core/error.h"
#include "core/run.h"
#include "core/stage.h"
#include "core/step_size.h"

namespace odenet {

struct FirstStep {
  const double* norms;  // [3, rows]: |y0|, |f0|, |f1 - f0|, scaled by the tolerance
  double size;          // > 0: the first step given by the user
  int phase;
};

// One set of launchers for each instruction set; cpu/levels.h calls those of the set in use.
#define ODENET_CPU_LAUNCHERS(LEVEL)                                                                  \
  namespace cpu::LEVEL {                                                                             \
  template <class T>                                                                                 \
  void stage(const Stage<T>& args, ParallelFor parallel_for);                                        \
  template <class T>                                                                                 \
  void error(const Error<T>& args, double* ratio, bool first, ParallelFor parallel_for);             \
  template <class R>                                                                                 \
  void step_size(const StepSize& args, R* times, ParallelFor parallel_for);                          \
  template <class R>                                                                                 \
  void first_step(const StepSize& args, const FirstStep& first, R* times, ParallelFor parallel_for); \
  template <class T>                                                                                 \
  void dense_output(const DenseOutput<T>& args, ParallelFor parallel_for);                           \
  template <class T>                                                                                 \
  void advance(const Advance<T>& args, ParallelFor parallel_for);                                    \
  }
ODENET_CPU_LAUNCHERS(baseline)
#ifdef ODENET_X86
ODENET_CPU_LAUNCHERS(avx2)
ODENET_CPU_LAUNCHERS(avx512)
#endif
#undef ODENET_CPU_LAUNCHERS

// Each returns null, or the CUDA runtime's words for what went wrong. `leaves`: those of one type, in one launch.
namespace cuda {
template <class T>
const char* stage(const Stage<T>* leaves, int count, Stream stream);
template <class T>
int64_t error_workspace(const Error<T>* leaves, int count);  // float64 numbers
// first: nothing is in ratio yet. workspace: of error_workspace.
template <class T>
const char* error(const Error<T>* leaves, int count, double* ratio, bool first, double* workspace, Stream stream);
// The same, and step_size: of up to 256 rows by the block that ends last, of more in a second launch. done: a counter,
// 0, which is left 0.
template <class T, class R>
const char* error_and_step_size(const Error<T>* leaves, int count, double* workspace, unsigned* done,
                                const StepSize& args, R* times, Stream stream);
template <class R>
const char* step_size(const StepSize& args, R* times, Stream stream);
template <class R>
const char* first_step(const StepSize& args, const FirstStep& first, R* times, Stream stream);
template <class T>
const char* dense_output(const DenseOutput<T>* leaves, int count, Stream stream);
template <class T>
const char* advance(const Advance<T>* leaves, int count, Stream stream);
const char* architectures();  // what the kernels were compiled for: "9.0 10.0+PTX"
}  // namespace cuda

}  // namespace odenet
