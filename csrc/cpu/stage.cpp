#include "../machine.h"
#include "stream.h"
#include "sums.h"

namespace odenet::cpu::ODENET_LEVEL {

namespace {

// y[i] = y0[begin + i] + dt sum_j a[j] k[j][begin + i], for at most kBlock elements where S is kAnyStages.
template <int S, class T>
__attribute__((noinline)) void stage_block(const Stage<T>& s, const Weights<T, S>& weights, T* y, int64_t begin,
                                           int64_t count) {
  const T* y0 = s.y0 ? s.y0 + begin : nullptr;
  const Weights<T, S> w = weights;  // a copy: the compiler then knows that writing y changes none of it
  if constexpr (S == kAnyStages) {
    alignas(kLine) Accumulate<T> sum[kBlock];
    sum_block(sum, s.k, w, s.stages, begin, static_cast<int>(count));
    add_block(y, y0, sum, static_cast<int>(count));
  } else {
    const T* k[S > 0 ? S : 1];
    for (int j = 0; j < S; ++j) k[j] = s.k[j] + begin;
    if (y0) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = y0[i] + weighted_sum<S>(k, w, S, i);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) y[i] = weighted_sum<S>(k, w, S, i);
    }
  }
}

// Elements [begin, end) of one row.
template <int S, class T>
void stage_range(const Stage<T>& s, int64_t row, int64_t begin, int64_t end, bool large) {
  const Weights<T, S> w = scaled_weights<T, S>(s.a, s.stages, s.dt[row]);
  const bool stream = large && end - begin >= 2 * kBlock;
  if (!stream) {
    const int64_t step = S == kAnyStages ? kBlock : end - begin;
    for (; begin < end; begin += step) {
      stage_block(s, w, s.y + begin, begin, end - begin < step ? end - begin : step);
    }
    return;
  }
  // Streamed are whole lines; the first block ends where a line begins.
  alignas(kLine) T block[kBlock];
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(s.y + begin) % kLine / sizeof(T));
  int64_t next = past ? begin + static_cast<int>(kLine / sizeof(T)) - past : begin + kBlock;
  while (begin < end) {
    if (next > end) next = end;
    const int64_t count = next - begin;
    if (count == kBlock) {
      stage_block(s, w, block, begin, count);
      stream_lines(s.y + begin, block, sizeof(block));
    } else {
      stage_block(s, w, s.y + begin, begin, count);
    }
    begin = next;
    next += kBlock;
  }
  stream_end();
}

}  // namespace

template <class T>
void stage(const Stage<T>& args, ParallelFor parallel_for) {
  const bool large = args.rows * args.columns * static_cast<int64_t>(sizeof(T)) >= last_level_cache();
  dispatch_sums<T>(args.stages, [&]<int S>() {
    parallel_rows(parallel_for, args.rows, args.columns,
                  [&](int64_t row, int64_t begin, int64_t end) { stage_range<S>(args, row, begin, end, large); });
  });
}

template void stage(const Stage<float>&, ParallelFor);
template void stage(const Stage<double>&, ParallelFor);
template void stage(const Stage<Half>&, ParallelFor);
template void stage(const Stage<BFloat16>&, ParallelFor);

}  // namespace odenet::cpu::ODENET_LEVEL
