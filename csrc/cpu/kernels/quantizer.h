// Rounding and quantizing of float32 values.
#pragma once

#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// NaN becomes `low`.
inline float clamp(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

// For |value| <= 2^22: the sum has no fraction bits left, so the addition does the rounding. Exact
// only if neither operation is fused or reordered. Unlike nearbyint it vectorizes.
inline float round_half_even(float value) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  return (value + kShift) - kShift;
}

inline float round_down(float value) {
  const float nearest = round_half_even(value);
  return nearest > value ? nearest - 1.0f : nearest;
}

// One width of an activation quantizer, in the domain of q - zero_point.
struct ActivationRange {
  float scale = 1.0f;
  float inverse_scale = 1.0f;
  float low = 0.0f;
  float high = 0.0f;
  int32_t zero_point = 0;
};

inline ActivationRange activation_range(const Quantizer& quantizer, int32_t bits) {
  const int index = index_of(quantizer.widths, bits);
  ActivationRange range;
  range.scale = quantizer.scale[index];
  range.inverse_scale = 1.0f / range.scale;
  range.zero_point = quantizer.zero_point[index];
  range.low = static_cast<float>(-range.zero_point);
  range.high = static_cast<float>((1 << bits) - 1 - range.zero_point);
  return range;
}

// q - zero_point
inline float activation_level(float value, const ActivationRange& range) {
  return round_half_even(clamp(value * range.inverse_scale, range.low, range.high));
}

inline void levels_from_floats(const float* values, int64_t count, const ActivationRange& range,
                               int16_t* levels) {
  const ActivationRange r = range;
  for (int64_t i = 0; i < count; ++i) {
    levels[i] = static_cast<int16_t>(static_cast<int32_t>(activation_level(values[i], r)));
  }
}

inline void codes_from_floats(const float* values, int64_t count, const ActivationRange& range,
                              uint8_t* codes) {
  const ActivationRange r = range;
  for (int64_t i = 0; i < count; ++i) {
    codes[i] =
        static_cast<uint8_t>(static_cast<int32_t>(activation_level(values[i], r)) + r.zero_point);
  }
}

inline void levels_from_codes(const uint8_t* codes, int64_t count, int32_t zero_point,
                              int16_t* levels) {
  const int16_t shift = static_cast<int16_t>(zero_point);
  for (int64_t i = 0; i < count; ++i) levels[i] = static_cast<int16_t>(codes[i] - shift);
}

inline void floats_from_codes(const uint8_t* codes, int64_t count, const ActivationRange& range,
                              float* values) {
  const float scale = range.scale;
  const int32_t zero_point = range.zero_point;
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(static_cast<int32_t>(codes[i]) - zero_point) * scale;
  }
}

// Codes of one quantizer to codes of another.
inline void requantize_codes(const uint8_t* codes, int64_t count, const ActivationRange& from,
                             const ActivationRange& to, uint8_t* result) {
  const float scale = from.scale;
  const int32_t zero_point = from.zero_point;
  const ActivationRange r = to;
  for (int64_t i = 0; i < count; ++i) {
    const float value = static_cast<float>(static_cast<int32_t>(codes[i]) - zero_point) * scale;
    result[i] =
        static_cast<uint8_t>(static_cast<int32_t>(activation_level(value, r)) + r.zero_point);
  }
}

inline void fake_quantize(float* values, int64_t count, const ActivationRange& range) {
  const ActivationRange r = range;
  for (int64_t i = 0; i < count; ++i) values[i] = activation_level(values[i], r) * r.scale;
}

// One width and output channel of a weight quantizer.
struct WeightRange {
  float scale;
  float inverse_scale;
  float low;
  float high;
  bool centred;
};

inline WeightRange weight_range(float scale, int32_t bits, bool centred) {
  const int32_t half = 1 << (bits - 1);
  return {scale, 1.0f / scale, static_cast<float>(-half), static_cast<float>(half - 1), centred};
}

// The signed code.
inline float weight_code(float value, const WeightRange& range) {
  const float code = clamp(value * range.inverse_scale, range.low, range.high);
  return range.centred ? round_down(code) : round_half_even(code);
}

// The value that a code stands for: level(code) times the step.
inline float weight_value(float code, const WeightRange& range) {
  return range.centred ? (2.0f * code + 1.0f) * (0.5f * range.scale) : code * range.scale;
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
