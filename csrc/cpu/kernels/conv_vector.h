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

inline bool has_centred_levels(const MixedConv2dArgs& args, int32_t bits) {
  return args.weight.centred[index_of(args.weight.widths, bits)];
}

// The kernel for a sample.
enum class ConvPath { kDepthwise, kPortable, kDirect, kTable };

inline ConvPath conv_path(const MixedConv2dArgs& args, int32_t bits) {
  if (is_depthwise(args.geometry)) return ConvPath::kDepthwise;
  if (!direct_takes(bits, has_centred_levels(args, bits))) return ConvPath::kPortable;
#if defined(__AVX512VBMI__)
  if (table_takes(args.geometry, bits) &&
      table_pays(window_shape(args.geometry, args.input, args.output.width), args.output.height)) {
    return ConvPath::kTable;
  }
#endif
  return ConvPath::kDirect;
}

inline size_t vector_tile_bytes(const ConvGeometry& g, int32_t bits, bool centred, TileForm form) {
  const bool is_direct = !is_depthwise(g) && direct_takes(bits, centred);
  if (form == TileForm::kTable) {
#if defined(__AVX512VBMI__)
    if (is_direct && table_takes(g, bits)) return table_tile_bytes(g);
#endif
    return 0;
  }
  if (is_direct) return direct_tile_bytes(g, bits);
  return is_depthwise(g) ? depthwise_tile_bytes(g) : filter_tile_bytes(g, bits, centred);
}

inline void vector_retile(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                          bool centred, TileForm form, void* tile) {
  if (vector_tile_bytes(g, bits, centred, form) == 0) return;
#if defined(__AVX512VBMI__)
  if (form == TileForm::kTable) return retile_table(g, canonical, tile);
#endif
  if (is_depthwise(g)) return retile_depthwise(g, canonical, bits, centred, tile);
  if (!direct_takes(bits, centred)) return retile_filters(g, canonical, bits, centred, tile);
  retile_direct(g, canonical, bits, centred, tile);
}

inline TileForm vector_tile_form(const MixedConv2dArgs& args, int32_t bits) {
  return conv_path(args, bits) == ConvPath::kTable ? TileForm::kTable : TileForm::kDots;
}

inline size_t vector_conv_scratch_bytes(const MixedConv2dArgs& args, int32_t bits) {
  if (bits == 0) return conv_scratch_bytes(args, bits);
  const WindowShape shape = window_shape(args.geometry, args.input, args.output.width);
  switch (conv_path(args, bits)) {
    case ConvPath::kDepthwise:
      return depthwise_scratch_bytes(args, bits);
    case ConvPath::kPortable:
      return conv_scratch_bytes(args, bits);
#if defined(__AVX512VBMI__)
    case ConvPath::kTable: {
      const int64_t rows = table_band_rows(shape, args.output.height);
      return table_scratch(table_shape(shape, rows), nullptr).bytes +
             table_weight_scratch(args.geometry, nullptr).bytes;
    }
#endif
    default:
      return bits == 32
                 ? direct_scratch<float, Floats>(shape, args.output.height, bits, nullptr).bytes
                 : direct_scratch<uint32_t, Ints>(shape, args.output.height, bits, nullptr).bytes;
  }
}

inline void vector_conv_rows(const ConvTask& task, void* memory) {
  switch (conv_path(*task.args, task.bits)) {
    case ConvPath::kDepthwise:
      return conv_depthwise(task, memory);
    case ConvPath::kPortable:
      return conv_rows(task, memory);
#if defined(__AVX512VBMI__)
    case ConvPath::kTable:
      return conv_table(task, memory);
#endif
    default:
      return task.bits == 32 ? conv_direct<float, Floats>(task, memory)
                             : conv_direct<uint32_t, Ints>(task, memory);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
