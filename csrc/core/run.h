// How a kernel is launched on CUDA, and how a launch reports.
#pragma once

#include "host_device.h"

namespace odenet::cuda {

using Stream = void*;

#if defined(__CUDACC__)
// The words for an error, or null. The runtime forgets it then, else it would be told of the next launch.
inline const char* words(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Lets a kernel's blocks have so many bytes that their threads share; without asking they have 48 KiB.
template <int bytes, class Kernel>
cudaError_t allow(Kernel kernel) {
  if constexpr (bytes <= 48 << 10) return cudaSuccess;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

// Runs a kernel in so many blocks, each with so many bytes that its threads share. The words for what went wrong with
// the launch, or null.
template <int threads, int bytes = 0, class... Parameters, class... Args>
const char* run(void (*kernel)(Parameters...), unsigned blocks, Stream stream, const Args&... args) {
  if (const cudaError_t error = allow<bytes>(kernel); error != cudaSuccess) return words(error);
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  return words(cudaGetLastError());
}

// The same where all blocks run at once, so that they can wait for each other: no more of them than `resident` says.
template <int threads, int bytes = 0, class... Parameters>
const char* run_together(void (*kernel)(Parameters...), unsigned blocks, Stream stream, Parameters... args) {
  if (const cudaError_t error = allow<bytes>(kernel); error != cudaSuccess) return words(error);
  void* given[] = {static_cast<void*>(&args)...};
  return words(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), given,
                                           size_t(bytes), static_cast<cudaStream_t>(stream)));
}

// How many blocks of it the current device has room for at once.
template <int threads, int bytes = 0, class... Parameters>
const char* resident(void (*kernel)(Parameters...), int64_t* blocks) {
  int device = 0, multiprocessors = 0, of_one = 0;
  cudaError_t error = allow<bytes>(kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_one, kernel, threads, size_t(bytes));
  }
  *blocks = static_cast<int64_t>(multiprocessors) * of_one;
  return words(error);
}
#endif  // else tests/native/emulation.h, which has the threads of a block run on the CPU

}  // namespace odenet::cuda
