// Quantizing and dequantizing in one go, and the gradients through that, for training.
#pragma once

#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"

namespace dfs {
namespace DFS_ISA {
namespace {

inline ActivationRange fake_range(const FakeQuantizer& quantizer) {
  ActivationRange range;
  range.scale = quantizer.scale;
  range.inverse_scale = 1.0f / quantizer.scale;
  range.zero_point = quantizer.zero_point;
  range.low = static_cast<float>(-quantizer.zero_point);
  range.high = static_cast<float>((1 << quantizer.bits) - 1 - quantizer.zero_point);
  return range;
}

inline void fake_quantize_values(const float* values, int64_t count, const FakeQuantizer& quantizer,
                                 float* result) {
  const ActivationRange r = fake_range(quantizer);
  for (int64_t i = 0; i < count; ++i) result[i] = activation_level(values[i], r) * r.scale;
}

// `value`, or 0 where it is not wanted. By its bits: GCC 12 does not vectorize a condition here
// below AVX-512, and the loop takes 30 times as long.
inline float keep_if(bool wanted, float value) {
  uint32_t pattern;
  std::memcpy(&pattern, &value, sizeof(pattern));
  pattern &= ~static_cast<uint32_t>(wanted) + 1u;
  std::memcpy(&value, &pattern, sizeof(value));
  return value;
}

// One value's gradient; `term` is its part of that of the scale.
inline float fake_gradient(float grad, float value, const ActivationRange& r, float* term) {
  const float t = value * r.inverse_scale;
  const float clamped = clamp(t, r.low, r.high);
  const bool inside = clamped == t;
  // Out of range `clamped` is an integer: the slope is that.
  *term = grad * (round_half_even(clamped) - keep_if(inside, t));
  return keep_if(inside, grad);
}

// Sixteen partial sums, whatever the vectors hold, so that the order of additions is the same for
// every instruction set.
inline double fake_quantize_gradients(const float* grads, const float* values, int64_t count,
                                      const FakeQuantizer& quantizer, float* result) {
  constexpr int64_t kSums = 16;
  constexpr int64_t kTerms = 256;
  const ActivationRange r = fake_range(quantizer);
  double sums[kSums] = {};
  for (int64_t first = 0; first < count; first += kTerms) {
    const int64_t run = min_of(kTerms, count - first);
    float terms[kTerms];
    for (int64_t i = 0; i < run; ++i) {
      result[first + i] = fake_gradient(grads[first + i], values[first + i], r, &terms[i]);
    }
    for (int64_t i = run; i % kSums != 0; ++i) terms[i] = 0.0f;
    for (int64_t i = 0; i < run; i += kSums) {
      for (int64_t j = 0; j < kSums; ++j) sums[j] += static_cast<double>(terms[i + j]);
    }
  }
  for (int64_t half = kSums / 2; half > 0; half /= 2) {
    for (int64_t j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
