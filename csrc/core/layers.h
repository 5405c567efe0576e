// The linear layers of a tile, [feature][lane].
#pragma once

#include <type_traits>

#include "team_layers.h"

namespace odenet {
namespace ODENET_LEVEL {

// Vectors of results that are added up at once: as many as hide how long an addition takes. The machine has registers
// for some more, but not for as many again.
#if defined(__AVX512F__)
constexpr int kSumsAtOnce = 16;
#else
constexpr int kSumsAtOnce = 8;
#endif

// How rows are dealt to passes: `most` at most in each, as evenly as can be; the first `whole` rows are in passes of
// `tall`, the others in passes of one fewer.
template <int rows, int most>
struct Passes {
  static constexpr int count = (rows + most - 1) / most, tall = (rows + count - 1) / count;
  static constexpr int whole = rows - (count * tall - rows) * (tall - 1);
};

template <class P>
constexpr int rows_of_pass() {
#if defined(ODENET_BLOCKS)
  return 1;
#else
  if constexpr (Lanes<P>::width == 1) {
    return kSumsAtOnce;
  } else {
    return kSumsAtOnce / P::vectors;
  }
#endif
}

// y[r] = start(r) + sum_c w[r * row + c * column] x[c] for `rows` rows, so that an activation is loaded once for all.
template <int rows, int columns, int row, int column, class P, class Start>
ODENET_HD void linear_rows(const Number<P>* w, const P* x, P* y, const Start& start) {
  P sum[rows];
  ODENET_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = start(r);
  for (int c = 0; c < columns; ++c) {
    const P value = x[c];
    ODENET_UNROLL
    for (int r = 0; r < rows; ++r) sum[r] = fused(value, w[r * row + c * column], sum[r]);
  }
  ODENET_UNROLL
  for (int r = 0; r < rows; ++r) y[r] = sum[r];
}

template <int rows, int columns, int row, int column, class P, class Start>
ODENET_HD void linear(const Number<P>* w, const P* x, P* y, const Start& start) {
  using In = Passes<rows, rows_of_pass<P>()>;
  const auto from = [&](int first) { return [&, first](int r) { return start(first + r); }; };
  int r = 0;
  for (; r < In::whole; r += In::tall) linear_rows<In::tall, columns, row, column>(w + r * row, x, y + r, from(r));
  if constexpr (In::whole < rows) {
    constexpr int low = In::tall - 1;
    for (; r < rows; r += low) linear_rows<low, columns, row, column>(w + r * row, x, y + r, from(r));
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
