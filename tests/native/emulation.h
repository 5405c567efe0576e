// CUDA C++ as far as csrc/cuda/ uses it, run by a CPU: the blocks of a launch one after the other, or at once where
// they wait for each other, and the threads of a block as in threads_of_a_block.h, which meet at __syncthreads. What a
// kernel computes, and what its threads race for, can then be tested where no GPU is. Given to the compiler before each
// .cu file.
#pragma once

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "threads_of_a_block.h"

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(...)
#if !defined(ODENET_WARP) && defined(ODENET_THREADS)
#define ODENET_WARP (ODENET_THREADS / 2)  // a block has two, as small as it may be
#elif !defined(ODENET_WARP)
#define ODENET_WARP 32
#endif

namespace emulation {

struct Index {
  unsigned x;
};
struct Fragment {  // of a thread: what it has of the operands of a tensor core's product
  float left[4][2], right[2][2];
};

// What the threads of a block share.
struct Block {
  Block(int threads, int bytes)
      : meeting(threads), memory(new unsigned char[bytes]), fragments(threads), shown(threads) {
    for (int warp = 0; warp < threads / ODENET_WARP; ++warp) warps.push_back(std::make_unique<Barrier>(ODENET_WARP));
  }
  Barrier meeting;
  std::vector<std::unique_ptr<Barrier>> warps;
  std::unique_ptr<unsigned char[]> memory;
  std::vector<Fragment> fragments;
  std::vector<double> shown;  // by each thread to the others of its warp
  std::atomic<int> votes{0};
};

// What a thread knows of itself.
struct Self {
  Index thread{0}, block_index{0};
  Block* block = nullptr;
};
inline thread_local Self self;
inline Index grid_size{1}, block_size{1};
constexpr int kResident = 3;  // blocks that run at once

// Whatever waits may let others go on in the same thread of the CPU.
template <class Waiting>
void wait(const Waiting& waiting) {
  const Self own = self;
  waiting();
  self = own;
}
inline void meet(Barrier& barrier) {
  wait([&] { barrier.arrive_and_wait(); });
}
inline void meet() {
  meet(self.block->meeting);
}

}  // namespace emulation

#define threadIdx emulation::self.thread
#define blockIdx emulation::self.block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

inline void __syncthreads() {
#ifndef ODENET_FAULT  // a block whose threads do not wait for each other: ThreadSanitizer must report it
  emulation::meet();
#endif
}
inline int __syncthreads_or(int some) {
  std::atomic<int>& votes = emulation::self.block->votes;
  if (some) votes = 1;
  emulation::meet();
  const int found = votes;
  emulation::meet();
  if (threadIdx.x == 0) votes = 0;
  emulation::meet();
  return found;
}
inline double __shfl_xor_sync(unsigned, double x, int lanes) {
  emulation::Block& block = *emulation::self.block;
  emulation::Barrier& warp = *block.warps[threadIdx.x / ODENET_WARP];
  block.shown[threadIdx.x] = x;
  emulation::meet(warp);
  const double found = block.shown[threadIdx.x ^ lanes];
  emulation::meet(warp);
  return found;
}
inline void __threadfence() {}  // atomicAdd is one
inline unsigned atomicAdd(unsigned* at, unsigned value) {
  return std::atomic_ref<unsigned>(*at).fetch_add(value);
}
inline unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return std::atomic_ref<unsigned long long>(*at).fetch_add(value);
}
inline double __ldcg(const double* at) {
  return *at;
}

// The tensor cores' products, by the fragments that the PTX ISA gives to each thread of a warp.
namespace emulation {

// The right operand's number at (j, k) lies in thread 4 k + j % (2 each) / each, and the left one's at (i, j) likewise.
template <int depth>
void multiply(float (&sums)[4], const Fragment& own) {
  constexpr int each = depth / 8;  // numbers in a register
  const unsigned warp = threadIdx.x / 32, place = threadIdx.x % 32;
  Fragment* all = self.block->fragments.data() + warp * 32;
  all[place] = own;
  meet(*self.block->warps[warp]);
  for (unsigned q = 0; q < 4; ++q) {
    const unsigned i = place / 4 + q / 2 * 8, k = place % 4 * 2 + q % 2;
    for (unsigned j = 0; j < depth; ++j) {
      const unsigned high = j / (4 * each), member = j % (4 * each) / each, half = j % each;
      sums[q] += all[i % 8 * 4 + member].left[high * 2 + i / 8][half] * all[k * 4 + member].right[high][half];
    }
  }
  meet(*self.block->warps[warp]);
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}

}  // namespace emulation

namespace odenet {

inline void* team_memory(int offset) {
  return emulation::self.block->memory.get() + offset;
}
inline uint32_t round_to_tf32(float x) {
  return x - x == 0 ? (emulation::to_bits(x) + 0x1000) & ~0x1fffu : emulation::to_bits(x);
}
inline uint32_t round_to_bf16(float first, float second) {
  const auto half = [](float x) {
    const uint32_t bits = emulation::to_bits(x);
    return (x - x == 0 ? bits + 0x7fff + (bits >> 16 & 1) : bits) >> 16;
  };
  return half(first) | half(second) << 16;
}
inline void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  emulation::Fragment own{};
  for (int n = 0; n < 4; ++n) own.left[n][0] = emulation::from_bits(left[n]);
  for (int n = 0; n < 2; ++n) own.right[n][0] = emulation::from_bits(right[n]);
  emulation::multiply<8>(sums, own);
}
inline void multiply_bf16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  emulation::Fragment own{};
  for (int half = 0; half < 2; ++half) {
    const auto number = [&](uint32_t bits) { return emulation::from_bits(half ? bits & 0xffff0000u : bits << 16); };
    for (int n = 0; n < 4; ++n) own.left[n][half] = number(left[n]);
    for (int n = 0; n < 2; ++n) own.right[n][half] = number(right[n]);
  }
  emulation::multiply<16>(sums, own);
}

}  // namespace odenet

namespace odenet {

inline unsigned read_through(const unsigned* at) {
  emulation::wait(emulation::pause);
  return std::atomic_ref<unsigned>(*const_cast<unsigned*>(at)).load();
}
inline double read_through(const double* at) {
  return *at;
}

}  // namespace odenet

namespace odenet::cuda {

// body() in each thread of a block.
template <class Body>
void add(emulation::Threads& all, emulation::Block& block, int threads, const Body& body) {
  emulation::block_size.x = threads;
  for (int thread = 0; thread < threads; ++thread) {
    all.add([&block, body, thread] {
      emulation::self = {{static_cast<unsigned>(thread)}, {0}, &block};
      body();
    });
  }
}

// One block after the other, so that memory declared __shared__ is theirs in turn.
template <int threads, int bytes = 0, class... Parameters, class... Args>
const char* run(void (*kernel)(Parameters...), unsigned blocks, void*, const Args&... args) {
  emulation::Block block(threads, bytes);
  emulation::grid_size.x = blocks;
  emulation::Threads all;
  add(all, block, threads, [&] {
    for (unsigned b = 0; b < blocks; ++b) {
      emulation::self.block_index.x = b;
      emulation::meet();
      kernel(args...);
      emulation::meet();
    }
  });
  all.run();
  return nullptr;
}

template <int threads, int bytes = 0, class... Parameters>
const char* run_together(void (*kernel)(Parameters...), unsigned count, void*, Parameters... args) {
  if (count > emulation::kResident) return "too many blocks to run at once";
  emulation::grid_size.x = count;
  std::vector<std::unique_ptr<emulation::Block>> blocks;
  emulation::Threads all;
  for (unsigned b = 0; b < count; ++b) {
    blocks.push_back(std::make_unique<emulation::Block>(threads, bytes));
    add(all, *blocks[b], threads, [&, b] {
      emulation::self.block_index.x = b;
      kernel(args...);
    });
  }
  all.run();
  return nullptr;
}

template <int threads, int bytes = 0, class... Parameters>
const char* resident(void (*)(Parameters...), int64_t* blocks) {
  *blocks = emulation::kResident;
  return nullptr;
}

}  // namespace odenet::cuda
