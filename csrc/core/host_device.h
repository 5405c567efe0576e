// The only place that asks which compiler is at work.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

// ODENET_HD: a function for both machines, inlined. ODENET_CALLED: one that is not, for it is large. ODENET_WHOLE: one
// into which all that it calls is inlined, lambdas too, so that what they share stays in registers. ODENET_BLOCKS:
// what is compiled runs in blocks of threads only, as compiled fields do on CUDA.
#if defined(__CUDACC__) && defined(ODENET_BLOCKS)
#define ODENET_HD __device__ __forceinline__
#define ODENET_CALLED __device__ __noinline__
#define ODENET_WHOLE ODENET_HD
#elif defined(__CUDACC__)
#define ODENET_HD __host__ __device__ __forceinline__
#define ODENET_CALLED __host__ __device__ __noinline__
#define ODENET_WHOLE ODENET_HD
#elif defined(__GNUC__) && !defined(__OPTIMIZE__)  // at -O0 it takes most of the compiler's time, and brings nothing
#define ODENET_HD inline
#define ODENET_CALLED __attribute__((noinline))
#define ODENET_WHOLE inline
#else
#define ODENET_HD inline __attribute__((always_inline))
#define ODENET_CALLED __attribute__((noinline))
#define ODENET_WHOLE inline __attribute__((noinline, flatten))
#endif

#define ODENET_EXPORT __attribute__((visibility("default")))

// The instruction set that a file is compiled for. The functions of core/ lie in a namespace of that name, so that the
// linker never takes one compiled for a newer machine for another of the same name.
#ifndef ODENET_LEVEL
#if defined(__CUDACC__)
#define ODENET_LEVEL cuda_level
#else
#define ODENET_LEVEL baseline
#endif
#endif

namespace odenet {

inline namespace ODENET_LEVEL {}

// Splits [begin, end) into ranges of at least `grain` and runs `body` on each, perhaps in several threads.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

constexpr int kMaxStages = 17;  // slopes in one linear combination (vern9 has 17)
constexpr int kMaxDegree = 8;   // degree of an interpolant in theta

namespace ODENET_LEVEL {

template <class To, class From>
ODENET_HD To bit_cast(From from) {
  if constexpr (std::is_arithmetic_v<To> || std::is_class_v<To>) {
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
  } else {
    return (To)from;  // of vectors, which memcpy would take through memory
  }
}

ODENET_HD bool is_finite(double x) {
  return x - x == 0;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
