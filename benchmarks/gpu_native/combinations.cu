// Kernels that read some states and write one: stage, advance, dense_output.
#include "native.h"

namespace odenet::native {

namespace {

template <class T>
struct StageCase {
  Memory<T> y, y0;
  std::vector<Memory<T>> k;
  Stage<T> args{};
  StageCase(int64_t rows, int64_t columns, int slopes, int shift, bool base, const double* dt)
      : y(rows * columns, shift), y0(filled<T>(rows * columns, 100, shift)) {
    args.y = y.get();
    args.y0 = base ? y0.get() : nullptr;
    for (int j = 0; j < slopes; ++j) {
      k.push_back(filled<T>(rows * columns, j, shift));
      args.k[j] = k[j].get();
      args.a[j] = 0.5 / (j + 1);
    }
    args.dt = dt;
    args.stages = slopes;
    args.rows = rows;
    args.columns = columns;
  }
};

template <class T>
void check_stage(int64_t rows, int64_t columns, int slopes, int shift, bool base) {
  std::vector<double> steps(rows);
  for (int64_t row = 0; row < rows; ++row) steps[row] = 0.1 + 0.01 * row;
  const Memory<double> dt(steps);
  const StageCase<T> made(rows, columns, slopes, shift, base, dt.get());
  const Stage<T>& s = made.args;
  MUST(cudaMemsetAsync(s.y, 0xff, rows * columns * sizeof(T), stream));  // not a number, wherever nothing is written
  MUST(cuda::stage(&s, 1, stream));
  const std::vector<T> y = made.y.fetch();
  double worst = 0;
  for (int64_t i = 0; i < rows * columns; ++i) {
    double expected = base ? rounded<T>(i, 100) : 0;
    for (int j = 0; j < slopes; ++j) expected += steps[i / columns] * s.a[j] * rounded<T>(i, j);
    const double apart = std::abs(value(y[i]) - expected) / (1 + std::abs(expected));
    worst = apart <= worst ? worst : apart;  // not a number counts
  }
  compare(worst < 4 * Name<T>::eps, std::string("stage ") + Name<T>::is, [&](Line& line) {
    line.add("rows", rows).add("columns", columns).add("slopes", int64_t{slopes}).add("shift", int64_t{shift});
    line.add("y0", int64_t{base}).add("apart", worst);
  });
}

template <class T>
void stages_of(double copy) {
  using Sizes = std::vector<int64_t>;
  for (int64_t rows : {1, 7}) {
    for (int64_t columns : quick ? Sizes{1, 5, 257} : Sizes{1, 5, 64, 257, 4096, 70001}) {
      for (int slopes : quick ? std::vector<int>{0, 3, 12} : std::vector<int>{0, 1, 2, 3, 5, 6, 8, 12}) {
        for (int shift : {0, 1}) check_stage<T>(rows, columns, slopes, shift, slopes % 2 == 0);
      }
    }
  }
  const Memory<double> dt(std::vector<double>{0.1});
  for (int64_t mib : {1, 64, 256}) {
    for (int slopes : {0, 1, 4, 6, 12}) {
      const int64_t size = mib * mebi() / sizeof(T);
      const StageCase<T> made(1, size, slopes, 0, true, dt.get());
      const Time t = timed([&] { MUST(cuda::stage(&made.args, 1, stream)); }, mib == 1 ? 50 : 1);
      if (quick) continue;
      Line line(std::string("stage ") + Name<T>::is);
      line.add("MiB", mib).add("slopes", int64_t{slopes}).add("us", t.median * 1e3).add("least us", t.least * 1e3);
      const double rate = (slopes + 2.0) * size * sizeof(T) / t.median / 1e6;
      if (mib > 1) line.add("GB/s", rate).add("of copy", rate / copy);  // the smallest lies in the cache
    }
  }
}

template <class T>
void advances_of(double copy) {
  for (int64_t mib : {1, 64, 256}) {
    const int64_t size = mib * mebi() / sizeof(T);
    const Memory<T> y0 = filled<T>(size, 0), k0 = filled<T>(size, 1), y1 = filled<T>(size, 2), k1 = filled<T>(size, 3);
    const Memory<double> accept(std::vector<double>{0.0});
    Advance<T> s{};
    s.y0 = y0.get();
    s.k0 = k0.get();
    s.y1 = y1.get();
    s.k1 = k1.get();
    s.accept = accept.get();
    s.rows = 1;
    s.columns = size;
    const auto advance = [&] { MUST(cuda::advance(&s, 1, stream)); };
    const auto is = [&](int y, int k) {
      const std::vector<T> a = y0.fetch(), b = k0.fetch();
      bool same = true;
      for (int64_t i = 0; i < size; i += quick ? 1 : 977)
        same = same && value(a[i]) == rounded<T>(i, y) && value(b[i]) == rounded<T>(i, k);
      compare(same, std::string("advance ") + Name<T>::is, [&](Line& line) { line.add("MiB", mib); });
    };
    const Time rejected = timed(advance, mib == 1 ? 50 : 1);
    is(0, 1);
    accept.send({1.0});
    const Time accepted = timed(advance, mib == 1 ? 50 : 1);
    is(2, 3);
    if (quick) continue;
    Line line(std::string("advance ") + Name<T>::is);
    line.add("MiB", mib).add("us", accepted.median * 1e3).add("rejected us", rejected.median * 1e3);
    if (mib > 1) line.add("of copy", 4.0 * size * sizeof(T) / accepted.median / 1e6 / copy);
  }
}

template <class T>
void dense_outputs_of(double copy) {
  constexpr int kSlopes = 7, kDegree = 4;
  for (int64_t mib : {1, 64}) {
    const int64_t size = mib * mebi() / sizeof(T);
    const Memory<T> ys(size), y0 = filled<T>(size, 100), y1 = filled<T>(size, 101);
    std::vector<Memory<T>> k;
    DenseOutput<T> s{};
    for (int j = 0; j < kSlopes; ++j) {
      k.push_back(filled<T>(size, j));
      s.k[j] = k[j].get();
      for (int d = 0; d < kDegree; ++d) s.p[j * kDegree + d] = 0.1 * ((j + d) % 5);
    }
    std::vector<double> state(kNumFields, 0.0);
    state[kLastDt] = state[kTime] = 0.1;
    const Memory<double> without(state), t(std::vector<double>{0.05});
    state[kOutputEnd] = 1;
    const Memory<double> with(state);
    s.ys = ys.get();
    s.y0 = y0.get();
    s.y1 = y1.get();
    s.t = t.get();
    s.stages = kSlopes;
    s.degree = kDegree;
    s.rows = 1;
    s.columns = size;
    s.state = without.get();
    MUST(cudaMemsetAsync(s.ys, 0xff, size * sizeof(T), stream));
    const Time none = timed([&] { MUST(cuda::dense_output(&s, 1, stream)); }, mib == 1 ? 50 : 1);
    const bool untouched = !(value(ys.fetch()[0]) == value(ys.fetch()[0]));
    s.state = with.get();
    const Time one = timed([&] { MUST(cuda::dense_output(&s, 1, stream)); }, mib == 1 ? 50 : 1);
    const std::vector<T> found = ys.fetch();
    double worst = 0;
    for (int64_t i = 0; i < size; i += quick ? 1 : 101) {
      double expected = rounded<T>(i, 100);
      for (int j = 0; j < kSlopes; ++j) {
        double b = 0;
        for (int d = kDegree - 1; d >= 0; --d) b = (b + s.p[j * kDegree + d]) * 0.5;
        expected += 0.1 * b * rounded<T>(i, j);
      }
      const double apart = std::abs(value(found[i]) - expected) / (1 + std::abs(expected));
      worst = apart <= worst ? worst : apart;
    }
    compare(untouched && worst < 4 * Name<T>::eps, std::string("dense_output ") + Name<T>::is, [&](Line& line) {
      line.add("MiB", mib).add("apart", worst).add("written where no output falls", int64_t{!untouched});
    });
    if (quick) continue;
    Line line(std::string("dense_output ") + Name<T>::is);
    line.add("MiB", mib).add("us", one.median * 1e3).add("no output us", none.median * 1e3);
    if (mib > 1) line.add("of copy", (kSlopes + 2.0) * size * sizeof(T) / one.median / 1e6 / copy);
  }
}

}  // namespace

void stages() {
  const double copy = copy_rate(256 * mebi());
  stages_of<float>(copy), stages_of<BFloat16>(copy), stages_of<double>(copy), stages_of<Half>(copy);
}

void advances() {
  const double copy = copy_rate(256 * mebi());
  advances_of<float>(copy), advances_of<BFloat16>(copy), advances_of<double>(copy);
}

void dense_outputs() {
  const double copy = copy_rate(256 * mebi());
  dense_outputs_of<float>(copy), dense_outputs_of<double>(copy), dense_outputs_of<BFloat16>(copy);
}

}  // namespace odenet::native
