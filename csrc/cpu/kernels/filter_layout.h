// Weights: quantized into the canonical packed form, and from there into the layouts of the
// kernels.
#pragma once

#include "bit_packing.h"
#include "dot_blocks.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"

namespace dfs {
namespace DFS_ISA {
namespace {

inline void quantize_filter(const float* weight, int64_t channels, int64_t taps, float scale,
                            int32_t bits, bool centred, uint8_t* packed) {
  const WeightRange range = weight_range(scale, bits, centred);
  const int32_t per_byte = 8 / bits;
  const unsigned mask = (1u << bits) - 1;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t first = 0; first < channels; first += per_byte) {
      const int64_t last = min_of(first + per_byte, channels);
      unsigned byte = 0;
      for (int64_t c = first; c < last; ++c) {
        const int32_t code = static_cast<int32_t>(weight_code(weight[c * taps + tap], range));
        byte |= (static_cast<unsigned>(code) & mask) << ((c - first) * bits);
      }
      *packed++ = static_cast<uint8_t>(byte);
    }
  }
}

inline int64_t filter_depth(const ConvGeometry& g) {
  return g.kernel_h * g.kernel_w * (g.in_channels / g.groups);
}

inline int64_t padded_depth(const ConvGeometry& g) { return round_up(filter_depth(g), kDepthStep); }

// Integer tiles: int16 levels (O, padded_depth) in kernel_h, kernel_w, channel order.
// Float tiles: (G, ceil(O/G / kFloatColumns), depth, kFloatColumns), output channels innermost.
inline size_t filter_tile_bytes(const ConvGeometry& g, int32_t bits, bool /*centred*/) {
  if (bits != 32) {
    return static_cast<size_t>(g.out_channels * padded_depth(g)) * sizeof(int16_t);
  }
  const int64_t group_outputs = round_up(g.out_channels / g.groups, kFloatColumns);
  return static_cast<size_t>(g.groups * group_outputs * filter_depth(g)) * sizeof(float);
}

template <int kBits>
inline void retile_integer(const ConvGeometry& g, const uint8_t* canonical, bool centred,
                           int16_t* tile) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t channels = g.in_channels / g.groups;
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t bytes = packed_bytes(channels, kBits);
  const int64_t stride = padded_depth(g);
  for (int64_t o = 0; o < g.out_channels; ++o) {
    int16_t* filter = tile + o * stride;
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* packed = canonical + (o * taps + tap) * bytes;
      for (int64_t c = 0; c < channels; ++c) {
        const int32_t code = static_cast<int8_t>(
            extract_code<kBits, true>(packed[c / kPerByte], static_cast<int>(c % kPerByte)));
        filter[tap * channels + c] = static_cast<int16_t>(centred ? 2 * code + 1 : code);
      }
    }
    for (int64_t k = taps * channels; k < stride; ++k) filter[k] = 0;
  }
}

inline void retile_float(const ConvGeometry& g, const uint8_t* canonical, float* tile) {
  const int64_t depth = filter_depth(g);
  const int64_t outputs = g.out_channels / g.groups;
  const int64_t panels = ceil_div(outputs, kFloatColumns);
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t o = 0; o < panels * kFloatColumns; ++o) {
      float* dst =
          tile + (group * panels + o / kFloatColumns) * depth * kFloatColumns + o % kFloatColumns;
      const uint8_t* src =
          canonical + (group * outputs + o) * depth * static_cast<int64_t>(sizeof(float));
      for (int64_t k = 0; k < depth; ++k) {
        float value = 0.0f;
        if (o < outputs) std::memcpy(&value, src + k * sizeof(float), sizeof(float));
        dst[k * kFloatColumns] = value;
      }
    }
  }
}

inline void retile_filters(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                           bool centred, void* tile) {
  switch (bits) {
    case 2:
      return retile_integer<2>(g, canonical, centred, static_cast<int16_t*>(tile));
    case 4:
      return retile_integer<4>(g, canonical, centred, static_cast<int16_t*>(tile));
    case 8:
      return retile_integer<8>(g, canonical, centred, static_cast<int16_t*>(tile));
    default:
      return retile_float(g, canonical, static_cast<float*>(tile));
  }
}

// A table of kernels that has nothing else.
inline size_t portable_tile_bytes(const ConvGeometry& g, int32_t bits, bool centred,
                                  TileForm form) {
  return form == TileForm::kDots ? filter_tile_bytes(g, bits, centred) : 0;
}

inline void portable_retile(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                            bool centred, TileForm form, void* tile) {
  if (form == TileForm::kDots) retile_filters(g, canonical, bits, centred, tile);
}

inline TileForm portable_tile_form(const MixedConv2dArgs&, int32_t) { return TileForm::kDots; }

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
