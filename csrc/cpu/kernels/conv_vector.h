// Which of the vectorized kernels runs what.
#pragma once

#include "conv_direct.h"
#include "conv_rows.h"
#include "isa.h"
#include "kernel_table.h"

namespace dfs {
namespace DFS_ISA {
namespace {

inline bool has_centred_levels(const ConvWeight& weight, int32_t bits) {
  return weight.centred[index_of(weight.widths, bits)];
}

inline size_t vector_tile_bytes(const ConvGeometry& g, int32_t bits) {
  size_t bytes = direct_tile_bytes(g, bits);
  if (!direct_takes(bits, true)) {
    const size_t portable = filter_tile_bytes(g, bits);
    bytes = portable > bytes ? portable : bytes;
  }
  return bytes;
}

inline void vector_retile(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                          bool centred, void* tile) {
  if (!direct_takes(bits, centred)) return retile_filters(g, canonical, bits, centred, tile);
  retile_direct(g, canonical, bits, centred, tile);
}

inline size_t vector_conv_scratch_bytes(const MixedConv2dArgs& args, int32_t bits) {
  if (bits == 0 || !direct_takes(bits, has_centred_levels(args.weight, bits))) {
    return conv_scratch_bytes(args, bits);
  }
  const WindowShape shape = window_shape(args.geometry, args.input, args.output.width);
  return bits == 32 ? direct_scratch<float, Floats>(shape, args.output.height, nullptr).bytes
                    : direct_scratch<uint32_t, Ints>(shape, args.output.height, nullptr).bytes;
}

inline void vector_conv_rows(const ConvTask& task, void* memory) {
  if (!direct_takes(task.bits, has_centred_levels(task.args->weight, task.bits))) {
    return conv_rows(task, memory);
  }
  if (task.bits == 32) return conv_direct<float, Floats>(task, memory);
  conv_direct<uint32_t, Ints>(task, memory);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
