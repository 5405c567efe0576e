// Where a kernel runs: the thread pool, the current device and the current stream of torch.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace odenet {

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  if (torch_parallel_for(begin, end, grain, body, context) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("parallel_for failed");
  }
}

#ifdef ODENET_CUDA
// The stream that torch works on. A CPU build of torch has no such symbol, and this extension must load there too, so
// it is looked up when the first CUDA kernel runs.
inline cuda::Stream current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    const char* const symbol = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, symbol);
    if (!found) {
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, symbol);
    }
    return reinterpret_cast<Get>(found);
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != AOTI_TORCH_SUCCESS) throw std::runtime_error("torch gave no CUDA stream");
  return stream;
}
#endif

constexpr int32_t kCpu = -1;

// Runs on_cpu() where device is kCpu, else on_cuda(stream) with that CUDA device current.
template <class OnCpu, class OnCuda>
void on_device(int32_t device, const OnCpu& on_cpu, [[maybe_unused]] const OnCuda& on_cuda) {
  if (device == kCpu) {
    on_cpu();
    return;
  }
#ifdef ODENET_CUDA
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (const char* words = on_cuda(current_stream(device))) throw std::runtime_error(std::string("CUDA: ") + words);
#else
  throw std::runtime_error(
      "odenet_cuda was built without CUDA kernels; install it again where nvcc is found, or with ODENET_CUDA=1");
#endif
}

}  // namespace odenet
