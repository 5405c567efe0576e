// Matrix products of a team: of a layer's weights and the rows that all members see, and of two slabs of such rows, for
// the weights' gradient. By the threads, or by the tensor cores.
#pragma once

#include <type_traits>

#include "tensor_core.h"

#if defined(ODENET_BLOCKS)

namespace odenet {
namespace ODENET_LEVEL {

// Some numbers, which are loaded and stored in pieces of sixteen bytes at most.
template <class T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Several {
  T numbers[n];
};
template <int n, class T>
ODENET_HD Several<T, n> load_several(const T* from) {
  return *reinterpret_cast<const Several<T, n>*>(from);
}

// What of a product a thread computes: some rows, of `wide` lanes. With one lane it is that of the thread, and the rows
// are its group's. With more, neighbours have the same lanes, and threads two apart the same rows: so half a warp
// that loads sixteen bytes a thread asks for 128 at most, which the memory of a team gives at once.
template <int wide>
struct Part {
  static constexpr int across = kTeam / wide, count = Block::size / across;
  int lane, row;
  ODENET_HD Part() {
    const int thread = Block{}.thread();
    if constexpr (wide == 1) {
      lane = thread % kTeam, row = thread / kTeam;
    } else {
      lane = thread / 2 % across * wide, row = thread / 2 / across * 2 + thread % 2;
    }
  }
};

// Numbers of the part's lanes in a row: of a thread's own numbers if it has one lane.
template <int wide, class X>
ODENET_HD auto load_lanes_of(const X& x, int row, int lane) {
  if constexpr (wide == 1) {
    return Several<std::remove_cvref_t<decltype(x[row])>, 1>{x[row]};
  } else {
    return load_several<wide>(&x.at(row, lane));
  }
}

// y[r] = start(r, lane) + sum_c w[r * row + c * column] x[c], each thread for its rows and `wide` lanes. aligned: w may
// be read in sixteen bytes.
template <int rows, int columns, int row, int column, int wide, bool aligned, class X, class T, class Start>
ODENET_HD void linear_of_threads(const T* w, const X& x, const Shared<T>& y, const Start& start) {
  using Mine = Part<wide>;
  constexpr int each = (rows + Mine::count - 1) / Mine::count, most = 32 / int(sizeof(T));
  constexpr int tall = each < most ? each : most;
  constexpr int apart = wide == 1 || column == 1 ? Mine::count : 1;  // rows of a thread
  constexpr int word = aligned ? 16 / int(sizeof(T)) : 1;
  constexpr int deep = column == 1 && row % word == 0 ? word : 1, whole = columns / deep * deep;
  // Rows whose weights lie side by side, and are loaded at once.
  constexpr bool beside = word > 1 && row == 1 && apart == 1 && column % word == 0;
  constexpr int side = beside && tall % word == 0 ? word : beside && tall % 2 == 0 ? 2 : 1;
  const Mine mine;
  for (int begin = mine.row * (apart == 1 ? tall : 1); begin < rows; begin += tall * Mine::count) {
    Several<T, wide> sum[tall];
    int first[tall];  // where the weights of a row begin
    ODENET_UNROLL
    for (int i = 0; i < tall; ++i) {
      const int r = begin + i * apart < rows ? begin + i * apart : begin;
      first[i] = r * row;
      ODENET_UNROLL
      for (int k = 0; k < wide; ++k) sum[i].numbers[k] = start(r, mine.lane + k);
    }
    // Of `count` columns from c on; weight(i, j): of row i and of column c + j.
    const auto add = [&](int c, auto count, const auto& weight) {
      ODENET_UNROLL
      for (int j = 0; j < count; ++j) {
        const auto value = load_lanes_of<wide>(x, c + j, mine.lane);
        ODENET_UNROLL
        for (int i = 0; i < tall; ++i) {
          ODENET_UNROLL
          for (int k = 0; k < wide; ++k) sum[i].numbers[k] += value.numbers[k] * weight(i, j);
        }
      }
    };
    for (int c = 0; c < whole; c += deep) {
      if constexpr (deep > 1) {
        Several<T, deep> weights[tall];
        ODENET_UNROLL
        for (int i = 0; i < tall; ++i) weights[i] = load_several<deep>(w + first[i] + c);
        add(c, std::integral_constant<int, deep>{}, [&](int i, int j) { return weights[i].numbers[j]; });
      } else {
        Several<T, side> weights[tall / side];
        ODENET_UNROLL
        for (int i = 0; i < tall / side; ++i) weights[i] = load_several<side>(w + first[i * side] + c * column);
        add(c, std::integral_constant<int, 1>{}, [&](int i, int) { return weights[i / side].numbers[i % side]; });
      }
    }
    for (int c = whole; c < columns; ++c) {
      add(c, std::integral_constant<int, 1>{}, [&](int i, int) { return w[first[i] + c * column]; });
    }
    ODENET_UNROLL
    for (int i = 0; i < tall; ++i) {
      const int r = begin + i * apart;
      if (r >= rows) break;
      if constexpr (wide == 1) {
        y[r] = sum[i].numbers[0];
      } else {
        *reinterpret_cast<Several<T, wide>*>(&y.at(r, mine.lane)) = sum[i];
      }
    }
  }
}

// The same by tensor cores, whose operands are rounded. rounded: w has been.
template <int rows, int columns, int row, int column, bool rounded, class Start>
ODENET_HD void linear_of_warps(const float* w, const Shared<float>& x, const Shared<float>& y, const Start& start) {
  using Tiles = Dealt<(rows + 15) / 16, kTeam / 8>;
  constexpr int warps = Block::size / 32, tall = Tiles::tall * 16;
  constexpr int room = warps / Tiles::across > 1 ? warps / Tiles::across : 1;  // shares one below the other at a time
  constexpr int high = Tiles::down < room ? Tiles::down : room;
  for (int top = 0; top < rows; top += high * tall) {
    const auto first_row = [&](int job) { return top + job % high * tall; };
    const auto first_lane = [&](int job) { return job / high * Tiles::together * 8; };
    WarpSums<TensorCore, high * Tiles::across, Tiles::tall, Tiles::together> sums;
    sums.each([&](int job, int i, int k, float& sum) {
      if (first_row(job) + i < rows) sum = start(first_row(job) + i, first_lane(job) + k);
    });
    sums.template add<columns, rounded>(
        [&](int job, int i, int j) {
          const int r = first_row(job) + i;  // rows behind the last are of no use
          return w[(r < rows ? r : rows - 1) * row + j * column];
        },
        [&](int job, int j, int k) { return x.at(j, first_lane(job) + k); });
    sums.each([&](int job, int i, int k, float sum) {
      if (first_row(job) + i < rows) y.at(first_row(job) + i, first_lane(job) + k) = sum;
    });
  }
}

// A constant matrix into the team's memory, its rows `to` apart. Core: that rounds it, or void.
template <int rows, int columns, int row, int to, class Core, class T>
ODENET_HD void stage_matrix(const T* from, int offset) {
  T* staged = static_cast<T*>(team_memory(offset));
  for (int n = Block{}.thread(); n < rows * columns; n += Block::size) {
    T& number = staged[n / columns * to + n % columns];
    number = from[n / columns * row + n % columns];
    if constexpr (!std::is_void_v<Core>) number = Core::round(number);
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
      for (int i = 0; i < kTeam; i += 4) {
        Several<T, 4> a[block], b[block];
        ODENET_UNROLL
        for (int n = 0; n < block; ++n) {
          a[n] = load_several<4>(&left(row + n * across, i)), b[n] = load_several<4>(&right(column + n * across, i));
        }
        ODENET_UNROLL
        for (int k = 0; k < 4; ++k) {
          ODENET_UNROLL
          for (int r = 0; r < block; ++r) {
            ODENET_UNROLL
            for (int c = 0; c < block; ++c) sum[q][r][c] += a[r].numbers[k] * b[c].numbers[k];
          }
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
  using Tiles = Dealt<kSide / 16, kSide / 8>;
  static constexpr int across = Tiles::across, tall = Tiles::tall * 16, wide = Tiles::together * 8;
  WarpSums<Core, Tiles::down * across, Tiles::tall, Tiles::together> sums;

  ODENET_HD void add(const Slab<float>& left, const Slab<float>& right) {
    sums.template add<kTeam, false>([&](int job, int i, int j) { return left(job / across * tall + i, j); },
                                    [&](int job, int j, int k) { return right(job % across * wide + k, j); });
  }
  template <class Body>
  ODENET_HD void each(const Body& body) {
    sums.each([&](int job, int i, int k, float sum) { body(job / across * tall + i, job % across * wide + k, sum); });
  }
};

template <class T>
using ProductsOf = std::conditional_t<std::is_void_v<TensorCore>, Products<T>, TensorProducts<TensorCore>>;

}  // namespace ODENET_LEVEL
}  // namespace odenet

#endif
