// A compiled field: a shared library written by odenet_cuda/compiled/emit.py, compiled, loaded, and called.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/tile.h"

namespace odenet {

class Library {
 public:
  // path: of the shared library. Raises std::runtime_error in the loader's words. It stays loaded.
  explicit Library(const std::string& path);

  int64_t lanes() const { return sizes_[0]; }         // samples of a tile
  int64_t tile_bytes() const { return sizes_[1]; }    // what a tile keeps between calls
  int64_t record_bytes() const { return sizes_[2]; }  // of one step on the tape

  // Goes on with the solve; returns how much is left: rows, or steps.
  int64_t run(const SolveCall& call) const;

 private:
  int64_t sizes_[3];
  int64_t (*run_)(const SolveCall*, ParallelFor);
};

// The arguments of a call, which own what is not a tensor.
struct Call {
  SolveCall in{};
  std::vector<const void*> constants;
  std::vector<double> rtol, atol;
};

}  // namespace odenet
