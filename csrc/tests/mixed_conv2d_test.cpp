#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "conv_case.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "operations.h"
#include "random.h"
#include "split_small_work.h"
#include "test_map.h"

namespace dfs_test {
namespace {

// The weights of a layer at all widths, as the caller of the kernels keeps them.
struct TestWeight {
  std::vector<int32_t> widths;
  std::vector<bool> centred;
  std::vector<float> scale;                    // (count, O)
  std::vector<float> values;                   // (O, Cg, KH, KW)
  std::vector<GuardedBuffer<uint8_t>> packed;  // canonical, per width
  std::vector<GuardedBuffer<uint8_t>> tiles;

  size_t index(int bits) const {
    for (size_t i = 0; i < widths.size(); ++i) {
      if (widths[i] == bits) return i;
    }
    fail(__FILE__, __LINE__, "no width ", bits);
  }

  int level(const ConvSizes& s, size_t i, int64_t o, int64_t c, int64_t tap) const {
    const int bits = widths[i];
    const int64_t bytes = naive_pixel_bytes(s.group_channels(), bits);
    int code = naive_extract(packed[i].data() + (o * s.taps() + tap) * bytes, c, bits);
    if (code >= 1 << (bits - 1)) code -= 1 << bits;
    return naive_level(code, centred[i]);
  }
};

TestWeight draw_weight(Random& random, const ConvSizes& s) {
  TestWeight weight;
  const dfs::ConvGeometry& g = s.geometry;
  weight.widths = {2, 4, 8, 32};
  const size_t filter = static_cast<size_t>(s.group_channels() * s.taps());
  weight.values.resize(filter * static_cast<size_t>(g.out_channels));
  for (float& value : weight.values) value = random.uniform(-1.0f, 1.0f);
  for (size_t i = 0; i < weight.widths.size(); ++i) {
    const int bits = weight.widths[i];
    weight.centred.push_back(bits != 32 && random.chance(bits == 2 ? 0.7 : 0.2));
    for (int64_t o = 0; o < g.out_channels; ++o) {
      weight.scale.push_back(random.uniform(0.5f, 2.0f) / static_cast<float>(1 << (bits / 2)));
    }
    if (bits == 32) {
      GuardedBuffer<uint8_t> canonical(weight.values.size() * sizeof(float));
      for (int64_t o = 0; o < g.out_channels; ++o) {
        for (int64_t c = 0; c < s.group_channels(); ++c) {
          for (int64_t tap = 0; tap < s.taps(); ++tap) {
            const float value =
                weight.values[static_cast<size_t>((o * s.group_channels() + c) * s.taps() + tap)];
            std::memcpy(canonical.data() + ((o * s.taps() + tap) * s.group_channels() + c) * 4,
                        &value, 4);
          }
        }
      }
      weight.packed.push_back(std::move(canonical));
    } else {
      const int64_t bytes = naive_pixel_bytes(s.group_channels(), bits);
      GuardedBuffer<uint8_t> canonical(static_cast<size_t>(g.out_channels * s.taps() * bytes));
      std::memset(canonical.data(), 0, canonical.size());
      for (int64_t run = 0; run < g.out_channels * s.taps(); ++run) {
        for (int64_t c = 0; c < s.group_channels(); ++c) {
          // Any code, both extremes often.
          const int half = 1 << (bits - 1);
          const int code = random.chance(0.3) ? (random.chance(0.5) ? half : half - 1)
                                              : static_cast<int>(random.integer(0, 2 * half - 1));
          naive_insert(canonical.data() + run * bytes, c, bits, code);
        }
      }
      weight.packed.push_back(std::move(canonical));
    }
    GuardedBuffer<uint8_t> tile(dfs::tile_bytes(g, bits));
    dfs::retile_weight(g, weight.packed[i].data(), bits, weight.centred[i], tile.data(), 1);
    tile.check_guards("tile");
    weight.tiles.push_back(std::move(tile));
  }
  return weight;
}

struct ConvCase {
  ConvSizes sizes;
  int64_t batch = 0;
  std::vector<int32_t> bits;
  TestWeight weight;
  TestMap input;
  bool requantize = false;
  TestQuantizer input_quantizer;
  std::vector<float> bias, mul, add;  // empty if not given
  bool has_residual = false;
  bool in_place = false;
  TestMap residual;
  bool relu = false;
  TestMap output;  // poisoned, or a copy of the residual

  std::string describe() const {
    std::string text = dfs_test::describe(sizes) + " bits";
    for (const int32_t b : bits) text += " " + std::to_string(b);
    text += input.packed ? (requantize ? ", packed input requantized" : ", packed input") : "";
    text += has_residual ? (residual.packed ? ", packed residual" : ", residual") : "";
    text += in_place ? " in place" : "";
    text += relu ? ", relu" : "";
    text += output.packed ? ", packed output" : "";
    return text;
  }

  dfs::MixedConv2dArgs args(TestMap& out) {
    dfs::MixedConv2dArgs a;
    a.batch = batch;
    a.bits = bits.data();
    a.geometry = sizes.geometry;
    a.weight.widths.count = static_cast<int32_t>(weight.widths.size());
    for (size_t i = 0; i < weight.widths.size(); ++i) {
      a.weight.widths.bits[i] = weight.widths[i];
      a.weight.tiles[i] = weight.tiles[i].data();
      a.weight.centred[i] = weight.centred[i];
    }
    a.weight.scale = weight.scale.data();
    a.input = input.view();
    if (!input.packed || requantize) a.input_quantizer = input_quantizer.view();
    a.bias = bias.empty() ? nullptr : bias.data();
    a.mul = mul.empty() ? nullptr : mul.data();
    a.add = add.empty() ? nullptr : add.data();
    a.has_residual = has_residual;
    a.output = out.view();
    if (has_residual) {
      a.residual = residual.view();
      if (in_place) {
        a.residual.values = a.output.values;
        a.residual.codes = a.output.codes;
      }
    }
    a.relu = relu;
    return a;
  }
};

std::vector<int32_t> draw_bits(Random& random, int64_t batch, double skipped) {
  const int32_t widths[] = {2, 4, 8, 32};
  std::vector<int32_t> bits;
  bits.reserve(static_cast<size_t>(batch) + 1);
  for (int64_t n = 0; n < batch; ++n) {
    bits.push_back(random.chance(skipped) ? 0 : widths[random.integer(0, 3)]);
  }
  return bits;
}

std::vector<float> draw_floats(Random& random, size_t count, float low, float high) {
  std::vector<float> values(count);
  for (float& value : values) value = random.uniform(low, high);
  return values;
}

ConvCase draw_case(Random& random) {
  ConvCase c;
  c.sizes = draw_sizes(random);
  const dfs::ConvGeometry& g = c.sizes.geometry;
  c.batch = random.integer(0, 5);
  c.bits = draw_bits(random, c.batch, 0.2);
  c.weight = draw_weight(random, c.sizes);
  c.input_quantizer = draw_quantizer(random, 0.015f);

  const int64_t input_form = random.integer(0, 2);
  if (input_form == 0) {
    c.input = make_float_map(random, c.batch, g.in_channels, c.sizes.height, c.sizes.width);
  } else {
    c.requantize = input_form == 2;
    c.input = make_packed_map(random, c.batch, g.in_channels, c.sizes.height, c.sizes.width,
                              c.requantize ? draw_bits(random, c.batch, 0.1) : c.bits,
                              draw_quantizer(random, 0.015f));
  }
  fill(random, c.input);

  const size_t outputs = static_cast<size_t>(g.out_channels);
  if (random.chance(0.5)) c.bias = draw_floats(random, outputs, -1.0f, 1.0f);
  if (random.chance(0.5)) c.mul = draw_floats(random, outputs * 4, -2.0f, 2.0f);
  if (random.chance(0.5)) c.add = draw_floats(random, outputs * 4, -1.0f, 1.0f);
  c.relu = random.chance(0.5);

  const auto out_map = [&](bool packed) {
    if (!packed) {
      return make_float_map(random, c.batch, g.out_channels, c.sizes.out_height, c.sizes.out_width);
    }
    const std::vector<int32_t> stored =
        random.chance(0.4) ? c.bits : draw_bits(random, c.batch, 0.1);
    return make_packed_map(random, c.batch, g.out_channels, c.sizes.out_height, c.sizes.out_width,
                           stored, draw_quantizer(random, 0.03f));
  };
  c.has_residual = random.chance(0.6);
  const bool packed_output = random.chance(0.5);
  c.in_place = c.has_residual && random.chance(0.5);
  c.output = out_map(packed_output);
  if (c.has_residual) {
    c.residual = c.in_place ? c.output : out_map(random.chance(0.5));
    if (c.in_place && packed_output) {
      // The same rows, perhaps under another width or scale.
      if (random.chance(0.3)) {
        TestMap wider = out_map(true);
        const int64_t row_bytes = std::max(wider.row_bytes, c.output.row_bytes);
        c.output.row_bytes = row_bytes;
        c.output.codes = GuardedBuffer<uint8_t>(static_cast<size_t>(c.batch * row_bytes));
        wider.row_bytes = row_bytes;
        wider.codes = c.output.codes;
        c.residual = wider;
      } else if (random.chance(0.3)) {
        c.residual.quantizer = draw_quantizer(random, 0.03f);
      }
    }
    fill(random, c.residual);
    if (c.in_place) {
      c.output.values = c.residual.values;
      c.output.codes = c.residual.codes;
    }
  }
  return c;
}

// Bounds of what an element may be: equal where the result is exact.
struct Expected {
  float low = 0.0f;
  float high = 0.0f;
};

Expected expected_value(const ConvCase& c, int64_t n, int64_t o, int64_t y, int64_t x) {
  const int bits = c.bits[static_cast<size_t>(n)];
  const float residual = c.has_residual ? c.residual.value(n, o, y, x) : 0.0f;
  if (bits == 0) return {residual, residual};
  const ConvSizes& s = c.sizes;
  const int64_t group = o / s.group_outputs();
  const size_t w = c.weight.index(bits);
  const size_t entry = w * static_cast<size_t>(s.geometry.out_channels) + static_cast<size_t>(o);
  const double mul = c.mul.empty() ? 1.0 : static_cast<double>(c.mul[entry]);
  const double add = c.add.empty() ? 0.0 : static_cast<double>(c.add[entry]);
  const double bias = c.bias.empty() ? 0.0 : static_cast<double>(c.bias[static_cast<size_t>(o)]);
  const float offset = static_cast<float>(bias * mul + add);

  if (bits == 32) {
    double sum = 0.0;
    double magnitude = 0.0;
    for_each_tap(s, y, x, [&](int64_t iy, int64_t ix, int64_t kh, int64_t kw) {
      for (int64_t ch = 0; ch < s.group_channels(); ++ch) {
        const double value = c.input.value(n, group * s.group_channels() + ch, iy, ix);
        const double weight = c.weight.values[static_cast<size_t>(
            ((o * s.group_channels() + ch) * s.geometry.kernel_h + kh) * s.geometry.kernel_w + kw)];
        sum += value * weight;
        magnitude += std::abs(value * weight);
      }
    });
    const double depth = static_cast<double>(s.group_channels() * s.taps());
    double bound = (depth + 2.0) * 0x1p-23 * magnitude * std::abs(mul);
    // The roundings of the epilogue.
    bound += 0x1p-22 * (std::abs(sum * mul) + std::abs(static_cast<double>(offset)) +
                        std::abs(static_cast<double>(residual)));
    double value = sum * mul + static_cast<double>(offset) + static_cast<double>(residual);
    double low = value - bound;
    double high = value + bound;
    if (c.relu) {
      low = std::max(low, 0.0);
      high = std::max(high, 0.0);
    }
    return {static_cast<float>(low), static_cast<float>(high)};
  }

  const TestQuantizer& loaded =
      c.input.packed && !c.requantize ? c.input.quantizer : c.input_quantizer;
  const float input_scale = loaded.scale_at(bits);
  const int zero_point = loaded.zero_point_at(bits);
  int64_t sum = 0;
  for_each_tap(s, y, x, [&](int64_t iy, int64_t ix, int64_t kh, int64_t kw) {
    for (int64_t ch = 0; ch < s.group_channels(); ++ch) {
      const int64_t channel = group * s.group_channels() + ch;
      const int code =
          c.input.packed && !c.requantize
              ? c.input.code(n, channel, iy, ix)
              : naive_code(c.input.value(n, channel, iy, ix), input_scale, zero_point, bits);
      sum += (code - zero_point) * c.weight.level(s, w, o, ch, kh * s.geometry.kernel_w + kw);
    }
  });
  const double weight_scale =
      static_cast<double>(c.weight.scale[entry]) * (c.weight.centred[w] ? 0.5 : 1.0);
  const float multiplier =
      static_cast<float>(static_cast<double>(input_scale) * weight_scale * mul);
  volatile float scaled = static_cast<float>(sum) * multiplier;
  volatile float value = scaled + offset;
  if (c.has_residual) value = value + residual;
  float result = value;
  if (c.relu && !(result > 0.0f)) result = 0.0f;
  return {result, result};
}

void check_element(const ConvCase& c, const TestMap& out, int64_t n, int64_t o, int64_t y,
                   int64_t x) {
  const Expected expected = expected_value(c, n, o, y, x);
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

void blank_outputs(TestMap& out) {
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

void check_output(const ConvCase& c, const TestMap& out) {
  out.values.check_guards("output");
  out.codes.check_guards("output");
  for_each_output(out, [&](int64_t n, int64_t y, int64_t x) {
    for (int64_t o = 0; o < out.channels; ++o) check_element(c, out, n, o, y, x);
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

bool same_output(const TestMap& a, const TestMap& b) {
  return a.values.same_bytes(b.values) && a.codes.same_bytes(b.codes);
}

// Sample n alone in a batch gives the same bits.
void check_sample_alone(ConvCase& c, const TestMap& expected, int64_t n) {
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

void check_case(ConvCase& c) {
  TestMap first = c.output;
  dfs::mixed_conv2d(c.args(first), 1);
  check_output(c, first);
  for (int threads = 2; threads <= 3; ++threads) {
    TestMap again = c.output;
    dfs::mixed_conv2d(c.args(again), threads);
    CHECK(same_output(first, again), c.describe(), ": differs with ", threads, " threads");
  }
  for (int64_t n = 0; n < c.batch; ++n) check_sample_alone(c, first, n);
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kCases = 250;
#else
constexpr int kCases = 1500;
#endif

}  // namespace

DFS_TEST(mixed_conv2d_matches_the_definition) {
  const SplitSmallWork split;
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < kCases; ++i) {
      ConvCase c = draw_case(random);
      check_case(c);
    }
  });
}

// Long sums of the largest products: pairs of them, and their total, must not saturate.
DFS_TEST(mixed_conv2d_survives_extreme_codes) {
  for_each_isa([] {
    for (const int bits : {2, 4, 8}) {
      for (const bool centred : {false, true}) {
        for (const bool lowest_weight : {false, true}) {
          for (const bool zero_at_top : {false, true}) {
            ConvSizes s;
            s.geometry.in_channels = 1027;
            s.geometry.out_channels = 5;
            s.geometry.kernel_h = s.geometry.kernel_w = 3;
            s.geometry.pad_left = s.geometry.pad_right = 1;
            s.geometry.pad_top = s.geometry.pad_bottom = 1;
            s.height = s.width = s.out_height = s.out_width = 3;
            const int64_t channels = s.geometry.in_channels;
            const int64_t bytes = naive_pixel_bytes(channels, bits);
            std::vector<uint8_t> canonical(static_cast<size_t>(5 * 9 * bytes), 0);
            const int code = lowest_weight ? 1 << (bits - 1) : (1 << (bits - 1)) - 1;
            for (int64_t run = 0; run < 5 * 9; ++run) {
              for (int64_t c = 0; c < channels; ++c) {
                naive_insert(canonical.data() + run * bytes, c, bits, code);
              }
            }
            GuardedBuffer<uint8_t> tile(dfs::tile_bytes(s.geometry, bits));
            dfs::retile_weight(s.geometry, canonical.data(), bits, centred, tile.data(), 1);

            const int top = (1 << bits) - 1;
            const float scale = 1.0f;
            const int32_t zero_point = zero_at_top ? top : 0;
            std::vector<float> input(static_cast<size_t>(channels * 9), zero_at_top ? -1e9f : 1e9f);
            std::vector<float> output(5 * 9);
            const std::vector<float> weight_scale(5, 1.0f);
            const int32_t sample_bits = bits;
            dfs::MixedConv2dArgs args;
            args.batch = 1;
            args.bits = &sample_bits;
            args.geometry = s.geometry;
            args.weight.widths = {1, {bits, 0, 0, 0}};
            args.weight.tiles[0] = tile.data();
            args.weight.centred[0] = centred;
            args.weight.scale = weight_scale.data();
            args.input.channels = channels;
            args.input.height = args.input.width = 3;
            args.input.values = input.data();
            args.input.stride_c = 9;
            args.input.stride_h = 3;
            args.input.stride_w = 1;
            args.input_quantizer.widths = args.weight.widths;
            args.input_quantizer.scale = &scale;
            args.input_quantizer.zero_point = &zero_point;
            args.output = args.input;
            args.output.channels = 5;
            args.output.values = output.data();
            dfs::mixed_conv2d(args, 2);

            const int level = naive_level(lowest_weight ? -(1 << (bits - 1)) : code, centred);
            const int64_t activation = zero_at_top ? -top : top;
            for (int64_t y = 0; y < 3; ++y) {
              for (int64_t x = 0; x < 3; ++x) {
                const int64_t taps = (y == 1 ? 3 : 2) * (x == 1 ? 3 : 2);
                const float expected = static_cast<float>(taps * channels * activation * level) *
                                       (centred ? 0.5f : 1.0f);
                const float got = output[static_cast<size_t>(4 * 9 + y * 3 + x)];
                CHECK(got == expected, "bits ", bits, ": ", got, " instead of ", expected);
              }
            }
          }
        }
      }
    }
  });
}

// A large image is worked on in several bands, a deep one in small blocks.
DFS_TEST(mixed_conv2d_of_large_inputs) {
  for_each_isa([] {
    Random random(seed());
    for (const bool deep : {false, true}) {
      ConvCase c;
      dfs::ConvGeometry& g = c.sizes.geometry;
      g.in_channels = deep ? 513 : 9;
      g.out_channels = deep ? 6 : 2;
      g.kernel_h = g.kernel_w = 3;
      g.stride_h = deep ? 1 : 2;
      g.pad_left = g.pad_right = g.pad_top = g.pad_bottom = 1;
      c.sizes.height = deep ? 5 : 170;
      c.sizes.width = deep ? 6 : 163;
      c.sizes.out_height = deep ? 5 : 85;
      c.sizes.out_width = c.sizes.width;
      c.bits = {2, 32, 8};
      c.batch = 3;
      c.weight = draw_weight(random, c.sizes);
      c.input_quantizer = draw_quantizer(random, 0.015f);
      c.input = make_float_map(random, 3, g.in_channels, c.sizes.height, c.sizes.width);
      fill(random, c.input);
      c.output = make_float_map(random, 3, g.out_channels, c.sizes.out_height, c.sizes.out_width);
      check_case(c);
    }
  });
}

DFS_TEST(mixed_conv2d_reads_nothing_for_skipped_samples) {
  for_each_isa([] {
    // Addresses that cannot be read.
    float* const nowhere = reinterpret_cast<float*>(uintptr_t{64});
    const int32_t bits[] = {0, 0};
    std::vector<float> output(2 * 3 * 4, 7.0f);
    dfs::MixedConv2dArgs args;
    args.batch = 2;
    args.bits = bits;
    args.geometry.in_channels = 5;
    args.geometry.out_channels = 3;
    args.geometry.kernel_h = args.geometry.kernel_w = 1;
    args.weight.widths = {2, {2, 32, 0, 0}};
    args.weight.scale = nowhere;
    args.input.channels = 5;
    args.input.height = args.input.width = 2;
    args.input.values = nowhere;
    args.input.stride_n = 20;
    args.input.stride_c = 4;
    args.input.stride_h = 2;
    args.input.stride_w = 1;
    args.output = args.input;
    args.output.channels = 3;
    args.output.stride_n = 12;
    args.output.values = output.data();
    dfs::mixed_conv2d(args, 2);
    for (const float value : output) CHECK(value == 0.0f, value);
    // In place there is nothing to do at all.
    args.has_residual = true;
    args.relu = true;
    args.output.values = nowhere;
    args.residual = args.output;
    dfs::mixed_conv2d(args, 2);
  });
}

DFS_TEST(mixed_conv2d_rejects_what_it_cannot_run) {
  Random random(seed());
  ConvCase c;
  do {
    c = draw_case(random);
  } while (c.batch < 3 || c.input.packed || c.output.packed || c.has_residual);
  for (int32_t& b : c.bits) b = 8;
  TestMap out = c.output;
  const auto message = [&](const dfs::MixedConv2dArgs& args) {
    return rejection_of([&] { dfs::mixed_conv2d(args, 1); });
  };

  c.bits[2] = 3;
  CHECK(message(c.args(out)).find("bits[2] is 3") != std::string::npos, message(c.args(out)));
  c.bits[2] = 8;
  dfs::MixedConv2dArgs args = c.args(out);
  args.input_quantizer = {};
  CHECK(message(args).find("bits[0] is 8") != std::string::npos, message(args));
  args = c.args(out);
  args.weight.tiles[2] = nullptr;
  CHECK(message(args).find("no tile for 8 bits") != std::string::npos, message(args));
  args.weight.tiles[2] = c.weight.tiles[1].data();
  CHECK(message(args).find("4 bits") != std::string::npos, message(args));
  const std::vector<uint8_t> garbage(64, 1);
  args.weight.tiles[2] = garbage.data();
  CHECK(message(args).find("retile_weight") != std::string::npos, message(args));
  args = c.args(out);
  args.geometry.groups = args.geometry.in_channels + 1;
  CHECK(message(args).find("groups") != std::string::npos, message(args));
  CHECK(same_output(out, c.output), "a rejected call wrote");
}

DFS_TEST(mixed_conv2d_rejects_sums_that_overflow) {
  dfs::ConvGeometry g;
  g.in_channels = 70000;
  g.out_channels = 1;
  g.kernel_h = g.kernel_w = 1;
  std::vector<uint8_t> canonical(70000);
  std::vector<uint8_t> tile(dfs::tile_bytes(g, 8));
  dfs::retile_weight(g, canonical.data(), 8, false, tile.data(), 1);
  std::vector<float> input(70000);
  float output = 0.0f;
  const float scale = 1.0f;
  const int32_t zero_point = 0;
  const int32_t bits = 8;
  dfs::MixedConv2dArgs args;
  args.batch = 1;
  args.bits = &bits;
  args.geometry = g;
  args.weight.widths = {1, {8, 0, 0, 0}};
  args.weight.tiles[0] = tile.data();
  args.weight.scale = &scale;
  args.input.channels = 70000;
  args.input.height = args.input.width = 1;
  args.input.values = input.data();
  args.input.stride_c = 1;
  args.input_quantizer.widths = args.weight.widths;
  args.input_quantizer.scale = &scale;
  args.input_quantizer.zero_point = &zero_point;
  args.output = args.input;
  args.output.channels = 1;
  args.output.values = &output;
  const std::string message = rejection_of([&] { dfs::mixed_conv2d(args, 1); });
  CHECK(message.find("overflow") != std::string::npos, message);
}

}  // namespace dfs_test
