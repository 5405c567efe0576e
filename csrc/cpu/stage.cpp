#include "../machine.h"
#include "stream.h"
#include "sums.h"

namespace odenet::cpu::ODENET_LEVEL {

namespace {

// y[i] = y0[begin + i] + dt sum_j a[j] k[j][begin + i] for a block.
template <int S, class T>
__attribute__((noinline)) void stage_block(const Stage<T>& s, const Weights<T, S>& w, T* y, int64_t begin, int count) {
  alignas(kLine) Accumulate<T> sum[kBlock];
  sum_block(sum, s.k, w, s.stages, begin, count);
  add_block(y, s.y0 ? s.y0 + begin : nullptr, sum, count);
}

// Elements [begin, end) of one row.
template <int S, class T>
void stage_range(const Stage<T>& s, int64_t row, int64_t begin, int64_t end, bool large) {
  const bool stream = large && end - begin >= 2 * kBlock;
  const Weights<T, S> w = scaled_weights<T, S>(s.a, s.stages, s.dt[row]);
  alignas(kLine) T block[kBlock];
  // Streamed are whole lines; the first block ends where a line begins.
  constexpr int kPerLine = kLine / sizeof(T);
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(s.y + begin) % kLine / sizeof(T));
  int64_t next = stream && past ? begin + kPerLine - past : begin + kBlock;
  while (begin < end) {
    if (next > end) next = end;
    const int count = static_cast<int>(next - begin);
    if (stream && count == kBlock) {
      stage_block(s, w, block, begin, count);
      stream_lines(s.y + begin, block, sizeof(block));
    } else {
      stage_block(s, w, s.y + begin, begin, count);
    }
    begin = next;
    next += kBlock;
  }
  if (stream) stream_end();
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
