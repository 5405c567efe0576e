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
  run_ = reinterpret_cast<int64_t (*)(const SolveCall*, ParallelFor)>(symbol(library, "odenet_run"));
}

int64_t Library::run(const SolveCall& call) const {
  return run_(&call, parallel_for);
}

}  // namespace odenet
