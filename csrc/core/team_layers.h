// Matrix products of a team: of a layer's weights and the rows that all members see, and of two slabs of such rows, for
// the weights' gradient. By the threads, or by the tensor cores.
#pragma once

#include <type_traits>

#include "tensor_core.h"

#if defined(ODENET_BLOCKS)

namespace odenet {
namespace ODENET_LEVEL {

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

}  // namespace ODENET_LEVEL
}  // namespace odenet

#endif
