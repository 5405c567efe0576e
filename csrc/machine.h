// What the CPU kernels ask of the machine: which instruction sets it has, and how large its caches are.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace odenet {

// The instruction sets that the kernels of cpu/ are compiled for, each including those before.
enum class Level { baseline, avx2, avx512 };

const char* name_of(Level level);
std::vector<Level> machine_levels();         // those that were built and that this machine has
Level level();                               // the one in use: the last of them, unless chosen otherwise
void choose_level(const std::string& name);  // throws std::invalid_argument where the machine has it not
int64_t last_level_cache();                  // bytes

}  // namespace odenet
