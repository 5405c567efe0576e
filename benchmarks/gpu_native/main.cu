// The kernels of csrc/cuda/ without Python and torch: are they right, how fast beside a copy, what does a launch cost?
//
//   gpu_native [--check] PART...      copies stage advance dense_output error rows launch graph loop
//
// One line of JSON a result. --check: small sizes and no figures, for compute-sanitizer. Exit status: 0, 1 where
// something is wrong, 2 where CUDA failed. Runs on the CPU too, by tests/native/emulation.h: right or wrong, but no
// speed.
#include <map>

#include "native.h"

namespace odenet::native {

double copy_rate(int64_t bytes) {
  const Memory<char> from(bytes), to(bytes);
  const Time t = timed([&] { MUST(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, stream)); });
  return 2.0 * bytes / t.median / 1e6;
}

void copies() {
#if defined(__CUDACC__)
  int device, driver, runtime;
  cudaDeviceProp card;
  MUST(cudaGetDevice(&device));
  MUST(cudaGetDeviceProperties(&card, device));
  MUST(cudaDriverGetVersion(&driver));
  MUST(cudaRuntimeGetVersion(&runtime));
  Line line(card.name);
  line.add("multiprocessors", int64_t{card.multiProcessorCount}).add("L2 bytes", int64_t{card.l2CacheSize});
  line.add("shared bytes a block", static_cast<int64_t>(card.sharedMemPerBlockOptin)).add("driver", int64_t{driver});
  line.add("runtime", int64_t{runtime}).add("kernels for", cuda::architectures());
#endif
  for (int64_t mib : {4, 64, 256, 1024, 4096}) {
    if (quick) break;
    Line("copy").add("MiB", mib).add("GB/s", copy_rate(mib * mebi()));
  }
}

int run_parts(const std::vector<std::string>& names) {
  const std::map<std::string, void (*)()> parts{
      {"copies", copies}, {"stage", stages}, {"advance", advances}, {"dense_output", dense_outputs},
      {"error", errors},  {"rows", rows},    {"launch", launches},  {"graph", graph},
      {"loop", loop}};
  if (names.empty()) return 0;  // that it can be loaded
  MUST(cudaSetDevice(0));
  MUST(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  for (const std::string& name : names) {
    const auto part = parts.find(name);
    if (part == parts.end()) fail(name, "there is no such part");
    part->second();
    MUST(cudaDeviceSynchronize());
    MUST(cudaGetLastError());
    Line("end of " + name).add("checked", checked).add("wrong", wrong);
  }
  return wrong != 0;
}

}  // namespace odenet::native

int main(int argc, char** argv) {
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--check") {
      odenet::native::quick = true;
    } else {
      names.push_back(argv[i]);
    }
  }
  return odenet::native::run_parts(names);
}
