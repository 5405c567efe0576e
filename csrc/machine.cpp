#include "machine.h"

#include <unistd.h>

#include <stdexcept>

namespace odenet {

namespace {

Level best() {
  return machine_levels().back();
}

Level& chosen() {
  static Level value = best();
  return value;
}

}  // namespace

const char* name_of(Level level) {
  switch (level) {
    case Level::avx512:
      return "avx512";
    case Level::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<Level> machine_levels() {
  std::vector<Level> levels{Level::baseline};
#ifdef ODENET_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("f16c")) return levels;
  levels.push_back(Level::avx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    levels.push_back(Level::avx512);
  }
#endif
  return levels;
}

Level level() {
  return chosen();
}

void choose_level(const std::string& name) {
  std::string known;
  for (const Level level : machine_levels()) {
    if (name == name_of(level)) {
      chosen() = level;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(name_of(level));
  }
  throw std::invalid_argument("ODENET_CPU must be an instruction set of this machine, " + known + ", got " + name);
}

// What the system says can be the sum of many caches, of which a core uses one.
int64_t last_level_cache() {
  static const int64_t size = [] {
    constexpr int64_t usual = int64_t{32} << 20;
#ifdef _SC_LEVEL3_CACHE_SIZE
    const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
    if (found > 0 && found < usual) return found;
#endif
    return usual;
  }();
  return size;
}

}  // namespace odenet
