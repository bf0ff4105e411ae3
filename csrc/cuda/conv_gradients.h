// Gradients of a mixed convolution as their kernels take them: what conv_gradients.cu plans, and
// the launches that it makes.
//
// Both gradients are products of matrices, in float32. So that these read 16 bytes at a time for
// any strides, kernel and padding, their operands are arranged first: the gradient of the output,
// the input as it was multiplied (quantized and back), and the weights of every width. *Arranged*
// maps have the channels of a pixel next to each other, each group filled up with zeros to a
// multiple of four. That costs a pass over memory each, beside as many products a value as the
// kernel has. Groups too narrow for that are summed directly, product by product.
//
// Samples at 0 bits, or at a width that is no option, have no part in any of this: their blocks
// leave zeros for the gradient of the input and end. Sums are taken in an order that depends on
// shapes and widths only: equal calls give equal bits, and the gradient of a sample's input does
// not depend on the rest of the batch.
#pragma once

#include <cstdint>

#include "codes.h"
#include "conv_layout.h"
#include "dfs/types.h"
#include "geometry.h"
#include "gradient_product.h"

namespace dfs::cuda {

constexpr int kGradientThreads = kProductThreads;
constexpr int kGradientWarps = kGradientThreads / 32;

struct GradientParams : Geometry {
  int64_t batch = 0;
  const int32_t* bits = nullptr;
  Map input;
  Map grad_output;
  SlotQuantizer input_quantizer;

  // Of a group; counted once, as a division takes as long as twenty other instructions.
  int group_channels = 0;
  int group_outputs = 0;
  int padded_channels = 0;
  int padded_outputs = 0;
  int window = 0;  // taps() * padded_channels

  int widths = 0;
  int8_t index[kSlots] = {-1, -1, -1, -1};  // where a width stands, -1 if it is no option
  bool centred[kSlots] = {};
  const float* weight = nullptr;           // (O, C/groups, KH, KW), or null:
  const void* packed_weight[kSlots] = {};  // canonical codes
  const float* weight_scale = nullptr;     // (widths, O), like mul
  const float* mul = nullptr;
  const float* bias = nullptr;

  float* grad_input = nullptr;  // (N, C, H, W); each of these may be null
  float* grad_weight = nullptr;
  float* grad_input_scale = nullptr;
  float* grad_weight_scale = nullptr;
  float* grad_mul = nullptr;
  float* grad_add = nullptr;

  bool direct = false;  // no arranged operands
  bool tf32 = false;    // these are rounded to TF32

  // Scratch memory.
  int32_t* counts = nullptr;       // (kSlots): samples of each width
  int32_t* order = nullptr;        // (kSlots, N): which they are, ascending
  float* values = nullptr;         // (widths, O, taps, padded C/groups) times mul, but O after taps
  float* arranged_grad = nullptr;  // (N, OH * OW, groups, padded O/groups)
  float* arranged_input = nullptr;  // (N, H * W, groups, padded C/groups)
  double* slopes = nullptr;         // (N, input_blocks): parts of the gradients of input steps
  double* grad_sums = nullptr;      // (N, O): over pixels
  float* partials = nullptr;        // (widths, splits, O, window)
  float* products = nullptr;        // (widths, O, window): their sums

  // Blocks of the input's gradient for each sample.
  int input_blocks = 0;
  int pixel_tiles = 0;
  int channel_tiles = 0;
  // The weight's gradient: parts of a sample's pixels, shared out among `splits` blocks.
  int parts = 0;
  int splits = 0;
  int window_tiles = 0;
  int output_tiles = 0;

  // From a pixel to the next in arranged maps.
  DFS_HOST_DEVICE int input_stride() const { return groups * padded_channels; }
  DFS_HOST_DEVICE int grad_stride() const { return groups * padded_outputs; }
  DFS_HOST_DEVICE bool wants_input() const {
    return grad_input != nullptr || grad_input_scale != nullptr;
  }
  DFS_HOST_DEVICE bool wants_products() const {
    return grad_weight != nullptr || grad_weight_scale != nullptr || grad_mul != nullptr;
  }
  DFS_HOST_DEVICE bool wants_sums() const { return grad_mul != nullptr || grad_add != nullptr; }
};

// Pixels of a part.
constexpr int kPartPixels = 256;

// The slot of a sample that has gradients, else -1.
DFS_DEVICE int gradient_slot(const GradientParams& p, int64_t n) {
  const int slot = slot_of(to_global(p.bits)[n]);
  return slot >= 0 && p.index[slot] >= 0 ? slot : -1;
}

// The slot of the width that stands at an index.
DFS_DEVICE int slot_at(const GradientParams& p, int width) {
  int slot = 0;
  while (p.index[slot] != width) ++slot;
  return slot;
}

// How many parts of samples at a width there are, and how many each split takes.
struct PartShare {
  int64_t parts;
  int64_t share;
};

DFS_DEVICE PartShare part_share(const GradientParams& p, int slot) {
  const int64_t parts = static_cast<int64_t>(to_global(p.counts)[slot]) * p.parts;
  return {parts, (parts + p.splits - 1) / p.splits};
}

DFS_DEVICE float round_half_even(float x) { return add(add(x, kRounder), -kRounder); }

// Halves away from zero, as cvt.rna does it.
DFS_DEVICE float round_to_tf32(float x) {
  if (!(x == x)) return not_a_number();
  return bits_to_float((float_to_bits(x) + 0x1000u) & ~0x1fffu);
}

// One width and output channel of a weight quantizer. At 32 bits a code is the weight itself.
struct WeightStep {
  float scale = 1.0f;
  float reciprocal = 1.0f;
  float low = 0.0f;
  float high = 0.0f;
  float centre = 0.0f;  // of a centred level, over its code
  bool quantizes = false;

  DFS_DEVICE float code(float w) const {
    if (!quantizes) return w;
    const float t = multiply(w, reciprocal);
    if (centre != 0.0f) return smaller(larger(floorf(t), low), high);
    return round_half_even(smaller(larger(t, low), high));
  }
  DFS_DEVICE float value(float code) const {
    return quantizes ? multiply(add(code, centre), scale) : code;
  }
};

DFS_DEVICE WeightStep weight_step(const GradientParams& p, int slot, int o) {
  WeightStep step;
  if (slot == 3) return step;
  const int reach = 1 << (bits_of(slot) - 1);
  step.quantizes = true;
  step.scale =
      to_global(p.weight_scale)[static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + o];
  step.reciprocal = divide(1.0f, step.scale);
  step.low = to_float(-reach);
  step.high = to_float(reach - 1);
  step.centre = p.centred[slot] ? 0.5f : 0.0f;
  return step;
}

// Of a float weight, or of a packed one at this slot.
DFS_DEVICE float weight_code(const GradientParams& p, int slot, const WeightStep& step, int o,
                             int channel, int tap) {
  const int channels = p.group_channels;
  if (p.weight != nullptr) {
    const int64_t filter = static_cast<int64_t>(o) * channels * p.taps();
    return step.code(to_global(p.weight)[filter + channel * p.taps() + tap]);
  }
  const int bits = bits_of(slot);
  const auto* codes = to_global(static_cast<const uint8_t*>(p.packed_weight[slot]));
  const uint8_t* row =
      codes + (static_cast<int64_t>(o) * p.taps() + tap) * packed_bytes(channels, bits);
  if (slot == 3) return load_float(row + 4 * channel);
  const int sign = 1 << (bits - 1);
  const int code = (row[channel * bits / 8] >> (channel * bits % 8)) & (2 * sign - 1);
  return small_to_float((code ^ sign) - sign);
}

// The straight-through gradient of one value of the input: the product of its gradient with the
// slope of its step is returned, and the gradient itself ends where the range does.
DFS_DEVICE float pass_through(const Step& step, float x, float* gradient) {
  const float t = multiply(x, step.reciprocal);
  const bool inside = t >= step.low && t <= step.high;
  const float clamped = smaller(larger(t, step.low), step.high);
  const float slope = inside ? add(round_half_even(clamped), -t) : clamped;
  const float term = multiply(*gradient, slope);
  if (!inside) *gradient = 0.0f;
  return term;
}

// The value that was multiplied.
DFS_DEVICE float fake_quantize(const Step& step, float x) {
  const float t = multiply(x, step.reciprocal);
  return multiply(round_half_even(smaller(larger(t, step.low), step.high)), step.scale);
}

// Adds up what the threads of a block bring, in a fixed order, for the first of them. `scratch`
// holds kGradientWarps values and may be used again after the next sync_block().
DFS_DEVICE double sum_block(double value, double* scratch) {
  for (int mask = 16; mask > 0; mask /= 2) value = add(value, shuffle_xor(value, mask));
  sync_block();
  if (thread_index() % 32 == 0) scratch[thread_index() / 32] = value;
  sync_block();
  double sum = scratch[0];
  for (int i = 1; i < kGradientWarps; ++i) sum = add(sum, scratch[i]);
  return sum;
}

// Zeros for a skipped sample's gradient: this block's share of them.
DFS_DEVICE void clear_share(const GradientParams& p, int64_t n, int block) {
  if (p.grad_input == nullptr) return;
  const int values = p.input.channels * p.input.pixels();
  float* image = to_global(p.grad_input) + n * values;
  const int share = round_up(divide_up(values, p.input_blocks), 4);
  const int first = least(block * share, values);
  const int last = least(first + share, values);
  const bool aligned = is_aligned(image, 16);
  const int quads = aligned ? (last - first) / 4 : 0;
  for (int i = thread_index(); i < quads; i += kGradientThreads) {
    *reinterpret_cast<Words4*>(image + first + 4 * i) = Words4{};
  }
  for (int i = first + 4 * quads + thread_index(); i < last; i += kGradientThreads) image[i] = 0.0f;
}

// In conv_gradient_operands.cu.
void launch_sort_samples(const GradientParams& p, Stream stream);
void launch_gradient_weights(const GradientParams& p, Stream stream);
void launch_arrange_grad(const GradientParams& p, Stream stream);
void launch_arrange_input(const GradientParams& p, Stream stream);
void launch_sum_grad(const GradientParams& p, Stream stream);

// In conv_input_gradient.cu and conv_weight_gradient.cu: how the work is divided, and the launch.
void plan_input_gradient(GradientParams& p);
void launch_input_gradient(const GradientParams& p, Stream stream);
void plan_weight_gradient(GradientParams& p);
void launch_weight_gradient(const GradientParams& p, Stream stream);

// In conv_gradient_sums.cu: from partial sums to gradients.
void launch_sum_products(const GradientParams& p, Stream stream);
void launch_finish_weight(const GradientParams& p, Stream stream);
void launch_finish_input_scale(const GradientParams& p, Stream stream);

}  // namespace dfs::cuda
