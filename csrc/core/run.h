// How a kernel is launched on CUDA, and how a launch reports.
#pragma once

#include "host_device.h"

namespace odenet::cuda {

using Stream = void*;

#if defined(__CUDACC__)
// Runs a kernel in so many blocks, each with so many bytes of memory that its threads share. The words for what went
// wrong with the launch, or null.
template <int threads, int bytes = 0, class... Parameters, class... Args>
const char* run(void (*kernel)(Parameters...), unsigned blocks, Stream stream, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if constexpr (bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif  // else tests/native/emulation.h, which has the threads of a block run on the CPU

}  // namespace odenet::cuda
