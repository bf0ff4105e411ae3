// A feature map with memory of its own, in any of the forms that the kernels take.
#pragma once

#include <cstring>
#include <vector>

#include "check.h"
#include "dfs/types.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "random.h"

namespace dfs_test {

// Scales and zero points per width.
struct TestQuantizer {
  std::vector<int32_t> widths;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  dfs::Quantizer view() const {
    dfs::Quantizer result;
    result.widths.count = static_cast<int32_t>(widths.size());
    for (size_t i = 0; i < widths.size(); ++i) result.widths.bits[i] = widths[i];
    result.scale = scale.data();
    result.zero_point = zero_point.data();
    return result;
  }

  size_t index(int bits) const {
    for (size_t i = 0; i < widths.size(); ++i) {
      if (widths[i] == bits) return i;
    }
    fail(__FILE__, __LINE__, "no width ", bits);
  }
  float scale_at(int bits) const { return scale[index(bits)]; }
  int zero_point_at(int bits) const { return zero_point[index(bits)]; }
};

inline TestQuantizer draw_quantizer(Random& random, float typical_scale) {
  TestQuantizer quantizer;
  quantizer.widths = {2, 4, 8};
  if (random.chance(0.5)) quantizer.widths.push_back(32);
  for (const int32_t bits : quantizer.widths) {
    const float range = bits == 32 ? 1.0f : 255.0f / static_cast<float>((1 << bits) - 1);
    quantizer.scale.push_back(typical_scale * range * random.uniform(0.5f, 2.0f));
    quantizer.zero_point.push_back(
        bits == 32
            ? 0
            : static_cast<int32_t>(random.chance(0.3)   ? 0
                                   : random.chance(0.3) ? (1 << bits) - 1
                                                        : random.integer(0, (1 << bits) - 1)));
  }
  return quantizer;
}

struct TestMap {
  int64_t batch = 0;
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  bool packed = false;

  GuardedBuffer<float> values;
  int64_t stride_n = 0;
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;

  GuardedBuffer<uint8_t> codes;
  int64_t codes_offset = 0;  // of the first row: kernels may not count on an alignment
  int64_t row_bytes = 0;
  std::vector<int32_t> bits;
  TestQuantizer quantizer;

  void allocate_codes() {
    codes = GuardedBuffer<uint8_t>(static_cast<size_t>(codes_offset + batch * row_bytes));
  }

  dfs::FeatureMap view() {
    dfs::FeatureMap map;
    map.channels = channels;
    map.height = height;
    map.width = width;
    if (packed) {
      map.codes = codes.data() + codes_offset;
      map.row_bytes = row_bytes;
      map.bits = bits.data();
      map.quantizer = quantizer.view();
    } else {
      map.values = values.data();
      map.stride_n = stride_n;
      map.stride_c = stride_c;
      map.stride_h = stride_h;
      map.stride_w = stride_w;
    }
    return map;
  }

  size_t value_index(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return static_cast<size_t>(n * stride_n + c * stride_c + y * stride_h + x * stride_w);
  }

  size_t pixel_index(int64_t n, int64_t y, int64_t x) const {
    return static_cast<size_t>(codes_offset + n * row_bytes +
                               (y * width + x) *
                                   naive_pixel_bytes(channels, bits[static_cast<size_t>(n)]));
  }

  int code(int64_t n, int64_t c, int64_t y, int64_t x) const {
    return naive_extract(codes.data() + pixel_index(n, y, x), c, bits[static_cast<size_t>(n)]);
  }

  // The value that an element stands for.
  float value(int64_t n, int64_t c, int64_t y, int64_t x) const {
    if (!packed) return values[value_index(n, c, y, x)];
    const int stored = bits[static_cast<size_t>(n)];
    if (stored == 0) return 0.0f;
    if (stored == 32) {
      float result;
      std::memcpy(&result, codes.data() + pixel_index(n, y, x) + c * 4, 4);
      return result;
    }
    return naive_value(code(n, c, y, x), quantizer.scale_at(stored),
                       quantizer.zero_point_at(stored));
  }
};

// All memory holds the sentinel.
inline TestMap make_float_map(Random& random, int64_t batch, int64_t channels, int64_t height,
                              int64_t width) {
  TestMap map;
  map.batch = batch;
  map.channels = channels;
  map.height = height;
  map.width = width;
  // Gaps between pixels, rows, planes and samples must stay as they are.
  const bool dense = random.chance(0.5);
  const auto gap = [&] { return dense ? 0 : random.integer(0, 2); };
  if (random.chance(0.5)) {
    map.stride_w = 1 + gap();
    map.stride_h = width * map.stride_w + gap();
    map.stride_c = height * map.stride_h + gap();
    map.stride_n = channels * map.stride_c + gap();
  } else {
    map.stride_c = 1;
    map.stride_w = channels + gap();
    map.stride_h = width * map.stride_w + gap();
    map.stride_n = height * map.stride_h + gap();
  }
  map.values = GuardedBuffer<float>(static_cast<size_t>(batch * map.stride_n));
  return map;
}

inline TestMap make_packed_map(Random& random, int64_t batch, int64_t channels, int64_t height,
                               int64_t width, const std::vector<int32_t>& bits,
                               const TestQuantizer& quantizer) {
  TestMap map;
  map.batch = batch;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.packed = true;
  map.bits = bits;
  map.bits.reserve(1);
  map.quantizer = quantizer;
  for (const int32_t b : bits) {
    map.row_bytes = std::max(map.row_bytes, height * width * naive_pixel_bytes(channels, b));
  }
  map.row_bytes += random.integer(0, 3);
  map.codes_offset = random.integer(0, 3);
  map.allocate_codes();
  return map;
}

// Values of about unit size; packed codes over their full range, extremes often. `extreme`: only
// codes at the ends of their range and values that are quantized to these.
inline void fill(Random& random, TestMap& map, bool extreme) {
  for (int64_t n = 0; n < map.batch; ++n) {
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) {
        if (map.packed) {
          const int bits = map.bits[static_cast<size_t>(n)];
          std::memset(map.codes.data() + map.pixel_index(n, y, x), 0,
                      static_cast<size_t>(naive_pixel_bytes(map.channels, bits)));
        }
        for (int64_t c = 0; c < map.channels; ++c) {
          const float value =
              extreme ? (random.chance(0.5) ? -1e4f : 1e4f) : random.uniform(-2.0f, 2.0f);
          if (!map.packed) {
            map.values[map.value_index(n, c, y, x)] = value;
            continue;
          }
          const int bits = map.bits[static_cast<size_t>(n)];
          uint8_t* pixel = map.codes.data() + map.pixel_index(n, y, x);
          if (bits == 32) {
            std::memcpy(pixel + c * 4, &value, 4);
          } else if (bits != 0) {
            const int top = (1 << bits) - 1;
            const int code = extreme || random.chance(0.3)
                                 ? (random.chance(0.5) ? 0 : top)
                                 : static_cast<int>(random.integer(0, top));
            naive_insert(pixel, c, bits, code);
          }
        }
      }
    }
  }
}

}  // namespace dfs_test
