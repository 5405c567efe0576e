#include <memory>

#include "sums.h"

namespace odenet::cpu::ODENET_LEVEL {

namespace {

// Rows are summed in chunks of a fixed size, and the chunks in order, so that the result depends neither on the number
// of threads nor on the other rows.
constexpr int64_t kChunk = 4096;
constexpr int kLanes = 16;  // independent partial sums, which vectorise

// Elements [begin, end) of one row.
template <int S, class T>
__attribute__((noinline)) double sum_of_squares(const Error<T>& args, const Weights<T, S>& w, int64_t begin,
                                                int64_t end) {
  const Error<T> s = args;  // a local copy: the compiler then knows that nothing written here changes it
  [[maybe_unused]] Accumulate<T> sums[kBlock], start[kBlock], finish[kBlock];
  Real<T> squares[kBlock], lanes[kLanes] = {};
  const Real<T> rtol = static_cast<Real<T>>(s.rtol), atol = static_cast<Real<T>>(s.atol);
  double sum = 0;
  for (; begin < end; begin += kBlock) {
    const int count = static_cast<int>(end - begin < kBlock ? end - begin : kBlock);
    if constexpr (S == kAnyStages) {
      sum_block(sums, s.k, w, s.stages, begin, count);
      const Accumulate<T>*y0 = widened(s.y0 + begin, start, count), *y1 = widened(s.y1 + begin, finish, count);
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) squares[i] = error_square<T>(y0[i], y1[i], sums[i], rtol, atol);
    } else {
      const T *y0 = s.y0 + begin, *y1 = s.y1 + begin, *k[S > 0 ? S : 1];
      for (int j = 0; j < S; ++j) k[j] = s.k[j] + begin;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        squares[i] = error_square<T>(y0[i], y1[i], weighted_sum<S>(k, w, S, i), rtol, atol);
      }
    }
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += squares[i + lane];
    }
    for (; i < count; ++i) sum += static_cast<double>(squares[i]);
  }
  for (int lane = 0; lane < kLanes; ++lane) sum += static_cast<double>(lanes[lane]);
  return sum;
}

}  // namespace

template <class T>
void error(const Error<T>& args, double* ratio, bool first, ParallelFor parallel_for) {
  const int64_t chunks = (args.columns + kChunk - 1) / kChunk;
  dispatch_sums<T>(args.stages, [&]<int S>() {
    const auto chunk_sum = [&](int64_t row, int64_t chunk) {
      const Weights<T, S> w = scaled_weights<T, S>(args.e, args.stages, args.dt[row]);
      const int64_t begin = row * args.columns + chunk * kChunk, last = (row + 1) * args.columns;
      return sum_of_squares(args, w, begin, begin + kChunk < last ? begin + kChunk : last);
    };
    if (args.rows == 1 && chunks > 1) {
      const std::unique_ptr<double[]> sums(new double[chunks]);
      parallel(parallel_for, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) sums[chunk] = chunk_sum(0, chunk);
      });
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk];
      ratio[0] = error_fold(ratio[0], sum, args.columns, first);
      return;
    }
    const int64_t grain = args.columns < kGrain ? kGrain / (args.columns > 0 ? args.columns : 1) : 1;
    parallel(parallel_for, args.rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += chunk_sum(row, chunk);
        ratio[row] = error_fold(ratio[row], sum, args.columns, first);
      }
    });
  });
}

template void error(const Error<float>&, double*, bool, ParallelFor);
template void error(const Error<double>&, double*, bool, ParallelFor);
template void error(const Error<Half>&, double*, bool, ParallelFor);
template void error(const Error<BFloat16>&, double*, bool, ParallelFor);
template void error(const Error<Complex<float>>&, double*, bool, ParallelFor);
template void error(const Error<Complex<double>>&, double*, bool, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
