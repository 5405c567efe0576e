// Sums over samples of outer products, as a matrix product on the CPU: a panel of columns, turned so that the numbers
// of a sample lie side by side, and rows of packs, of which each number serves a whole panel.
#pragma once

#include "pack.h"

#if !defined(__CUDACC__)

namespace odenet {
namespace ODENET_LEVEL {

// In 2 x 2 blocks of `distance` numbers those right above and left below are exchanged.
template <class T, int distance, int... I>
ODENET_HD void exchange(Vector<T>& x, Vector<T>& y, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  const Vector<T> above = shuffled(x, y, std::integer_sequence<int, (I & distance ? lanes + I - distance : I)...>{});
  y = shuffled(x, y, std::integer_sequence<int, (I & distance ? lanes + I : I + distance)...>{});
  x = above;
}

// As many vectors as one has lanes: number j of vector i becomes number i of vector j.
template <class T, int distance = kVectorBytes / int(sizeof(T)) / 2>
ODENET_HD void transpose(Vector<T>* x) {
  constexpr int lanes = kVectorBytes / int(sizeof(T));
  ODENET_UNROLL
  for (int i = 0; i < lanes; ++i) {
    if (!(i & distance)) exchange<T, distance>(x[i], x[i + distance], std::make_integer_sequence<int, lanes>{});
  }
  if constexpr (distance > 1) transpose<T, distance / 2>(x);
}

// `wide` vectors of columns of each sample, and of each of `steps` steps.
template <class P, int steps, int wide>
struct Panel {
  using T = Number<P>;
  static constexpr int lanes = P::of_vector, width = Lanes<P>::width, columns = wide * lanes;
  Vector<T> numbers[steps * width][wide];

  // Of weight[s] taps[s][b], ..., up to `count` columns; behind those it has numbers that are of no use.
  template <int N>
  ODENET_HD void load(const P (*taps)[N], const P* weight, int b, int count) {
    for (int s = 0; s < steps; ++s) {
      for (int v = 0; v < wide; ++v) {
        ODENET_UNROLL
        for (int h = 0; h < P::vectors; ++h) {
          Vector<T> block[lanes];
          ODENET_UNROLL
          for (int j = 0; j < lanes; ++j) {
            const int column = v * lanes + j < count ? v * lanes + j : count - 1;
            block[j] = weight[s].v[h] * taps[s][b + column].v[h];
          }
          transpose<T>(block);
          ODENET_UNROLL
          for (int i = 0; i < lanes; ++i) numbers[s * width + h * lanes + i][v] = block[i];
        }
      }
    }
  }

  // sums[i * stride + j] += sum over samples and steps of rows[s][i] numbers[j], for j < count. apart: packs between
  // two steps of the rows.
  template <int high>
  ODENET_CALLED void add(const P* rows, int apart, T* sums, int stride, int count) const {
    Vector<T> sum[high][wide];
    ODENET_UNROLL
    for (int i = 0; i < high; ++i) {
      ODENET_UNROLL
      for (int v = 0; v < wide; ++v) sum[i][v] = Vector<T>{};
    }
    for (int s = 0; s < steps; ++s) {
      for (int l = 0; l < width; ++l) {
        const Vector<T>* right = numbers[s * width + l];
        ODENET_UNROLL
        for (int i = 0; i < high; ++i) {
          const Vector<T> left = lane_in_memory(rows[s * apart + i], l) - Vector<T>{};
          ODENET_UNROLL
          for (int v = 0; v < wide; ++v) sum[i][v] = fused(left, right[v], sum[i][v]);
        }
      }
    }
    for (int i = 0; i < high; ++i) {
      if (count == columns) {
        ODENET_UNROLL
        for (int v = 0; v < wide; ++v) {
          Vector<T> total;
          memcpy(&total, sums + i * stride + v * lanes, sizeof(total));
          total += sum[i][v];
          memcpy(sums + i * stride + v * lanes, &total, sizeof(total));
        }
      } else {
        for (int j = 0; j < count; ++j) sums[i * stride + j] += sum[i][j / lanes][j % lanes];
      }
    }
  }
};

// sums[r * stride + c] += sum over steps s and lanes of weight[s] a[s][r] b[s][c]; a and b begin at those places.
template <int rows, int columns, int steps, class P, int N>
ODENET_HD void sums_of_panel(const P (*taps)[N], int a, int b, const P* weight, Number<P>* sums, int stride) {
  constexpr int wide = (columns + P::of_vector - 1) / P::of_vector;
  Panel<P, steps, wide> panel;
  panel.load(taps, weight, b, columns);
  using In = Passes<rows, kSumsAtOnce * 3 / 2 / wide>;  // more than in a layer, where passes are longer
  int r = 0;
  for (; r < In::whole; r += In::tall) {
    panel.template add<In::tall>(&taps[0][a + r], N, sums + r * stride, stride, columns);
  }
  if constexpr (In::whole < rows) {
    for (; r < rows; r += In::tall - 1) {
      panel.template add<In::tall - 1>(&taps[0][a + r], N, sums + r * stride, stride, columns);
    }
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet

#endif
