// The leaves of a state as one op sees them, gathered by type and then launched together: on CUDA those of one type are
// one launch. Nothing is written before every leaf has been added, so that a bad argument leaves all as it was.
#pragma once

#include <tuple>
#include <vector>

#include "cpu/levels.h"
#include "device.h"

namespace odenet {

template <template <class> class Args, class... Types>
class LeavesOf {
 public:
  template <class T>
  Args<T>& add() {
    return std::get<std::vector<Args<T>>>(lists_).emplace_back();
  }

  // Calls visit(leaves, count) for each type that has some.
  template <class Visit>
  void each(const Visit& visit) const {
    const auto one = [&](const auto& list) {
      if (!list.empty()) visit(list.data(), static_cast<int>(list.size()));
    };
    (one(std::get<std::vector<Args<Types>>>(lists_)), ...);
  }

  int num_types() const {
    int count = 0;
    each([&](const auto*, int) { ++count; });
    return count;
  }

 private:
  std::tuple<std::vector<Args<Types>>...> lists_;
};

template <template <class> class Args>
using RealLeaves = LeavesOf<Args, float, double, Half, BFloat16>;
using StageLeaves = RealLeaves<Stage>;
using DenseOutputLeaves = RealLeaves<DenseOutput>;
using AdvanceLeaves = RealLeaves<Advance>;
using ErrorLeaves = LeavesOf<Error, float, double, Half, BFloat16, Complex<float>, Complex<double>>;

// on_cpu(args) for each leaf, or on_cuda(leaves, count, stream) for each type.
template <class Leaves, class OnCpu, class OnCuda>
void launch_each(int32_t device, const Leaves& leaves, const OnCpu& on_cpu, const OnCuda& on_cuda) {
  leaves.each([&](const auto* args, int count) {
    on_device(
        device,
        [&] {
          for (int i = 0; i < count; ++i) on_cpu(args[i]);
        },
        [&](cuda::Stream stream) { return on_cuda(args, count, stream); });
  });
}

inline void launch(int32_t device, const StageLeaves& leaves) {
  launch_each(
      device, leaves, [](const auto& args) { cpu::stage(args, parallel_for); },
      [](const auto* args, int count, cuda::Stream stream) { return cuda::stage(args, count, stream); });
}

inline void launch(int32_t device, const DenseOutputLeaves& leaves) {
  launch_each(
      device, leaves, [](const auto& args) { cpu::dense_output(args, parallel_for); },
      [](const auto* args, int count, cuda::Stream stream) { return cuda::dense_output(args, count, stream); });
}

inline void launch(int32_t device, const AdvanceLeaves& leaves) {
  launch_each(
      device, leaves, [](const auto& args) { cpu::advance(args, parallel_for); },
      [](const auto* args, int count, cuda::Stream stream) { return cuda::advance(args, count, stream); });
}

// ratio [rows]: the largest over all leaves. workspace: of cuda::error_workspace; not used on the CPU.
inline void launch(int32_t device, const ErrorLeaves& leaves, double* ratio, double* workspace) {
  bool first = true;  // nothing is in ratio yet
  launch_each(
      device, leaves,
      [&](const auto& args) {
        cpu::error(args, ratio, first, parallel_for);
        first = false;
      },
      [&](const auto* args, int count, cuda::Stream stream) {
        const bool start = first;
        first = false;
        return cuda::error(args, count, ratio, start, workspace, stream);
      });
}

// Numbers of workspace that the largest group of these leaves needs.
inline int64_t workspace_of([[maybe_unused]] int32_t device, [[maybe_unused]] const ErrorLeaves& leaves) {
  int64_t size = 0;
#ifdef ODENET_CUDA
  if (device == kCpu) return 0;
  leaves.each([&](const auto* args, int count) {
    const int64_t needed = cuda::error_workspace(args, count);
    if (needed > size) size = needed;
  });
#endif
  return size;
}

// The type R of the stage times.
template <class R>
void launch(int32_t device, const StepSize& args, R* times) {
  on_device(
      device, [&] { cpu::step_size(args, times, parallel_for); },
      [&](cuda::Stream stream) { return cuda::step_size(args, times, stream); });
}

template <class R>
void launch(int32_t device, const StepSize& args, const FirstStep& first, R* times) {
  on_device(
      device, [&] { cpu::first_step(args, first, times, parallel_for); },
      [&](cuda::Stream stream) { return cuda::first_step(args, first, times, stream); });
}

}  // namespace odenet
