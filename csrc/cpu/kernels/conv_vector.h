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

// The kernel for a sample. Weights for the table follow those for dot products.
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

inline size_t vector_tile_bytes(const ConvGeometry& g, int32_t bits, bool centred) {
  if (is_depthwise(g)) return depthwise_tile_bytes(g);
  if (!direct_takes(bits, centred)) return filter_tile_bytes(g, bits, centred);
  size_t bytes = direct_tile_bytes(g, bits);
#if defined(__AVX512VBMI__)
  if (table_takes(g, bits)) bytes += table_tile_bytes(g);
#endif
  return bytes;
}

inline void vector_retile(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                          bool centred, void* tile) {
  if (is_depthwise(g)) return retile_depthwise(g, canonical, bits, centred, tile);
  if (!direct_takes(bits, centred)) return retile_filters(g, canonical, bits, centred, tile);
  retile_direct(g, canonical, bits, tile);
#if defined(__AVX512VBMI__)
  if (table_takes(g, bits)) {
    retile_table(g, canonical, centred, static_cast<uint8_t*>(tile) + direct_tile_bytes(g, bits));
  }
#endif
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
      return table_scratch(table_shape(shape, rows), nullptr).bytes;
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
