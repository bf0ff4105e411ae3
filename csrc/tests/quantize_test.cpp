#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "operations.h"
#include "random.h"
#include "split_small_work.h"

namespace dfs_test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Tables {
  float scale[4];
  int32_t zero_point[4];

  dfs::Quantizer quantizer() const {
    dfs::Quantizer result;
    result.widths = {4, {2, 4, 8, 32}};
    result.scale = scale;
    result.zero_point = zero_point;
    return result;
  }
};

Tables draw_tables(Random& random) {
  Tables tables{};
  const float extremes[] = {0x1p-126f, 0x1p126f, 0.3f, 1.0f};
  for (int i = 0; i < 4; ++i) {
    tables.scale[i] =
        random.chance(0.2) ? extremes[random.integer(0, 3)] : random.uniform(0.01f, 0.5f);
    const int bits = i < 3 ? 2 << i : 8;
    tables.zero_point[i] = static_cast<int32_t>(random.integer(0, (1 << bits) - 1));
  }
  return tables;
}

// Ties, values one step away from them, out of range values, specials.
float draw_value(Random& random, float scale) {
  switch (random.integer(0, 9)) {
    case 0:
      return kNan;
    case 1:
      return random.chance(0.5) ? kInfinity : -kInfinity;
    case 2:
      return random.chance(0.5) ? 3.4e38f : -3.4e38f;
    case 3:
      return random.chance(0.5) ? 0.0f : -0.0f;
    case 4:
      return 0x1p-149f;
    case 5:
    case 6:
      return (static_cast<float>(random.integer(-260, 260)) + 0.5f) * scale;
    case 7:
      return std::nextafter((static_cast<float>(random.integer(-8, 8)) + 0.5f) * scale,
                            random.chance(0.5) ? kInfinity : -kInfinity);
    default:
      return random.uniform(-300.0f, 300.0f) * scale;
  }
}

struct MapCase {
  int64_t batch, channels, height, width, row_bytes;
  std::vector<int32_t> bits;
  Tables tables;
};

void check_maps(Random& random, const MapCase& c, bool channels_last) {
  const size_t elements = static_cast<size_t>(c.channels * c.height * c.width);
  GuardedBuffer<float> values(static_cast<size_t>(c.batch) * elements);
  dfs::FeatureMap src;
  src.channels = c.channels;
  src.height = c.height;
  src.width = c.width;
  src.values = values.data();
  src.stride_n = static_cast<int64_t>(elements);
  src.stride_c = channels_last ? 1 : c.height * c.width;
  src.stride_h = channels_last ? c.channels * c.width : c.width;
  src.stride_w = channels_last ? c.channels : 1;
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = draw_value(random, c.tables.scale[random.integer(0, 3)]);
  }
  const auto value_index = [&](int64_t n, int64_t ch, int64_t y, int64_t x) {
    return static_cast<size_t>(n * src.stride_n + ch * src.stride_c + y * src.stride_h +
                               x * src.stride_w);
  };

  dfs::FeatureMap dst;
  dst.channels = c.channels;
  dst.height = c.height;
  dst.width = c.width;
  dst.row_bytes = c.row_bytes;
  dst.bits = c.bits.data();
  dst.quantizer = c.tables.quantizer();

  for (int threads = 1; threads <= 3; ++threads) {
    GuardedBuffer<uint8_t> packed(static_cast<size_t>(c.batch * c.row_bytes));
    dst.codes = packed.data();
    dfs::quantize_pack(src, dst, c.batch, threads);
    packed.check_guards("packed");
    GuardedBuffer<float> back(values.size());
    dfs::FeatureMap back_map = src;
    back_map.values = back.data();
    dfs::unpack_dequantize(dst, back_map, c.batch, threads);
    back.check_guards("dequantized");

    for (int64_t n = 0; n < c.batch; ++n) {
      const int bits = c.bits[static_cast<size_t>(n)];
      const int index = dfs::index_of(dst.quantizer.widths, bits);
      const int64_t pixel_bytes = naive_pixel_bytes(c.channels, bits);
      const uint8_t* row = packed.data() + n * c.row_bytes;
      for (int64_t y = 0; y < c.height; ++y) {
        for (int64_t x = 0; x < c.width; ++x) {
          const uint8_t* pixel = row + (y * c.width + x) * pixel_bytes;
          for (int64_t ch = 0; ch < c.channels; ++ch) {
            const float value = values[value_index(n, ch, y, x)];
            const float restored = back[value_index(n, ch, y, x)];
            if (bits == 0) {
              CHECK(restored == 0.0f, "a skipped sample is not zero");
            } else if (bits == 32) {
              float stored;
              std::memcpy(&stored, pixel + ch * 4, 4);
              CHECK(std::memcmp(&stored, &value, 4) == 0, "a float was changed");
              CHECK(std::memcmp(&restored, &value, 4) == 0, "a float was changed");
            } else {
              const float scale = c.tables.scale[index];
              const int zero_point = c.tables.zero_point[index];
              const int code = naive_extract(pixel, ch, bits);
              const int expected = naive_code(value, scale, zero_point, bits);
              CHECK(code == expected, "bits ", bits, " value ", value, " scale ", scale, " zero ",
                    zero_point, ": ", code, " instead of ", expected);
              CHECK(restored == naive_value(code, scale, zero_point), "code ", code);
            }
          }
          if (bits != 0 && bits != 32) {
            for (int64_t ch = c.channels; ch * bits < pixel_bytes * 8; ++ch) {
              CHECK(naive_extract(pixel, ch, bits) == 0, "a tail code is not zero");
            }
          }
        }
      }
      for (int64_t i = c.height * c.width * pixel_bytes; i < c.row_bytes; ++i) {
        packed.check_untouched(static_cast<size_t>(n * c.row_bytes + i), "packed");
      }
    }
  }
}

}  // namespace

DFS_TEST(quantize_pack_matches_the_definition) {
  for_each_isa([] {
    Random random(seed());
    const int32_t all_bits[] = {0, 2, 4, 8, 32};
    for (int i = 0; i < 60; ++i) {
      MapCase c;
      c.batch = random.integer(0, 5);
      c.channels = random.integer(1, 19);
      c.height = random.integer(1, 6);
      c.width = random.integer(1, 9);
      c.row_bytes = c.channels * c.height * c.width * 4 + random.integer(0, 5);
      for (int64_t n = 0; n < c.batch; ++n) c.bits.push_back(all_bits[random.integer(0, 4)]);
      c.tables = draw_tables(random);
      check_maps(random, c, random.chance(0.5));
    }
  });
}

DFS_TEST(quantize_rounds_ties_to_even) {
  for_each_isa([] {
    const std::vector<float> x = {-0.5f, 0.5f, 1.5f, 2.5f, 3.5f, 254.5f, 255.5f, kNan, kInfinity};
    const std::vector<int> expected = {0, 0, 2, 2, 4, 254, 255, 0, 255};
    const float scale = 1.0f;
    const int32_t zero_point = 0;
    const int32_t bits = 8;
    std::vector<float> values = x;
    std::vector<uint8_t> codes(x.size(), 77);
    dfs::FeatureMap src;
    src.channels = static_cast<int64_t>(x.size());
    src.height = src.width = 1;
    src.values = values.data();
    src.stride_c = 1;
    dfs::FeatureMap dst;
    dst.channels = src.channels;
    dst.height = dst.width = 1;
    dst.codes = codes.data();
    dst.row_bytes = src.channels;
    dst.bits = &bits;
    dst.quantizer.widths = {1, {8, 0, 0, 0}};
    dst.quantizer.scale = &scale;
    dst.quantizer.zero_point = &zero_point;
    dfs::quantize_pack(src, dst, 1, 1);
    for (size_t i = 0; i < x.size(); ++i) {
      CHECK(codes[i] == expected[i], "x = ", x[i], ": ", int{codes[i]});
    }
  });
}

DFS_TEST(fake_quantize_matches_the_definition) {
  const SplitSmallWork split;
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < 60; ++i) {
      dfs::FakeQuantizer quantizer;
      quantizer.bits = static_cast<int32_t>(random.integer(1, 16));
      quantizer.scale = random.uniform(0.01f, 0.5f);
      const int64_t top = (int64_t{1} << quantizer.bits) - 1;
      quantizer.zero_point = static_cast<int32_t>(random.integer(0, top));
      // Some longer than a block of the gradient's sums, one longer than a task.
      const int64_t count = i == 0 ? 40000 : random.integer(0, 700);
      GuardedBuffer<float> values(static_cast<size_t>(count));
      GuardedBuffer<float> grads(static_cast<size_t>(count));
      for (size_t k = 0; k < values.size(); ++k) {
        values[k] = draw_value(random, quantizer.scale);
        grads[k] = random.uniform(-1.0f, 1.0f);
      }
      const float low = static_cast<float>(-quantizer.zero_point);
      const float high = static_cast<float>(top - quantizer.zero_point);
      double first_sum = 0.0;
      for (int threads = 1; threads <= 3; ++threads) {
        GuardedBuffer<float> result(values.size());
        GuardedBuffer<float> grad_values(values.size());
        dfs::fake_quantize(values.data(), count, quantizer, result.data(), threads);
        const double sum = dfs::fake_quantize_backward(grads.data(), values.data(), count,
                                                       quantizer, grad_values.data(), threads);
        result.check_guards("values");
        grad_values.check_guards("gradients");
        double expected_sum = 0.0;
        double magnitude = 0.0;
        for (size_t k = 0; k < values.size(); ++k) {
          const int code =
              naive_code(values[k], quantizer.scale, quantizer.zero_point, quantizer.bits);
          const float expected = naive_value(code, quantizer.scale, quantizer.zero_point);
          CHECK(result[k] == expected, "bits ", quantizer.bits, " value ", values[k]);
          const float t = values[k] * (1.0f / quantizer.scale);
          const bool inside = t >= low && t <= high;
          CHECK(grad_values[k] == (inside ? grads[k] : 0.0f), "gradient of ", values[k]);
          const float slope = inside ? std::nearbyint(t) - t : naive_clamp(t, low, high);
          const float term = grads[k] * slope;
          expected_sum += static_cast<double>(term);
          magnitude += std::fabs(static_cast<double>(term));
        }
        CHECK(std::fabs(sum - expected_sum) <= 1e-12 * magnitude, "sum ", sum);
        if (threads == 1) first_sum = sum;
        CHECK(sum == first_sum, "threads change the sum");
      }
    }
  });
}

DFS_TEST(fake_quantize_rejects_other_widths) {
  float value = 0.0f;
  for (const int32_t bits : {0, 17, 32}) {
    const std::string message =
        rejection_of([&] { dfs::fake_quantize(&value, 1, {bits, 1.0f, 0}, &value, 1); });
    CHECK(message.find("bits must lie in [1, 16]") != std::string::npos, message);
  }
}

DFS_TEST(quantize_rejects_widths_without_a_scale) {
  float value = 0.0f;
  uint8_t code = 0;
  const int32_t bits[] = {0, 3};
  dfs::FeatureMap src;
  src.channels = src.height = src.width = 1;
  src.values = &value;
  dfs::FeatureMap dst = src;
  dst.values = nullptr;
  dst.codes = &code;
  dst.bits = bits;
  const std::string message = rejection_of([&] { dfs::quantize_pack(src, dst, 2, 1); });
  CHECK(message.find("bits[1] is 3") != std::string::npos, message);
}

DFS_TEST(quantize_weight_matches_the_definition) {
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < 60; ++i) {
      const int64_t outputs = random.integer(1, 9);
      const int64_t kernel_h = random.integer(1, 4);
      const int64_t kernel_w = random.integer(1, 4);
      const int64_t channels = random.integer(1, 17);
      const int bits = 2 << random.integer(0, 2);
      const bool centred = random.chance(0.5);
      const int64_t taps = kernel_h * kernel_w;
      const int64_t bytes = naive_pixel_bytes(channels, bits);
      std::vector<float> scale(static_cast<size_t>(outputs));
      for (float& s : scale) {
        s = random.chance(0.1)   ? 0x1p-126f
            : random.chance(0.1) ? 0x1p126f
                                 : random.uniform(0.01f, 0.5f);
      }
      std::vector<float> weight(static_cast<size_t>(outputs * channels * taps));
      for (float& w : weight) {
        w = draw_value(random, scale[static_cast<size_t>(random.integer(0, outputs - 1))]);
      }
      for (int threads = 1; threads <= 3; ++threads) {
        GuardedBuffer<uint8_t> packed(static_cast<size_t>(outputs * taps * bytes));
        dfs::quantize_weight(weight.data(), outputs, kernel_h, kernel_w, channels, scale.data(),
                             bits, centred, packed.data(), threads);
        packed.check_guards("packed weight");
        for (int64_t o = 0; o < outputs; ++o) {
          for (int64_t tap = 0; tap < taps; ++tap) {
            std::vector<uint8_t> expected(static_cast<size_t>(bytes), 0);
            for (int64_t c = 0; c < channels; ++c) {
              const float w = weight[static_cast<size_t>((o * channels + c) * taps + tap)];
              naive_insert(expected.data(), c, bits,
                           naive_weight_code(w, scale[static_cast<size_t>(o)], bits, centred));
            }
            const uint8_t* got = packed.data() + (o * taps + tap) * bytes;
            CHECK(std::memcmp(got, expected.data(), static_cast<size_t>(bytes)) == 0, "bits ", bits,
                  " centred ", centred, " channels ", channels, " output ", o, " tap ", tap);
          }
        }
      }
    }
  });
}

}  // namespace dfs_test
