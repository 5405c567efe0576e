// Matrix products of a tile: those of a linear layer, and those of its weights' gradient. [feature][lane] throughout.
#pragma once

#include "pack.h"

namespace odenet {
namespace ODENET_LEVEL {

// Rows of one pass: as many accumulators as the machine has registers for, so that an activation is loaded once for all.
#if defined(__AVX512F__)
constexpr int kRowsOfPass = 8;
#else
constexpr int kRowsOfPass = 4;
#endif

// y[r] += sum_c w[r * row + c * column] x[c] for `rows` rows
template <int rows, int columns, int row, int column, class P>
ODENET_HD void linear_rows(const Number<P>* w, const P* x, P* y) {
  P sum[rows];
  ODENET_UNROLL
  for (int r = 0; r < rows; ++r) sum[r] = y[r];
  for (int c = 0; c < columns; ++c) {
    const P value = x[c];
    ODENET_UNROLL
    for (int r = 0; r < rows; ++r) sum[r] = sum[r] + value * w[r * row + c * column];
  }
  ODENET_UNROLL
  for (int r = 0; r < rows; ++r) y[r] = sum[r];
}

template <int rows, int columns, int row, int column, class P>
ODENET_HD void linear(const Number<P>* w, const P* x, P* y) {
  constexpr int of_pass = Lanes<P>::width == 1 ? 1 : kRowsOfPass;
  constexpr int whole = rows / of_pass * of_pass;
  for (int r = 0; r < whole; r += of_pass) linear_rows<of_pass, columns, row, column>(w + r * row, x, y + r);
  if constexpr (whole < rows) linear_rows<rows - whole, columns, row, column>(w + whole * row, x, y + whole);
}

// The sum over the lanes, always in the same order.
template <class P>
ODENET_HD Number<P> sum_of_lanes(const P& x) {
  if constexpr (Lanes<P>::width == 1) {
    return x;
  } else {
    Number<P> numbers[Lanes<P>::width];
    memcpy(numbers, &x, sizeof(x));
    ODENET_UNROLL
    for (int half = Lanes<P>::width / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) numbers[i] += numbers[i + half];
    }
    return numbers[0];
  }
}

// sums[r * columns + c] += sum over steps s and lanes of weight[s] a[s][r] b[s][c]; a and b begin at those places of taps.
template <int rows, int columns, int steps, int a, int b, class P, int N>
ODENET_HD void outer_sums(const P (*taps)[N], const P* weight, Number<P>* sums) {
  constexpr int high = rows < 4 ? rows : 4, wide = columns < 2 ? columns : 2;
  const auto block = [&](auto height, auto width, int r, int c) {
    P sum[height][width];
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j) sum[i][j] = P(Number<P>(0));
    }
    ODENET_UNROLL
    for (int s = 0; s < steps; ++s) {
      ODENET_UNROLL
      for (int i = 0; i < height; ++i) {
        const P value = weight[s] * taps[s][a + r + i];
        ODENET_UNROLL
        for (int j = 0; j < width; ++j) sum[i][j] = sum[i][j] + value * taps[s][b + c + j];
      }
    }
    ODENET_UNROLL
    for (int i = 0; i < height; ++i) {
      ODENET_UNROLL
      for (int j = 0; j < width; ++j) sums[(r + i) * columns + c + j] += sum_of_lanes(sum[i][j]);
    }
  };
  constexpr int rest_high = rows % high, rest_wide = columns % wide;
  const auto line = [&](auto height, int r) {
    for (int c = 0; c + wide <= columns; c += wide) block(height, std::integral_constant<int, wide>{}, r, c);
    if constexpr (rest_wide > 0) block(height, std::integral_constant<int, rest_wide>{}, r, columns - rest_wide);
  };
  for (int r = 0; r + high <= rows; r += high) line(std::integral_constant<int, high>{}, r);
  if constexpr (rest_high > 0) line(std::integral_constant<int, rest_high>{}, rows - rest_high);
}

// sums[r] += sum over steps and lanes of weight[s] a[s][r]
template <int rows, int steps, int a, class P, int N>
ODENET_HD void column_sums(const P (*taps)[N], const P* weight, Number<P>* sums) {
  for (int r = 0; r < rows; ++r) {
    P sum(Number<P>(0));
    for (int s = 0; s < steps; ++s) sum = sum + weight[s] * taps[s][a + r];
    sums[r] += sum_of_lanes(sum);
  }
}

// The same lane by lane: of numbers that each sample has for itself.
template <int rows, int steps, int a, class P, int N>
ODENET_HD void lane_sums(const P (*taps)[N], const P* weight, P* sums) {
  for (int r = 0; r < rows; ++r) {
    for (int s = 0; s < steps; ++s) sums[r] = sums[r] + weight[s] * taps[s][a + r];
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
