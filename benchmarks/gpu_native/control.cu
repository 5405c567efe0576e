// The error of a step, and its control by the block that ends last.
#include <map>

#include "native.h"

namespace odenet::native {

namespace {

constexpr int kSlopes = 6;

// A solver state far from its end, whose steps are all accepted and stay what they are.
struct Control {
  StepSize args{};
  Memory<double> state, stops, t;
  explicit Control(int64_t rows)
      : state(begin(rows)), stops(std::vector<double>{1e9, double(kStopEnd)}), t(std::vector<double>{0.0, 1e9}) {
    args.state = state.get();
    args.stops = stops.get();
    args.t = t.get();
    const double c[7] = {0, 0.2, 0.3, 0.8, 8.0 / 9, 1, 1};
    std::copy(c, c + 7, args.c);
    args.controller = {5, 0.9, 10, 0.2, 0.2, 0, 0, 1, 0, 1e-9, 1e15};  // max_step is the step
    args.rows = rows;
    args.num_stops = 1;
    args.num_outputs = 2;
    args.stages = 7;
  }
  static std::vector<double> begin(int64_t rows) {
    std::vector<double> x(kNumFields * rows, 0.0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int field : {kDt, kProposal, kStepEnd}) x[field * rows + row] = 1e-9;
      for (int field : {kInverse1, kInverse2, kOutputBegin, kOutputEnd, kDirection}) x[field * rows + row] = 1;
    }
    return x;
  }
};

template <class T>
struct ErrorCase {
  Memory<T> y0, y1, times;
  std::vector<Memory<T>> k;
  Memory<double> dt, ratio;
  Memory<unsigned> done{std::vector<unsigned>{0}};
  Error<T> args{};
  Memory<double> work;
  Control control;
  ErrorCase(int64_t rows, int64_t columns)
      : y0(filled<T>(rows * columns, 100)),
        y1(filled<T>(rows * columns, 101)),
        times(7 * rows),
        dt(std::vector<double>(rows, 1e-4)),
        ratio(rows),
        args(bind(rows, columns)),
        work(cuda::error_workspace(&args, 1)),
        control(rows) {}
  void error() const { MUST(cuda::error(&args, 1, ratio.get(), true, work.get(), stream)); }
  void with_control() const {
    MUST(cuda::error_and_step_size(&args, 1, work.get(), done.get(), control.args, times.get(), stream));
  }

 private:
  Error<T> bind(int64_t rows, int64_t columns) {
    Error<T> s{};
    s.y0 = y0.get();
    s.y1 = y1.get();
    for (int j = 0; j < kSlopes; ++j) {
      k.push_back(filled<T>(rows * columns, j));
      s.k[j] = k[j].get();
      s.e[j] = 0.1 / (j + 1);
    }
    s.dt = dt.get();
    s.rtol = s.atol = 1e-3;
    s.stages = kSlopes;
    s.rows = rows;
    s.columns = columns;
    return s;
  }
};

template <class T>
double expected_ratio(const Error<T>& s, int64_t row, double dt) {
  double sum = 0;
  for (int64_t i = row * s.columns; i < (row + 1) * s.columns; ++i) {
    double error = 0;
    for (int j = 0; j < kSlopes; ++j) error += dt * s.e[j] * rounded<T>(i, j);
    error /= s.atol + s.rtol * std::max(std::abs(rounded<T>(i, 100)), std::abs(rounded<T>(i, 101)));
    sum += error * error;
  }
  return std::sqrt(sum / s.columns);
}

// Three times, for the counter of blocks must be left as it was.
template <class T>
void check_error(int64_t rows, int64_t columns) {
  const ErrorCase<T> made(rows, columns);
  std::map<int64_t, double> expected;
  for (int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
    if (!expected.count(row)) expected[row] = expected_ratio(made.args, row, 1e-4);
  }
  for (int again = 1; again <= 3; ++again) {
    made.error();
    made.with_control();
    const std::vector<double> alone = made.ratio.fetch(), state = made.control.state.fetch();
    for (const auto& pair : expected) {
      const int64_t row = pair.first;
      const double ratio = pair.second;
      const double both = state[kErrorRatio * rows + row], accepted = state[kNumAccepted * rows + row];
      const bool good = std::abs(alone[row] - ratio) < 1e-4 * ratio && both == alone[row] && accepted == again;
      compare(good, std::string("error ") + Name<T>::is, [&](Line& line) {
        line.add("rows", rows)
            .add("columns", columns)
            .add("row", row)
            .add("ratio", alone[row])
            .add("with control", both);
        line.add("expected", ratio).add("accepted", accepted);
      });
    }
  }
}

template <class T>
void errors_of(double copy) {
  using Sizes = std::vector<std::pair<int64_t, int64_t>>;
  for (auto [rows, columns] : quick ? Sizes{{1, 5}, {1, 7001}, {7, 257}, {300, 6}}
                                    : Sizes{{1, 5}, {1, 70001}, {1, 3000000}, {7, 257}, {300, 64}, {4096, 8}}) {
    check_error<T>(rows, columns);
  }
  for (int64_t mib : {1, 64, 256}) {
    const int64_t size = mib * mebi() / sizeof(T);
    const ErrorCase<T> made(1, size);
    const Time alone = timed([&] { made.error(); }, mib == 1 ? 50 : 1);
    const Time both = timed([&] { made.with_control(); }, mib == 1 ? 50 : 1);
    const double bytes = (kSlopes + 2.0) * size * sizeof(T);
    if (quick) continue;
    Line line(std::string("error ") + Name<T>::is);
    line.add("MiB", mib).add("us", alone.median * 1e3).add("with control us", both.median * 1e3);
    if (mib == 1) continue;
    line.add("of copy", bytes / alone.median / 1e6 / copy);
    line.add("with control of copy", bytes / both.median / 1e6 / copy);
  }
}

}  // namespace

void errors() {
  const double copy = copy_rate(256 * mebi());
  errors_of<float>(copy), errors_of<double>(copy), errors_of<BFloat16>(copy);
}

// How many rows are too many for the block that ends last? See error_and_step_size in csrc/launch.h.
void rows() {
  for (int64_t count : {1, 32, 64, 256, 512, 1024, 2048, 4096, 16384}) {
    if (quick && count > 256) break;
    const ErrorCase<float> made(count, 8);
    const StepSize& control = made.control.args;
    double* ratio = control.state + kErrorRatio * count;
    const auto step_size = [&] { MUST(cuda::step_size(control, made.times.get(), stream)); };
    const Time one = timed([&] { made.with_control(); }, 20);
    const Time three = timed(
        [&] {
          MUST(cuda::error(&made.args, 1, ratio, true, made.work.get(), stream));
          step_size();
        },
        20);
    const Time alone = timed(step_size, 20);
    const std::vector<double> state = made.control.state.fetch();
    bool good = true;
    for (int64_t row = 0; row < count; ++row) {
      good = good && state[kStatus * count + row] == double(kRunning) &&
             state[kNumAccepted * count + row] == state[kNumAccepted * count];
    }
    compare(good, "rows", [&](Line& line) { line.add("rows", count); });
    if (quick) continue;
    Line line("rows x 8 float32");
    line.add("rows", count).add("one launch us", one.median * 1e3).add("three launches us", three.median * 1e3);
    line.add("control alone us", alone.median * 1e3);
  }
}

}  // namespace odenet::native
