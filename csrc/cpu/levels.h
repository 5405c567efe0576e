// The launchers of launch.h, from the set compiled for the instruction set in use.
#pragma once

#include "../launch.h"
#include "../machine.h"

namespace odenet::cpu {

#ifdef ODENET_X86
#define ODENET_AT_LEVEL(op)           \
  template <class... Args>            \
  void op(const Args&... args) {      \
    switch (level()) {                \
      case Level::avx512:             \
        return avx512::op(args...);   \
      case Level::avx2:               \
        return avx2::op(args...);     \
      default:                        \
        return baseline::op(args...); \
    }                                 \
  }
#else
#define ODENET_AT_LEVEL(op)       \
  template <class... Args>        \
  void op(const Args&... args) {  \
    return baseline::op(args...); \
  }
#endif

ODENET_AT_LEVEL(stage)
ODENET_AT_LEVEL(error)
ODENET_AT_LEVEL(step_size)
ODENET_AT_LEVEL(first_step)
ODENET_AT_LEVEL(dense_output)
ODENET_AT_LEVEL(advance)

#undef ODENET_AT_LEVEL

}  // namespace odenet::cpu
