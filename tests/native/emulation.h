// CUDA C++ as far as csrc/cuda/ uses it, run by the threads of a CPU: the blocks of a launch one after the other, the
// threads of a block each a std::thread, which meet at __syncthreads. What a kernel computes, and what its threads race
// for, can then be tested where no GPU is. Given to the compiler before each .cu file.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(threads)

namespace emulation {

struct Index {
  unsigned x;
};
inline thread_local Index thread_index{0};
inline Index block_index{0}, grid_size{1}, block_size{1};
inline std::unique_ptr<std::barrier<>> meeting;

inline void meet() {
  meeting->arrive_and_wait();
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

inline void __syncthreads() {
#ifndef ODENET_FAULT  // a block whose threads do not wait for each other: ThreadSanitizer must report it
  emulation::meet();
#endif
}
inline int __syncthreads_or(int some) {
  static std::atomic<int> votes{0};
  if (some) votes = 1;
  emulation::meet();
  const int found = votes;
  emulation::meet();
  if (threadIdx.x == 0) votes = 0;
  emulation::meet();
  return found;
}
inline void __threadfence() {}  // blocks never run at the same time
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return std::atomic_ref<unsigned>(*at).fetch_add(value);
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::atomic_ref<unsigned long long>(*at).fetch_add(value);
}
inline double __ldcg(const double* at) {
  return *at;
}

namespace odenet::cuda {

template <int threads, class... Parameters, class... Args>
const char* run(void (*kernel)(Parameters...), unsigned blocks, void*, const Args&... args) {
  emulation::grid_size.x = blocks;
  emulation::block_size.x = threads;
  emulation::meeting = std::make_unique<std::barrier<>>(threads);
  std::vector<std::thread> block;
  for (int thread = 0; thread < threads; ++thread) {
    block.emplace_back([&, thread] {
      emulation::thread_index.x = thread;
      for (unsigned b = 0; b < blocks; ++b) {
        if (thread == 0) emulation::block_index.x = b;
        emulation::meet();
        kernel(args...);
        emulation::meet();
      }
    });
  }
  for (std::thread& thread : block) thread.join();
  return nullptr;
}

}  // namespace odenet::cuda
