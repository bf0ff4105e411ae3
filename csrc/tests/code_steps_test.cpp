#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "kernel_table.h"
#include "random.h"

namespace dfs_test {
namespace {

// Step by step as the numerics have it: two roundings, the quantizer's product, half to even.
int32_t code_of(int32_t sum, float multiplier, float offset, float scale) {
  const float y = static_cast<float>(sum) * multiplier + offset;
  const float level = y * (1.0f / scale);
  if (!(level > 0.0f)) return 0;
  return level >= 3.0f ? 3 : static_cast<int32_t>(std::nearbyint(level));
}

}  // namespace

DFS_TEST(code_steps_stand_for_scaling_and_rounding) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kLargest = std::numeric_limits<float>::max();
  for_each_isa([&] {
    Random random(seed());
    // Extremes: constant codes, steps at both ends, and what is not finite.
    std::vector<float> multiplier = {0.0f,     -0.0f,  1.0f,  -1.0f,        1e-30f,    -1e-30f,
                                     1e30f,    -1e30f, 0.25f, -0.25f,       kInfinity, -kInfinity,
                                     kLargest, 0.5f,   -0.5f, std::nanf("")};
    std::vector<float> offset = {0.5f, 1.5f, 0.5f, -0.5f, 1.0f,  2.5f,      0.0f,       3.0f,
                                 0.5f, 0.5f, 1.0f, -1.0f, -1.0f, kInfinity, -kInfinity, 1.0f};
    while (multiplier.size() < 40) {
      multiplier.push_back(random.uniform(-0.01f, 0.01f));
      offset.push_back(random.uniform(-2.0f, 2.0f));
    }
    const auto channels = static_cast<int64_t>(multiplier.size());
    for (const float scale : {1.0f, 0.37f, 4.0f}) {
      constexpr int32_t kZero = 0;
      dfs::Quantizer output;
      output.widths = {1, {2}};
      output.scale = &scale;
      output.zero_point = &kZero;
      std::vector<int16_t> steps(static_cast<size_t>((dfs::kCodeSteps + 1) * channels));
      dfs::kernels().find_code_steps(multiplier.data(), offset.data(), channels, output,
                                     steps.data());
      for (int64_t o = 0; o < channels; ++o) {
        const auto step = [&](int64_t k) {
          return int32_t{steps[static_cast<size_t>(k * channels + o)]};
        };
        const auto index = static_cast<size_t>(o);
        for (int32_t sum = -0x7fff; sum < 0x7fff; ++sum) {
          int32_t code = 0;
          for (int64_t k = 0; k < dfs::kCodeSteps; ++k) {
            code += (sum ^ step(dfs::kCodeSteps)) >= step(k) ? 1 : 0;
          }
          const int32_t expected = code_of(sum, multiplier[index], offset[index], scale);
          CHECK(code == expected, "sum ", sum, " times ", multiplier[index], " plus ",
                offset[index], " at step ", scale, ": ", code, " instead of ", expected);
        }
      }
    }
  });
}

}  // namespace dfs_test
