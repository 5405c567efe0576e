// How elements are visited on the CPU: [rows, columns] cut into pieces that lie in one row, perhaps in several threads.
// This file and those that include it are compiled once for each instruction set, in a namespace of its name.
#pragma once

#include <type_traits>

#include "../launch.h"

namespace odenet::cpu::ODENET_LEVEL {

constexpr int64_t kGrain = 1 << 15;  // elements below which a second thread costs more than it brings

// Calls body(begin, end) on ranges of [0, size).
template <class Body>
void parallel(ParallelFor parallel_for, int64_t size, int64_t grain, const Body& body) {
  if (size <= grain) {
    if (size > 0) body(int64_t{0}, size);
    return;
  }
  parallel_for(
      0, size, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<Body*>(&body));
}

// Calls body(row, begin, end) on ranges of elements of one row, numbered through the whole leaf.
template <class Body>
void parallel_rows(ParallelFor parallel_for, int64_t rows, int64_t columns, const Body& body) {
  parallel(parallel_for, rows * columns, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = rows == 1 ? 0 : begin / columns;
      const int64_t last = (row + 1) * columns, stop = last < end ? last : end;
      body(row, begin, stop);
      begin = stop;
    }
  });
}

}  // namespace odenet::cpu::ODENET_LEVEL
