// Register-only loops that show how fast this processor multiplies and adds at best.
#pragma once

#include "isa.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Runs `rounds` rounds of independent chains of accumulate(); returns the multiplications made.
template <typename Vector, typename Accumulate>
inline int64_t multiply_rounds(int64_t rounds, int64_t macs_per_lane, Vector left, Vector right,
                               Accumulate accumulate) {
  // Enough to hide the latency of any instruction used.
  constexpr int kChains = 12;
  Vector sums[kChains];
  // Opaque to the compiler, which would otherwise merge equal chains and multiply once.
  unroll<kChains>([&](auto i) {
    sums[i] = left;
    asm volatile("" : "+x"(sums[i]));
  });
  for (int64_t round = 0; round < rounds; ++round) {
    unroll<kChains>([&](auto i) {
      asm volatile("" : "+x"(left), "+x"(right));
      sums[i] = accumulate(sums[i], left, right);
    });
  }
  unroll<kChains>([&](auto i) { asm volatile("" : : "x"(sums[i])); });
  return rounds * kChains * kLanes * macs_per_lane;
}

inline int64_t multiply_floats(int64_t rounds) {
  return multiply_rounds(rounds, 1, splat(1.0f), splat(0.5f),
                         [](Floats sum, Floats a, Floats b) { return dot(sum, a, b); });
}

inline int64_t multiply_codes(int64_t rounds) {
  return multiply_rounds(rounds, kCodesPerDword, splat(0x01010101), splat(0x01010101),
                         [](Ints sum, Ints a, Ints b) { return dot_fitting(sum, a, b); });
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
