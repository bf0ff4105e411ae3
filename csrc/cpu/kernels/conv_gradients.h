// Gradients of a mixed convolution with float weights, in float32 with sums over pixels and samples
// carried on in float64.
#pragma once

#include <math.h>

#include "dot_blocks.h"
#include "feature_map_rows.h"
#include "filter_layout.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

inline WindowShape backward_shape(const MixedConv2dBackwardArgs& args) {
  return window_shape(args.geometry, args.input, args.grad_output.width);
}

inline int64_t backward_stride(const WindowShape& shape) {
  const int64_t stride = round_up(shape.depth, kFloatColumns);
  // Columns of a power-of-two stride would share a few cache sets.
  return stride % 64 == 0 ? stride + kFloatColumns : stride;
}

inline int64_t backward_pixels(const WindowShape& shape) {
  constexpr int64_t kBlockBytes = 128 << 10;
  const int64_t bytes = backward_stride(shape) * static_cast<int64_t>(sizeof(float));
  return max_of(min_of(kBlockBytes / bytes, 64), 4) / 4 * 4;
}

// Index into (channels, kernel_h * kernel_w) of a value at k in kernel_h, kernel_w, channel order.
inline int64_t weight_index(int64_t k, int64_t channels, int64_t taps) {
  return k % channels * taps + k / channels;
}

inline size_t backward_weight_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(round_up(filter_depth(g), kFloatColumns) * g.out_channels) *
         sizeof(float);
}

// Blocks (G, ceil(K / kFloatColumns), O/G, kFloatColumns), K in kernel_h, kernel_w, channel order.
inline void backward_weight_blocks(const MixedConv2dBackwardArgs& args, int index, float* blocks) {
  const ConvGeometry& g = args.geometry;
  const int32_t bits = args.widths.bits[index];
  const int64_t depth = filter_depth(g);
  const int64_t panels = ceil_div(depth, kFloatColumns);
  const int64_t channels = g.in_channels / g.groups;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t outputs = g.out_channels / g.groups;
  for (int64_t o = 0; o < g.out_channels; ++o) {
    const float* weight = args.weight + o * depth;
    float* group = blocks + o / outputs * panels * outputs * kFloatColumns;
    const WeightRange range = bits == 32
                                  ? WeightRange{1.0f, 1.0f, 0.0f, 0.0f, false}
                                  : weight_range(args.weight_scale[index * g.out_channels + o],
                                                 bits, args.centred[index]);
    for (int64_t k = 0; k < panels * kFloatColumns; ++k) {
      float value = 0.0f;
      if (k < depth) {
        value = weight[weight_index(k, channels, taps)];
        if (bits != 32) value = weight_value(weight_code(value, range), range);
      }
      group[(k / kFloatColumns * outputs + o % outputs) * kFloatColumns + k % kFloatColumns] =
          value;
    }
  }
}

struct BackwardInputScratch {
  Band<float> band;
  float* grads;    // (pixels, O/G)
  float* windows;  // (pixels, stride)
  float* row;
  float* terms;
  size_t bytes;
};

inline BackwardInputScratch backward_input_scratch(const MixedConv2dBackwardArgs& args,
                                                   const WindowShape& shape, void* memory) {
  Arena arena(memory);
  BackwardInputScratch scratch;
  const int64_t pixels = backward_pixels(shape);
  scratch.band.height = band_height(shape, args.grad_output.height);
  scratch.band.data =
      arena.take<float>(scratch.band.height * shape.band_width * shape.group_channels);
  scratch.grads = arena.take<float>(pixels * args.geometry.out_channels / args.geometry.groups);
  scratch.windows = arena.take<float>(pixels * backward_stride(shape));
  scratch.row = arena.take<float>(args.input.width);
  scratch.terms = arena.take<float>(args.input.width);
  scratch.bytes = arena.used();
  return scratch;
}

inline size_t backward_input_scratch_bytes(const MixedConv2dBackwardArgs& args) {
  return backward_input_scratch(args, backward_shape(args), nullptr).bytes;
}

// The gradient of y for channels [first, first + channels) of a run of pixels.
inline void read_grads(const MixedConv2dBackwardArgs& args, int64_t sample, int64_t y, int64_t x,
                       int64_t pixels, int64_t first, int64_t channels, float* grads) {
  const FeatureMap& map = args.grad_output;
  transpose_in(map.values + sample * map.stride_n + first * map.stride_c + y * map.stride_h +
                   x * map.stride_w,
               map.stride_c, map.stride_w, channels, pixels, grads);
}

// The gradient of the padded, quantized input: the transposed convolution.
inline void scatter_gradient(const MixedConv2dBackwardArgs& args, const WindowShape& shape,
                             int64_t sample, int64_t group, const float* mul,
                             const BackwardWeight& weight, const BackwardInputScratch& scratch) {
  const int64_t outputs = args.geometry.out_channels / args.geometry.groups;
  const int64_t first_output = group * outputs;
  const int64_t panels = ceil_div(shape.depth, kFloatColumns);
  const int64_t stride = backward_stride(shape);
  const int64_t block = backward_pixels(shape);
  const int64_t pixels = args.grad_output.height * shape.out_width;
  const float* blocks = weight.blocks + group * panels * outputs * kFloatColumns;
  std::memset(scratch.band.data, 0,
              static_cast<size_t>(scratch.band.height * shape.band_width * shape.group_channels) *
                  sizeof(float));
  for (int64_t first = 0; first < pixels; first += block) {
    const int64_t count = min_of(pixels - first, block);
    for_each_run(first, count, shape.out_width,
                 [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                   read_grads(args, sample, y, x, run, first_output, outputs,
                              scratch.grads + offset * outputs);
                 });
    if (mul != nullptr) {
      for (int64_t p = 0; p < count; ++p) {
        float* grads = scratch.grads + p * outputs;
        for (int64_t o = 0; o < outputs; ++o) grads[o] *= mul[first_output + o];
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* dst = scratch.windows + panel * kFloatColumns;
      float_rows(scratch.grads, count, outputs, 1, blocks + panel * outputs * kFloatColumns,
                 kFloatColumns, outputs, [&](int64_t pixel, const float* sums) {
                   for (int64_t j = 0; j < kFloatColumns; ++j) dst[pixel * stride + j] = sums[j];
                 });
    }
    for_each_run(
        first, count, shape.out_width, [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
          for (int64_t i = 0; i < run; ++i) {
            add_window(shape, scratch.band, 0, y, x + i, scratch.windows + (offset + i) * stride);
          }
        });
  }
}

// Four partial sums, in an order that depends on `count` only.
inline double sum_of(const float* terms, int64_t count) {
  double sums[4] = {0.0, 0.0, 0.0, 0.0};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += static_cast<double>(terms[i + j]);
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(terms[i]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline double backward_input(const MixedConv2dBackwardArgs& args, int64_t sample, int64_t group,
                             const BackwardWeight& weight, void* memory) {
  const WindowShape shape = backward_shape(args);
  const ConvGeometry& g = args.geometry;
  const BackwardInputScratch scratch = backward_input_scratch(args, shape, memory);
  const int32_t bits = args.bits[sample];
  const int index = index_of(args.widths, bits);
  const float* mul = args.mul == nullptr ? nullptr : args.mul + index * g.out_channels;
  scatter_gradient(args, shape, sample, group, mul, weight, scratch);

  const bool quantized = bits != 32;
  const ActivationRange range =
      quantized ? activation_range(args.input_quantizer, bits) : ActivationRange{};
  const FeatureMap& input = args.input;
  const int64_t channels = shape.group_channels;
  double scale_gradient = 0.0;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t channel = group * channels + c;
    for (int64_t y = 0; y < input.height; ++y) {
      const float* values =
          input.values + sample * input.stride_n + channel * input.stride_c + y * input.stride_h;
      const int64_t row = y + g.pad_top;
      const int64_t used = row < scratch.band.height ? shape.used_width : 0;
      const float* band = scratch.band.data + (row * shape.band_width + g.pad_left) * channels + c;
      for (int64_t x = 0; x < used; ++x) scratch.row[x] = band[x * channels];
      for (int64_t x = used; x < input.width; ++x) scratch.row[x] = 0.0f;
      if (quantized) {
        for (int64_t x = 0; x < input.width; ++x) {
          const float t = values[x * input.stride_w] * range.inverse_scale;
          const bool inside = t >= range.low && t <= range.high;
          const float clamped = clamp(t, range.low, range.high);
          const float slope = inside ? round_half_even(clamped) - t : clamped;
          scratch.terms[x] = scratch.row[x] * slope;
          scratch.row[x] = inside ? scratch.row[x] : 0.0f;
        }
        scale_gradient += sum_of(scratch.terms, input.width);
      }
      if (args.grad_input != nullptr) {
        std::memcpy(args.grad_input +
                        ((sample * input.channels + channel) * input.height + y) * input.width,
                    scratch.row, static_cast<size_t>(input.width) * sizeof(float));
      }
    }
  }
  return scale_gradient;
}

struct BackwardFilterScratch {
  Band<float> band;
  float* row;
  float* windows;     // (pixels, stride)
  float* grads;       // (pixels, channels)
  double* products;   // (channels, stride): G, the gradient of the quantized weight without mul
  double* gradient;   // (channels, stride): of the weight, all widths so far
  double* grad_sums;  // (channels)
  size_t bytes;
};

inline BackwardFilterScratch backward_filter_scratch(const MixedConv2dBackwardArgs& args,
                                                     const WindowShape& shape, int64_t channels,
                                                     void* memory) {
  Arena arena(memory);
  BackwardFilterScratch scratch;
  const int64_t pixels = backward_pixels(shape);
  const int64_t stride = backward_stride(shape);
  const int64_t rows = rows_per_band(shape, args.grad_output.height, sizeof(float));
  scratch.band.data = arena.take<float>(band_elements(shape, rows));
  scratch.row = arena.take<float>(shape.used_width * args.geometry.in_channels);
  scratch.windows = arena.take<float>(pixels * stride);
  scratch.grads = arena.take<float>(pixels * channels);
  scratch.products = arena.take<double>(channels * stride);
  scratch.gradient = arena.take<double>(channels * stride);
  scratch.grad_sums = arena.take<double>(channels);
  scratch.bytes = arena.used();
  return scratch;
}

inline size_t backward_filter_scratch_bytes(const MixedConv2dBackwardArgs& args, int64_t channels) {
  return backward_filter_scratch(args, backward_shape(args), channels, nullptr).bytes;
}

// Adds one sample's part of G and of the sums of the gradient.
inline void add_filter_products(const MixedConv2dBackwardArgs& args, const WindowShape& shape,
                                int64_t sample, int64_t channel_begin, int64_t channel_end,
                                bool want_products, BackwardFilterScratch* scratch) {
  const ConvGeometry& g = args.geometry;
  const int64_t outputs = g.out_channels / g.groups;
  const int64_t stride = backward_stride(shape);
  const int64_t panels = ceil_div(shape.depth, kFloatColumns);
  const int64_t block = backward_pixels(shape);
  const int64_t out_height = args.grad_output.height;
  const int64_t band_rows = rows_per_band(shape, out_height, sizeof(float));
  const int32_t bits = args.bits[sample];
  const SampleView input = sample_view(args.input, sample);
  const int64_t row_count = shape.used_width * g.in_channels;
  const ActivationRange range =
      bits == 32 ? ActivationRange{} : activation_range(args.input_quantizer, bits);
  for (int64_t begin = 0; begin < out_height; begin += band_rows) {
    const int64_t end = min_of(begin + band_rows, out_height);
    if (want_products) {
      load_band(shape, begin, end, scratch->row, &scratch->band, [&](int64_t y, float* values) {
        read_pixels(input, y, 0, shape.used_width, nullptr, values);
        if (bits != 32) fake_quantize(values, row_count, range);
      });
    }
    const int64_t pixels = (end - begin) * shape.out_width;
    for (int64_t first = 0; first < pixels; first += block) {
      const int64_t count = min_of(pixels - first, block);
      for (int64_t channel = channel_begin; channel < channel_end;) {
        const int64_t group = channel / outputs;
        const int64_t channels = min_of((group + 1) * outputs, channel_end) - channel;
        const int64_t local = channel - channel_begin;
        for_each_run(first, count, shape.out_width,
                     [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                       read_grads(args, sample, begin + y, x, run, channel, channels,
                                  scratch->grads + offset * channels);
                       if (!want_products) return;
                       for (int64_t i = 0; i < run; ++i) {
                         copy_window(shape, scratch->band, group, y, x + i,
                                     scratch->windows + (offset + i) * stride);
                       }
                     });
        double* sums = scratch->grad_sums + local;
        for (int64_t p = 0; p < count; ++p) {
          for (int64_t o = 0; o < channels; ++o) {
            sums[o] += static_cast<double>(scratch->grads[p * channels + o]);
          }
        }
        for (int64_t panel = 0; want_products && panel < panels; ++panel) {
          double* products = scratch->products + local * stride + panel * kFloatColumns;
          float_rows(scratch->grads, channels, 1, channels,
                     scratch->windows + panel * kFloatColumns, stride, count,
                     [&](int64_t o, const float* block_sums) {
                       for (int64_t j = 0; j < kFloatColumns; ++j) {
                         products[o * stride + j] += static_cast<double>(block_sums[j]);
                       }
                     });
        }
        channel += channels;
      }
    }
  }
}

// From G of one width and output channel to its gradients; `gradient` gathers that of the weight.
inline void finish_filter(const MixedConv2dBackwardArgs& args, int index, int64_t channel,
                          const double* products, double grad_sum, double* gradient) {
  const ConvGeometry& g = args.geometry;
  const int64_t depth = filter_depth(g);
  const int64_t channels = g.in_channels / g.groups;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t entry = index * g.out_channels + channel;
  const int32_t bits = args.widths.bits[index];
  const float* weight = args.weight + channel * depth;
  const double mul = args.mul == nullptr ? 1.0 : static_cast<double>(args.mul[entry]);
  double scale_gradient = 0.0;
  double mul_gradient =
      args.bias == nullptr ? 0.0 : static_cast<double>(args.bias[channel]) * grad_sum;
  if (bits == 32) {
    for (int64_t k = 0; k < depth; ++k) {
      mul_gradient += static_cast<double>(weight[weight_index(k, channels, taps)]) * products[k];
      gradient[k] += mul * products[k];
    }
  } else {
    const bool centred = args.centred[index];
    const WeightRange range = weight_range(args.weight_scale[entry], bits, centred);
    // Centred levels lie half a step above their codes.
    const float centre = centred ? 0.5f : 0.0f;
    for (int64_t k = 0; k < depth; ++k) {
      const float w = weight[weight_index(k, channels, taps)];
      const float t = w * range.inverse_scale;
      const float shifted = t - centre;
      const bool inside = shifted >= range.low && shifted <= range.high;
      const float code = weight_code(w, range);
      const float slope =
          inside ? (code + centre) - t : clamp(shifted, range.low, range.high) + centre;
      const double d = mul * products[k];
      scale_gradient += d * static_cast<double>(slope);
      mul_gradient += static_cast<double>(weight_value(code, range)) * products[k];
      if (inside) gradient[k] += d;
    }
    const double elements = static_cast<double>(depth);
    scale_gradient /= sqrt(elements * static_cast<double>(1 << (bits - 1)));
  }
  if (args.grad_weight_scale != nullptr) {
    args.grad_weight_scale[entry] = static_cast<float>(scale_gradient);
  }
  if (args.grad_mul != nullptr) args.grad_mul[entry] = static_cast<float>(mul_gradient);
  if (args.grad_add != nullptr) args.grad_add[entry] = static_cast<float>(grad_sum);
}

inline void backward_filter(const MixedConv2dBackwardArgs& args, int64_t channel_begin,
                            int64_t channel_end, void* memory) {
  const WindowShape shape = backward_shape(args);
  const ConvGeometry& g = args.geometry;
  const int64_t count = channel_end - channel_begin;
  const int64_t stride = backward_stride(shape);
  BackwardFilterScratch scratch = backward_filter_scratch(args, shape, count, memory);
  const bool want_products =
      args.grad_weight != nullptr || args.grad_weight_scale != nullptr || args.grad_mul != nullptr;
  // Columns past the depth are multiplied too; they only have to be finite.
  std::memset(scratch.windows, 0,
              static_cast<size_t>(backward_pixels(shape) * stride) * sizeof(float));
  std::memset(scratch.gradient, 0, static_cast<size_t>(count * stride) * sizeof(double));
  for (int index = 0; index < args.widths.count; ++index) {
    std::memset(scratch.products, 0, static_cast<size_t>(count * stride) * sizeof(double));
    std::memset(scratch.grad_sums, 0, static_cast<size_t>(count) * sizeof(double));
    for (int64_t n = 0; n < args.batch; ++n) {
      if (args.bits[n] != args.widths.bits[index]) continue;
      add_filter_products(args, shape, n, channel_begin, channel_end, want_products, &scratch);
    }
    for (int64_t o = 0; o < count; ++o) {
      finish_filter(args, index, channel_begin + o, scratch.products + o * stride,
                    scratch.grad_sums[o], scratch.gradient + o * stride);
    }
  }
  if (args.grad_weight == nullptr) return;
  const int64_t channels = shape.group_channels;
  const int64_t taps = g.kernel_h * g.kernel_w;
  for (int64_t o = 0; o < count; ++o) {
    float* dst = args.grad_weight + (channel_begin + o) * shape.depth;
    for (int64_t k = 0; k < shape.depth; ++k) {
      dst[weight_index(k, channels, taps)] = static_cast<float>(scratch.gradient[o * stride + k]);
    }
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
