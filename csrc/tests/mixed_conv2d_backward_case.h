// A backward call drawn at random, and its gradients by their definition.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "conv_case.h"
#include "dfs/types.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "random.h"
#include "test_map.h"

namespace dfs_test {

// A sum in float64 and the sum of the magnitudes, which bounds the error of a float32 sum.
struct Sum {
  double value = 0.0;
  double magnitude = 0.0;

  void add(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

struct BackwardCase {
  ConvSizes sizes;
  int64_t batch = 0;
  std::vector<int32_t> bits;
  TestQuantizer input_quantizer;
  std::vector<bool> centred;
  std::vector<float> weight, weight_scale, mul, bias;
  TestMap input, grad_output;

  size_t widths() const { return input_quantizer.widths.size(); }
  size_t weights() const { return weight.size(); }
  size_t filter() const { return static_cast<size_t>(sizes.group_channels() * sizes.taps()); }
  size_t outputs() const { return static_cast<size_t>(sizes.geometry.out_channels); }
};

struct Gradients {
  GuardedBuffer<float> input, weight, input_scale, weight_scale, mul, add;

  explicit Gradients(const BackwardCase& c)
      : input(static_cast<size_t>(c.batch * c.sizes.geometry.in_channels * c.sizes.height *
                                  c.sizes.width)),
        weight(c.weights()),
        input_scale(c.widths()),
        weight_scale(c.widths() * c.outputs()),
        mul(c.widths() * c.outputs()),
        add(c.widths() * c.outputs()) {}

  bool same(const Gradients& other) const {
    return input.same_bytes(other.input) && weight.same_bytes(other.weight) &&
           input_scale.same_bytes(other.input_scale) &&
           weight_scale.same_bytes(other.weight_scale) && mul.same_bytes(other.mul) &&
           add.same_bytes(other.add);
  }

  void check_guards() const {
    input.check_guards("grad_input");
    weight.check_guards("grad_weight");
    input_scale.check_guards("grad_input_scale");
    weight_scale.check_guards("grad_weight_scale");
    mul.check_guards("grad_mul");
    add.check_guards("grad_add");
  }
};

// The tensors of a case whose sizes, batch and input quantizer are known already.
inline void draw_backward_tensors(Random& random, BackwardCase& c) {
  const dfs::ConvGeometry& g = c.sizes.geometry;
  for (const int32_t b : c.input_quantizer.widths) {
    c.centred.push_back(random.chance(b == 2 ? 0.7 : 0.3));
    for (size_t o = 0; o < c.outputs(); ++o) {
      c.weight_scale.push_back(random.uniform(0.5f, 2.0f) / static_cast<float>(1 << (b % 32)));
      c.mul.push_back(random.uniform(-2.0f, 2.0f));
    }
  }
  if (random.chance(0.3)) c.mul.clear();
  if (random.chance(0.5)) {
    for (size_t o = 0; o < c.outputs(); ++o) c.bias.push_back(random.uniform(-1.0f, 1.0f));
  }
  for (size_t i = 0; i < c.outputs() * c.filter(); ++i) {
    c.weight.push_back(random.uniform(-1.0f, 1.0f));
  }
  c.input = make_float_map(random, c.batch, g.in_channels, c.sizes.height, c.sizes.width);
  fill(random, c.input, false);
  c.grad_output =
      make_float_map(random, c.batch, g.out_channels, c.sizes.out_height, c.sizes.out_width);
  fill(random, c.grad_output, false);
}

inline BackwardCase draw_backward_case(Random& random) {
  BackwardCase c;
  c.sizes = draw_sizes(random);
  c.batch = random.integer(0, 5);
  c.input_quantizer = draw_quantizer(random, 0.015f);
  c.bits.reserve(1);
  for (int64_t n = 0; n < c.batch; ++n) {
    const int64_t i = random.integer(-1, static_cast<int64_t>(c.widths()) - 1);
    c.bits.push_back(i < 0 ? 0 : c.input_quantizer.widths[static_cast<size_t>(i)]);
  }
  draw_backward_tensors(random, c);
  return c;
}

inline dfs::MixedConv2dBackwardArgs backward_args(BackwardCase& c, Gradients& out) {
  dfs::MixedConv2dBackwardArgs args;
  args.batch = c.batch;
  args.bits = c.bits.data();
  args.geometry = c.sizes.geometry;
  args.input_quantizer = c.input_quantizer.view();
  args.widths = args.input_quantizer.widths;
  for (size_t i = 0; i < c.widths(); ++i) args.centred[i] = c.centred[i];
  args.input = c.input.view();
  args.weight = c.weight.data();
  args.weight_scale = c.weight_scale.data();
  args.mul = c.mul.empty() ? nullptr : c.mul.data();
  args.bias = c.bias.empty() ? nullptr : c.bias.data();
  args.grad_output = c.grad_output.view();
  args.grad_input = out.input.data();
  args.grad_weight = out.weight.data();
  args.grad_input_scale = out.input_scale.data();
  args.grad_weight_scale = out.weight_scale.data();
  args.grad_mul = out.mul.data();
  args.grad_add = out.add.data();
  return args;
}

struct Slope {
  bool inside;
  double value;  // of the quantized value with respect to the step
};

inline Slope input_slope(float x, float scale, int zero_point, int bits) {
  const float t = x * (1.0f / scale);
  const float low = static_cast<float>(-zero_point);
  const float high = static_cast<float>((1 << bits) - 1 - zero_point);
  if (!(t >= low && t <= high)) return {false, naive_clamp(t, low, high)};
  return {true, std::nearbyint(t) - t};
}

inline Slope weight_slope(float w, float scale, int bits, bool centred) {
  const float t = w * (1.0f / scale);
  const float low = static_cast<float>(-(1 << (bits - 1)));
  const float high = static_cast<float>((1 << (bits - 1)) - 1);
  if (!centred) {
    if (!(t >= low && t <= high)) return {false, naive_clamp(t, low, high)};
    return {true, std::nearbyint(t) - t};
  }
  const float shifted = t - 0.5f;
  if (!(shifted >= low && shifted <= high)) return {false, naive_clamp(shifted, low, high) + 0.5f};
  return {true, (std::floor(t) + 0.5f) - t};
}

struct ExpectedGradients {
  std::vector<Sum> input, weight, input_scale, weight_scale, mul, add;
};

inline ExpectedGradients expected_gradients(const BackwardCase& c) {
  const ConvSizes& s = c.sizes;
  const dfs::ConvGeometry& g = s.geometry;
  ExpectedGradients e;
  const size_t input_elements = static_cast<size_t>(g.in_channels * s.height * s.width);
  e.input.resize(static_cast<size_t>(c.batch) * input_elements);
  e.weight.resize(c.weights());
  e.input_scale.resize(c.widths());
  e.weight_scale.resize(c.widths() * c.outputs());
  e.mul.resize(c.widths() * c.outputs());
  e.add.resize(c.widths() * c.outputs());

  for (size_t i = 0; i < c.widths(); ++i) {
    const int bits = c.input_quantizer.widths[i];
    const float scale = c.input_quantizer.scale[i];
    const int zero_point = c.input_quantizer.zero_point[i];
    std::vector<double> levels(c.weights());
    for (size_t k = 0; k < c.weights(); ++k) {
      const float step = c.weight_scale[i * c.outputs() + k / c.filter()];
      levels[k] = c.weight[k];
      if (bits != 32) {
        const int code = naive_weight_code(c.weight[k], step, bits, c.centred[i]);
        levels[k] = naive_level(code, c.centred[i]) * static_cast<double>(step) *
                    (c.centred[i] ? 0.5 : 1.0);
      }
    }
    std::vector<Sum> products(c.weights());
    int64_t samples = 0;
    for (int64_t n = 0; n < c.batch; ++n) {
      if (c.bits[static_cast<size_t>(n)] != bits) continue;
      ++samples;
      std::vector<Sum> grad_input(input_elements);
      const auto input_index = [&](int64_t ch, int64_t y, int64_t x) {
        return static_cast<size_t>((ch * s.height + y) * s.width + x);
      };
      for (int64_t o = 0; o < g.out_channels; ++o) {
        const size_t entry = i * c.outputs() + static_cast<size_t>(o);
        const double mul = c.mul.empty() ? 1.0 : static_cast<double>(c.mul[entry]);
        const int64_t first = o / s.group_outputs() * s.group_channels();
        for (int64_t y = 0; y < s.out_height; ++y) {
          for (int64_t x = 0; x < s.out_width; ++x) {
            const double grad = c.grad_output.value(n, o, y, x);
            e.add[entry].add(grad);
            for_each_tap(s, y, x, [&](int64_t iy, int64_t ix, int64_t kh, int64_t kw) {
              for (int64_t ch = 0; ch < s.group_channels(); ++ch) {
                const size_t k = static_cast<size_t>(
                    ((o * s.group_channels() + ch) * g.kernel_h + kh) * g.kernel_w + kw);
                float value = c.input.value(n, first + ch, iy, ix);
                if (bits != 32) {
                  value =
                      naive_value(naive_code(value, scale, zero_point, bits), scale, zero_point);
                }
                products[k].add(grad * static_cast<double>(value));
                grad_input[input_index(first + ch, iy, ix)].add(grad * mul * levels[k]);
              }
            });
          }
        }
      }
      for (int64_t ch = 0; ch < g.in_channels; ++ch) {
        for (int64_t y = 0; y < s.height; ++y) {
          for (int64_t x = 0; x < s.width; ++x) {
            const size_t local = input_index(ch, y, x);
            Sum& grad = e.input[static_cast<size_t>(n) * input_elements + local];
            grad = grad_input[local];
            if (bits == 32) continue;
            const Slope slope = input_slope(c.input.value(n, ch, y, x), scale, zero_point, bits);
            e.input_scale[i].value += grad.value * slope.value;
            e.input_scale[i].magnitude += grad.magnitude * std::abs(slope.value);
            if (!slope.inside) grad = Sum{};
          }
        }
      }
    }
    if (samples > 0 && bits != 32) {
      const double factor =
          1.0 / std::sqrt(static_cast<double>(samples) * static_cast<double>(input_elements) *
                          static_cast<double>((1 << bits) - 1));
      e.input_scale[i].value *= factor;
      e.input_scale[i].magnitude *= factor;
    }
    for (size_t k = 0; k < c.weights(); ++k) {
      const size_t o = k / c.filter();
      const size_t entry = i * c.outputs() + o;
      const double mul = c.mul.empty() ? 1.0 : static_cast<double>(c.mul[entry]);
      e.mul[entry].value += levels[k] * products[k].value;
      e.mul[entry].magnitude += std::abs(levels[k]) * products[k].magnitude;
      Slope slope{true, 0.0};
      if (bits != 32) {
        slope = weight_slope(c.weight[k], c.weight_scale[entry], bits, c.centred[i]);
        const double factor =
            1.0 / std::sqrt(static_cast<double>(c.filter()) * static_cast<double>(1 << (bits - 1)));
        e.weight_scale[entry].value += factor * mul * products[k].value * slope.value;
        e.weight_scale[entry].magnitude +=
            factor * std::abs(mul * slope.value) * products[k].magnitude;
      }
      if (slope.inside) {
        e.weight[k].value += mul * products[k].value;
        e.weight[k].magnitude += std::abs(mul) * products[k].magnitude;
      }
    }
    for (size_t o = 0; o < c.outputs(); ++o) {
      const size_t entry = i * c.outputs() + o;
      const double bias = c.bias.empty() ? 0.0 : static_cast<double>(c.bias[o]);
      e.mul[entry].value += bias * e.add[entry].value;
      e.mul[entry].magnitude += std::abs(bias) * e.add[entry].magnitude;
    }
  }
  return e;
}

// `error`: of a sum, relative to the sum of the magnitudes.
inline void check_close(const GuardedBuffer<float>& got, const std::vector<Sum>& expected,
                        const std::string& name, double error) {
  CHECK(got.size() == expected.size(), name);
  for (size_t i = 0; i < got.size(); ++i) {
    const double bound = error * expected[i].magnitude + 1e-30;
    CHECK(std::abs(static_cast<double>(got[i]) - expected[i].value) <= bound, name, "[", i,
          "]: ", got[i], " instead of ", expected[i].value);
  }
}

inline void check_gradients(const BackwardCase& c, const Gradients& got,
                            const ExpectedGradients& expected, double error = 1e-5) {
  got.check_guards();
  const std::string name = describe(c.sizes) + " ";
  check_close(got.input, expected.input, name + "grad_input", error);
  check_close(got.weight, expected.weight, name + "grad_weight", error);
  check_close(got.input_scale, expected.input_scale, name + "grad_input_scale", error);
  check_close(got.weight_scale, expected.weight_scale, name + "grad_weight_scale", error);
  check_close(got.mul, expected.mul, name + "grad_mul", error);
  check_close(got.add, expected.add, name + "grad_add", error);
}

}  // namespace dfs_test
