// A captured step as the body of a WHILE node of a CUDA graph.
// https://docs.nvidia.com/cuda/cuda-programming-guide/04-special-topics/cuda-graphs.html#conditional-graph-nodes
#include "../core/run.h"
#include "../core/step_size.h"
#include "../repeat.h"

#if defined(__CUDACC__)  // what runs kernels on the CPU has no graphs

namespace odenet::cuda {

namespace {

constexpr int kThreads = 256;

// Whether a step follows: some row goes on, and of `steps` some are left. Before the first step, and after each. One
// block.
__global__ void decide_kernel(cudaGraphConditionalHandle again, const double* status, int64_t rows, int64_t* left,
                              int64_t steps, bool first) {
  bool some = false;
  for (int64_t row = threadIdx.x; row < rows; row += kThreads) some |= static_cast<int>(status[row]) == kRunning;
  some = __syncthreads_or(some);
  if (threadIdx.x != 0) return;
  *left = first ? steps : *left - 1;
  cudaGraphSetConditional(again, some && *left > 0);
}

template <class... Parameters>
cudaError_t add_kernel(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                       void (*kernel)(Parameters...), Parameters... arguments) {
  void* pointers[] = {&arguments...};
  cudaKernelNodeParams params{};
  params.func = reinterpret_cast<void*>(kernel);
  params.gridDim = dim3(1);
  params.blockDim = dim3(kThreads);
  params.kernelParams = pointers;
  return cudaGraphAddKernelNode(node, graph, after, after ? 1 : 0, &params);
}

cudaError_t build(cudaGraph_t graph, cudaGraph_t step, const double* status, int64_t rows, int64_t* left,
                  int64_t steps) {
  cudaGraphConditionalHandle again;
  cudaGraphNode_t first, loop, made, next;
  cudaError_t error = cudaGraphConditionalHandleCreate(&again, graph, 0, cudaGraphCondAssignDefault);
  if (error == cudaSuccess)
    error = add_kernel(&first, graph, nullptr, decide_kernel, again, status, rows, left, steps, true);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams params{};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = again;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
#if CUDART_VERSION >= 13000
  error = cudaGraphAddNode(&loop, graph, &first, nullptr, 1, &params);
#else
  error = cudaGraphAddNode(&loop, graph, &first, 1, &params);
#endif
  if (error != cudaSuccess) return error;
  const cudaGraph_t body = params.conditional.phGraph_out[0];
  error = cudaGraphAddChildGraphNode(&made, body, nullptr, 0, step);
  if (error != cudaSuccess) return error;
  return add_kernel(&next, body, &made, decide_kernel, again, status, rows, left, steps, false);
}

}  // namespace

const char* make_repeat(Graph step, const double* status, int64_t rows, int64_t* left, int64_t steps, Graph& made) {
  cudaGraph_t graph;
  cudaGraphExec_t exec = nullptr;
  cudaError_t error = cudaGraphCreate(&graph, 0);
  if (error != cudaSuccess) return words(error);
  error = build(graph, static_cast<cudaGraph_t>(step), status, rows, left, steps);
  if (error == cudaSuccess) error = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  made = exec;
  return words(error);
}

const char* launch_repeat(Graph made, Stream stream) {
  return words(cudaGraphLaunch(static_cast<cudaGraphExec_t>(made), static_cast<cudaStream_t>(stream)));
}

void free_repeat(Graph made) {
  cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(made));
}

}  // namespace odenet::cuda

#endif
