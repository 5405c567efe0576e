// Matrix products of a tile: those of a linear layer, and those of its weights' gradient. [feature][lane] throughout.
#pragma once

#include <type_traits>
#include <utility>

#include "tensor_core.h"

namespace odenet {
namespace ODENET_LEVEL {

// Rows of one pass: as many accumulators as the machine has registers for, so that an activation is loaded once for
// all.
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

#if defined(ODENET_BLOCKS)

// Sixteen bytes, loaded at once.
template <class T>
struct alignas(16) Several {
  static constexpr int count = 16 / int(sizeof(T));
  T numbers[count];
};

// y[r] = start(r, lane) + sum_c w[r * row + c * column] x[c], each group for its rows. aligned: w may be read in
// sixteen bytes.
template <int rows, int columns, int row, int column, bool aligned, class X, class T, class Start>
ODENET_HD void linear_of_groups(const T* w, const X& x, const Shared<T>& y, const Start& start) {
  constexpr int of_pass = own(rows) < 8 ? own(rows) : 8;
  constexpr int together = aligned && column == 1 && row % Several<T>::count == 0 ? Several<T>::count : 1;
  constexpr int whole = columns / together * together;
  for (int begin = group(); begin < rows; begin += of_pass * kGroups) {
    T sum[of_pass];
    const T* from[of_pass];
    ODENET_UNROLL
    for (int i = 0; i < of_pass; ++i) {
      const int r = begin + i * kGroups < rows ? begin + i * kGroups : begin;
      sum[i] = start(r, Block{}.lane());
      from[i] = w + r * row;
    }
    for (int c = 0; c < whole; c += together) {
      T value[together];
      ODENET_UNROLL
      for (int j = 0; j < together; ++j) value[j] = x[c + j];
      ODENET_UNROLL
      for (int i = 0; i < of_pass; ++i) {
        if constexpr (together == 1) {
          sum[i] += value[0] * from[i][c * column];
        } else {
          const Several<T> weights = *reinterpret_cast<const Several<T>*>(from[i] + c);
          ODENET_UNROLL
          for (int j = 0; j < together; ++j) sum[i] += value[j] * weights.numbers[j];
        }
      }
    }
    for (int c = whole; c < columns; ++c) {
      const T value = x[c];
      ODENET_UNROLL
      for (int i = 0; i < of_pass; ++i) sum[i] += value * from[i][c * column];
    }
    ODENET_UNROLL
    for (int i = 0; i < of_pass; ++i) {
      if (begin + i * kGroups < rows) y[begin + i * kGroups] = sum[i];
    }
  }
}

// The same by tensor cores, whose operands are rounded.
template <int rows, int columns, int row, int column, class Start>
ODENET_HD void linear_of_warps(const float* w, const Shared<float>& x, const Shared<float>& y, const Start& start) {
  constexpr int warps = Block::size / 32, tall = (rows + 15) / 16, high = tall < warps ? tall : warps, wide = kTeam / 8;
  // As many products in a row as leave work for every warp: they have the left operand in common.
  constexpr int together = high * (wide / 4) >= warps ? 4 : high * (wide / 2) >= warps ? 2 : 1;
  for (int top = 0; top < rows; top += high * 16) {
    const auto first_row = [&](int job) { return top + job % high * 16; };
    const auto first_lane = [&](int job) { return job / high * together * 8; };
    WarpSums<TensorCore, high*(wide / together), together> sums;
    sums.each([&](int job, int i, int k, float& sum) {
      if (first_row(job) + i < rows) sum = start(first_row(job) + i, first_lane(job) + k);
    });
    sums.template add<columns>(
        [&](int job, int i, int j) {
          const int r = first_row(job) + i;
          return r < rows && j < columns ? w[r * row + j * column] : 0.0f;
        },
        [&](int job, int j, int k) { return j < columns ? x.at(j, first_lane(job) + k) : 0.0f; });
    sums.each([&](int job, int i, int k, float sum) {
      if (first_row(job) + i < rows) y.at(first_row(job) + i, first_lane(job) + k) = sum;
    });
  }
}

// A constant matrix into the team's memory, its rows `to` apart.
template <int rows, int columns, int row, int to, class T>
ODENET_HD void stage_matrix(const T* from, int offset) {
  T* staged = static_cast<T*>(team_memory(offset));
  for (int n = Block{}.thread(); n < rows * columns; n += Block::size) {
    staged[n / columns * to + n % columns] = from[n / columns * row + n % columns];
  }
}

#endif

#if !defined(__CUDACC__)

// pairs[i]: the sums of two neighbours each, those of x first.
template <class V, int... I>
ODENET_HD V add_neighbours(const V& x, const V& y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, (2 * I)...) + __builtin_shufflevector(x, y, (2 * I + 1)...);
#else
  using Index = decltype(x < y);
  return __builtin_shuffle(x, y, Index{2 * I...}) + __builtin_shuffle(x, y, Index{2 * I + 1 ...});
#endif
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

#endif

// The sum over the lanes, always in the same order.
template <class P>
ODENET_HD Number<P> sum_of_lanes(const P& x) {
  Number<P> sum(0);
  for (int i = 0; i < Lanes<P>::width; ++i) sum += lane(x, i);
  return sum;
}

#if defined(ODENET_BLOCKS)

// Rows of a slab of numbers that the whole team sees, [row][lane], and how far they lie apart.
constexpr int kSide = kGroups == 1 ? 16 : 64, kSlabRow = kTeam + 4;

template <class T>
struct Slab {
  T* numbers;
  ODENET_HD explicit Slab(int which)
      : numbers(static_cast<T*>(team_memory(kStaged + which * kSide * kSlabRow * int(sizeof(T))))) {}
  ODENET_HD T& operator()(int row, int lane) const { return numbers[row * kSlabRow + lane]; }
};

// Products of the rows of two slabs, sums over the lanes: each thread adds up block x block of them at several places.
template <class T>
struct Products {
  static constexpr int threads = Block::size;
  static constexpr int block = kSide * kSide >= 16 * threads ? 4 : kSide * kSide >= 4 * threads ? 2 : 1;
  static constexpr int across = kSide / block, places = (across * across + threads - 1) / threads;
  T sum[places][block][block] = {};

  ODENET_HD static int place(int q) { return q * threads + Block{}.thread(); }
  ODENET_HD void add(const Slab<T>& left, const Slab<T>& right) {
    for (int q = 0; q < places && place(q) < across * across; ++q) {
      const int row = place(q) / across, column = place(q) % across;
      for (int i = 0; i < kTeam; ++i) {
        T a[block], b[block];
        ODENET_UNROLL
        for (int n = 0; n < block; ++n) a[n] = left(row + n * across, i), b[n] = right(column + n * across, i);
        ODENET_UNROLL
        for (int r = 0; r < block; ++r) {
          ODENET_UNROLL
          for (int c = 0; c < block; ++c) sum[q][r][c] += a[r] * b[c];
        }
      }
    }
  }
  // body(row, column, sum) for all of them.
  template <class Body>
  ODENET_HD void each(const Body& body) const {
    for (int q = 0; q < places && place(q) < across * across; ++q) {
      for (int r = 0; r < block; ++r) {
        for (int c = 0; c < block; ++c) {
          body(place(q) / across + r * across, place(q) % across + c * across, sum[q][r][c]);
        }
      }
    }
  }
};

// The same by tensor cores.
template <class Core>
struct TensorProducts {
  static constexpr int together = kSide < 32 ? kSide / 8 : 4, across = kSide / 8 / together;
  WarpSums<Core, kSide / 16 * across, together> sums;

  ODENET_HD void add(const Slab<float>& left, const Slab<float>& right) {
    sums.template add<kTeam>(
        [&](int job, int i, int j) { return j < kTeam ? left(job / across * 16 + i, j) : 0.0f; },
        [&](int job, int j, int k) { return j < kTeam ? right(job % across * together * 8 + k, j) : 0.0f; });
  }
  template <class Body>
  ODENET_HD void each(const Body& body) {
    sums.each(
        [&](int job, int i, int k, float sum) { body(job / across * 16 + i, job % across * together * 8 + k, sum); });
  }
};

template <class T>
using ProductsOf = std::conditional_t<std::is_void_v<TensorCore>, Products<T>, TensorProducts<TensorCore>>;

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
        for (int c = 0; c < columns; ++c) sums[r * columns + c] += value * taps[s][b + c];
      }
    }
  } else {
#if !defined(__CUDACC__)
    // Blocks of as many results as a vector has lanes, so that one reduction gives them all.
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
              for (int i = 0; i < high; ++i) sum[i * wide + j] += left[s][i].v[h] * right;
            }
          }
        }
        const Vector<T> total = sum_each<T>(sum);
        for (int i = 0; i < high && r + i < rows; ++i) {
          for (int j = 0; j < wide && c + j < columns; ++j) sums[(r + i) * columns + c + j] += total[i * wide + j];
        }
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
    for (int s = 0; s < steps; ++s) sum = sum + weight[s] * taps[s][place];
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
  } else {
    for (int r = 0; r < rows; ++r) sums[r] += sum_of_lanes(of_tap(a + r));
  }
}

// The same lane by lane: of numbers that each sample has for itself. A member of the team adds what it has.
template <int rows, int steps, int a, class P, int N>
ODENET_HD void lane_sums(const P (*taps)[N], const P* weight, P* sums) {
  for (int r = own_from(a) - a; r < rows; r += kGroups) {
    for (int s = 0; s < steps; ++s) sums[r] = sums[r] + weight[s] * taps[s][(a + r) / kGroups];
  }
}

}  // namespace ODENET_LEVEL
}  // namespace odenet
