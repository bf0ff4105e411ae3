#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "checks.h"
#include "dispatch.h"
#include "float_environment.h"
#include "operations.h"
#include "output_scaling.h"
#include "parallel.h"
#include "weight_tile.h"

namespace dfs {
namespace {

std::string sample_name(int64_t n, int32_t bits) {
  return "bits[" + std::to_string(n) + "] is " + std::to_string(bits);
}

bool reads_codes_as_they_are(const MixedConv2dArgs& args) {
  return is_packed(args.input) && args.input_quantizer.scale == nullptr;
}

// The quantizer that gives the codes which enter the multiplication.
const Quantizer& load_quantizer(const MixedConv2dArgs& args) {
  return reads_codes_as_they_are(args) ? args.input.quantizer : args.input_quantizer;
}

void check_bits(const MixedConv2dArgs& args) {
  const Quantizer& loaded = load_quantizer(args);
  for (int64_t n = 0; n < args.batch; ++n) {
    const int32_t bits = args.bits[n];
    if (bits == 0) continue;
    if (index_of(args.weight.widths, bits) < 0) {
      reject(sample_name(n, bits) + ", but the weight has only: " + width_list(args.weight.widths) +
             " (and 0)");
    }
    if (reads_codes_as_they_are(args) && args.input.bits[n] != bits) {
      reject(sample_name(n, bits) + ", but the packed input is stored at " +
             std::to_string(args.input.bits[n]) + " bits and no input scale is given");
    }
    if (bits == 32) continue;
    if (index_of(loaded.widths, bits) < 0 || loaded.scale == nullptr ||
        loaded.zero_point == nullptr) {
      reject(sample_name(n, bits) + ", but the input scales are for: " + width_list(loaded.widths));
    }
  }
}

void check_sum_fits(const MixedConv2dArgs& args, int index) {
  const ConvGeometry& g = args.geometry;
  const int32_t bits = args.weight.widths.bits[index];
  const Quantizer& loaded = load_quantizer(args);
  const int32_t zero_point = loaded.zero_point[index_of(loaded.widths, bits)];
  const int64_t max_code = (int64_t{1} << bits) - 1;
  if (zero_point < 0 || zero_point > max_code) {
    reject("the input zero point at " + std::to_string(bits) + " bits is " +
           std::to_string(zero_point) + "; allowed is 0 to " + std::to_string(max_code));
  }
  const int64_t activation = std::max<int64_t>(zero_point, max_code - zero_point);
  const int64_t level = args.weight.centred[index] ? max_code : int64_t{1} << (bits - 1);
  const int64_t depth = g.in_channels / g.groups * g.kernel_h * g.kernel_w;
  if (depth > std::numeric_limits<int32_t>::max() / (activation * level)) {
    reject("a sum over " + std::to_string(depth) + " products at " + std::to_string(bits) +
           " bits can overflow int32");
  }
}

// m and c of y = acc * m + c for each width, (count, O).
struct OutputScaling {
  std::unique_ptr<float[]> multiplier;
  std::unique_ptr<float[]> offset;
};

OutputScaling output_scaling(const MixedConv2dArgs& args, const bool* used) {
  const int64_t channels = args.geometry.out_channels;
  const WidthTable& widths = args.weight.widths;
  OutputScaling scaling;
  scaling.multiplier.reset(new float[static_cast<size_t>(channels * widths.count)]);
  scaling.offset.reset(new float[static_cast<size_t>(channels * widths.count)]);
  const Quantizer& loaded = load_quantizer(args);
  for (int i = 0; i < widths.count; ++i) {
    if (!used[i]) continue;
    const int32_t bits = widths.bits[i];
    const float input_scale = bits == 32 ? 1.0f : loaded.scale[index_of(loaded.widths, bits)];
    fold_output_scaling(args.weight, i, channels, input_scale, args.bias, args.mul, args.add,
                        scaling.multiplier.get() + i * channels,
                        scaling.offset.get() + i * channels);
  }
  return scaling;
}

// A packed residual whose row is overwritten with codes of another width is read from a copy.
std::unique_ptr<uint8_t[]> copy_of_overwritten_row(const MixedConv2dArgs& args, int64_t n) {
  if (!args.has_residual || !is_packed(args.residual) || !is_packed(args.output)) {
    return nullptr;
  }
  const int32_t from = args.residual.bits[n];
  const int32_t to = args.output.bits[n];
  const uint8_t* row = args.residual.codes + n * args.residual.row_bytes;
  if (from == 0 || to == 0 || from == to || row != args.output.codes + n * args.output.row_bytes) {
    return nullptr;
  }
  const int64_t pixels = args.residual.height * args.residual.width;
  const size_t bytes = static_cast<size_t>(pixels * ((args.residual.channels * from + 7) / 8));
  std::unique_ptr<uint8_t[]> copy(new uint8_t[bytes]);
  std::memcpy(copy.get(), row, bytes);
  return copy;
}

// Whether a skipped sample leaves nothing to be done.
bool stays_as_it_is(const MixedConv2dArgs& args, int64_t n) {
  const FeatureMap& to = args.output;
  if (is_packed(to) && to.bits[n] == 0) return true;
  if (!args.has_residual) return false;
  const FeatureMap& from = args.residual;
  if (is_packed(from) != is_packed(to)) return false;
  if (!is_packed(to)) {
    return from.values == to.values && from.stride_n == to.stride_n &&
           from.stride_c == to.stride_c && from.stride_h == to.stride_h &&
           from.stride_w == to.stride_w;
  }
  const int32_t bits = to.bits[n];
  if (from.bits[n] != bits || from.codes + n * from.row_bytes != to.codes + n * to.row_bytes) {
    return false;
  }
  if (bits == 32) return true;
  const int a = index_of(from.quantizer.widths, bits);
  const int b = index_of(to.quantizer.widths, bits);
  return from.quantizer.scale[a] == to.quantizer.scale[b] &&
         from.quantizer.zero_point[a] == to.quantizer.zero_point[b];
}

double nanoseconds_per_mac(const KernelTable& table, int32_t bits) {
  constexpr WidthTable kWidths = {kMaxWidths, {2, 4, 8, 32}};
  return table.nanoseconds_per_mac[index_of(kWidths, bits)];
}

double epilogue_cost(const MixedConv2dArgs& args) {
  return static_cast<double>(args.output.channels * args.output.height * args.output.width) *
         kNanosecondsPerValue;
}

}  // namespace

void mixed_conv2d(const MixedConv2dArgs& args, int threads) {
  const ConvGeometry& g = args.geometry;
  const WidthTable& widths = args.weight.widths;
  check_geometry(g);
  check_widths(widths, "weight");
  check_stored_widths(args.input, args.batch, "input");
  if (args.has_residual) check_stored_widths(args.residual, args.batch, "residual");
  check_stored_widths(args.output, args.batch, "output");
  check_bits(args);
  const int64_t out_pixels = args.output.height * args.output.width;
  if (args.batch == 0 || out_pixels == 0) return;

  const KernelTable& table = kernels();
  bool used[kMaxWidths] = {};
  const void* tiles[kMaxWidths] = {};
  size_t scratch_bytes = 0;
  std::vector<int64_t> samples;
  std::vector<int64_t> skipped;
  for (int64_t n = 0; n < args.batch; ++n) {
    const int32_t bits = args.bits[n];
    if (bits == 0) {
      if (!stays_as_it_is(args, n)) skipped.push_back(n);
      continue;
    }
    samples.push_back(n);
    used[index_of(widths, bits)] = true;
  }
  for (int i = 0; i < widths.count; ++i) {
    if (!used[i]) continue;
    const int32_t bits = widths.bits[i];
    if (bits != 32) check_sum_fits(args, i);
    tiles[i] = tile_payload(args.weight.tiles[i], table, g, bits, args.weight.centred[i],
                            table.tile_form(args, bits));
    scratch_bytes = std::max(scratch_bytes, table.conv_scratch_bytes(args, bits));
  }
  if (!skipped.empty()) {
    scratch_bytes = std::max(scratch_bytes, table.conv_scratch_bytes(args, 0));
  }
  const OutputScaling scaling = [&] {
    const DefaultFloatEnvironment environment;
    return output_scaling(args, used);
  }();

  const double macs = static_cast<double>(out_pixels * g.out_channels) *
                      static_cast<double>(g.in_channels / g.groups * g.kernel_h * g.kernel_w);
  const auto cost_of = [&](int64_t n) {
    return macs * nanoseconds_per_mac(table, args.bits[n]) + epilogue_cost(args);
  };
  // The costliest first: one at the end would keep one thread busy alone.
  std::stable_sort(samples.begin(), samples.end(),
                   [&](int64_t a, int64_t b) { return cost_of(a) > cost_of(b); });
  std::vector<RowRange> ranges = split_rows(samples, args.output.height, threads, cost_of);
  for (int64_t n : skipped) ranges.push_back({n, 0, args.output.height});
  std::vector<std::unique_ptr<uint8_t[]>> copies;
  if (args.has_residual && is_packed(args.residual)) {
    copies.resize(static_cast<size_t>(args.batch));
    for (int64_t n = 0; n < args.batch; ++n) {
      copies[static_cast<size_t>(n)] = copy_of_overwritten_row(args, n);
    }
  }

  double total_cost = epilogue_cost(args) * static_cast<double>(skipped.size());
  for (const int64_t n : samples) total_cost += cost_of(n);
  const int64_t count = static_cast<int64_t>(ranges.size());
  parallel_for_scratch(count, total_cost / static_cast<double>(std::max<int64_t>(count, 1)),
                       threads, scratch_bytes, [&](int64_t index, void* memory) {
                         const RowRange& range = ranges[static_cast<size_t>(index)];
                         ConvTask task;
                         task.args = &args;
                         task.sample = range.sample;
                         task.row_begin = range.row_begin;
                         task.row_end = range.row_end;
                         task.bits = args.bits[range.sample];
                         if (args.has_residual && is_packed(args.residual)) {
                           const auto& copy = copies[static_cast<size_t>(range.sample)];
                           task.residual_row =
                               copy ? copy.get()
                                    : args.residual.codes + range.sample * args.residual.row_bytes;
                         }
                         if (task.bits == 0) {
                           table.skip_rows(task, memory);
                           return;
                         }
                         const int width_index = index_of(widths, task.bits);
                         task.tile = tiles[width_index];
                         task.multiplier = scaling.multiplier.get() + width_index * g.out_channels;
                         task.offset = scaling.offset.get() + width_index * g.out_channels;
                         table.conv_rows(task, memory);
                       });
}

}  // namespace dfs
