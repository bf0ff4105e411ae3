// Runs a mixed convolution on every instruction set and compares it with the definition: integer
// widths exactly, 32 bits within the bound of a float32 sum, nothing written beside the output.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "mixed_conv2d_case.h"
#include "naive.h"
#include "operations.h"
#include "test_map.h"

namespace dfs_test {

// Bounds of what an element may be: equal where the result is exact.
struct Expected {
  float low = 0.0f;
  float high = 0.0f;
};

struct ExpectedOutput {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  std::vector<Expected> elements;  // (N, H, W, O)

  const Expected& at(int64_t n, int64_t o, int64_t y, int64_t x) const {
    return elements[static_cast<size_t>(((n * height + y) * width + x) * channels + o)];
  }
};

// What is multiplied for one sample: values at 32 bits, integers at the other widths.
template <typename T>
struct Operands {
  std::vector<T> input;   // (H, W, C)
  std::vector<T> weight;  // (O, KH, KW, C/groups)
};

inline const TestQuantizer& loaded_quantizer(const ConvCase& c) {
  return c.input.packed && !c.requantize ? c.input.quantizer : c.input_quantizer;
}

template <typename T, typename InputValue>
std::vector<T> input_operand(const ConvCase& c, InputValue value) {
  std::vector<T> result;
  for (int64_t y = 0; y < c.sizes.height; ++y) {
    for (int64_t x = 0; x < c.sizes.width; ++x) {
      for (int64_t ch = 0; ch < c.sizes.geometry.in_channels; ++ch) {
        result.push_back(value(ch, y, x));
      }
    }
  }
  return result;
}

inline Operands<double> float_operands(const ConvCase& c, int64_t n) {
  const ConvSizes& s = c.sizes;
  Operands<double> operands;
  operands.input = input_operand<double>(c, [&](int64_t ch, int64_t y, int64_t x) {
    return static_cast<double>(c.input.value(n, ch, y, x));
  });
  for (int64_t o = 0; o < s.geometry.out_channels; ++o) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      for (int64_t ch = 0; ch < s.group_channels(); ++ch) {
        const int64_t i = (o * s.group_channels() + ch) * s.taps() + tap;
        operands.weight.push_back(static_cast<double>(c.weight.values[static_cast<size_t>(i)]));
      }
    }
  }
  return operands;
}

inline Operands<int32_t> integer_operands(const ConvCase& c, int64_t n) {
  const ConvSizes& s = c.sizes;
  const int bits = c.bits[static_cast<size_t>(n)];
  const float scale = loaded_quantizer(c).scale_at(bits);
  const int zero_point = loaded_quantizer(c).zero_point_at(bits);
  Operands<int32_t> operands;
  operands.input = input_operand<int32_t>(c, [&](int64_t ch, int64_t y, int64_t x) {
    const int code = c.input.packed && !c.requantize
                         ? c.input.code(n, ch, y, x)
                         : naive_code(c.input.value(n, ch, y, x), scale, zero_point, bits);
    return code - zero_point;
  });
  const size_t w = c.weight.index(bits);
  const int64_t bytes = naive_pixel_bytes(s.group_channels(), bits);
  for (int64_t run = 0; run < s.geometry.out_channels * s.taps(); ++run) {
    for (int64_t ch = 0; ch < s.group_channels(); ++ch) {
      int code = naive_extract(c.weight.packed[w].data() + run * bytes, ch, bits);
      if (code >= 1 << (bits - 1)) code -= 1 << bits;
      operands.weight.push_back(naive_level(code, c.weight.centred[w]));
    }
  }
  return operands;
}

// Calls fn(input, weight) for each product of an output element.
template <typename T, typename Fn>
void for_each_product(const ConvSizes& s, const Operands<T>& operands, int64_t o, int64_t y,
                      int64_t x, Fn fn) {
  const int64_t first_channel = o / s.group_outputs() * s.group_channels();
  for_each_tap(s, y, x, [&](int64_t iy, int64_t ix, int64_t kh, int64_t kw) {
    const int64_t pixel = (iy * s.width + ix) * s.geometry.in_channels + first_channel;
    const int64_t run = (o * s.taps() + kh * s.geometry.kernel_w + kw) * s.group_channels();
    const T* input = operands.input.data() + pixel;
    const T* weight = operands.weight.data() + run;
    for (int64_t ch = 0; ch < s.group_channels(); ++ch) fn(input[ch], weight[ch]);
  });
}

// Folded into the result after the sum.
struct Epilogue {
  double mul = 1.0;
  float offset = 0.0f;
  float residual = 0.0f;
};

inline Epilogue epilogue(const ConvCase& c, int64_t n, int64_t o, int64_t y, int64_t x) {
  const size_t w = c.weight.index(c.bits[static_cast<size_t>(n)]);
  const size_t channel = static_cast<size_t>(o);
  const size_t entry = w * static_cast<size_t>(c.sizes.geometry.out_channels) + channel;
  Epilogue result;
  if (!c.mul.empty()) result.mul = static_cast<double>(c.mul[entry]);
  const double add = c.add.empty() ? 0.0 : static_cast<double>(c.add[entry]);
  const double bias = c.bias.empty() ? 0.0 : static_cast<double>(c.bias[channel]);
  result.offset = static_cast<float>(bias * result.mul + add);
  if (c.has_residual) result.residual = c.residual.value(n, o, y, x);
  return result;
}

inline Expected expected_float(const ConvCase& c, const Operands<double>& operands, int64_t n,
                               int64_t o, int64_t y, int64_t x) {
  double sum = 0.0;
  double magnitude = 0.0;
  for_each_product(c.sizes, operands, o, y, x, [&](double input, double weight) {
    sum += input * weight;
    magnitude += std::abs(input * weight);
  });
  const Epilogue e = epilogue(c, n, o, y, x);
  const double offset = static_cast<double>(e.offset);
  const double residual = static_cast<double>(e.residual);
  const double depth = static_cast<double>(c.sizes.group_channels() * c.sizes.taps());
  double bound = (depth + 2.0) * 0x1p-23 * magnitude * std::abs(e.mul);
  // The roundings of the epilogue.
  bound += 0x1p-22 * (std::abs(sum * e.mul) + std::abs(offset) + std::abs(residual));
  const double value = sum * e.mul + offset + residual;
  double low = value - bound;
  double high = value + bound;
  if (c.relu) {
    low = std::max(low, 0.0);
    high = std::max(high, 0.0);
  }
  return {static_cast<float>(low), static_cast<float>(high)};
}

inline Expected expected_integer(const ConvCase& c, const Operands<int32_t>& operands, int64_t n,
                                 int64_t o, int64_t y, int64_t x) {
  int64_t sum = 0;
  for_each_product(c.sizes, operands, o, y, x,
                   [&](int64_t input, int64_t weight) { sum += input * weight; });
  const int bits = c.bits[static_cast<size_t>(n)];
  const size_t w = c.weight.index(bits);
  const size_t entry =
      w * static_cast<size_t>(c.sizes.geometry.out_channels) + static_cast<size_t>(o);
  const Epilogue e = epilogue(c, n, o, y, x);
  const double input_scale = static_cast<double>(loaded_quantizer(c).scale_at(bits));
  const double weight_scale =
      static_cast<double>(c.weight.scale[entry]) * (c.weight.centred[w] ? 0.5 : 1.0);
  const float multiplier = static_cast<float>(input_scale * weight_scale * e.mul);
  volatile float scaled = static_cast<float>(sum) * multiplier;
  volatile float value = scaled + e.offset;
  if (c.has_residual) value = value + e.residual;
  float result = value;
  if (c.relu && !(result > 0.0f)) result = 0.0f;
  return {result, result};
}

inline ExpectedOutput expected_output(const ConvCase& c) {
  const ConvSizes& s = c.sizes;
  ExpectedOutput result;
  result.channels = s.geometry.out_channels;
  result.height = s.out_height;
  result.width = s.out_width;
  for (int64_t n = 0; n < c.batch; ++n) {
    const int bits = c.bits[static_cast<size_t>(n)];
    Operands<double> floats;
    Operands<int32_t> integers;
    if (bits == 32) {
      floats = float_operands(c, n);
    } else if (bits != 0) {
      integers = integer_operands(c, n);
    }
    for (int64_t y = 0; y < s.out_height; ++y) {
      for (int64_t x = 0; x < s.out_width; ++x) {
        for (int64_t o = 0; o < result.channels; ++o) {
          Expected expected;
          if (bits == 32) {
            expected = expected_float(c, floats, n, o, y, x);
          } else if (bits != 0) {
            expected = expected_integer(c, integers, n, o, y, x);
          } else if (c.has_residual) {
            expected.low = expected.high = c.residual.value(n, o, y, x);
          }
          result.elements.push_back(expected);
        }
      }
    }
  }
  return result;
}

inline void check_element(const ConvCase& c, const Expected& expected, const TestMap& out,
                          int64_t n, int64_t o, int64_t y, int64_t x) {
  const int stored = out.packed ? out.bits[static_cast<size_t>(n)] : 32;
  const auto where = [&] {
    return c.describe() + " at " + std::to_string(n) + "," + std::to_string(o) + "," +
           std::to_string(y) + "," + std::to_string(x);
  };
  if (stored == 32) {
    const float value = out.value(n, o, y, x);
    CHECK(value >= expected.low && value <= expected.high, where(), ": ", value, " not in [",
          expected.low, ", ", expected.high, "]");
    return;
  }
  const float scale = out.quantizer.scale_at(stored);
  const int zero_point = out.quantizer.zero_point_at(stored);
  const int code = out.code(n, o, y, x);
  int low = naive_code(expected.low, scale, zero_point, stored);
  int high = naive_code(expected.high, scale, zero_point, stored);
  if (c.bits[static_cast<size_t>(n)] == 0 && c.has_residual && c.residual.packed &&
      c.residual.bits[static_cast<size_t>(n)] == stored &&
      c.residual.quantizer.scale_at(stored) == scale &&
      c.residual.quantizer.zero_point_at(stored) == zero_point) {
    low = high = c.residual.code(n, o, y, x);
  }
  CHECK(code >= low && code <= high, where(), ": code ", code, " not in [", low, ", ", high, "]");
}

// Blanks what the kernels may write; what remains must be as it was before.
template <typename Fn>
void for_each_output(const TestMap& out, Fn fn) {
  for (int64_t n = 0; n < out.batch; ++n) {
    if (out.packed && out.bits[static_cast<size_t>(n)] == 0) continue;
    for (int64_t y = 0; y < out.height; ++y) {
      for (int64_t x = 0; x < out.width; ++x) fn(n, y, x);
    }
  }
}

inline void blank_outputs(TestMap& out) {
  for_each_output(out, [&](int64_t n, int64_t y, int64_t x) {
    if (out.packed) {
      std::memset(
          out.codes.data() + out.pixel_index(n, y, x), 0,
          static_cast<size_t>(naive_pixel_bytes(out.channels, out.bits[static_cast<size_t>(n)])));
      return;
    }
    for (int64_t o = 0; o < out.channels; ++o) out.values[out.value_index(n, o, y, x)] = 0.0f;
  });
}

inline void check_output(const ConvCase& c, const ExpectedOutput& expected, const TestMap& out) {
  out.values.check_guards("output");
  out.codes.check_guards("output");
  for_each_output(out, [&](int64_t n, int64_t y, int64_t x) {
    for (int64_t o = 0; o < out.channels; ++o)
      check_element(c, expected.at(n, o, y, x), out, n, o, y, x);
    const int stored = out.packed ? out.bits[static_cast<size_t>(n)] : 32;
    if (stored == 32) return;
    const int64_t pixel_bits = naive_pixel_bytes(out.channels, stored) * 8;
    for (int64_t o = out.channels; (o + 1) * stored <= pixel_bits; ++o) {
      CHECK(out.code(n, o, y, x) == 0, c.describe(), ": a tail code is not zero");
    }
  });
  TestMap after = out;
  TestMap before = c.output;
  blank_outputs(after);
  blank_outputs(before);
  CHECK(after.values.same_bytes(before.values) && after.codes.same_bytes(before.codes),
        c.describe(), ": wrote between its elements");
}

inline bool same_output(const TestMap& a, const TestMap& b) {
  return a.values.same_bytes(b.values) && a.codes.same_bytes(b.codes);
}

// Sample n alone in a batch gives the same bits.
inline void check_sample_alone(ConvCase& c, const TestMap& expected, int64_t n) {
  TestMap out = c.output;
  dfs::MixedConv2dArgs args = c.args(out);
  const auto shift = [n](dfs::FeatureMap& map) {
    if (map.values != nullptr) map.values += n * map.stride_n;
    if (map.codes != nullptr) map.codes += n * map.row_bytes;
    if (map.bits != nullptr) map.bits += n;
  };
  args.batch = 1;
  args.bits += n;
  shift(args.input);
  shift(args.output);
  if (args.has_residual) shift(args.residual);
  dfs::mixed_conv2d(args, 1);
  for (int64_t y = 0; y < out.height; ++y) {
    for (int64_t x = 0; x < out.width; ++x) {
      if (out.packed) {
        const size_t pixel = out.pixel_index(n, y, x);
        const int64_t bytes = naive_pixel_bytes(out.channels, out.bits[static_cast<size_t>(n)]);
        CHECK(std::memcmp(out.codes.data() + pixel, expected.codes.data() + pixel,
                          static_cast<size_t>(bytes)) == 0,
              c.describe(), ": sample ", n, " differs when it is alone");
        continue;
      }
      for (int64_t o = 0; o < out.channels; ++o) {
        const size_t i = out.value_index(n, o, y, x);
        CHECK(std::memcmp(&out.values[i], &expected.values[i], sizeof(float)) == 0, c.describe(),
              ": sample ", n, " differs when it is alone");
      }
    }
  }
}

// Also with other numbers of threads and each sample alone, which must change nothing.
inline void check_case(ConvCase& c) {
  const ExpectedOutput expected = expected_output(c);
  for_each_isa([&] {
    retile(c.weight, c.sizes.geometry);
    TestMap first = c.output;
    dfs::mixed_conv2d(c.args(first), 1);
    check_output(c, expected, first);
    for (int threads = 2; threads <= 3; ++threads) {
      TestMap again = c.output;
      dfs::mixed_conv2d(c.args(again), threads);
      CHECK(same_output(first, again), c.describe(), ": differs with ", threads, " threads");
    }
    for (int64_t n = 0; n < c.batch; ++n) check_sample_alone(c, first, n);
  });
}

}  // namespace dfs_test
