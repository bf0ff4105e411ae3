// What a frozen network consists of. Pointers are borrowed: an Engine copies what it needs.
#pragma once

#include <cstdint>
#include <vector>

#include "dfs/types.h"

namespace dfs {

// A convolution at every width it offers, BatchNorm folded in.
struct LayerSpec {
  ConvGeometry geometry;
  WidthTable widths;
  const void* codes[kMaxWidths] = {};  // canonical packed weights; float32 in that order at 32 bits
  bool centred[kMaxWidths] = {};
  const float* weight_scale = nullptr;        // (count, O)
  const float* input_scale = nullptr;         // (count)
  const int32_t* input_zero_point = nullptr;  // (count)
  const float* bias = nullptr;                // (O) or null
  const float* mul = nullptr;                 // (count, O)
  const float* add = nullptr;                 // (count, O)
};

// How a stretch of the residual stream is kept: uint8 codes with zero point 0, or float32.
struct StreamSpec {
  bool is_packed = true;
  float scale = 1.0f;
};

// A residual block: convolutions with ReLUs between them, around an identity or a shortcut.
struct BlockSpec {
  std::vector<LayerSpec> layers;
  std::vector<LayerSpec> shortcut;  // none or one, at its only width
  StreamSpec stream;                // what the block writes; that which it reads, for an identity
  // The width of a block that has no gate; -1: its gate decides.
  int32_t fixed_bits = -1;
};

enum class GateKind { kRecurrent, kFeedForward, kConstant };

// What one gate does not share with the others. F are the features it sees: C channel means, and
// with `deviation` as many channel deviations behind them.
struct GateSpec {
  GateKind kind = GateKind::kRecurrent;
  bool deviation = false;
  const float* embed_weight = nullptr;  // (H, F); not for a constant gate
  const float* embed_bias = nullptr;    // (H)
  const float* proj_weight = nullptr;   // (K, H), of a feed-forward gate
  const float* proj_bias = nullptr;     // (K); of a constant gate, its logits
};

struct NetworkSpec {
  int64_t in_channels = 0;
  int64_t height = 0;
  int64_t width = 0;
  // (in_channels, 256), the floats that uint8 pixels stand for; null: it takes none.
  const float* pixel_values = nullptr;

  LayerSpec stem;  // at its only width
  StreamSpec stem_stream;
  int64_t pool_size = 0;  // of the max pool behind the stem; 0 for none
  int64_t pool_stride = 1;
  int64_t pool_padding = 0;

  std::vector<BlockSpec> blocks;

  // One for each gated block, in order.
  std::vector<GateSpec> gates;
  int64_t hidden = 0;
  std::vector<int32_t> choices;
  const double* choice_bias = nullptr;
  // Shared by recurrent gates: those of RnnGateArgs.
  const float* weight_ih = nullptr;
  const float* weight_hh = nullptr;
  const float* bias_ih = nullptr;
  const float* bias_hh = nullptr;
  const float* proj_weight = nullptr;
  const float* proj_bias = nullptr;

  LayerSpec classifier;  // 1x1 on the pooled features, at its only width
};

}  // namespace dfs
