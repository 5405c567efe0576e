#include "repeat.h"

#include <stdexcept>

#include "device.h"

namespace odenet {

namespace {

void refuse() {
  throw std::runtime_error("a step is repeated on CUDA devices alone");
}

}  // namespace

Repeat::Repeat(std::uintptr_t step, std::uintptr_t status, int64_t rows, std::uintptr_t left, int64_t steps,
               int32_t device)
    : device_(device) {
  on_device(device, refuse, [&](cuda::Stream) {
    return cuda::make_repeat(reinterpret_cast<cuda::Graph>(step), reinterpret_cast<const double*>(status), rows,
                             reinterpret_cast<int64_t*>(left), steps, made_);
  });
}

Repeat::~Repeat() {
#ifdef ODENET_CUDA
  if (made_ != nullptr) cuda::free_repeat(made_);
#endif
}

void Repeat::launch() const {
  on_device(device_, refuse, [&](cuda::Stream stream) { return cuda::launch_repeat(made_, stream); });
}

}  // namespace odenet
