// Gradients of what is the same for all samples: sums over the lanes of a tile, [feature][lane], and over the stages of
// a step.
#pragma once

#include <utility>

#include "layers.h"
#include "panels.h"

namespace odenet {
namespace ODENET_LEVEL {

#if !defined(__CUDACC__)

// The sums of two neighbours each, those of x first.
template <class V, int... I>
ODENET_HD V add_neighbours(const V& x, const V& y, std::integer_sequence<int, I...>) {
  return shuffled(x, y, std::integer_sequence<int, 2 * I...>{}) +
         shuffled(x, y, std::integer_sequence<int, 2 * I + 1 ...>{});
}

// As many vectors as one has lanes -> the sum of each, in one vector.
template <class T>
ODENET_HD Vector<T> sum_each(Vector<T>* x) {
  constexpr int lanes = kVectorBytes / int(sizeof(T));
  ODENET_UNROLL
  for (int count = lanes / 2; count > 0; count /= 2) {
    ODENET_UNROLL
    for (int i = 0; i < count; ++i) {
      x[i] = add_neighbours(x[2 * i], x[2 * i + 1], std::make_integer_sequence<int, lanes>{});
    }
  }
  return x[0];
}

// sums[r * stride + c] += sum over steps s and lanes of weight[s] a[s][r] b[s][c], of few rows and columns: in blocks
// of as many results as a vector has lanes, so that one reduction gives them all.
template <int rows, int columns, int steps, class P, int N>
ODENET_HD void sums_of_blocks(const P (*taps)[N], int a, int b, const P* weight, Number<P>* sums, int stride) {
  using T = Number<P>;
  constexpr int lanes = P::of_vector, high = rows < 4 && lanes > 4 ? (rows < 2 ? 1 : 2) : lanes < 4 ? lanes : 4;
  constexpr int wide = lanes / high;
  P left[steps][high];
  for (int r = 0; r < rows; r += high) {
    for (int s = 0; s < steps; ++s) {
      for (int i = 0; i < high; ++i) left[s][i] = weight[s] * taps[s][a + (r + i < rows ? r + i : rows - 1)];
    }
    for (int c = 0; c < columns; c += wide) {
      Vector<T> sum[lanes];
      int place[wide];
      ODENET_UNROLL
      for (int j = 0; j < wide; ++j) place[j] = b + (c + j < columns ? c + j : columns - 1);
      ODENET_UNROLL
      for (int i = 0; i < lanes; ++i) sum[i] = Vector<T>{};
      for (int s = 0; s < steps; ++s) {
        ODENET_UNROLL
        for (int h = 0; h < P::vectors; ++h) {
          ODENET_UNROLL
          for (int j = 0; j < wide; ++j) {
            const Vector<T> right = taps[s][place[j]].v[h];
            ODENET_UNROLL
            for (int i = 0; i < high; ++i) sum[i * wide + j] = fused(left[s][i].v[h], right, sum[i * wide + j]);
          }
        }
      }
      const Vector<T> total = sum_each<T>(sum);
      for (int i = 0; i < high && r + i < rows; ++i) {
        for (int j = 0; j < wide && c + j < columns; ++j) sums[(r + i) * stride + c + j] += total[i * wide + j];
      }
    }
  }
}

template <class P>
ODENET_HD auto sum_of_vectors(const P& x) {
  auto sum = x.v[0];
  ODENET_UNROLL
  for (int h = 1; h < x.vectors; ++h) sum += x.v[h];
  return sum;
}

#endif

// sums[r * columns + c] += sum over steps s, lanes and the team of weight[s] a[s][r] b[s][c]; a and b begin at those
// places of taps.
template <int rows, int columns, int steps, int a, int b, class Team, class P, int N>
ODENET_HD void outer_sums(const Team& team, const P (*taps)[N], const P* weight, Number<P>* sums) {
  using T = Number<P>;
  if constexpr (Team::size > 1) {
#if defined(ODENET_BLOCKS)
    // A slab of rows and one of columns at a time.
    const Slab<T> left(0), right(1);
    const int lane = team.lane();
    for (int r = 0; r < rows; r += kSide) {
      for (int c = 0; c < columns; c += kSide) {
        ProductsOf<T> products;
        for (int s = 0; s < steps; ++s) {
          team.sync();
          for (int i = own_from(a + r) - a - r; i < kSide; i += kGroups) {
            left(i, lane) = r + i < rows ? weight[s] * taps[s][(a + r + i) / kGroups] : T(0);
          }
          for (int i = own_from(b + c) - b - c; i < kSide; i += kGroups) {
            right(i, lane) = c + i < columns ? taps[s][(b + c + i) / kGroups] : T(0);
          }
          team.sync();
          products.add(left, right);
        }
        products.each([&](int i, int j, T sum) {
          if (r + i < rows && c + j < columns) sums[(r + i) * columns + c + j] += sum;
        });
      }
    }
#endif
  } else if constexpr (Lanes<P>::width == 1) {
    for (int r = 0; r < rows; ++r) {
      for (int s = 0; s < steps; ++s) {
        const P value = weight[s] * taps[s][a + r];
        for (int c = 0; c < columns; ++c) sums[r * columns + c] = fused(value, taps[s][b + c], sums[r * columns + c]);
      }
    }
  } else {
#if !defined(__CUDACC__)
    constexpr int wide = 2 * P::of_vector, rest = columns % wide, whole = columns - rest;
    if constexpr (rows < 12 || columns < 12) {  // a panel would cost more than it saves
      sums_of_blocks<rows, columns, steps>(taps, a, b, weight, sums, columns);
    } else {
      for (int c = 0; c < whole; c += wide) {
        sums_of_panel<rows, wide, steps>(taps, a, b + c, weight, sums + c, columns);
      }
      if constexpr (2 * rest >= P::of_vector) {
        sums_of_panel<rows, rest, steps>(taps, a, b + whole, weight, sums + whole, columns);
      } else if constexpr (rest > 0) {
        sums_of_blocks<rows, rest, steps>(taps, a, b + whole, weight, sums + whole, columns);
      }
    }
#endif
  }
}

// sums[r] += sum over steps, lanes and the team of weight[s] a[s][r]
template <int rows, int steps, int a, class Team, class P, int N>
ODENET_HD void column_sums(const Team& team, const P (*taps)[N], const P* weight, Number<P>* sums) {
  const auto of_tap = [&](int place) {
    P sum(Number<P>(0));
    for (int s = 0; s < steps; ++s) sum = fused(weight[s], taps[s][place], sum);
    return sum;
  };
  if constexpr (Team::size > 1) {
#if defined(ODENET_BLOCKS)
    const Slab<Number<P>> numbers(0);
    for (int begin = 0; begin < rows; begin += kSide) {
      team.sync();
      for (int r = own_from(a + begin) - a; r < begin + kSide && r < rows; r += kGroups) {
        numbers(r - begin, team.lane()) = of_tap((a + r) / kGroups);
      }
      team.sync();
      for (int r = begin + team.thread(); r < begin + kSide && r < rows; r += Team::size) {
        Number<P> sum(0);
        for (int i = 0; i < kTeam; ++i) sum += numbers(r - begin, i);
        sums[r] += sum;
      }
    }
#endif
  } else if constexpr (Lanes<P>::width == 1) {
    for (int r = 0; r < rows; ++r) sums[r] += of_tap(a + r);
  } else {
#if !defined(__CUDACC__)
    constexpr int lanes = P::of_vector;
    for (int r = 0; r < rows; r += lanes) {
      Vector<Number<P>> sum[lanes];
      ODENET_UNROLL
      for (int i = 0; i < lanes; ++i) sum[i] = sum_of_vectors(of_tap(a + (r + i < rows ? r + i : rows - 1)));
      const Vector<Number<P>> total = sum_each<Number<P>>(sum);
      for (int i = 0; i < lanes && r + i < rows; ++i) sums[r + i] += total[i];
    }
#endif
  }
}

// The same lane by lane: of numbers that each sample has for itself. A member of the team adds what it has.
template <int rows, int steps, int a, class P, int N>
ODENET_HD void lane_sums(const P (*taps)[N], const P* weight, P* sums) {
  for (int r = own_from(a) - a; r < rows; r += kGroups) {
    for (int s = 0; s < steps; ++s) sums[r] = fused(weight[s], taps[s][(a + r) / kGroups], sums[r]);
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
