// What the kernels should compute, written a second time from the definitions and without any of
// their code: scalar, one element at a time.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace dfs_test {

inline float naive_clamp(float value, float low, float high) {
  if (std::isnan(value)) return low;
  if (value < low) return low;
  if (value > high) return high;
  return value;
}

// q of an activation.
inline int naive_code(float x, float scale, int zero_point, int bits) {
  const float r = 1.0f / scale;
  const float t = x * r;
  const float low = static_cast<float>(-zero_point);
  const float high = static_cast<float>((1 << bits) - 1 - zero_point);
  return static_cast<int>(std::nearbyint(naive_clamp(t, low, high))) + zero_point;
}

inline float naive_value(int code, float scale, int zero_point) {
  return static_cast<float>(code - zero_point) * scale;
}

inline int naive_weight_code(float w, float scale, int bits, bool centred) {
  const float r = 1.0f / scale;
  const float low = static_cast<float>(-(1 << (bits - 1)));
  const float high = static_cast<float>((1 << (bits - 1)) - 1);
  const float t = w * r;
  if (centred) return static_cast<int>(naive_clamp(std::floor(t), low, high));
  return static_cast<int>(std::nearbyint(naive_clamp(t, low, high)));
}

inline int naive_level(int code, bool centred) { return centred ? 2 * code + 1 : code; }

// Code `c` of a run of packed codes, one bit at a time.
inline int naive_extract(const uint8_t* packed, int64_t c, int bits) {
  int code = 0;
  for (int b = 0; b < bits; ++b) {
    const int64_t position = c * bits + b;
    code |= ((packed[position / 8] >> (position % 8)) & 1) << b;
  }
  return code;
}

inline void naive_insert(uint8_t* packed, int64_t c, int bits, int code) {
  for (int b = 0; b < bits; ++b) {
    const int64_t position = c * bits + b;
    const int mask = 1 << (position % 8);
    if ((code >> b) & 1) {
      packed[position / 8] = static_cast<uint8_t>(packed[position / 8] | mask);
    } else {
      packed[position / 8] = static_cast<uint8_t>(packed[position / 8] & ~mask);
    }
  }
}

inline int64_t naive_pixel_bytes(int64_t channels, int bits) { return (channels * bits + 7) / 8; }

}  // namespace dfs_test
