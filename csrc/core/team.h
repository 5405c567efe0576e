// A team: the packs that go through a solve in step, so that they can add up what belongs to all. On the CPU a pack is
// alone; on CUDA the threads of a block are a team, each of them a lane.
//
// Whatever a team does together, every member must come to: loops with such calls in them run until `any` has ended.
#pragma once

#include "pack.h"

#ifndef ODENET_TEAM
#define ODENET_TEAM 128
#endif

namespace odenet {

constexpr int kTeam = ODENET_TEAM;  // threads of a block

namespace ODENET_LEVEL {

struct Alone {
  static constexpr int size = 1;
  ODENET_HD int rank() const { return 0; }
  ODENET_HD void sync() const {}
  ODENET_HD bool any(bool some) const { return some; }
};

#if defined(ODENET_BLOCKS)

struct Block {
  static constexpr int size = kTeam;
  ODENET_HD int rank() const { return static_cast<int>(threadIdx.x); }
  ODENET_HD void sync() const { __syncthreads(); }
  ODENET_HD bool any(bool some) const { return __syncthreads_or(some) != 0; }
};

constexpr int kSide = 16;  // rows of a slab

// Memory that the whole team sees: two slabs, [row][lane].
template <class T>
ODENET_HD T (*slab(int which)) [kTeam + 1] {
  __shared__ T numbers[2][kSide][kTeam + 1];
  return numbers[which];
}

#endif

}  // namespace ODENET_LEVEL
}  // namespace odenet
