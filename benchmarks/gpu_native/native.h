// What the parts of the program share: memory, numbers known on both sides, time between events, and results as lines.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "launch.h"

namespace odenet::native {

// ---- results: one line of JSON each, flushed, so that what hangs or dies later leaves them

class Line {
 public:
  explicit Line(const std::string& what) : text_("{\"what\": \"" + what + "\"") {}
  Line(const Line&) = delete;
  Line& operator=(const Line&) = delete;
  ~Line() {
    std::printf("%s}\n", text_.c_str());
    std::fflush(stdout);
  }
  Line& add(const std::string& name, const std::string& value) { return raw(name, "\"" + value + "\""); }
  Line& add(const std::string& name, int64_t value) { return raw(name, std::to_string(value)); }
  Line& add(const std::string& name, double value) {  // JSON knows no NaN
    char digits[32];
    std::snprintf(digits, sizeof(digits), "%.4g", value);
    return raw(name, std::isfinite(value) ? digits : std::string("\"") + digits + "\"");
  }

 private:
  Line& raw(const std::string& name, const std::string& value) {
    text_ += ", \"" + name + "\": " + value;
    return *this;
  }
  std::string text_;
};

inline int64_t checked = 0, wrong = 0;

// Counts a comparison. The first that are wrong are told, in words of `describe`, which adds to the line.
inline void compare(bool good, const std::string& what, const std::function<void(Line&)>& describe) {
  ++checked;
  if (good || ++wrong > 20) return;
  Line line(what);
  line.add("wrong", int64_t{1});
  describe(line);
}

[[noreturn]] inline void fail(const std::string& what, const char* words) {
  Line(what).add("failed", words);
  std::exit(2);
}
inline void must(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
}
inline void must(const char* words, const char* what) {
  if (words) fail(what, words);
}
#define MUST(call) must(call, #call)

// ---- the machine

#if defined(__CUDACC__)
constexpr bool kEmulated = false;
constexpr int kBlock = 256;
constexpr unsigned kBlocks = 1024;
constexpr int64_t kSteps = 1000;  // of a solve
#else                             // tests/native/emulation.h: right or wrong, but no speed
constexpr bool kEmulated = true;
constexpr int kBlock = 8;
constexpr unsigned kBlocks = 1;
constexpr int64_t kSteps = 20;
#endif
inline cudaStream_t stream;
inline bool quick = kEmulated;  // few sizes, small ones, and no figures
inline int64_t mebi() {
  return int64_t{1} << (kEmulated ? 6 : quick ? 10 : 20);
}

struct Time {
  double median, least;  // milliseconds
};
// Of call() on the stream, between two events.
inline float milliseconds(const std::function<void()>& call) {
  cudaEvent_t begin, end;
  MUST(cudaEventCreate(&begin));
  MUST(cudaEventCreate(&end));
  MUST(cudaEventRecord(begin, stream));
  call();
  MUST(cudaEventRecord(end, stream));
  MUST(cudaEventSynchronize(end));
  float ms = 0;
  MUST(cudaEventElapsedTime(&ms, begin, end));
  MUST(cudaEventDestroy(begin));
  MUST(cudaEventDestroy(end));
  return ms;
}

// Of one call in several runs, each of so many calls.
inline Time timed(const std::function<void()>& call, int calls = 1, int runs = quick ? 1 : 15) {
  const auto run = [&] {
    for (int i = 0; i < calls; ++i) call();
  };
  run();
  std::vector<float> all;
  for (int i = 0; i < runs; ++i) all.push_back(milliseconds(run) / calls);
  std::sort(all.begin(), all.end());
  return {all[all.size() / 2], all[0]};
}

// ---- memory, freed by its owner

template <class T>
class Memory {
 public:
  explicit Memory(int64_t count, int shift = 0) : count_(count), shift_(shift) {
    MUST(cudaMalloc(reinterpret_cast<void**>(&at_), std::max<int64_t>(1, count + shift) * sizeof(T)));
  }
  explicit Memory(const std::vector<T>& from) : Memory(static_cast<int64_t>(from.size())) { send(from); }
  Memory(Memory&& other) noexcept : at_(other.at_), count_(other.count_), shift_(other.shift_) { other.at_ = nullptr; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(at_); }  // after what is in flight

  T* get() const { return at_ + shift_; }
  void send(const std::vector<T>& from) const {
    MUST(cudaMemcpy(get(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> fetch() const {
    MUST(cudaDeviceSynchronize());
    std::vector<T> to(count_);
    MUST(cudaMemcpy(to.data(), get(), count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return to;
  }

 private:
  T* at_ = nullptr;
  int64_t count_;
  int shift_;
};

// ---- numbers

template <class T>
struct Name;
template <>
struct Name<float> {
  static constexpr const char* is = "float32";
  static constexpr double eps = 1.2e-7;
};
template <>
struct Name<double> {
  static constexpr const char* is = "float64";
  static constexpr double eps = 2.3e-16;
};
template <>
struct Name<Half> {
  static constexpr const char* is = "float16";
  static constexpr double eps = 9.8e-4;
};
template <>
struct Name<BFloat16> {
  static constexpr const char* is = "bfloat16";
  static constexpr double eps = 7.9e-3;
};

template <class T>
double value(T x) {
  return static_cast<double>(static_cast<Accumulate<T>>(x));
}

// Number i of buffer j, in [-1, 1).
__host__ __device__ inline double number(int64_t i, int j) {
  return ((i * 2654435761u + j * 40503u) % 2048) / 1024.0 - 1;
}
template <class T>
double rounded(int64_t i, int j) {
  return value(static_cast<T>(static_cast<Accumulate<T>>(number(i, j))));
}
template <class T>
__global__ void fill(T* p, int64_t count, int j) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += threads) {
    p[i] = static_cast<T>(static_cast<Accumulate<T>>(number(i, j)));
  }
}
template <class T>
Memory<T> filled(int64_t count, int j, int shift = 0) {
  Memory<T> made(count, shift);
  MUST(cuda::run<kBlock>(fill<T>, kBlocks, stream, made.get(), count, j));
  return made;
}

// GB/s of a copy by the driver, bytes read and written.
double copy_rate(int64_t bytes);

// ---- the parts

void copies();
void stages(), advances(), dense_outputs();
void errors(), rows();
void launches(), graph(), loop();

}  // namespace odenet::native
