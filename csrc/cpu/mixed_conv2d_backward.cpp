#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "checks.h"
#include "dispatch.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

// A guess, good enough to tell work that is worth a second thread from work that is not.
constexpr double kNanosecondsPerMac = 0.1;

void check_args(const MixedConv2dBackwardArgs& args) {
  check_geometry(args.geometry);
  check_widths(args.widths, "widths");
  for (int64_t n = 0; n < args.batch; ++n) {
    const int32_t bits = args.bits[n];
    if (bits == 0) continue;
    if (index_of(args.widths, bits) < 0) {
      reject("bits[" + std::to_string(n) + "] is " + std::to_string(bits) +
             ", but the widths are: " + width_list(args.widths) + " (and 0)");
    }
    if (bits == 32) continue;
    const Quantizer& quantizer = args.input_quantizer;
    if (index_of(quantizer.widths, bits) < 0 || quantizer.scale == nullptr ||
        quantizer.zero_point == nullptr) {
      reject("bits[" + std::to_string(n) + "] is " + std::to_string(bits) +
             ", but the input scales are for: " + width_list(quantizer.widths));
    }
  }
}

double filter_macs(const MixedConv2dBackwardArgs& args) {
  const ConvGeometry& g = args.geometry;
  return static_cast<double>(args.grad_output.height * args.grad_output.width) *
         static_cast<double>(g.in_channels / g.groups * g.kernel_h * g.kernel_w);
}

void input_gradients(const MixedConv2dBackwardArgs& args, const KernelTable& table, int threads) {
  const ConvGeometry& g = args.geometry;
  const int64_t input_elements = args.input.channels * args.input.height * args.input.width;
  std::vector<int64_t> samples;
  int64_t samples_at[kMaxWidths] = {};
  for (int64_t n = 0; n < args.batch; ++n) {
    const int32_t bits = args.bits[n];
    if (bits == 0) {
      if (args.grad_input != nullptr) {
        std::memset(args.grad_input + n * input_elements, 0,
                    static_cast<size_t>(input_elements) * sizeof(float));
      }
      continue;
    }
    ++samples_at[index_of(args.widths, bits)];
    if (bits != 32 || args.grad_input != nullptr) samples.push_back(n);
  }

  std::unique_ptr<float[]> blocks[kMaxWidths];
  parallel_for(
      args.widths.count,
      static_cast<double>(g.out_channels * (g.in_channels / g.groups) * g.kernel_h * g.kernel_w) *
          4 * kNanosecondsPerValue,
      threads, [&](int64_t i, int) {
        if (samples_at[i] == 0) return;
        blocks[i].reset(new float[table.backward_weight_bytes(g) / sizeof(float)]);
        table.backward_weight_blocks(args, static_cast<int>(i), blocks[i].get());
      });

  const int64_t count = static_cast<int64_t>(samples.size()) * g.groups;
  std::vector<double> scale_gradients(static_cast<size_t>(count));
  parallel_for_scratch(
      count,
      filter_macs(args) * static_cast<double>(g.out_channels / g.groups) * kNanosecondsPerMac,
      threads, table.backward_input_scratch_bytes(args), [&](int64_t task, void* memory) {
        const int64_t n = samples[static_cast<size_t>(task / g.groups)];
        BackwardWeight weight;
        weight.blocks = blocks[index_of(args.widths, args.bits[n])].get();
        scale_gradients[static_cast<size_t>(task)] =
            table.backward_input(args, n, task % g.groups, weight, memory);
      });

  if (args.grad_input_scale == nullptr) return;
  for (int i = 0; i < args.widths.count; ++i) {
    const int32_t bits = args.widths.bits[i];
    double sum = 0.0;
    for (int64_t task = 0; task < count; ++task) {
      if (args.bits[samples[static_cast<size_t>(task / g.groups)]] == bits) {
        sum += scale_gradients[static_cast<size_t>(task)];
      }
    }
    if (bits == 32 || samples_at[i] == 0) {
      args.grad_input_scale[i] = 0.0f;
      continue;
    }
    const double elements = static_cast<double>(samples_at[i] * input_elements);
    args.grad_input_scale[i] =
        static_cast<float>(sum / std::sqrt(elements * static_cast<double>((1 << bits) - 1)));
  }
}

void filter_gradients(const MixedConv2dBackwardArgs& args, const KernelTable& table, int threads) {
  const int64_t channels = args.geometry.out_channels;
  // Every task loads all inputs again, so there are no more tasks than threads; and a sum over
  // samples stays in one task, so that its order does not depend on their number.
  const int64_t tasks = std::min<int64_t>(std::max(threads, 1), (channels + 3) / 4);
  const int64_t share = ((channels + tasks - 1) / tasks + 3) / 4 * 4;
  const int64_t count = (channels + share - 1) / share;
  parallel_for_scratch(
      count, filter_macs(args) * static_cast<double>(share * args.batch) * kNanosecondsPerMac,
      threads, table.backward_filter_scratch_bytes(args, share), [&](int64_t task, void* memory) {
        table.backward_filter(args, task * share, std::min((task + 1) * share, channels), memory);
      });
}

}  // namespace

void mixed_conv2d_backward(const MixedConv2dBackwardArgs& args, int threads) {
  check_args(args);
  const KernelTable& table = kernels();
  if (args.grad_input != nullptr || args.grad_input_scale != nullptr) {
    input_gradients(args, table, threads);
  }
  if (args.grad_weight != nullptr || args.grad_weight_scale != nullptr ||
      args.grad_mul != nullptr || args.grad_add != nullptr) {
    filter_gradients(args, table, threads);
  }
}

}  // namespace dfs
