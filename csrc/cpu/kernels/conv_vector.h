// Which of the vectorized kernels runs what.
#pragma once

#include "conv_depthwise.h"
#include "conv_direct.h"
#include "conv_rows.h"
#include "isa.h"
#include "kernel_table.h"
#if defined(__AVX512VBMI__)
#include "conv_table.h"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

inline bool has_centred_levels(const ConvWeight& weight, int32_t bits) {
  return weight.centred[index_of(weight.widths, bits)];
}

inline size_t vector_tile_bytes(const ConvGeometry& g, int32_t bits) {
  if (is_depthwise(g)) return depthwise_tile_bytes(g);
  size_t bytes = direct_tile_bytes(g, bits);
#if defined(__AVX512VBMI__)
  if (table_takes(g, bits)) bytes += table_tile_bytes(g);
#endif
  if (!direct_takes(bits, true)) {
    const size_t portable = filter_tile_bytes(g, bits);
    bytes = portable > bytes ? portable : bytes;
  }
  return bytes;
}

inline void vector_retile(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                          bool centred, void* tile) {
  if (is_depthwise(g)) return retile_depthwise(g, canonical, bits, centred, tile);
  if (!direct_takes(bits, centred)) return retile_filters(g, canonical, bits, centred, tile);
  retile_direct(g, canonical, bits, centred, tile);
#if defined(__AVX512VBMI__)
  if (table_takes(g, bits)) {
    retile_table(g, canonical, centred, static_cast<uint8_t*>(tile) + direct_tile_bytes(g, bits));
  }
#endif
}

inline size_t vector_conv_scratch_bytes(const MixedConv2dArgs& args, int32_t bits) {
  if (bits != 0 && is_depthwise(args.geometry)) return depthwise_scratch_bytes(args, bits);
  if (bits == 0 || !direct_takes(bits, has_centred_levels(args.weight, bits))) {
    return conv_scratch_bytes(args, bits);
  }
  const WindowShape shape = window_shape(args.geometry, args.input, args.output.width);
#if defined(__AVX512VBMI__)
  if (table_takes(args.geometry, bits) && table_pays(shape, args.output.height)) {
    const int64_t rows = table_band_rows(shape, args.output.height);
    return table_scratch(table_shape(shape, rows), nullptr).bytes;
  }
#endif
  return bits == 32 ? direct_scratch<float, Floats>(shape, args.output.height, nullptr).bytes
                    : direct_scratch<uint32_t, Ints>(shape, args.output.height, nullptr).bytes;
}

inline void vector_conv_rows(const ConvTask& task, void* memory) {
  if (is_depthwise(task.args->geometry)) return conv_depthwise(task, memory);
  if (!direct_takes(task.bits, has_centred_levels(task.args->weight, task.bits))) {
    return conv_rows(task, memory);
  }
#if defined(__AVX512VBMI__)
  const MixedConv2dArgs& args = *task.args;
  if (table_takes(args.geometry, task.bits) &&
      table_pays(window_shape(args.geometry, args.input, args.output.width), args.output.height)) {
    return conv_table(task, memory);
  }
#endif
  if (task.bits == 32) return conv_direct<float, Floats>(task, memory);
  conv_direct<uint32_t, Ints>(task, memory);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
