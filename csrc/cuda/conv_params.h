// A mixed convolution as its kernels take it.
#pragma once

#include <cstdint>

#include "codes.h"
#include "conv_layout.h"
#include "dfs/types.h"
#include "geometry.h"

namespace dfs::cuda {

struct ConvParams : Geometry {
  int64_t batch = 0;
  const int32_t* bits = nullptr;

  Map input;
  bool quantizes = false;  // input values are quantized on loading, else codes are used as they are
  SlotQuantizer input_quantizer;
  Map residual;
  bool has_residual = false;
  Map output;
  bool in_place = false;
  bool relu = false;

  // By slot. `tiles` is what retile_weight made for the tensor cores; at 32 bits, and for the
  // general kernel, the canonical codes.
  const void* tiles[kSlots] = {};
  bool centred[kSlots] = {};
  bool offered[kSlots] = {};
  const float* weight_scale[kSlots] = {};  // (O) each, like mul and add
  const float* mul[kSlots] = {};
  const float* add[kSlots] = {};
  const float* bias = nullptr;

  // Of this launch: the widths that it serves, and whether skipped and unknown ones are its too.
  bool serves[kSlots] = {};
  bool serves_rest = false;
  int tiles_per_sample = 0;  // blocks

  // Of the tensor-core kernel: a block's output pixels and the input that they need.
  int tile_h = 0;
  int tile_w = 0;
  int tiles_w = 0;
  SmallDivisor tile_w_divisor;
  int patch_h = 0;
  int patch_w = 0;
  bool has_even_patch = false;  // its rows and those of the input are divided into fours alike
  int lead_w = 0;               // columns of the patch before the first that is needed
  int patch_step_h = 0;         // rows of the input from one row of the patch to the next
  int patch_step_w = 0;
  int pixel_step_h = 0;  // rows of the patch from one output row to the next
  int pixel_step_w = 0;
  int slice_bytes = 0;
  bool planes = false;  // this launch multiplies bit planes

  DFS_HOST_DEVICE int group_channels() const { return input.channels / groups; }
  DFS_HOST_DEVICE int group_outputs() const { return output.channels / groups; }
};

// y = sum * multiplier + offset of one output channel.
struct Affine {
  float multiplier;
  float offset;
};

DFS_DEVICE Affine affine_of(const ConvParams& p, int slot, float input_scale, int o) {
  double step = 1.0;
  if (slot != 3) {
    const double weight_step = static_cast<double>(to_global(p.weight_scale[slot])[o]);
    step = multiply(static_cast<double>(input_scale),
                    p.centred[slot] ? 0.5 * weight_step : weight_step);
  }
  const double mul = p.mul[slot] == nullptr ? 1.0 : static_cast<double>(to_global(p.mul[slot])[o]);
  const double bias = p.bias == nullptr ? 0.0 : static_cast<double>(to_global(p.bias)[o]);
  const double shift =
      p.add[slot] == nullptr ? 0.0 : static_cast<double>(to_global(p.add[slot])[o]);
  // Adding 0 too: it makes the -0 of a negative gain 0.
  return {to_float(multiply(step, mul)), to_float(add(multiply(bias, mul), shift))};
}

// How the codes that enter the multiplication are quantized.
DFS_DEVICE Step input_step(const ConvParams& p, int bits) {
  return step_of(p.quantizes ? p.input_quantizer : p.input.quantizer, bits);
}

// What a block works on.
struct BlockTask {
  int64_t sample;
  int part;  // of the sample's blocks
  int bits;  // negative for what can't be computed
  int slot;  // -1 for what is no option
};

DFS_DEVICE BlockTask block_task(const ConvParams& p) {
  BlockTask task;
  task.sample = block_index() / p.tiles_per_sample;
  task.part = block_index() % p.tiles_per_sample;
  task.bits = to_global(p.bits)[task.sample];
  task.slot = slot_of(task.bits);
  const bool offered = task.slot >= 0 && p.offered[task.slot];
  // Codes that are used as they are have to be stored at the sample's own width.
  const bool stored = p.quantizes || !p.input.packed() || task.bits == 0 ||
                      to_global(p.input.bits)[task.sample] == task.bits;
  if (!stored) task.bits = -1;
  if (!offered || !stored) task.slot = -1;
  return task;
}

}  // namespace dfs::cuda
