#include "library.h"

#include <dlfcn.h>

#include <stdexcept>

#include "device.h"

namespace odenet {

namespace {

void* symbol(void* library, const char* name) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw std::runtime_error(std::string("a compiled field lacks ") + name);
  return found;
}

}  // namespace

Library::Library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  reinterpret_cast<void (*)(int64_t*)>(symbol(library, "odenet_sizes"))(sizes_);
  if (void* found = dlsym(library, "odenet_launch")) {
    launch_ = reinterpret_cast<decltype(launch_)>(found);
    resident_ = reinterpret_cast<decltype(resident_)>(symbol(library, "odenet_resident"));
  } else {
    run_ = reinterpret_cast<decltype(run_)>(symbol(library, "odenet_run"));
  }
}

int64_t Library::run(const SolveCall& call) const {
  if (run_ == nullptr) throw std::runtime_error("this compiled field was compiled for CUDA");
  return run_(&call, parallel_for);
}

void Library::launch(const SolveCall& call, int32_t device, unsigned long long* left) const {
  if (launch_ == nullptr) throw std::runtime_error("this compiled field was compiled for the CPU");
  on_device(
      device, [&] { launch_(&call, left, nullptr); },
      [&](cuda::Stream stream) { return launch_(&call, left, stream); });
}

int64_t Library::resident(int32_t device) const {
  if (resident_ == nullptr) throw std::runtime_error("this compiled field was compiled for the CPU");
  int64_t blocks = 0;
  on_device(device, [&] { resident_(&blocks); }, [&](cuda::Stream) { return resident_(&blocks); });
  return blocks;
}

}  // namespace odenet
