// Where a layer's 2-bit output codes change, as integer sums: codes grow or fall with the sum, so
// three comparisons stand for scaling, ReLU and rounding.
#pragma once

#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Codes of the sums: y = sum * m + c to 2 bits with a zero point of 0, which rectifies as well.
struct SumCode {
  float multiplier;
  float offset;
  ActivationRange range;

  int32_t operator()(int32_t sum) const {
    const float y = static_cast<float>(sum) * multiplier + offset;
    return static_cast<int32_t>(activation_level(y, range));
  }
};

// See ConvTask::code_steps. `output` has a zero point of 0 at 2 bits.
inline void find_code_steps(const float* multiplier, const float* offset, int64_t channels,
                            const Quantizer& output, int16_t* steps) {
  constexpr int32_t kNever = 0x7fff;
  const ActivationRange range = activation_range(output, 2);
  for (int64_t o = 0; o < channels; ++o) {
    const SumCode code = {multiplier[o], offset[o], range};
    const int32_t flip = multiplier[o] < 0.0f ? -1 : 0;
    for (int32_t k = 1; k <= kCodeSteps; ++k) {
      // The first flipped sum whose code is at least k.
      int32_t low = -kNever - 1;
      int32_t high = kNever;
      while (low < high) {
        const int32_t middle = low + (high - low) / 2;
        if (code(middle ^ flip) >= k) {
          high = middle;
        } else {
          low = middle + 1;
        }
      }
      steps[(k - 1) * channels + o] = static_cast<int16_t>(low);
    }
    steps[kCodeSteps * channels + o] = static_cast<int16_t>(flip);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
