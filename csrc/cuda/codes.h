// Codes and widths as all kernels take them.
#pragma once

#include <cstdint>

#include "device.h"
#include "dfs/types.h"

namespace dfs::cuda {

// Widths have a slot each, so that what a width means is found without a search.
constexpr int kSlots = 4;

DFS_HOST_DEVICE int slot_of(int bits) {
  return bits == 2 ? 0 : bits == 4 ? 1 : bits == 8 ? 2 : bits == 32 ? 3 : -1;
}
DFS_HOST_DEVICE int bits_of(int slot) { return slot == 3 ? 32 : 2 << slot; }

// Steps and zero points by slot: where each stands, -1 for a width that is not on offer.
struct SlotQuantizer {
  const float* scale = nullptr;
  const int32_t* zero_point = nullptr;
  int8_t index[kSlots] = {-1, -1, -1, -1};
};

// A feature map as kernels see it.
struct Map {
  float* values = nullptr;
  int64_t stride_n = 0;
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;
  uint8_t* codes = nullptr;
  int64_t row_bytes = 0;
  const int32_t* bits = nullptr;
  SlotQuantizer quantizer;
  int channels = 0;
  int height = 0;
  int width = 0;

  DFS_HOST_DEVICE bool packed() const { return bits != nullptr; }
  DFS_HOST_DEVICE int pixels() const { return height * width; }
};

inline SlotQuantizer by_slot(const Quantizer& quantizer) {
  SlotQuantizer result;
  result.scale = quantizer.scale;
  result.zero_point = quantizer.zero_point;
  for (int i = 0; i < quantizer.widths.count; ++i) {
    const int slot = slot_of(quantizer.widths.bits[i]);
    if (slot >= 0) result.index[slot] = static_cast<int8_t>(i);
  }
  return result;
}

inline Map to_map(const FeatureMap& map) {
  Map result;
  result.values = map.values;
  result.stride_n = map.stride_n;
  result.stride_c = map.stride_c;
  result.stride_h = map.stride_h;
  result.stride_w = map.stride_w;
  result.codes = map.codes;
  result.row_bytes = map.row_bytes;
  result.bits = map.bits;
  result.quantizer = by_slot(map.quantizer);
  result.channels = static_cast<int>(map.channels);
  result.height = static_cast<int>(map.height);
  result.width = static_cast<int>(map.width);
  return result;
}

// Adding it to a value of at most 2^22 rounds that to an integer, halves to even, and leaves the
// integer in the low bits: converting takes a pipe that is eight times narrower. Taken off again it
// gives the value of an integer that was put there.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
constexpr uint32_t kRounderBits = 0x4b400000u;

// An integer of at most 2^22 as a float.
DFS_DEVICE float small_to_float(int32_t x) {
  return add(bits_to_float(kRounderBits + static_cast<uint32_t>(x)), -kRounder);
}

// x is about (q - zero_point) * scale.
struct Step {
  float scale = 0.0f;
  float reciprocal = 0.0f;
  float low = 0.0f;
  float high = 0.0f;
  int zero_point = 0;
  // The zero point is added by rounding too, as far as it is even: an odd number would turn halves
  // the other way.
  float rounder = kRounder;
  uint32_t odd = 0;

  // The code less `odd`, with kRounderBits added.
  DFS_DEVICE uint32_t round(float x) const {
    // A NaN becomes `low`.
    const float clamped = smaller(larger(multiply(x, reciprocal), low), high);
    return float_to_bits(add(clamped, rounder));
  }
  DFS_DEVICE uint32_t quantize_raised(float x) const { return round(x) + odd; }
  DFS_DEVICE int quantize(float x) const {
    return static_cast<int>(quantize_raised(x) - kRounderBits);
  }
  DFS_DEVICE float dequantize(int code) const {
    return multiply(small_to_float(code - zero_point), scale);
  }
};

// Codes with kRounderBits added, packed into a word: what was added is taken off the sum.
template <int kBits>
struct WordPacker {
  uint32_t word = 0;
  uint32_t excess = 0;

  DFS_DEVICE void put(int i, uint32_t raised) {
    word += raised << (i * kBits);
    excess += kRounderBits << (i * kBits);
  }
  DFS_DEVICE uint32_t packed() const { return word - excess; }
};

DFS_DEVICE Step step_of(const SlotQuantizer& quantizer, int bits) {
  Step step;
  const int slot = slot_of(bits);
  const int index = slot < 0 ? -1 : quantizer.index[slot];
  if (index < 0 || bits == 32) return step;
  step.scale = to_global(quantizer.scale)[index];
  step.zero_point = to_global(quantizer.zero_point)[index];
  step.reciprocal = divide(1.0f, step.scale);
  step.low = to_float(-step.zero_point);
  step.high = to_float((1 << bits) - 1 - step.zero_point);
  step.odd = static_cast<uint32_t>(step.zero_point & 1);
  step.rounder = add(kRounder, to_float(step.zero_point & ~1));
  return step;
}

DFS_DEVICE bool offers(const SlotQuantizer& quantizer, int bits) {
  const int slot = slot_of(bits);
  return slot >= 0 && quantizer.index[slot] >= 0;
}

DFS_DEVICE float not_a_number() { return bits_to_float(0x7fc00000u); }

DFS_DEVICE uint32_t load_bytes(const uint8_t* from, int count) {
  uint32_t word = 0;
  DFS_NO_UNROLL
  for (int i = 0; i < count; ++i) word |= static_cast<uint32_t>(from[i]) << (8 * i);
  return word;
}

// A float32 of a packed row, which need not be aligned.
DFS_DEVICE float load_float(const uint8_t* from) {
  if (is_aligned(from, 4)) return *reinterpret_cast<const float*>(from);
  return bits_to_float(load_bytes(from, 4));
}

DFS_DEVICE void store_float(uint8_t* to, float value) {
  if (is_aligned(to, 4)) {
    *reinterpret_cast<float*>(to) = value;
    return;
  }
  const uint32_t word = float_to_bits(value);
  for (int i = 0; i < 4; ++i) to[i] = static_cast<uint8_t>(word >> (8 * i));
}

// One sample of a map, to be read value by value.
struct SampleReader {
  const float* values = nullptr;
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;
  const uint8_t* row = nullptr;
  int bits = 0;
  int width = 0;
  int pixel_bytes = 0;
  bool known = true;  // whether a packed sample's width is on offer
  Step step;

  DFS_DEVICE const float* address(int y, int x, int channel) const {
    return to_global(values) + channel * stride_c + y * stride_h + x * stride_w;
  }
  DFS_DEVICE const uint8_t* pixel(int y, int x) const {
    return to_global(row) + (static_cast<int64_t>(y) * width + x) * pixel_bytes;
  }
  DFS_DEVICE int code(int y, int x, int channel) const { return code_of(pixel(y, x), channel); }
  DFS_DEVICE float value(int y, int x, int channel) const {
    if (row == nullptr) return *address(y, x, channel);
    return value_of(pixel(y, x), channel);
  }

  // Of a pixel's bytes, wherever they are.
  DFS_DEVICE int code_of(const uint8_t* bytes, int channel) const {
    const int bit = channel * bits;
    return (bytes[bit >> 3] >> (bit & 7)) & ((1 << bits) - 1);
  }
  DFS_DEVICE float value_of(const uint8_t* bytes, int channel) const {
    if (bits == 0) return 0.0f;
    if (!known) return not_a_number();
    return bits == 32 ? load_float(bytes + 4 * channel) : step.dequantize(code_of(bytes, channel));
  }
};

DFS_DEVICE SampleReader reader_of(const Map& map, int64_t n) {
  SampleReader reader;
  reader.width = map.width;
  if (!map.packed()) {
    reader.values = map.values + n * map.stride_n;
    reader.stride_c = map.stride_c;
    reader.stride_h = map.stride_h;
    reader.stride_w = map.stride_w;
    return reader;
  }
  reader.row = map.codes + n * map.row_bytes;
  reader.bits = to_global(map.bits)[n];
  reader.known = offers(map.quantizer, reader.bits);
  reader.pixel_bytes = (map.channels * reader.bits + 7) / 8;
  reader.step = step_of(map.quantizer, reader.bits);
  return reader;
}

}  // namespace dfs::cuda
