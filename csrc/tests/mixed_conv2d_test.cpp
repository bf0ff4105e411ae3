#include <cstdint>
#include <string>
#include <vector>

#include "check.h"
#include "guarded_buffer.h"
#include "mixed_conv2d_case.h"
#include "mixed_conv2d_check.h"
#include "naive.h"
#include "operations.h"
#include "random.h"
#include "split_small_work.h"
#include "test_map.h"

namespace dfs_test {

DFS_TEST(mixed_conv2d_matches_the_definition) {
  const SplitSmallWork split;
  Random random(seed());
  for (int i = 0; i < case_count(2400); ++i) {
    ConvCase c = draw_case(random);
    check_case(c);
  }
}

// Long sums of the largest products that a weight gives: pairs of them, as many as are added up
// before they are widened, and their total must not saturate.
DFS_TEST(mixed_conv2d_survives_extreme_codes) {
  for_each_isa([] {
    for (const int bits : {2, 4, 8}) {
      for (const bool centred : {false, true}) {
        for (const int code :
             {-128, -65, -64, -33, -21, -8, -7, -2, -1, 1, 3, 7, 21, 32, 64, 127}) {
          if (code < -(1 << (bits - 1)) || code >= 1 << (bits - 1)) continue;
          for (const bool zero_at_top : {false, true}) {
            ConvSizes s;
            s.geometry.in_channels = 1303;
            s.geometry.out_channels = 5;
            s.geometry.kernel_h = s.geometry.kernel_w = 3;
            s.geometry.pad_left = s.geometry.pad_right = 1;
            s.geometry.pad_top = s.geometry.pad_bottom = 1;
            s.height = s.width = s.out_height = s.out_width = 3;
            const int64_t channels = s.geometry.in_channels;
            const int64_t bytes = naive_pixel_bytes(channels, bits);
            std::vector<uint8_t> canonical(static_cast<size_t>(5 * 9 * bytes), 0);
            for (int64_t run = 0; run < 5 * 9; ++run) {
              for (int64_t c = 0; c < channels; ++c) {
                naive_insert(canonical.data() + run * bytes, c, bits, code);
              }
            }
            GuardedBuffer<uint8_t> tile(dfs::tile_bytes(s.geometry, bits, centred));
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

            const int level = naive_level(code, centred);
            const int64_t activation = zero_at_top ? -top : top;
            for (int64_t y = 0; y < 3; ++y) {
              for (int64_t x = 0; x < 3; ++x) {
                const int64_t taps = (y == 1 ? 3 : 2) * (x == 1 ? 3 : 2);
                const float expected = static_cast<float>(taps * channels * activation * level) *
                                       (centred ? 0.5f : 1.0f);
                const float got = output[static_cast<size_t>(4 * 9 + y * 3 + x)];
                CHECK(got == expected, "bits ", bits, ", code ", code, ": ", got, " instead of ",
                      expected);
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
    c.weight = draw_weight(random, c.sizes, false);
    c.input_quantizer = draw_quantizer(random, 0.015f);
    c.input = make_float_map(random, 3, g.in_channels, c.sizes.height, c.sizes.width);
    fill(random, c.input, false);
    c.output = make_float_map(random, 3, g.out_channels, c.sizes.out_height, c.sizes.out_width);
    check_case(c);
  }
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
  retile(c.weight, c.sizes.geometry);
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
  std::vector<uint8_t> tile(dfs::tile_bytes(g, 8, false));
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
