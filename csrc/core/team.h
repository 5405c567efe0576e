// A team: the packs that go through a solve in step, so that they can share work and add up what belongs to all. On the
// CPU a pack is alone; on CUDA the threads of a block are a team of kTeam lanes and kGroups groups. With one group
// every thread is a lane, and has all numbers of its sample. With several, a sample has a thread in each group, which
// deal its rows among themselves: row n is that of group n % kGroups. What all of them read lies in the team's memory.
//
// Whatever a team does together, every member must come to: loops with such calls in them run until `any` has ended.
#pragma once

#include "pack.h"

#ifndef ODENET_TEAM
#define ODENET_TEAM 128
#endif
#ifndef ODENET_GROUPS
#define ODENET_GROUPS 1
#endif
#ifndef ODENET_STAGED
#define ODENET_STAGED 0
#endif
#ifndef ODENET_ROW
#define ODENET_ROW ODENET_TEAM
#endif

// Ahead of a loop over a group's rows: several at once, so that they do not wait for each other's loads and functions.
#if defined(__CUDACC__)
#define ODENET_BY_FOUR _Pragma("unroll 4")
#else
#define ODENET_BY_FOUR
#endif

namespace odenet {

constexpr int kTeam = ODENET_TEAM;      // lanes of a block
constexpr int kGroups = ODENET_GROUPS;  // threads of a lane
constexpr int kStaged = ODENET_STAGED;  // bytes of the team's memory that hold constants, from its start
constexpr int kRow = ODENET_ROW;        // numbers between two rows of that memory, [row][lane]

// How many of some rows a member has at most. The last of these may be none of them: what it holds is of no use.
constexpr int own(int rows) {
  return (rows + kGroups - 1) / kGroups;
}

namespace ODENET_LEVEL {

struct Alone {
  static constexpr int size = 1;
  ODENET_HD int lane() const { return 0; }
  ODENET_HD bool leads() const { return true; }
  ODENET_HD void sync() const {}
  ODENET_HD bool any(bool some) const { return some; }
};

// The group of a thread.
ODENET_HD int group() {
#if defined(ODENET_BLOCKS)
  if constexpr (kGroups > 1) return static_cast<int>(threadIdx.x) / kTeam;
#endif
  return 0;
}
// The first of the rows from `row` on that is this group's.
ODENET_HD int own_from(int row) {
  if constexpr (kGroups == 1) return row;
  return row + (group() + kGroups - row % kGroups) % kGroups;
}
ODENET_HD bool is_own(int row) {
  return kGroups == 1 || row % kGroups == group();
}

#if defined(ODENET_BLOCKS)

#if defined(__CUDACC__)
// The memory of the team from that byte on.
ODENET_HD void* team_memory(int offset) {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory + offset;
}
#endif  // else tests/native/emulation.h

// What another block may have written meanwhile.
#if defined(__CUDACC__)
ODENET_HD unsigned read_through(const unsigned* at) {
  return *static_cast<const volatile unsigned*>(at);
}
ODENET_HD double read_through(const double* at) {
  return *static_cast<const volatile double*>(at);
}
#endif  // else tests/native/emulation.h

struct Block {
  static constexpr int size = kTeam * kGroups;  // threads
  ODENET_HD int thread() const { return static_cast<int>(threadIdx.x); }
  ODENET_HD int lane() const { return thread() % kTeam; }
  ODENET_HD bool leads() const { return thread() == 0; }
  ODENET_HD void sync() const { __syncthreads(); }
  ODENET_HD bool any(bool some) const { return __syncthreads_or(some) != 0; }
  // The sum over all threads, in the same order for each.
  ODENET_HD double add(double x) const {
    double* parts = static_cast<double*>(team_memory(kStaged));
    constexpr int few = 16;
    sync();
    parts[thread()] = x;
    sync();
    double sum = 0;
    if (thread() < few) {
      for (int i = thread(); i < size; i += few) sum += parts[i];
    }
    sync();
    if (thread() < few) parts[thread()] = sum;
    sync();
    sum = 0;
    for (int i = 0; i < few && i < size; ++i) sum += parts[i];
    return sum;
  }
};

// What all members see of some rows of their samples.
template <class T>
struct Shared {
  T* numbers;  // of the thread's lane
  ODENET_HD T& operator[](int row) const { return numbers[row * kRow]; }
  ODENET_HD Shared operator+(int rows) const { return {numbers + rows * kRow}; }
  ODENET_HD T& at(int row, int lane) const { return numbers[row * kRow + lane - Block{}.lane()]; }
};

// Those that begin at that byte of the team's memory.
template <class T>
ODENET_HD Shared<T> rows_at(int offset) {
  return {static_cast<T*>(team_memory(offset)) + Block{}.lane()};
}

// The rows that each member has of its own, for all of them. The team must meet before they are read.
template <int rows, class T>
ODENET_HD Shared<T> share(const T* from, int offset) {
  const Shared<T> all = rows_at<T>(offset);
  for (int i = 0, row = group(); row < rows; ++i, row += kGroups) all[row] = from[i];
  return all;
}

#endif

// The sum over the groups, for every thread of a lane.
template <class P>
ODENET_HD P add_groups(const P& x) {
#if defined(ODENET_BLOCKS)
  if constexpr (kGroups > 1) {
    const Block team;
    const Shared<P> parts = rows_at<P>(kStaged);
    team.sync();
    parts[group()] = x;
    team.sync();
    P sum = parts[0];
    for (int i = 1; i < kGroups; ++i) sum = sum + parts[i];
    team.sync();
    return sum;
  }
#endif
  return x;
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
