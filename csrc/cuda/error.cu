#include "grid.h"

namespace odenet::cuda {

namespace {

constexpr int64_t kChunk = 16 * kThreads;  // elements summed by one block

// The sum over a block, in thread 0, in an order that does not depend on timing.
__device__ double block_sum(double value) {
  __shared__ double sums[kThreads];
  sums[threadIdx.x] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}

// workspace[row, chunk]: sums of squares; one block each.
template <class T, int S>
__global__ void error_kernel(const Error<T> s, int64_t chunks, double* workspace) {
  for (int64_t part = blockIdx.x; part < s.rows * chunks; part += gridDim.x) {
    const int64_t row = part / chunks, chunk = part % chunks;
    Real<T> w[S > 0 ? S : 1];
    error_weights<S>(s, row, w);
    const int64_t end = row * s.columns + min(s.columns, (chunk + 1) * kChunk);
    double sum = 0;
    for (int64_t i = row * s.columns + chunk * kChunk + threadIdx.x; i < end; i += kThreads) {
      sum += static_cast<double>(error_element<S>(s, w, i));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) workspace[part] = sum;
    __syncthreads();
  }
}

// ratio[row]: one block a row adds up its chunks.
__global__ void error_fold_kernel(int64_t rows, int64_t columns, int64_t chunks, bool first, const double* workspace,
                                  double* ratio) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    double sum = 0;
    for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) sum += workspace[row * chunks + chunk];
    sum = block_sum(sum);
    if (threadIdx.x == 0) ratio[row] = error_fold(ratio[row], sum, columns, first);
    __syncthreads();
  }
}

}  // namespace

int64_t error_chunks(int64_t columns) {
  return (columns + kChunk - 1) / kChunk;
}

template <class T>
const char* error(const Error<T>& args, double* ratio, bool first, double* workspace, Stream stream) {
  if (args.rows == 0) return nullptr;
  const int64_t chunks = error_chunks(args.columns);
  if (chunks > 0) {
    dispatch_stages(args.stages, [&]<int S>() {
      error_kernel<T, S>
          <<<blocks_for(args.rows * chunks * kThreads), kThreads, 0, native(stream)>>>(args, chunks, workspace);
    });
    if (const char* words = launch_error()) return words;
  }
  error_fold_kernel<<<blocks_for(args.rows * kThreads), kThreads, 0, native(stream)>>>(args.rows, args.columns, chunks,
                                                                                       first, workspace, ratio);
  return launch_error();
}

template const char* error(const Error<float>&, double*, bool, double*, Stream);
template const char* error(const Error<double>&, double*, bool, double*, Stream);

}  // namespace odenet::cuda
