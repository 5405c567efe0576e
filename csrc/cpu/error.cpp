#include <vector>

#include "parallel.h"

namespace odenet::cpu {

namespace {

// Rows are summed in chunks of a fixed size, and the chunks in order, so that the result depends neither on the number
// of threads nor on the other rows.
constexpr int64_t kChunk = 4096;
constexpr int kLanes = 16;  // independent partial sums, which vectorise

constexpr int kBlock = 256;  // elements whose squares are formed in one vectorised loop before they are summed

template <int S, class T>
ODENET_CLONES double sum_of_squares(const Error<T>& args, const Real<T> (&w)[S > 0 ? S : 1], int64_t begin,
                                    int64_t end) {
  const Error<T> s = args;
  Real<T> squares[kBlock];
  Real<T> lanes[kLanes] = {};
  double sum = 0;
  for (; begin < end; begin += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, end - begin));
#pragma GCC ivdep
    for (int i = 0; i < count; ++i) squares[i] = error_element<S>(s, w, begin + i);
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
  dispatch_stages(args.stages, [&]<int S>() {
    const auto chunk_sum = [&](int64_t row, int64_t chunk) {
      Real<T> w[S > 0 ? S : 1];
      error_weights<S>(args, row, w);
      const int64_t begin = row * args.columns + chunk * kChunk;
      return sum_of_squares<S>(args, w, begin, std::min(begin + kChunk, (row + 1) * args.columns));
    };
    if (args.rows == 1 && chunks > 1) {
      std::vector<double> sums(chunks);
      parallel(parallel_for, chunks, kGrain / kChunk, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) sums[chunk] = chunk_sum(0, chunk);
      });
      double sum = 0;
      for (const double part : sums) sum += part;
      ratio[0] = error_fold(ratio[0], sum, args.columns, first);
      return;
    }
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(args.columns, 1));
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

}  // namespace odenet::cpu
