// The CPU kernels in real threads: on every instruction set the results are those of one thread on the first of them,
// to the bit. Without Python and torch, so that a sanitizer sees all of the program. `threads race`, `threads overrun`
// and `threads misaligned` do what a sanitizer must report.
#include <cstdio>
#include <latch>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/levels.h"
#include "cpu/parallel.h"

namespace odenet {

bool small_cache = false;  // then every state is larger than the caches, and `stage` streams

// In place of machine.cpp's, which is compiled under another name.
int64_t last_level_cache() {
  return small_cache ? 0 : std::numeric_limits<int64_t>::max();
}

namespace {

constexpr int64_t kThreads = 5, kGrain = cpu::baseline::kGrain;

struct Size {
  int64_t rows, columns;
};
constexpr Size kSizes[] = {{1, 7},          {1, kGrain}, {1, kGrain + 1}, {1, 2 * kGrain + 3},
                           {2, kGrain + 1}, {7, 5000},   {kGrain + 5, 1}, {11001, 3},
                           {5, 0}};
constexpr int64_t kRows[] = {1, 1024, 1025, 5003};  // around the grain of `step_size`

struct Count {
  int cases = 0, split = 0, failures = 0;
};
std::map<std::string, Count> counts;
int ranges = 0;  // of the last launches in threads

void one_thread(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  body(begin, end, context);
}

// Ranges in threads that all begin at once, each kOverlap longer than it should be.
template <int64_t kOverlap>
void many_threads(int64_t begin, int64_t end, int64_t, ParallelBody body, void* context) {
  const int64_t share = (end - begin + kThreads - 1) / kThreads, count = (end - begin + share - 1) / share;
  std::latch start(count);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = begin + i * share, last = first + share + kOverlap;
    threads.emplace_back([=, &start] {
      start.arrive_and_wait();
      body(first, last < end ? last : end, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  ranges += static_cast<int>(count);
}

std::mt19937_64 engine(0);

double draw(double low = -1, double high = 1) {
  return std::uniform_real_distribution<double>(low, high)(engine);
}
template <class T>
void draw_into(T& x) {
  x = static_cast<T>(static_cast<Real<T>>(draw()));
}
template <class R>
void draw_into(Complex<R>& x) {
  x = {static_cast<R>(draw()), static_cast<R>(draw())};
}
template <class T>
std::vector<T> numbers(int64_t size) {
  std::vector<T> result(size);
  for (T& x : result) draw_into(x);
  return result;
}
template <class T>
std::vector<std::vector<T>> slopes_of(int stages, int64_t size, const T** k, double* weights) {
  std::vector<std::vector<T>> result;
  for (int j = 0; j < stages; ++j) {
    result.push_back(numbers<T>(size));
    k[j] = result.back().data();
    weights[j] = draw();
  }
  return result;
}

// An output: what it holds before differs from run to run, so that an element left unwritten is seen.
unsigned char fill = 0;

template <class T>
std::vector<T> blank(int64_t size) {
  std::vector<T> result(size);
  if (size) std::memset(static_cast<void*>(result.data()), ++fill, size * sizeof(T));
  return result;
}

template <class... Parts>
std::string bytes(const Parts&... parts) {
  std::string result;
  (result.append(reinterpret_cast<const char*>(parts.data()), parts.size() * sizeof(parts[0])), ...);
  return result;
}

// run(parallel_for) returns the bytes that it wrote.
template <class Run>
void compare(const std::string& op, const Run& run) {
  Count& count = counts[op];
  choose_level(name_of(Level::baseline));
  const std::string expected = run(one_thread);
  for (const Level level : machine_levels()) {
    choose_level(name_of(level));
    ranges = 0;
    const bool same = run(many_threads<0>) == expected;
    count.cases += 1;
    count.split += ranges > 1;
    count.failures += !same;
    if (!same) std::printf("%s, case %d, %s: not the result of one thread\n", op.c_str(), count.cases, name_of(level));
  }
}

template <class T>
void test_stage() {
  enum Base { zero, apart, in_place };
  for (const auto [rows, columns] : kSizes) {
    const int64_t size = rows * columns;
    const auto y0 = numbers<T>(size);
    const auto dt = numbers<double>(rows);
    for (const int stages : {0, 3, 9}) {
      Stage<T> s{};
      s.dt = dt.data(), s.stages = stages, s.rows = rows, s.columns = columns;
      const auto k = slopes_of(stages, size, s.k, s.a);
      for (const Base base : {zero, apart, in_place}) {
        const auto run = [&](ParallelFor parallel_for) {
          std::vector<T> y = base == in_place ? y0 : blank<T>(size);
          s.y = y.data();
          s.y0 = base == zero ? nullptr : base == apart ? y0.data() : y.data();
          cpu::stage(s, parallel_for);
          return bytes(y);
        };
        for (const bool streamed : {false, true}) {
          small_cache = streamed;
          compare(streamed ? "stage, streamed" : "stage", run);
        }
      }
    }
  }
}

template <class T>
void test_error() {
  for (const auto [rows, columns] : kSizes) {
    const int64_t size = rows * columns;
    const auto y0 = numbers<T>(size), y1 = numbers<T>(size);
    const auto dt = numbers<double>(rows), before = numbers<double>(rows);
    for (const int stages : {7, 9}) {
      Error<T> s{};
      s.y0 = y0.data(), s.y1 = y1.data(), s.dt = dt.data(), s.rtol = 1e-2, s.atol = 1e-1, s.stages = stages,
      s.rows = rows, s.columns = columns;
      const auto k = slopes_of(stages, size, s.k, s.e);
      for (const bool first : {true, false}) {
        compare("error", [&](ParallelFor parallel_for) {
          std::vector<double> ratio = first ? blank<double>(rows) : before;
          cpu::error(s, ratio.data(), first, parallel_for);
          return bytes(ratio);
        });
      }
    }
  }
}

// Steps from 0 to 2, of which some are rejected, with a stop, a discontinuity and outputs on the way.
template <class R>
void test_step_size() {
  constexpr int kSteps = 12, kNodes = 4;
  const std::vector<double> stops{0.5, 1.25, 2, kStopStep, kStopJump, kStopEnd}, t{0.1, 0.4, 0.5, 1.25, 1.7, 2};
  for (const int64_t rows : kRows) {
    std::vector<double> norms(3 * rows), ratios(kSteps * rows);
    for (double& norm : norms) norm = draw(0, 10);
    for (double& ratio : ratios) ratio = draw(0, 2);
    norms[rows / 2] = std::numeric_limits<double>::quiet_NaN();
    ratios[rows / 3] = std::numeric_limits<double>::infinity();
    StepSize s{nullptr, stops.data(), t.data(), {0, 0.2, 0.8, 1}, {}, rows, 3, 6, 0, 0, kNodes};
    s.controller = {5, 0.9, 10, 0.2, 0.14, -0.08, 0, 0.2, 0, 0.3, 8};
    std::vector<double> state(kNumFields * rows);
    for (int64_t row = 0; row < rows; ++row) state[kDirection * rows + row] = 1;
    for (const auto& [phase, size] : {std::pair{0, 0.0}, {1, 0.0}, {0, 0.25}}) {
      const FirstStep first{norms.data(), size, phase};
      const auto run = [&](std::vector<double>& begun, ParallelFor parallel_for) {
        auto times = blank<R>(kNodes * rows);
        s.state = begun.data();
        cpu::first_step(s, first, times.data(), parallel_for);
        return bytes(begun, times);
      };
      compare("first_step", [&](ParallelFor parallel_for) {
        auto begun = state;
        return run(begun, parallel_for);
      });
      if (phase == 1) run(state, one_thread);
    }
    compare("step_size", [&](ParallelFor parallel_for) {
      auto steps = state;
      std::string result;
      s.state = steps.data();
      for (int step = 0; step < kSteps; ++step) {
        auto times = blank<R>(kNodes * rows);
        for (int64_t row = 0; row < rows; ++row) s.field(kErrorRatio, row) = ratios[step * rows + row];
        cpu::step_size(s, times.data(), parallel_for);
        result += bytes(steps, times);
      }
      return result;
    });
  }
}

// A step from 0 to 1. The last output is its end; row r has the outputs from r % 4 on.
template <class T>
void test_dense_output() {
  const std::vector<double> t{0.25, 0.625, 1};
  const int64_t outputs = static_cast<int64_t>(t.size());
  for (const auto [rows, columns] : kSizes) {
    const int64_t size = rows * columns;
    const auto y0 = numbers<T>(size), y1 = numbers<T>(size), ys = numbers<T>(outputs * size);
    std::vector<double> state(kNumFields * rows);
    for (int64_t row = 0; row < rows; ++row) {
      state[kTime * rows + row] = state[kLastDt * rows + row] = 1;
      state[kOutputBegin * rows + row] = static_cast<double>(row % (outputs + 1));
      state[kOutputEnd * rows + row] = static_cast<double>(outputs);
    }
    double weights[kMaxStages];
    DenseOutput<T> s{};
    s.y0 = y0.data(), s.y1 = y1.data(), s.state = state.data(), s.t = t.data(), s.stages = 7, s.degree = 4,
    s.rows = rows, s.columns = columns;
    const auto k = slopes_of(s.stages, size, s.k, weights);
    for (int i = 0; i < s.stages * s.degree; ++i) s.p[i] = draw();
    compare("dense_output", [&](ParallelFor parallel_for) {
      auto written = rows == 1 ? blank<T>(outputs * size) : ys;
      s.ys = written.data();
      cpu::dense_output(s, parallel_for);
      return bytes(written);
    });
  }
}

template <class T>
void test_advance() {
  for (const auto [rows, columns] : kSizes) {
    const int64_t size = rows * columns;
    const auto y0 = numbers<T>(size), k0 = numbers<T>(size), y1 = numbers<T>(size), k1 = numbers<T>(size);
    std::vector<double> accept(rows);
    for (int64_t row = 0; row < rows; row += 2) accept[row] = 1;
    compare("advance", [&](ParallelFor parallel_for) {
      auto y = rows == 1 ? blank<T>(size) : y0, k = rows == 1 ? blank<T>(size) : k0, stage = blank<T>(size);
      Advance<T> s{y.data(), k.data(), y1.data(),    k1.data(), accept.data(),
                   rows,     columns,  stage.data(), 0.2,       accept.data()};
      cpu::advance(s, parallel_for);
      return bytes(y, k, stage);
    });
  }
}

template <class T>
void test_all() {
  test_stage<T>();
  test_error<T>();
  test_step_size<T>();
  test_dense_output<T>();
  test_advance<T>();
}

// What a sanitizer must report.
void do_wrong(const std::string& fault) {
  const int64_t size = 8 * kGrain, rows = 1;
  std::vector<float> y(size), y1 = numbers<float>(size);
  std::vector<double> accept(rows, 1);
  Advance<float> s{y.data(), y.data(), y1.data(), y1.data(), accept.data(), rows, size, nullptr, 0, nullptr};
  if (fault == "overrun") s.columns += 1;
  if (fault == "misaligned")
    s.y1 = reinterpret_cast<const float*>(reinterpret_cast<const char*>(s.y1) + 1), s.columns -= 1;
  cpu::advance(s, fault == "race" ? many_threads<64> : one_thread);
}

}  // namespace
}  // namespace odenet

int main(int argc, char** argv) {
  using namespace odenet;
  if (argc > 1) return do_wrong(argv[1]), 0;
  test_all<float>();
  test_all<double>();
  test_all<Half>();
  test_all<BFloat16>();
  test_error<Complex<float>>();
  test_error<Complex<double>>();
  bool good = true;
  for (const auto& [op, count] : counts) {
    std::printf("%-16s %5d cases, %5d in several ranges, %d wrong\n", op.c_str(), count.cases, count.split,
                count.failures);
    good = good && count.split > 0 && count.failures == 0;
  }
  return good ? 0 : 1;
}
