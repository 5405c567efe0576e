// Matrix products of a warp by tensor cores (PTX ISA, "Matrix Fragments for mma.m16n8k8" and "m16n8k16"): sums of
// float, operands rounded to TF32 or bfloat16. The fragments of a thread by its place in the warp, quad = place / 4 and
// member = place % 4: of the left operand rows quad and quad + 8, of the right operand column quad, of the sums those
// rows and columns 2 member and 2 member + 1.
#pragma once

#include <cstdint>

#include "team.h"

#ifndef ODENET_TENSOR_CORE
#define ODENET_TENSOR_CORE void
#endif

#if defined(ODENET_BLOCKS)

namespace odenet {
namespace ODENET_LEVEL {

#if defined(__CUDACC__)  // else tests/native/emulation.h

// To the nearest of eleven bits, halves away from zero.
ODENET_HD uint32_t round_to_tf32(float x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
  return rounded;
}
// To the nearest even of eight bits; the second number is in the high half.
ODENET_HD uint32_t round_to_bf16(float first, float second) {
  uint32_t rounded;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(rounded) : "f"(second), "f"(first));
  return rounded;
}
// sums += left right
ODENET_HD void multiply_tf32(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}
ODENET_HD void multiply_bf16(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}

#endif

// depth: numbers of a row of the left operand in one product. left(i, j), right(j, k): the operands' numbers. rounded:
// the left ones have been through `round`.
struct Tf32 {
  static constexpr int depth = 8;
  ODENET_HD static float round(float x) {
    const uint32_t bits = round_to_tf32(x);
    memcpy(&x, &bits, sizeof(x));
    return x;
  }
  template <bool rounded, class Left>
  ODENET_HD static void load_left(uint32_t (&to)[4], int quad, int member, const Left& left) {
    ODENET_UNROLL
    for (int n = 0; n < 4; ++n) {
      const float x = left(quad + n % 2 * 8, member + n / 2 * 4);
      if constexpr (rounded) {
        memcpy(&to[n], &x, sizeof(x));
      } else {
        to[n] = round_to_tf32(x);
      }
    }
  }
  template <class Right>
  ODENET_HD static void load_right(uint32_t (&to)[2], int quad, int member, const Right& right) {
    ODENET_UNROLL
    for (int n = 0; n < 2; ++n) to[n] = round_to_tf32(right(member + n * 4, quad));
  }
  ODENET_HD static void multiply(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    multiply_tf32(sums, left, right);
  }
};

struct Bf16 {  // two numbers are rounded by one instruction, which brings them together too: nothing is done beforehand
  static constexpr int depth = 16;
  ODENET_HD static float round(float x) { return x; }
  template <bool rounded, class Left>
  ODENET_HD static void load_left(uint32_t (&to)[4], int quad, int member, const Left& left) {
    ODENET_UNROLL
    for (int n = 0; n < 4; ++n) {
      const int i = quad + n % 2 * 8, j = 2 * member + n / 2 * 8;
      to[n] = round_to_bf16(left(i, j), left(i, j + 1));
    }
  }
  template <class Right>
  ODENET_HD static void load_right(uint32_t (&to)[2], int quad, int member, const Right& right) {
    ODENET_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int j = 2 * member + n * 8;
      to[n] = round_to_bf16(right(j, quad), right(j + 1, quad));
    }
  }
  ODENET_HD static void multiply(float (&sums)[4], const uint32_t (&left)[4], const uint32_t (&right)[2]) {
    multiply_bf16(sums, left, right);
  }
};

using TensorCore = ODENET_TENSOR_CORE;  // void: matrix products are of float

// How products of sixteen rows and eight columns, `high` times `wide` of them, are dealt: a warp has several side by
// side, which have their operands in common, but four warps, one for each scheduler of a multiprocessor, have some.
template <int high, int wide>
struct Dealt {
  static constexpr int each = high * wide >= 32 ? 8 : high * wide >= 16 ? 4 : high * wide >= 8 ? 2 : 1;
  static constexpr int most = each == 8 ? 4 : each == 1 ? 1 : 2, together = wide < most ? wide : most;
  static constexpr int tall = each / together < high ? each / together : high;
  static constexpr int down = (high + tall - 1) / tall, across = wide / together;  // warps' shares
};

// The sums of `jobs` shares of tall times `together` products each, by the warps in turn.
template <class Core, int jobs, int tall, int together>
struct WarpSums {
  static constexpr int warps = Block::size / 32, turns = (jobs + warps - 1) / warps;
  float sums[turns][tall][together][4] = {};

  // body(job, row, column, sum) for the sums that this thread has, rows and columns of its job.
  template <class Body>
  ODENET_HD void each(const Body& body) {
    const int place = Block{}.thread() % 32;
    ODENET_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const int job = turn * warps + Block{}.thread() / 32;
      if (job >= jobs) return;
      ODENET_UNROLL
      for (int m = 0; m < tall; ++m) {
        ODENET_UNROLL
        for (int n = 0; n < together; ++n) {
          ODENET_UNROLL
          for (int q = 0; q < 4; ++q) {
            body(job, m * 16 + place / 4 + q / 2 * 8, n * 8 + place % 4 * 2 + q % 2, sums[turn][m][n][q]);
          }
        }
      }
    }
  }
  // Adds products of `depth` numbers. left(job, i, j), right(job, j, k): the operands' numbers.
  template <int depth, bool rounded, class Left, class Right>
  ODENET_HD void add(const Left& left, const Right& right) {
    constexpr int whole = depth / Core::depth * Core::depth;
    ODENET_UNROLL
    for (int turn = 0; turn < turns; ++turn) {
      const int job = turn * warps + Block{}.thread() / 32;
      if (job >= jobs) return;
      ODENET_BY_FOUR
      for (int begin = 0; begin < whole; begin += Core::depth) {
        add_one<rounded>(
            sums[turn], [&](int i, int j) { return left(job, i, begin + j); },
            [&](int j, int k) { return right(job, begin + j, k); });
      }
      if constexpr (whole < depth) {  // zeros behind the operands' ends
        add_one<rounded>(
            sums[turn], [&](int i, int j) { return whole + j < depth ? left(job, i, whole + j) : 0.0f; },
            [&](int j, int k) { return whole + j < depth ? right(job, whole + j, k) : 0.0f; });
      }
    }
  }
  template <bool rounded, class Left, class Right>
  ODENET_HD static void add_one(float (&sums)[tall][together][4], const Left& left, const Right& right) {
    const int place = Block{}.thread() % 32, quad = place / 4, member = place % 4;
    uint32_t a[tall][4], b[2];
    ODENET_UNROLL
    for (int m = 0; m < tall; ++m) {
      Core::template load_left<rounded>(a[m], quad, member, [&](int i, int j) { return left(m * 16 + i, j); });
    }
    ODENET_UNROLL
    for (int n = 0; n < together; ++n) {
      Core::load_right(b, quad, member, [&](int j, int k) { return right(j, n * 8 + k); });
      ODENET_UNROLL
      for (int m = 0; m < tall; ++m) Core::multiply(sums[m][n], a[m], b);
    }
  }
};

}  // namespace ODENET_LEVEL
}  // namespace odenet

#endif
