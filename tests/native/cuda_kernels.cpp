// The CUDA kernels, run by emulation.h on the CPU, against the CPU kernels: leaves of many sizes in one launch, rows,
// packs and what is left after them, unaligned buffers, and the block that ends last and decides the step.
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dtype.h"
#include "launch.h"

namespace odenet {

int64_t last_level_cache() {
  return int64_t{1} << 40;
}

namespace {

void one_thread(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  body(begin, end, context);
}

std::mt19937_64 engine(0);
int failures = 0, cases = 0;

double draw() {
  return std::uniform_real_distribution<double>(-1, 1)(engine);
}
template <class T>
void draw_into(T& x) {
  x = static_cast<T>(static_cast<Real<T>>(draw()));
}
template <class R>
void draw_into(Complex<R>& x) {
  x = {static_cast<R>(draw()), static_cast<R>(draw())};
}

// Numbers on the heap, `shift` elements behind an aligned beginning.
template <class T>
class Numbers {
 public:
  Numbers(int64_t size, int shift) : all_(size + shift), shift_(shift) {
    for (T& x : all_) draw_into(x);
  }
  T* data() { return all_.data() + shift_; }
  bool operator==(const Numbers& other) const {
    return all_.empty() || std::memcmp(all_.data(), other.all_.data(), all_.size() * sizeof(T)) == 0;
  }

 private:
  std::vector<T> all_;
  int shift_;
};

void check(bool good, const std::string& what) {
  ++cases;
  if (good) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

bool near(double x, double y, double tolerance) {
  return std::abs(x - y) <= tolerance * (std::abs(x) + std::abs(y)) || (x != x && y != y);
}

// Columns of the leaves of a launch: whole packs, and not.
const std::vector<int64_t> kEven{64, 16, 2000, 0, 256}, kOdd{1, 5, 64, 257, 2000, 0, 33};
std::vector<int64_t> columns_in_use;
int copies = 1;  // leaves of each: a few in a small batch, many in a large one, more in several

template <class T>
struct Leaf {
  int64_t columns;
  Numbers<T> y, y0, y1;
  std::vector<Numbers<T>> k;
  Leaf(int64_t rows, int64_t columns, int stages, int shift)
      : columns(columns), y(rows * columns, shift), y0(rows * columns, shift), y1(rows * columns, shift) {
    for (int j = 0; j < stages; ++j) k.emplace_back(rows * columns, shift);
  }
};

template <class T>
std::vector<Leaf<T>> leaves_of(int64_t rows, int stages, int shift) {
  std::vector<Leaf<T>> leaves;
  for (int copy = 0; copy < copies; ++copy) {
    for (const int64_t columns : columns_in_use) leaves.emplace_back(rows, columns, stages, shift);
  }
  return leaves;
}

std::vector<double> draws(int64_t count) {
  std::vector<double> result(count);
  for (double& x : result) x = draw();
  return result;
}

template <class T>
void test_stage(const char* type, int64_t rows, int stages, int shift, bool with_y0) {
  auto leaves = leaves_of<T>(rows, stages, shift);
  auto expected = leaves;
  const std::vector<double> dt = draws(rows), a = draws(stages);
  std::vector<Stage<T>> args;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    Stage<T> s{};
    s.y0 = with_y0 ? leaves[leaf].y0.data() : nullptr;
    for (int j = 0; j < stages; ++j) {
      s.k[j] = leaves[leaf].k[j].data();
      s.a[j] = a[j];
    }
    s.dt = dt.data();
    s.stages = stages;
    s.rows = rows;
    s.columns = leaves[leaf].columns;
    s.y = expected[leaf].y.data();
    cpu::baseline::stage(s, one_thread);
    s.y = leaves[leaf].y.data();
    args.push_back(s);
  }
  cuda::stage(args.data(), static_cast<int>(args.size()), nullptr);
  bool same = true;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) same = same && leaves[leaf].y == expected[leaf].y;
  check(same, std::string("stage ") + type + ", rows " + std::to_string(rows) + ", slopes " + std::to_string(stages) +
                  ", shift " + std::to_string(shift));
}

template <class T>
void test_advance(const char* type, int64_t rows, int shift, bool with_stage) {
  auto leaves = leaves_of<T>(rows, 2, shift);
  auto expected = leaves;
  std::vector<double> accept(rows);
  for (int64_t row = 0; row < rows; ++row) accept[row] = row % 3 != 1;
  const std::vector<double> dt = draws(rows);
  std::vector<Advance<T>> args;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    Leaf<T>&mine = leaves[leaf], &other = expected[leaf];
    Advance<T> s{other.y0.data(),
                 other.k[0].data(),
                 mine.y1.data(),
                 mine.k[1].data(),
                 accept.data(),
                 rows,
                 mine.columns,
                 with_stage ? other.y.data() : nullptr,
                 0.2,
                 dt.data()};
    cpu::baseline::advance(s, one_thread);
    s.y0 = mine.y0.data();
    s.k0 = mine.k[0].data();
    if (with_stage) s.y = mine.y.data();
    args.push_back(s);
  }
  cuda::advance(args.data(), static_cast<int>(args.size()), nullptr);
  bool same = true;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    same = same && leaves[leaf].y0 == expected[leaf].y0 && leaves[leaf].k[0] == expected[leaf].k[0] &&
           leaves[leaf].y == expected[leaf].y;
  }
  check(same, std::string("advance ") + type + ", rows " + std::to_string(rows) + ", shift " + std::to_string(shift));
}

// A solver state in the middle of a solve.
std::vector<double> solver_state(int64_t rows) {
  std::vector<double> state(kNumFields * rows, 0.0);
  const auto field = [&](Field name, int64_t row) -> double& { return state[name * rows + row]; };
  for (int64_t row = 0; row < rows; ++row) {
    field(kTime, row) = 0.25;
    field(kDt, row) = row % 2 ? 0.125 : 0.75;  // the second lands on the end
    field(kStepEnd, row) = 0.25 + field(kDt, row);
    field(kProposal, row) = field(kDt, row);
    field(kInverse1, row) = field(kInverse2, row) = field(kDirection, row) = 1;
    field(kOutputBegin, row) = field(kOutputEnd, row) = 1;
  }
  return state;
}

template <class T, class R>
void test_error(const char* type, int64_t rows, int stages, int shift, double size) {
  auto leaves = leaves_of<T>(rows, stages, shift);
  std::vector<double> dt = draws(rows);
  const std::vector<double> e = draws(stages);
  std::vector<Error<T>> args;
  std::vector<double> expected(rows, -1.0), found(rows, -1.0);
  for (Leaf<T>& leaf : leaves) {
    Error<T> s{};
    s.y0 = leaf.y0.data();
    s.y1 = leaf.y1.data();
    for (int j = 0; j < stages; ++j) {
      s.k[j] = leaf.k[j].data();
      s.e[j] = e[j];
    }
    s.dt = dt.data();
    s.rtol = 1e-2 * size;
    s.atol = size;
    s.stages = stages;
    s.rows = rows;
    s.columns = leaf.columns;
    cpu::baseline::error(s, expected.data(), args.empty(), one_thread);
    args.push_back(s);
  }
  const int count = static_cast<int>(args.size());
  std::vector<double> workspace(cuda::error_workspace(args.data(), count));
  const std::string words = std::string("error ") + type + ", rows " + std::to_string(rows) + ", slopes " +
                            std::to_string(stages) + ", shift " + std::to_string(shift);
  cuda::error(args.data(), count, found.data(), true, workspace.data(), nullptr);
  bool same = true;
  for (int64_t row = 0; row < rows; ++row) same = same && near(found[row], expected[row], 1e-5);
  check(same, words);

  // And with the control of the step: as error and step_size one after the other.
  const std::vector<double> stops{1.0, double(kStopEnd)}, t{0.0, 0.3, 1.0};
  std::vector<double> one = solver_state(rows), two = one;
  std::vector<R> times_one(3 * rows), times_two(3 * rows);
  StepSize control{};
  control.stops = stops.data();
  control.t = t.data();
  control.c[1] = 0.5;
  control.c[2] = 1;
  control.controller = {5, 0.9, 10, 0.2, 0.2, 0, 0, 1, 0, 1e9, 1e9};
  control.rows = rows;
  control.num_stops = 1;
  control.num_outputs = 3;
  control.stages = 3;
  control.state = one.data();
  std::copy(found.begin(), found.end(), one.begin() + kErrorRatio * rows);
  cpu::baseline::step_size(control, times_one.data(), one_thread);
  control.state = two.data();
  unsigned done = 0;
  cuda::error_and_step_size(args.data(), count, workspace.data(), &done, control, times_two.data(), nullptr);
  check(one == two && done == 0, words + ", state after the control");
  check(std::memcmp(times_one.data(), times_two.data(), times_one.size() * sizeof(R)) == 0, words + ", stage times");
}

// One row in batches of others, wherever it stands there and however it lies in memory: the same to the last bit.
template <class T>
struct RowInBatch {
  static constexpr int kSlopes = 4;
  int64_t rows, columns, place;
  Numbers<T> y, y0, y1;
  std::vector<Numbers<T>> k;
  std::vector<double> dt;

  RowInBatch(int64_t rows, int64_t columns, int64_t place, int shift, int seed)
      : rows(rows),
        columns(columns),
        place(place),
        y(rows * columns, shift),
        y0(rows * columns, shift),
        y1(rows * columns, shift),
        dt(draws(rows)) {
    for (int j = 0; j < kSlopes; ++j) k.emplace_back(rows * columns, shift);
    const std::mt19937_64 others = std::exchange(engine, std::mt19937_64(seed));  // the row itself is always the same
    for (Numbers<T>* x : {&y0, &y1, &k[0], &k[1], &k[2], &k[3]}) {
      for (int64_t i = 0; i < columns; ++i) draw_into(x->data()[place * columns + i]);
    }
    dt[place] = 0.125;
    engine = others;
  }

  Error<T> error() {
    Error<T> s{};
    s.y0 = y0.data();
    s.y1 = y1.data();
    for (int j = 0; j < kSlopes; ++j) {
      s.k[j] = k[j].data();
      s.e[j] = 0.1 * (j + 1);
    }
    s.dt = dt.data();
    s.rtol = 1e-2;
    s.stages = kSlopes;  // atol 0: what is no element has no error either
    s.rows = rows;
    s.columns = columns;
    return s;
  }
  // The row's norm, and the sums that it is made of: a root hides most of what may differ.
  std::vector<double> norm() {
    const Error<T> s = error();
    std::vector<double> workspace(cuda::error_workspace(&s, 1)), ratio(rows);
    cuda::error(&s, 1, ratio.data(), true, workspace.data(), nullptr);
    const int64_t sums = workspace.size() / rows;
    std::vector<double> found(workspace.begin() + place * sums, workspace.begin() + (place + 1) * sums);
    found.push_back(ratio[place]);
    return found;
  }
  double norm_on_cpu() {
    std::vector<double> ratio(rows);
    cpu::baseline::error(error(), ratio.data(), true, one_thread);
    return ratio[place];
  }
};

// What an op that has no sums makes of the row.
template <class T>
std::vector<T> stage_of(RowInBatch<T>& batch) {
  const Error<T> e = batch.error();
  Stage<T> s{};
  s.y = batch.y.data();
  s.y0 = e.y0;
  std::copy(e.k, e.k + e.stages, s.k);
  std::copy(e.e, e.e + e.stages, s.a);
  s.dt = e.dt;
  s.stages = e.stages;
  s.rows = e.rows;
  s.columns = e.columns;
  cuda::stage(&s, 1, nullptr);
  return {s.y + batch.place * s.columns, s.y + (batch.place + 1) * s.columns};
}

struct Place {
  int64_t rows, place;
  int shift;
};

template <class T>
void test_row_in_batches(const char* type) {
  constexpr bool real = std::is_same_v<T, RealPart<T>>;
  for (const int64_t columns : {1, 3, 7, 16, 33, 64, 129, 1000, 4099, 12345}) {
    bool same = true, same_on_cpu = true, same_stage = true;
    for (int seed = 0; seed < (columns < 1000 ? 4 : 1); ++seed) {
      RowInBatch<T> alone(1, columns, 0, 0, seed);
      const std::vector<double> norm = alone.norm();
      const double norm_on_cpu = alone.norm_on_cpu();
      std::vector<T> stage;
      if constexpr (real) stage = stage_of(alone);
      same = same && norm.back() > 0 && near(norm.back(), norm_on_cpu, 1e-5);
      for (const auto [rows, place, shift] :
           {Place{1, 0, 1}, Place{1, 0, 2}, Place{3, 1, 0}, Place{3, 1, 1}, Place{10, 9, 0}}) {
        RowInBatch<T> batch(rows, columns, place, shift, seed);
        same = same && batch.norm() == norm;
        same_on_cpu = same_on_cpu && batch.norm_on_cpu() == norm_on_cpu;
        if constexpr (real) {
          same_stage = same_stage && std::memcmp(stage_of(batch).data(), stage.data(), columns * sizeof(T)) == 0;
        }
      }
    }
    const std::string words = std::string(" of a row of ") + type + " in batches, columns " + std::to_string(columns);
    check(same, "norm" + words);
    check(same_on_cpu, "norm on the CPU" + words);
    check(same_stage, "stage" + words);
  }
}

template <class T>
void test_dense_output(const char* type, int64_t rows) {
  constexpr int kStages = 4, kDegree = 3;
  auto leaves = leaves_of<T>(rows, kStages, 0);
  std::vector<double> state = solver_state(rows);
  for (int64_t row = 0; row < rows; ++row) {
    state[kLastTime * rows + row] = 0.25;
    state[kLastDt * rows + row] = 0.5;
    state[kTime * rows + row] = 0.75;
    state[kOutputEnd * rows + row] = row % 3;  // none, one or two outputs
    state[kOutputBegin * rows + row] = 0;
  }
  const std::vector<double> t{0.5, 0.75}, p = draws(kStages * kDegree);
  std::vector<Numbers<T>> found, expected;
  std::vector<DenseOutput<T>> args;
  for (Leaf<T>& leaf : leaves) found.emplace_back(2 * rows * leaf.columns, 0);
  expected = found;
  for (size_t leaf = 0; leaf < leaves.size(); ++leaf) {
    DenseOutput<T> s{};
    s.y0 = leaves[leaf].y0.data();
    s.y1 = leaves[leaf].y1.data();
    for (int j = 0; j < kStages; ++j) s.k[j] = leaves[leaf].k[j].data();
    std::copy(p.begin(), p.end(), s.p);
    s.state = state.data();
    s.t = t.data();
    s.stages = kStages;
    s.degree = kDegree;
    s.rows = rows;
    s.columns = leaves[leaf].columns;
    s.ys = expected[leaf].data();
    cpu::baseline::dense_output(s, one_thread);
    s.ys = found[leaf].data();
    args.push_back(s);
  }
  cuda::dense_output(args.data(), static_cast<int>(args.size()), nullptr);
  check(found == expected, std::string("dense_output ") + type + ", rows " + std::to_string(rows));
}

void test_first_step(int64_t rows) {
  const std::vector<double> stops{1.0, double(kStopEnd)}, t{0.0, 1.0};
  std::vector<double> norms = draws(3 * rows);
  for (double& x : norms) x = std::abs(x);
  for (int phase = 0; phase < 2; ++phase) {
    std::vector<double> one = solver_state(rows), two = one;
    std::vector<float> times_one(rows), times_two(rows);
    StepSize control{};
    control.stops = stops.data();
    control.t = t.data();
    control.controller = {5, 0.9, 10, 0.2, 0.2, 0, 0, 1, 0, 1e9, 1e9};
    control.rows = rows;
    control.num_stops = 1;
    control.num_outputs = 2;
    control.stages = 1;
    const FirstStep first{norms.data(), 0, phase};
    control.state = one.data();
    cpu::baseline::first_step(control, first, times_one.data(), one_thread);
    control.state = two.data();
    cuda::first_step(control, first, times_two.data(), nullptr);
    check(one == two && times_one == times_two, "first_step, rows " + std::to_string(rows));
    cpu::baseline::step_size(control, times_one.data(), one_thread);
    control.state = one.data();
    cuda::step_size(control, times_two.data(), nullptr);
    check(one == two && times_one == times_two, "step_size, rows " + std::to_string(rows));
  }
}

template <class T>
void test_real(const char* type) {
  for (const auto& columns : {kEven, kOdd}) {
    columns_in_use = columns;
    for (const int64_t rows : {1, 7}) {
      copies = rows == 1 ? 1 : 3;
      for (const int shift : {0, 1}) {
        for (const int stages : {0, 1, 6, 12}) test_stage<T>(type, rows, stages, shift, stages != 1);
        for (const bool with_stage : {false, true}) test_advance<T>(type, rows, shift, with_stage);
        test_error<T, T>(type, rows, shift ? 6 : 12, shift, rows == 1 ? 1 : 1e-3);
      }
      test_dense_output<T>(type, rows);
    }
  }
}

}  // namespace
}  // namespace odenet

int main() {
  using namespace odenet;
  test_real<float>("float");
  test_real<double>("double");
  test_real<Half>("half");
  test_real<BFloat16>("bfloat16");
  for (const int64_t rows : {1, 7}) {
    test_error<Complex<float>, float>("complex of float", rows, 6, 0, 1);
    test_error<Complex<double>, double>("complex of double", rows, 6, 0, 1e-3);
    test_first_step(rows);
  }
  test_row_in_batches<float>("float");
  test_row_in_batches<double>("double");
  test_row_in_batches<Half>("half");
  test_row_in_batches<BFloat16>("bfloat16");
  test_row_in_batches<Complex<float>>("complex of float");
  test_row_in_batches<Complex<double>>("complex of double");
  test_error<float, float>("float of many rows", 100, 2, 0, 1);  // decided in a launch of its own
  columns_in_use = {3, 4200};                                    // and rows of many chunks
  test_error<double, double>("double of long rows", 9, 2, 0, 1);
  columns_in_use = kOdd;
  copies = 24;
  test_stage<float>("float of many leaves", 1, 6, 0, true);
  test_advance<float>("float of many leaves", 1, 0, true);
  test_error<float, float>("float of many leaves", 1, 6, 0, 1);
  test_dense_output<float>("float of many leaves", 1);
  std::printf("%d checks, %d failed\n", cases, failures);
  return failures != 0;
}
