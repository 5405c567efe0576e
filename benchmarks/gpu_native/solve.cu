// What a launch costs, and a solve by dopri5 of y' = -y in equal steps: by launches, by a graph a step, by a WHILE
// node.
#include <chrono>

#include "native.h"
#include "repeat.h"

namespace odenet::native {

namespace {

__global__ void field(const float* y, float* k, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) k[i] = -y[i];
}

constexpr int kStages = 7;
constexpr double kA[kStages][kStages] = {{},
                                         {1.0 / 5},
                                         {3.0 / 40, 9.0 / 40},
                                         {44.0 / 45, -56.0 / 15, 32.0 / 9},
                                         {19372.0 / 6561, -25360.0 / 2187, 64448.0 / 6561, -212.0 / 729},
                                         {9017.0 / 3168, -355.0 / 33, 46732.0 / 5247, 49.0 / 176, -5103.0 / 18656},
                                         {35.0 / 384, 0, 500.0 / 1113, 125.0 / 192, -2187.0 / 6784, 11.0 / 84}};
constexpr double kC[kStages] = {0, 1.0 / 5, 3.0 / 10, 4.0 / 5, 8.0 / 9, 1, 1};
constexpr double kE[kStages] = {71.0 / 57600, 0, -71.0 / 16695, 71.0 / 1920, -17253.0 / 339200, 22.0 / 525, -1.0 / 40};

struct Solve {
  int64_t rows, columns;
  Memory<float> y0, times;
  std::vector<Memory<float>> y, k;
  std::vector<double> start;
  Memory<double> state, stops, t;
  Memory<unsigned> done{std::vector<unsigned>{0}};
  Error<float> error{};
  Memory<double> work;
  StepSize control{};

  Solve(int64_t rows, int64_t columns)
      : rows(rows),
        columns(columns),
        y0(rows * columns),
        times(kStages * rows),
        y(buffers()),
        k(buffers()),
        start(first_state()),
        state(start),
        stops(std::vector<double>{1.0, double(kStopEnd)}),
        t(std::vector<double>{0.0, 1.0}),
        error(bind_error()),
        work(cuda::error_workspace(&error, 1)) {
    control.state = state.get();
    control.stops = stops.get();
    control.t = t.get();
    std::copy(kC, kC + kStages, control.c);
    control.controller = {5, 0.9, 10, 0.2, 0.2, 0, 0, 1, 0, 1.0 / kSteps, 1e15};  // max_step: equal steps
    control.rows = rows;
    control.num_stops = 1;
    control.num_outputs = 2;
    control.stages = kStages;
  }
  void slope(const float* from, float* to) const {
    const unsigned blocks = (rows * columns + kBlock - 1) / kBlock;
    MUST(cuda::run<kBlock>(field, blocks, stream, from, to, rows * columns));
  }
  void begin() const {
    MUST(cudaMemcpyAsync(state.get(), start.data(), start.size() * sizeof(double), cudaMemcpyHostToDevice, stream));
    MUST(cuda::run<kBlock>(fill<float>, kBlocks, stream, y0.get(), rows * columns, 1));
    slope(y0.get(), k[0].get());
    MUST(cudaStreamSynchronize(stream));
  }
  // 14 launches. more: a copy and a memset too, which steps that torch captures may hold.
  void step(bool more = false) const {
    for (int i = 1; i < kStages; ++i) {
      Stage<float> s{};
      s.y = y[i].get();
      s.y0 = y0.get();
      for (int j = 0; j < i; ++j) {
        if (kA[i][j] == 0) continue;
        s.k[s.stages] = k[j].get();
        s.a[s.stages++] = kA[i][j];
      }
      s.dt = error.dt;
      s.rows = rows;
      s.columns = columns;
      MUST(cuda::stage(&s, 1, stream));
      slope(y[i].get(), k[i].get());
    }
    if (more) {
      const size_t bytes = rows * columns * sizeof(float);
      MUST(cudaMemcpyAsync(y[0].get(), y[6].get(), bytes, cudaMemcpyDeviceToDevice, stream));
      MUST(cudaMemsetAsync(y[0].get(), 0, bytes, stream));
    }
    MUST(cuda::error_and_step_size(&error, 1, work.get(), done.get(), control, times.get(), stream));
    Advance<float> moved{};
    moved.y0 = y0.get();
    moved.k0 = k[0].get();
    moved.y1 = y[6].get();
    moved.k1 = k[6].get();
    moved.accept = state.get() + kAccept * rows;
    moved.rows = rows;
    moved.columns = columns;
    MUST(cuda::advance(&moved, 1, stream));
  }
  // `steps` were tried: as many as there are, and some more that change nothing.
  void verdict(const std::string& way, double ms, int64_t steps) const {
    const std::vector<double> x = state.fetch();
    const std::vector<float> end = y0.fetch();
    double worst = 0;
    for (int64_t i = 0; i < rows * columns; ++i) {
      const double apart = std::abs(end[i] - std::exp(-1.0) * rounded<float>(i, 1));
      worst = apart <= worst ? worst : apart;
    }
    const auto of = [&](int field, int64_t row) { return x[field * rows + row]; };
    bool good = worst < 1e-4;
    for (int64_t row = 0; row < rows; ++row) {
      good = good && of(kStatus, row) == double(kSuccess) && of(kTime, row) == 1 && of(kNumAccepted, row) == kSteps;
    }
    compare(good, way, [&](Line& line) {
      line.add("status", of(kStatus, 0)).add("time", of(kTime, 0)).add("accepted", of(kNumAccepted, 0));
    });
    if (quick) return;
    Line line(way);
    line.add("rows", rows).add("columns", columns).add("us a step", ms * 1e3 / steps).add("apart", worst);
  }

 private:
  std::vector<Memory<float>> buffers() const {
    std::vector<Memory<float>> made;
    for (int i = 0; i < kStages; ++i) made.emplace_back(rows * columns);
    return made;
  }
  std::vector<double> first_state() const {
    std::vector<double> x(kNumFields * rows, 0.0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int field : {kDt, kProposal, kStepEnd}) x[field * rows + row] = 1.0 / kSteps;
      for (int field : {kInverse1, kInverse2, kOutputBegin, kOutputEnd, kDirection}) x[field * rows + row] = 1;
    }
    return x;
  }
  Error<float> bind_error() const {
    Error<float> s{};
    for (int j = 0; j < kStages; ++j) {
      if (kE[j] == 0) continue;
      s.k[s.stages] = k[j].get();
      s.e[s.stages++] = kE[j];
    }
    s.y0 = y0.get();
    s.y1 = y[6].get();
    s.dt = state.get() + kDt * rows;
    s.rtol = s.atol = 1e-3;
    s.rows = rows;
    s.columns = columns;
    return s;
  }
};

// Joint and per-sample control of a small and a larger batch.
template <class Visit>
void for_each_solve(const Visit& visit) {
  using Shape = std::pair<int64_t, int64_t>;
  for (auto [samples, width] : quick ? std::vector<Shape>{{64, 8}} : std::vector<Shape>{{64, 8}, {4096, 64}}) {
    visit(Solve(1, samples * width));
    visit(Solve(samples, width));
  }
}

#if defined(__CUDACC__)
template <int bytes>
struct Parameters {
  char x[bytes];
};
template <int bytes>
__global__ void nothing(const __grid_constant__ Parameters<bytes> p, char* out) {
  if (out) *out = p.x[bytes - 1];
}

cudaGraph_t captured(const std::function<void()>& call) {
  cudaGraph_t graph;
  MUST(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  call();
  MUST(cudaStreamEndCapture(stream, &graph));
  return graph;
}

template <int bytes>
void launch_cost() {
  static const Parameters<bytes> p{};
  char* none = nullptr;
  const auto launch = [&] { MUST(cuda::run<32>(nothing<bytes>, 1, stream, p, none)); };
  const int number = quick ? 10 : 1000;
  launch();
  MUST(cudaDeviceSynchronize());
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < number; ++i) launch();
  const std::chrono::duration<double, std::micro> host = std::chrono::steady_clock::now() - begin;
  MUST(cudaDeviceSynchronize());
  const Time single = timed(launch, number, 5);
  cudaGraphExec_t made;
  MUST(cudaGraphInstantiate(&made, captured([&] {
    for (int i = 0; i < 100; ++i) launch();
  }),
                            0));
  const Time graph = timed([&] { MUST(cudaGraphLaunch(made, stream)); });
  if (quick) return;
  Line line("launch");
  line.add("parameter bytes", int64_t{bytes}).add("host us", host.count() / number);
  line.add("one after the other us", single.median * 1e3).add("in a graph us", graph.median * 1e3 / 100);
}
#endif

}  // namespace

#if defined(__CUDACC__)
void launches() {
  launch_cost<64>(), launch_cost<512>(), launch_cost<4064>(), launch_cost<32000>();
}
#else
void launches() {}
#endif

void graph() {
  for_each_solve([](const Solve& s) {
    const int64_t steps = kSteps + 10;
    s.begin();
    s.step();  // what is done once is done
    s.begin();
    const double ms = milliseconds([&] {
      for (int64_t i = 0; i < steps; ++i) s.step();
    });
    s.verdict("14 launches a step", ms, steps);
#if defined(__CUDACC__)
    cudaGraphExec_t made;
    MUST(cudaGraphInstantiate(&made, captured([&] { s.step(); }), 0));
    s.begin();
    MUST(cudaGraphLaunch(made, stream));
    MUST(cudaStreamSynchronize(stream));
    s.begin();
    const double replayed = milliseconds([&] {
      for (int64_t i = 0; i < steps; ++i) MUST(cudaGraphLaunch(made, stream));
    });
    s.verdict("a graph a step", replayed, steps);
#endif
  });
}

#if defined(__CUDACC__)
void loop() {
  for_each_solve([](const Solve& s) {
    for (bool more : {false, true}) {
      const Memory<int64_t> left(1);
      cuda::Graph made = nullptr;
      const std::string way = more ? "a WHILE node, with a copy and a memset" : "a WHILE node";
      const double* status = s.state.get() + kStatus * s.rows;
      if (const char* words =
              cuda::make_repeat(captured([&] { s.step(more); }), status, s.rows, left.get(), 256, made)) {
        ++wrong;
        Line(way).add("failed", words);
        continue;
      }
      double ms = 0;
      for (int again = 0; again < 2; ++again) {
        s.begin();
        ms = milliseconds([&] {
          for (int i = 0; i < 5; ++i) MUST(cuda::launch_repeat(made, stream));
        });
      }
      s.verdict(way, ms, kSteps);
      cuda::free_repeat(made);
    }
  });
}
#else
void loop() {}
#endif

}  // namespace odenet::native
