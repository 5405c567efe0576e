// A captured step of a solve, made again and again on a CUDA device in one launch, for as long as some row goes on.
#pragma once

#include <cstdint>

#include "core/run.h"

namespace odenet {

namespace cuda {
using Graph = void*;  // cudaGraph_t, or cudaGraphExec_t once made

// Each returns null, or the CUDA runtime's words for what went wrong. See Repeat.
const char* make_repeat(Graph step, const double* status, int64_t rows, int64_t* left, int64_t steps, Graph& made);
const char* launch_repeat(Graph made, Stream stream);
void free_repeat(Graph made);
}  // namespace cuda

class Repeat {
 public:
  // step: a cudaGraph_t, copied. status: float64 [rows], that of the solver state. left: memory for an int64. steps:
  // the most in one launch. The last two and what the step works on are the caller's, and must stay.
  Repeat(std::uintptr_t step, std::uintptr_t status, int64_t rows, std::uintptr_t left, int64_t steps, int32_t device);
  ~Repeat();
  Repeat(const Repeat&) = delete;
  Repeat& operator=(const Repeat&) = delete;

  void launch() const;  // on torch's current stream

 private:
  int32_t device_;
  cuda::Graph made_ = nullptr;
};

}  // namespace odenet
