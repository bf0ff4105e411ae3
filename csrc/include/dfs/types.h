// Plain structs that describe a call. Every pointer is borrowed from the caller and every buffer is
// checked before it gets here: kernels assume that shapes, strides and widths fit together.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dfs {

// The kernel widths other than 0: 2, 4, 8 and 32 bits.
constexpr int kMaxWidths = 4;
// What a gate may choose from: the widths from 0 to 32.
constexpr int kMaxChoices = 33;

// The widths a tensor may use, ascending. Per-width arrays elsewhere are indexed like `bits`.
struct WidthTable {
  int32_t count = 0;
  int32_t bits[kMaxWidths] = {0, 0, 0, 0};
};

// Index of `width`, or -1 if it is not listed. (Helpers here have internal linkage: an inline
// function shared by the ISA files would let the linker pick the AVX-512 copy for everybody.)
static inline int index_of(const WidthTable& table, int32_t width) {
  for (int i = 0; i < table.count; ++i) {
    if (table.bits[i] == width) return i;
  }
  return -1;
}

// Per-tensor activation quantizer: x is about (q - zero_point) * scale, q an unsigned code.
struct Quantizer {
  WidthTable widths;
  const float* scale = nullptr;         // (count)
  const int32_t* zero_point = nullptr;  // (count)
};

// One width of an activation quantizer, for values that stay floats; any width from 1 to 16.
struct FakeQuantizer {
  int32_t bits = 8;
  float scale = 1.0f;
  int32_t zero_point = 0;
};

// N samples of C x H x W, either float32 with any strides or packed codes in the canonical layout:
// per sample a row of H*W pixels of ceil(C*b/8) bytes, float32 NHWC at 32 bits.
struct FeatureMap {
  int64_t channels = 0;
  int64_t height = 0;
  int64_t width = 0;

  float* values = nullptr;  // float32 form
  int64_t stride_n = 0;     // in elements
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;

  uint8_t* codes = nullptr;  // packed form
  int64_t row_bytes = 0;
  const int32_t* bits = nullptr;  // (N), each sample's stored width; null for the float32 form
  Quantizer quantizer;
};

static inline bool is_packed(const FeatureMap& map) { return map.bits != nullptr; }

struct ConvGeometry {
  int64_t in_channels = 0;
  int64_t out_channels = 0;
  int64_t kernel_h = 0;
  int64_t kernel_w = 0;
  int64_t stride_h = 1;
  int64_t stride_w = 1;
  int64_t pad_left = 0;
  int64_t pad_right = 0;
  int64_t pad_top = 0;
  int64_t pad_bottom = 0;
  int64_t dilation_h = 1;
  int64_t dilation_w = 1;
  int64_t groups = 1;
};

// Weights of one layer at every width it offers.
struct ConvWeight {
  WidthTable widths;
  const void* tiles[kMaxWidths] = {};  // the backend's private layout, from retile_weight
  bool centred[kMaxWidths] = {};       // level(q) = 2q + 1 with half the step, instead of q
  const float* scale = nullptr;        // (count, O); entries for 32 bits are ignored
  bool planes = false;                 // 2-bit tiles were made as bit planes; CUDA only
};

// One mixed-bitwidth convolution, epilogue included.
struct MixedConv2dArgs {
  int64_t batch = 0;
  const int32_t* bits = nullptr;  // (N), each sample's width
  ConvGeometry geometry;
  ConvWeight weight;

  FeatureMap input;
  // With a scale: float input, or packed input to be dequantized, is quantized with it on loading.
  // Without one: packed input whose codes are used as they are.
  Quantizer input_quantizer;

  const float* bias = nullptr;  // (O)
  const float* mul = nullptr;   // (weight.widths.count, O); 1 if null
  const float* add = nullptr;   // (weight.widths.count, O); 0 if null

  bool has_residual = false;
  FeatureMap residual;
  bool relu = false;

  // May be the residual's own memory. A packed output is written at `output.bits[n]`; a row of
  // width 0 is left as it is.
  FeatureMap output;
};

// One step of a recurrent gate: H hidden units, one logit for each of K choices. Matrices are
// (outputs, inputs); the LSTM's rows are those of its input, forget, cell and output gates.
struct RnnGateArgs {
  int64_t batch = 0;
  FeatureMap input;
  int64_t hidden = 0;
  int64_t choice_count = 0;
  int32_t choices[kMaxChoices] = {};  // widths, the cheapest first

  const double* state = nullptr;        // (2, N, H), outputs and cells; null stands for zeros
  const float* embed_weight = nullptr;  // (H, C)
  const float* embed_bias = nullptr;    // (H)
  const float* weight_ih = nullptr;     // (4H, H)
  const float* weight_hh = nullptr;     // (4H, H)
  const float* bias_ih = nullptr;       // (4H)
  const float* bias_hh = nullptr;       // (4H)
  const float* proj_weight = nullptr;   // (K, H)
  const float* proj_bias = nullptr;     // (K)
  const double* choice_bias = nullptr;  // (K)

  int32_t* out_bits = nullptr;   // (N)
  double* out_logits = nullptr;  // (N, K)
  double* out_state = nullptr;   // (2, N, H)
};

// Gradients of a mixed convolution with float weights. Each output may be null: not wanted.
struct MixedConv2dBackwardArgs {
  int64_t batch = 0;
  const int32_t* bits = nullptr;
  ConvGeometry geometry;
  WidthTable widths;
  bool centred[kMaxWidths] = {};

  FeatureMap input;                            // float32
  Quantizer input_quantizer;                   // its widths equal `widths`
  const float* weight = nullptr;               // (O, C/groups, KH, KW) float32, contiguous
  const void* packed_weight[kMaxWidths] = {};  // canonical codes instead of `weight`; CUDA only
  const float* weight_scale = nullptr;         // (count, O)
  const float* mul = nullptr;                  // (count, O) or null
  const float* bias = nullptr;                 // (O) or null
  FeatureMap grad_output;  // float32, gradient of y before residual and activation

  float* grad_input = nullptr;         // (N, C, H, W) contiguous
  float* grad_weight = nullptr;        // (O, C/groups, KH, KW)
  float* grad_input_scale = nullptr;   // (count)
  float* grad_weight_scale = nullptr;  // (count, O)
  float* grad_mul = nullptr;           // (count, O)
  float* grad_add = nullptr;           // (count, O)
};

}  // namespace dfs
