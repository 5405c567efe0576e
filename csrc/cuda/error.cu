#include <utility>

#include "grid.h"

namespace odenet::cuda {

namespace {

constexpr int64_t kChunk = 16 * kThreads;  // elements of a row that one block sums at a time
constexpr int64_t kRowsAlone = 32;         // of more chunks than this, a row is added up by a whole block

__host__ __device__ int64_t chunks_of(int64_t columns) {
  return (columns + kChunk - 1) / kChunk;
}

// The sum over a block, in every thread, in an order that does not depend on timing.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// |err|^2 of N elements, added up.
template <int S, class T, int N>
__device__ Real<T> squares(const Error<T>& s, double dt, const Weights<T, S>& w, int64_t i, Width<N>) {
  Accumulate<T> sum[N];
  sum_slopes<S>(sum, s.k, s.e, s.stages, dt, w, i);
  const Pack<T, N> y0 = load<N>(s.y0, i), y1 = load<N>(s.y1, i);
  Real<T> total = 0;
  for (int n = 0; n < N; ++n) {
    total += error_square<T>(static_cast<Accumulate<T>>(y0.of[n]), static_cast<Accumulate<T>>(y1.of[n]), sum[n],
                             static_cast<Real<T>>(s.rtol), static_cast<Real<T>>(s.atol));
  }
  return total;
}

// workspace[part] for the parts (row, chunk) of this block, of a leaf whose parts begin there.
template <class T, int S, int V>
__device__ void sum_parts(const Error<T>& s, unsigned block, unsigned blocks, double* workspace) {
  const int64_t chunks = chunks_of(s.columns), parts = s.rows * chunks;
  for (int64_t part = block; part < parts; part += blocks) {
    const int64_t row = part / chunks, begin = (part - row * chunks) * kChunk;
    const int64_t count = s.columns - begin < kChunk ? s.columns - begin : kChunk;
    const int64_t at = row * s.columns + begin;
    const double dt = s.dt[row];
    Weights<T, S> w{};
    if constexpr (S != kAnyStages) w = scaled_weights<T, S>(s.e, s.stages, dt);
    double sum = 0;
    visit_packs<V>(count, 0, 1,
                   [&](int64_t i, auto width) { sum += static_cast<double>(squares(s, dt, w, at + i, width)); });
    sum = block_sum(sum);
    if (threadIdx.x == 0) workspace[part] = sum;
  }
}

template <class T>
__device__ void fold(const Error<T>& s, double sum, int64_t row, bool first, double* ratio) {
  ratio[row] = error_fold(ratio[row], sum, s.columns, first);
}

// ratio: the chunks of each row of all leaves added up, by one block for the rows [begin, end).
template <class T, int bytes>
__device__ void fold_rows(const Batch<Error<T>, bytes>& batch, int64_t begin, int64_t end, bool first,
                          const double* workspace, double* ratio) {
  for (int leaf = 0; leaf < batch.count; ++leaf) {
    const Error<T>& s = batch.leaf[leaf];
    const int64_t chunks = chunks_of(s.columns);
    const bool start = first && leaf == 0;
    if (chunks > kRowsAlone) {
      for (int64_t row = begin; row < end; ++row) {
        double sum = 0;
        for (int64_t i = threadIdx.x; i < chunks; i += kThreads) sum += __ldcg(workspace + row * chunks + i);
        sum = block_sum(sum);
        if (threadIdx.x == 0) fold(s, sum, row, start, ratio);
      }
    } else {
      for (int64_t row = begin + threadIdx.x; row < end; row += kThreads) {
        double sum = 0;
        for (int64_t i = 0; i < chunks; ++i) sum += __ldcg(workspace + row * chunks + i);
        fold(s, sum, row, start, ratio);
      }
    }
    __syncthreads();
    workspace += s.rows * chunks;
  }
}

template <class T, int bytes>
__device__ double* workspace_of_leaf(const Batch<Error<T>, bytes>& batch, const Error<T>& mine, double* workspace) {
  for (const Error<T>* s = batch.leaf; s != &mine; ++s) workspace += s->rows * chunks_of(s->columns);
  return workspace;
}

template <class T, int S, int V, int bytes>
__global__ void __launch_bounds__(kThreads)
    error_kernel(const __grid_constant__ Batch<Error<T>, bytes> batch, double* workspace) {
  unsigned block, blocks;
  const Error<T>& s = batch.mine(block, blocks);
  sum_parts<T, S, V>(s, block, blocks, workspace_of_leaf(batch, s, workspace));
}

constexpr int64_t kRowsOfBlock = kThreads;

template <class T, int bytes>
__global__ void __launch_bounds__(kThreads) error_fold_kernel(const __grid_constant__ Batch<Error<T>, bytes> batch,
                                                              bool first, const double* workspace, double* ratio) {
  const int64_t rows = batch.leaf[0].rows;
  for (int64_t begin = blockIdx.x * kRowsOfBlock; begin < rows; begin += gridDim.x * kRowsOfBlock) {
    fold_rows(batch, begin, begin + kRowsOfBlock < rows ? begin + kRowsOfBlock : rows, first, workspace, ratio);
  }
}

// The same in one launch, and then the control of every row, by the block that ends last.
template <class T, int S, int V, class R, int bytes>
__global__ void __launch_bounds__(kThreads)
    error_and_step_size_kernel(const __grid_constant__ Batch<Error<T>, bytes> batch, bool first, double* workspace,
                               unsigned* done, const __grid_constant__ StepSize control, R* times) {
  unsigned block, blocks;
  const Error<T>& s = batch.mine(block, blocks);
  sum_parts<T, S, V>(s, block, blocks, workspace_of_leaf(batch, s, workspace));
  __shared__ bool last;
  __threadfence();  // what this block wrote is seen before its ticket
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  double* ratio = control.state + kErrorRatio * control.rows;
  fold_rows(batch, 0, control.rows, first, workspace, ratio);
  for (int64_t row = threadIdx.x; row < control.rows; row += kThreads) {
    step_size_row(control, row);
    write_times(control, row, times);
  }
  if (threadIdx.x == 0) *done = 0;
}

template <class T>
bool all_in_packs(const Error<T>& s) {
  bool fit = packs_fit<T>(s.rows, s.columns) && aligned(s.y0) && aligned(s.y1);
  for (int j = 0; j < s.stages; ++j) fit = fit && aligned(s.k[j]);
  return fit;
}

struct Add {
  template <class T, int bytes>
  bool operator()(Batch<Error<T>, bytes>& batch, const Error<T>& s) const {
    batch.add(s, blocks_for(s.rows * chunks_of(s.columns) * kThreads));
    return all_in_packs(s);
  }
};

// Loops of their own for the common types, and few leaves, only.
template <class T, int bytes, class Visit>
const char* dispatch(const Batch<Error<T>, bytes>& batch, bool fit, const Visit& visit) {
  const auto by_width = [&]<int S>() {
    return fit ? visit.template operator()<S, kPack<T>>() : visit.template operator()<S, 1>();
  };
  if constexpr (std::is_same_v<T, Real<T>> && bytes == kFew) {
    return dispatch_stages<kUnrolled>(batch.leaf[0].stages, by_width);
  } else {
    return by_width.template operator()<kAnyStages>();
  }
}

template <class T, int bytes>
const char* launch(const Batch<Error<T>, bytes>& batch, bool fit, double* ratio, bool first, double* workspace,
                   Stream stream) {
  const char* words = dispatch(batch, fit, [&]<int S, int V>() {
    return run<kThreads>(error_kernel<T, S, V, bytes>, batch.blocks(), stream, batch, workspace);
  });
  if (words) return words;
  const unsigned blocks = blocks_for(batch.leaf[0].rows);
  return run<kThreads>(error_fold_kernel<T, bytes>, blocks, stream, batch, first, workspace, ratio);
}

}  // namespace

template <class T>
int64_t error_workspace(const Error<T>* leaves, int count) {
  int64_t size = 0;
  for (int i = 0; i < count; ++i) size += leaves[i].rows * chunks_of(leaves[i].columns);
  return size;
}

template <class T>
const char* error(const Error<T>* leaves, int count, double* ratio, bool first, double* workspace, Stream stream) {
  if (leaves[0].rows == 0) return nullptr;
  return in_batches(leaves, count, Add{}, [&](const auto& batch, bool fit, bool) {
    const bool start = std::exchange(first, false);
    return launch(batch, fit, ratio, start, workspace, stream);
  });
}

template <class T, class R>
const char* error_and_step_size(const Error<T>* leaves, int count, double* workspace, unsigned* done,
                                const StepSize& args, R* times, Stream stream) {
  if (args.rows == 0) return nullptr;
  bool first = true;
  const auto launch_one = [&]<int bytes>(const Batch<Error<T>, bytes>& batch, bool fit, bool last) {
    const bool start = std::exchange(first, false);
    if (!last) return launch(batch, fit, args.state + kErrorRatio * args.rows, start, workspace, stream);
    return dispatch(batch, fit, [&]<int S, int V>() {
      return run<kThreads>(error_and_step_size_kernel<T, S, V, R, bytes>, batch.blocks(), stream, batch, start,
                           workspace, done, args, times);
    });
  };
  return in_batches(leaves, count, Add{}, launch_one);
}

#define ODENET_INSTANCES(T, R)                                                      \
  template int64_t error_workspace(const Error<T>*, int);                           \
  template const char* error(const Error<T>*, int, double*, bool, double*, Stream); \
  template const char* error_and_step_size(const Error<T>*, int, double*, unsigned*, const StepSize&, R*, Stream);
ODENET_INSTANCES(float, float)
ODENET_INSTANCES(double, double)
ODENET_INSTANCES(Half, Half)
ODENET_INSTANCES(BFloat16, BFloat16)
ODENET_INSTANCES(Complex<float>, float)
ODENET_INSTANCES(Complex<double>, double)

}  // namespace odenet::cuda
