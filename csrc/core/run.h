// How a kernel is launched on CUDA, and how a launch reports.
#pragma once

#include "host_device.h"

namespace odenet::cuda {

using Stream = void*;

#if defined(__CUDACC__)
// Runs a kernel in so many blocks. The words for what went wrong with the launch, or null.
template <int threads, class... Parameters, class... Args>
const char* run(void (*kernel)(Parameters...), unsigned blocks, Stream stream, const Args&... args) {
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif  // else tests/native/emulation.h, which has the threads of a block run on the CPU

}  // namespace odenet::cuda
