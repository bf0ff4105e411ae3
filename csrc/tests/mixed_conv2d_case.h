// Random mixed convolutions with memory of their own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "conv_case.h"
#include "dfs/types.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "operations.h"
#include "random.h"
#include "test_map.h"

namespace dfs_test {

// The weights of a layer at all widths, as the caller of the kernels keeps them.
struct TestWeight {
  std::vector<int32_t> widths;
  std::vector<bool> centred;
  std::vector<float> scale;                    // (count, O)
  std::vector<float> values;                   // (O, Cg, KH, KW)
  std::vector<GuardedBuffer<uint8_t>> packed;  // canonical, per width
  std::vector<GuardedBuffer<uint8_t>> tiles;   // from retile()

  size_t index(int bits) const {
    for (size_t i = 0; i < widths.size(); ++i) {
      if (widths[i] == bits) return i;
    }
    fail(__FILE__, __LINE__, "no width ", bits);
  }
};

// `extreme`: integer codes are the lowest or the highest.
inline TestWeight draw_weight(Random& random, const ConvSizes& s, bool extreme) {
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
      // How many small products fit into a word depends on how small they are.
      const int divisor = 1 << (random.chance(0.5) ? random.integer(0, bits - 2) : 0);
      for (int64_t run = 0; run < g.out_channels * s.taps(); ++run) {
        for (int64_t c = 0; c < s.group_channels(); ++c) {
          // Any code, both extremes often.
          const int half = 1 << (bits - 1);
          const int code = extreme || random.chance(0.3)
                               ? (random.chance(0.5) ? -half : half - 1)
                               : static_cast<int>(random.integer(-half, half - 1));
          naive_insert(canonical.data() + run * bytes, c, bits, code / divisor);
        }
      }
      weight.packed.push_back(std::move(canonical));
    }
  }
  return weight;
}

// Fills `tiles` for the instruction set in use.
inline void retile(TestWeight& weight, const dfs::ConvGeometry& g) {
  weight.tiles.clear();
  for (size_t i = 0; i < weight.widths.size(); ++i) {
    const int bits = weight.widths[i];
    GuardedBuffer<uint8_t> tile(dfs::tile_bytes(g, bits, weight.centred[i]));
    dfs::retile_weight(g, weight.packed[i].data(), bits, weight.centred[i], tile.data(), 1);
    tile.check_guards("tile");
    weight.tiles.push_back(std::move(tile));
  }
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

inline std::vector<int32_t> draw_bits(Random& random, int64_t batch, double skipped) {
  const int32_t widths[] = {2, 4, 8, 32};
  std::vector<int32_t> bits;
  bits.reserve(static_cast<size_t>(batch) + 1);
  for (int64_t n = 0; n < batch; ++n) {
    bits.push_back(random.chance(skipped) ? 0 : widths[random.integer(0, 3)]);
  }
  return bits;
}

inline std::vector<float> draw_floats(Random& random, size_t count, float low, float high) {
  std::vector<float> values(count);
  for (float& value : values) value = random.uniform(low, high);
  return values;
}

// What shapes the work is drawn before what fills it: a fuzzer's bytes should not all go into the
// contents. The weight has no tiles yet.
inline ConvCase draw_case(Random& random) {
  ConvCase c;
  c.sizes = draw_sizes(random);
  const dfs::ConvGeometry& g = c.sizes.geometry;
  c.batch = random.integer(0, 5);
  c.bits = draw_bits(random, c.batch, 0.2);
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

  const auto out_map = [&](bool packed) {
    if (!packed) {
      return make_float_map(random, c.batch, g.out_channels, c.sizes.out_height, c.sizes.out_width);
    }
    const std::vector<int32_t> stored =
        random.chance(0.4) ? c.bits : draw_bits(random, c.batch, 0.1);
    return make_packed_map(random, c.batch, g.out_channels, c.sizes.out_height, c.sizes.out_width,
                           stored, draw_quantizer(random, 0.03f));
  };
  c.relu = random.chance(0.5);
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
        wider.row_bytes = std::max(wider.row_bytes, c.output.row_bytes);
        c.output.row_bytes = wider.row_bytes;
        wider.codes_offset = c.output.codes_offset;
        c.output.allocate_codes();
        wider.allocate_codes();
        c.residual = wider;
      } else if (random.chance(0.3)) {
        c.residual.quantizer = draw_quantizer(random, 0.03f);
      }
    }
  }

  const size_t outputs = static_cast<size_t>(g.out_channels);
  if (random.chance(0.5)) c.bias = draw_floats(random, outputs, -1.0f, 1.0f);
  if (random.chance(0.5)) c.mul = draw_floats(random, outputs * 4, -2.0f, 2.0f);
  if (random.chance(0.5)) c.add = draw_floats(random, outputs * 4, -1.0f, 1.0f);
  const bool extreme = random.chance(0.15);
  c.weight = draw_weight(random, c.sizes, extreme);
  fill(random, c.input, extreme);
  if (c.has_residual) {
    fill(random, c.residual, extreme);
    if (c.in_place) {
      c.output.values = c.residual.values;
      c.output.codes = c.residual.codes;
    }
  }
  return c;
}

}  // namespace dfs_test
