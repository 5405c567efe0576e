// How elements are visited on CUDA: the leaves of one launch, 16 bytes at a time, and how a launch reports.
#pragma once

#include "../core/run.h"
#include "../launch.h"

namespace odenet::cuda {

#ifndef ODENET_THREADS
#define ODENET_THREADS 256
#endif
constexpr int kThreads = ODENET_THREADS;  // of a block
#ifndef ODENET_WARP
#define ODENET_WARP 32
#endif
constexpr int kWarp = ODENET_WARP;
constexpr int kUnrolled = 8;              // up to so many slopes have kernels of their own
constexpr int64_t kMaxBlocks = 132 * 16;  // enough waves to fill the largest GPU; larger sizes loop

inline unsigned blocks_for(int64_t size) {
  const int64_t blocks = (size + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < 1 ? 1 : blocks > kMaxBlocks ? kMaxBlocks : blocks);
}

// Bytes of kernel parameters, which are copied at every launch: few leaves travel in a small batch.
constexpr int kFew = 4096, kMany = 32764;

// The leaves of one launch, each with blocks of its own.
template <class Args, int bytes>
struct Batch {
  static constexpr int kCapacity = (bytes - 640) / (sizeof(Args) + sizeof(unsigned) + sizeof(bool));
  static_assert(kCapacity >= 1);
  Args leaf[kCapacity];
  unsigned end[kCapacity];  // the block after the last of each leaf
  bool wide[kCapacity];     // whether packs of it can be read and written as one
  int count = 0;

  __host__ void add(const Args& args, unsigned blocks, bool fit) {
    leaf[count] = args;
    end[count] = (count ? end[count - 1] : 0) + blocks;
    wide[count] = fit;
    ++count;
  }
  __host__ unsigned blocks() const { return end[count - 1]; }
  __host__ bool all_wide() const {
    bool all = true;
    for (int i = 0; i < count; ++i) all = all && wide[i];
    return all;
  }

  // The leaf of this block; block and blocks: the number of this block among those of the leaf.
  __device__ int mine(unsigned& block, unsigned& blocks) const {
    int i = 0, last = count - 1;
    while (i < last) {
      const int middle = (i + last) / 2;
      if (blockIdx.x >= end[middle]) {
        i = middle + 1;
      } else {
        last = middle;
      }
    }
    const unsigned begin = i ? end[i - 1] : 0;
    block = blockIdx.x - begin;
    blocks = end[i] - begin;
    return i;
  }
};

template <int bytes, class Args, class Add, class Launch>
const char* in_batches_of(const Args* leaves, int count, const Add& add, const Launch& launch) {
  for (int i = 0; i < count;) {
    Batch<Args, bytes> batch;
    for (; i < count && batch.count < batch.kCapacity; ++i) add(batch, leaves[i]);
    if (batch.count == 0) continue;
    if (const char* words = launch(batch, i == count)) return words;
  }
  return nullptr;
}

// Calls launch(batch, last) for all leaves, in as few batches as they go into. add(batch, leaf) adds one, if it has
// elements; last: whether none is left.
template <class Args, class Add, class Launch>
const char* in_batches(const Args* leaves, int count, const Add& add, const Launch& launch) {
  if (count <= Batch<Args, kFew>::kCapacity) return in_batches_of<kFew>(leaves, count, add, launch);
  return in_batches_of<kMany>(leaves, count, add, launch);
}

// V neighbouring elements, read and written as one.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T of[V];
};

template <int V, class T>
__device__ Pack<T, V> load(const T* from, int64_t i) {
  return *reinterpret_cast<const Pack<T, V>*>(from + i);
}

// 16 bytes are stored by name: of an assignment nvcc makes as many stores as there are elements, some of the time.
template <class T, int V>
__device__ void store(T* to, int64_t i, const Pack<T, V>& pack) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(pack) == 16) {
    const uint4 bits = bit_cast<uint4>(pack);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to + i), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(to + i) = pack;
}

template <class T>
constexpr int kPack = 16 / sizeof(T) > 0 ? 16 / sizeof(T) : 1;  // elements in 16 bytes

inline bool aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether packs of V fit: no pack may lie in two rows.
template <class T>
bool packs_fit(int64_t rows, int64_t columns) {
  return rows == 1 || columns % kPack<T> == 0;
}

// Calls visit(i, Width<V>) for the packs of this thread, then visit(i, Width<1>) for an element after the last pack.
template <int V>
struct Width {
  static constexpr int value = V;
};
template <int V, class Visit>
__device__ void visit_packs(int64_t size, unsigned block, unsigned blocks, const Visit& visit) {
  const int64_t thread = static_cast<int64_t>(block) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(blocks) * kThreads;
  const int64_t packs = size / V;
  for (int64_t i = thread; i < packs; i += threads) visit(i * V, Width<V>{});
  if constexpr (V > 1) {
    if (thread < size - packs * V) visit(packs * V + thread, Width<1>{});
  }
}

// sum[n] = dt sum_j coefficients[j] k[j], of the elements of a pack. read(packs, k): the pack in each of several
// slopes.
template <int S, class T, int N, class Read>
__device__ void sum_slopes(Accumulate<T> (&sum)[N], const T* const* k, const double* coefficients, int stages,
                           double dt, const Weights<T, S>& w, const Read& read) {
  for (int n = 0; n < N; ++n) sum[n] = {};
  if constexpr (S == kAnyStages) {  // weights kept for a loop of unknown length would lie in memory
#pragma unroll 4
    for (int j = 0; j < stages; ++j) {
      Pack<T, N> slope[1];
      read(slope, k + j);
      const Real<T> weight = scaled_weight<T>(coefficients[j], dt);
      for (int n = 0; n < N; ++n) sum[n] += weight * static_cast<Accumulate<T>>(slope[0].of[n]);
    }
  } else if constexpr (S > 0) {
    Pack<T, N> slope[S];  // all are on their way before the first is used
    read(slope, k);
#pragma unroll
    for (int j = 0; j < S; ++j) {
      for (int n = 0; n < N; ++n) sum[n] += w.of[j] * static_cast<Accumulate<T>>(slope[j].of[n]);
    }
  }
}

// The row of element i. 64-bit divisions are slow, and seldom needed.
__device__ inline int64_t row_of(int64_t i, int64_t rows, int64_t columns) {
  if (rows == 1) return 0;
  if (i < (int64_t{1} << 32) && columns < (int64_t{1} << 32)) {
    return static_cast<uint32_t>(i) / static_cast<uint32_t>(columns);
  }
  return i / columns;
}

}  // namespace odenet::cuda
