// A compiled field: a shared library written by odenet_cuda/compiled/emit.py, compiled, loaded, and called.
#pragma once

#include <cstdint>
#include <string>

#include "core/run.h"
#include "core/tile.h"

namespace odenet {

class Library {
 public:
  // path: of the shared library. Raises std::runtime_error in the loader's words. It stays loaded.
  explicit Library(const std::string& path);

  int64_t lanes() const { return sizes_[0]; }         // samples of a tile
  int64_t tile_bytes() const { return sizes_[1]; }    // what a tile keeps between calls
  int64_t record_bytes() const { return sizes_[2]; }  // of one step on the tape
  int64_t team() const { return sizes_[3]; }          // tiles that go through the solve together
  int64_t groups() const { return sizes_[4]; }        // threads of a tile, each of which keeps its own

  // Goes on with the solve; returns how much is left: rows, or steps.
  int64_t run(const SolveCall& call) const;
  // The same on torch's current stream of a CUDA device, which adds what is left to *left, an address there of two
  // numbers that are 0.
  void launch(const SolveCall& call, int32_t device, unsigned long long* left) const;
  // How many blocks of it run at once there, at most.
  int64_t resident(int32_t device) const;

 private:
  int64_t sizes_[5];
  int64_t (*run_)(const SolveCall*, ParallelFor) = nullptr;
  const char* (*launch_)(const SolveCall*, unsigned long long*, cuda::Stream) = nullptr;
  const char* (*resident_)(int64_t*) = nullptr;
};

}  // namespace odenet
