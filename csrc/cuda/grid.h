// How elements are visited on CUDA, and how a launch reports.
#pragma once

#include <algorithm>

#include "../launch.h"

namespace odenet::cuda {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;  // enough waves to fill the largest GPU; larger sizes loop

inline unsigned blocks_for(int64_t size) {
  return static_cast<unsigned>(std::clamp<int64_t>((size + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

inline cudaStream_t native(Stream stream) {
  return static_cast<cudaStream_t>(stream);
}

// The words for what went wrong with the launch just made, or null.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// A grid-stride loop over all elements of a leaf.
#define ODENET_GRID_STRIDE(i, size)                                                         \
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < (size); \
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)

}  // namespace odenet::cuda
