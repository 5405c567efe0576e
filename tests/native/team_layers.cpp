// Products of a layer's weights by the threads of a block (core/team_layers.h), run by emulation.h on the CPU: rows
// that no thread's share divides, weights by rows and by columns, staged and not, one lane a thread and several. Sums
// are added up in the order of the columns, so they must be right to the bit; tensor cores' must not depend on when the
// weights are rounded.
//
// ODENET_TEAM, ODENET_GROUPS, ODENET_ROW and NUMBER, the type of all numbers, are given by the compiler.
#define ODENET_BLOCKS
#define ODENET_STAGED (1 << 16)
#define ODENET_TENSOR_CORE Tf32
#include "core/team_layers.h"

#include <cmath>
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "core/run.h"

namespace odenet {
namespace ODENET_LEVEL {

using T = NUMBER;
constexpr int kBytes = kStaged + 400 * kRow * int(sizeof(T));
int cases = 0, failures = 0;

// How a product is computed: kThreads with `wide` lanes a thread; kWarps with weights that are rounded or not.
enum Way { kThreads, kWarps, kWarpsRounded };

// As odenet_cuda/compiled/team_text.py sets them apart.
constexpr int row_in_memory(int columns) {
  const int row = (columns + 3) / 4 * 4;
  return row % 8 == 0 ? row + 4 : row;
}

template <int rows, int columns, bool transposed, int wide, bool staged, Way way>
void kernel(const T* w, const T* bias, const T* x, T* y) {
  const Block team;
  constexpr int high = transposed ? columns : rows, long_ = transposed ? rows : columns;  // of the matrix in memory
  constexpr int step = staged ? row_in_memory(long_) : long_;
  constexpr int row = transposed ? 1 : step, column = transposed ? step : 1;
  using Core = std::conditional_t<way == kWarpsRounded, Tf32, void>;
  if constexpr (staged) stage_matrix<high, long_, long_, step, Core>(w, 0);
  const T* weights = staged ? static_cast<const T*>(team_memory(0)) : w;
  const Shared<T> in = rows_at<T>(kStaged), out = rows_at<T>(kStaged + columns * kRow * int(sizeof(T)));
  for (int c = group(); c < columns; c += kGroups) in[c] = x[c * kTeam + team.lane()];
  team.sync();
  const auto start = [&](int i, int lane) { return bias[i] + T(lane); };
  if constexpr (way == kThreads) {
    linear_of_threads<rows, columns, row, column, wide, staged>(weights, in, out, start);
  } else if constexpr (std::is_same_v<T, float>) {
    linear_of_warps<rows, columns, row, column, way == kWarpsRounded>(weights, in, out, start);
  }
  team.sync();
  for (int r = group(); r < rows; r += kGroups) y[r * kTeam + team.lane()] = out[r];
}

std::vector<T> draw(int count) {
  static std::mt19937 engine(0);
  std::vector<T> numbers(count);
  for (T& x : numbers) x = std::uniform_real_distribution<T>(-1, 1)(engine);
  return numbers;
}

void check(bool good, const char* what, int rows, int columns, bool transposed, int wide, bool staged) {
  ++cases;
  if (good) return;
  ++failures;
  std::printf("%s: %d x %d, transposed %d, wide %d, staged %d\n", what, rows, columns, transposed, wide, staged);
}

template <int rows, int columns, bool transposed, int wide, bool staged, Way way>
std::vector<T> run(const std::vector<T>& w, const std::vector<T>& bias, const std::vector<T>& x) {
  std::vector<T> y(rows * kTeam, T(NAN));
  cuda::run<Block::size, kBytes>(kernel<rows, columns, transposed, wide, staged, way>, 1, nullptr, w.data(),
                                 bias.data(), x.data(), y.data());
  return y;
}

template <int rows, int columns, bool transposed, bool staged>
void try_layer() {
  const std::vector<T> w = draw(rows * columns), bias = draw(rows), x = draw(columns * kTeam);
  std::vector<T> expected(rows * kTeam);
  for (int r = 0; r < rows; ++r) {
    for (int lane = 0; lane < kTeam; ++lane) {
      T sum = bias[r] + T(lane);
      for (int c = 0; c < columns; ++c) {
        sum += x[c * kTeam + lane] * w[transposed ? c * rows + r : r * columns + c];
      }
      expected[r * kTeam + lane] = sum;
    }
  }
  const auto by_threads = [&](auto wide) {
    const auto y = run<rows, columns, transposed, wide, staged, kThreads>(w, bias, x);
    check(y == expected, "other numbers", rows, columns, transposed, wide, staged);
  };
  by_threads(std::integral_constant<int, 1>{});
  by_threads(std::integral_constant<int, 2>{});
  by_threads(std::integral_constant<int, 4>{});
  if constexpr (std::is_same_v<T, float> && staged) {
    const auto y = run<rows, columns, transposed, 0, staged, kWarps>(w, bias, x);
    double error = 0;
    for (int i = 0; i < rows * kTeam; ++i) error = std::fmax(error, std::fabs(double(y[i]) - expected[i]));
    check(error < 1e-3 * columns, "tensor cores are wrong", rows, columns, transposed, 0, staged);
    check(y == run<rows, columns, transposed, 0, staged, kWarpsRounded>(w, bias, x), "rounded beforehand differs", rows,
          columns, transposed, 0, staged);
  }
}

template <int rows, int columns>
void try_layers() {
  try_layer<rows, columns, false, false>();
  try_layer<rows, columns, false, true>();
  try_layer<rows, columns, true, false>();
  try_layer<rows, columns, true, true>();
}

}  // namespace ODENET_LEVEL
}  // namespace odenet

int main() {
  using namespace odenet::ODENET_LEVEL;
  try_layers<3, 9>();
  try_layers<37, 36>();
  try_layers<130, 21>();
  std::printf("%d checks, %d failed\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
