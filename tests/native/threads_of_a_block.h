// Many threads that wait for each other often. For a sanitizer each is a thread of the CPU, so that it sees their
// races. Else they are fibers of one thread, which go on in turn, in one order and in the other: hundreds of threads
// that meet thousands of times are then a matter of seconds.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)

#include <barrier>
#include <thread>

namespace emulation {

using Barrier = std::barrier<>;

inline void pause() {
  std::this_thread::yield();
}

class Threads {
 public:
  void add(std::function<void()> body) { bodies_.push_back(std::move(body)); }
  void run() {
    std::vector<std::thread> all;
    for (std::function<void()>& body : bodies_) all.emplace_back(body);
    for (std::thread& thread : all) thread.join();
  }

 private:
  std::vector<std::function<void()>> bodies_;
};

}  // namespace emulation

#else

#include <sys/mman.h>
#include <ucontext.h>

#include <cstddef>
#include <deque>
#include <new>

namespace emulation {

struct Fiber {
  static constexpr size_t kStack = size_t{1} << 20;

  explicit Fiber(std::function<void()> work) : body(std::move(work)) {
    stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() { munmap(stack, kStack); }

  std::function<void()> body;
  void* stack;
  ucontext_t here, caller;
  bool done = false;
};

inline thread_local Fiber* running = nullptr;

// Lets the others go on.
inline void pause() {
  Fiber* own = running;
  swapcontext(&own->here, &own->caller);
}

class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void arrive_and_wait() {
    const unsigned round = round_;
    if (++arrived_ == count_) {
      arrived_ = 0;
      ++round_;
    }
    while (round == round_) pause();
  }

 private:
  int count_, arrived_ = 0;
  unsigned round_ = 0;
};

class Threads {
 public:
  void add(std::function<void()> body) { fibers_.emplace_back(std::move(body)); }
  void run() {
    for (Fiber& fiber : fibers_) {
      getcontext(&fiber.here);
      fiber.here.uc_stack.ss_sp = fiber.stack;
      fiber.here.uc_stack.ss_size = Fiber::kStack;
      fiber.here.uc_link = &fiber.caller;
      makecontext(&fiber.here, begin, 0);
    }
    size_t left = fibers_.size();
    for (unsigned turn = 0; left > 0; ++turn) {
      const bool backwards = turn * 2654435769u >> 31;
      for (size_t i = 0; i < fibers_.size(); ++i) left -= go_on(fibers_[backwards ? fibers_.size() - 1 - i : i]);
    }
  }

 private:
  static void begin() {
    running->body();
    running->done = true;
  }
  // Whether it has come to its end.
  static bool go_on(Fiber& fiber) {
    if (fiber.done) return false;
    running = &fiber;
    swapcontext(&fiber.caller, &fiber.here);
    return fiber.done;
  }

  std::deque<Fiber> fibers_;
};

}  // namespace emulation

#endif
