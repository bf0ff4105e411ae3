// The kernels of one instruction set, each working on one task: no threads, no allocation, no
// exceptions. Scratch memory is passed in, 64-byte aligned and uninitialized.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dfs/types.h"

namespace dfs {

// Rows [row_begin, row_end) of one sample's output.
struct ConvTask {
  const MixedConv2dArgs* args = nullptr;
  int64_t sample = 0;
  int64_t row_begin = 0;
  int64_t row_end = 0;
  int32_t bits = 0;
  const void* tile = nullptr;             // this width's weights in the form of tile_form
  const float* multiplier = nullptr;      // (O), m of y = acc * m + c
  const float* offset = nullptr;          // (O), c
  const uint8_t* residual_row = nullptr;  // a packed residual's row, perhaps a copy of it
  // (4, O), or null. Of a layer at 2 bits, whose output has 2 bits too, a zero point of 0 and no
  // residual: the sums from which its codes are at least 1, 2 and 3 (0x7fff: none), and what bits
  // of a sum are flipped before, all where codes fall as sums grow.
  const int16_t* code_steps = nullptr;
};

constexpr int kCodeSteps = 3;

// Float weights of one width, quantized and dequantized, arranged for the gradient of the input.
struct BackwardWeight {
  const float* blocks = nullptr;
};

// Re-tiled weights come in two forms. Which one a sample is multiplied with depends on the sizes of
// its maps.
enum class TileForm { kDots, kTable };
constexpr TileForm kTileForms[] = {TileForm::kDots, TileForm::kTable};

// Vectors of a gate are padded to a multiple of this.
constexpr int kGateRows = 8;
constexpr int64_t gate_room(int64_t count) {
  return (count + kGateRows - 1) / kGateRows * kGateRows;
}

struct KernelTable {
  const char* name;

  // About how long a multiplication takes at 2, 4, 8 and 32 bits, to share out work by.
  double nanoseconds_per_mac[kMaxWidths];

  // `pixels` runs of `channels` codes, each run starting at a new byte of `packed`.
  void (*pack_pixels)(const uint8_t* codes, int64_t pixels, int64_t channels, int32_t bits,
                      uint8_t* packed);
  void (*unpack_pixels)(const uint8_t* packed, int64_t pixels, int64_t channels, int32_t bits,
                        bool is_signed, uint8_t* codes);

  size_t (*convert_scratch_bytes)(int64_t channels, int64_t width);
  void (*quantize_rows)(const FeatureMap& src, const FeatureMap& dst, int64_t sample,
                        int64_t row_begin, int64_t row_end, void* scratch);
  void (*dequantize_rows)(const FeatureMap& src, const FeatureMap& dst, int64_t sample,
                          int64_t row_begin, int64_t row_end, void* scratch);

  // Quantized and dequantized; and from gradients of that those of the values, and the unscaled one
  // of the scale, which is returned.
  void (*fake_quantize)(const float* values, int64_t count, const FakeQuantizer& quantizer,
                        float* result);
  double (*fake_quantize_backward)(const float* grads, const float* values, int64_t count,
                                   const FakeQuantizer& quantizer, float* result);

  // Sums (channels) over `pixels` runs of bytes.
  void (*sum_pixels)(const uint8_t* codes, int64_t pixels, int64_t channels, int32_t* sums);

  // Of gates, in float64: weight (columns, rows) times x plus bias, rows a multiple of kGateRows,
  // and an LSTM cell from its gates (4, hidden), which it overwrites, and the cell before. Those
  // need gate_room(4 * hidden) + kGateRows values, the others gate_room(hidden).
  void (*map_columns)(const double* weight, const double* bias, int64_t rows, int64_t columns,
                      const double* x, double* result);
  void (*lstm_units)(double* gates, int64_t hidden, const double* kept, double* cell,
                     double* output);

  // One output channel, (channels, kernel_h * kernel_w) -> [kernel_h * kernel_w][channels] codes.
  void (*quantize_filter)(const float* weight, int64_t channels, int64_t taps, float scale,
                          int32_t bits, bool centred, uint8_t* packed);

  // 0 where a layer has no such form.
  size_t (*tile_bytes)(const ConvGeometry& geometry, int32_t bits, bool centred, TileForm form);
  void (*retile_weight)(const ConvGeometry& geometry, const uint8_t* canonical, int32_t bits,
                        bool centred, TileForm form, void* tile);
  // The form that conv_rows takes.
  TileForm (*tile_form)(const MixedConv2dArgs& args, int32_t bits);

  // ConvTask::code_steps for an output whose zero point at 2 bits is 0; sums fit 15 bits and a
  // sign.
  void (*find_code_steps)(const float* multiplier, const float* offset, int64_t channels,
                          const Quantizer& output, int16_t* steps);

  size_t (*conv_scratch_bytes)(const MixedConv2dArgs& args, int32_t bits);
  void (*conv_rows)(const ConvTask& task, void* scratch);
  // A sample at 0 bits.
  void (*skip_rows)(const ConvTask& task, void* scratch);

  size_t (*backward_weight_bytes)(const ConvGeometry& geometry);
  void (*backward_weight_blocks)(const MixedConv2dBackwardArgs& args, int width_index,
                                 float* blocks);
  size_t (*backward_input_scratch_bytes)(const MixedConv2dBackwardArgs& args);
  // Writes one sample's and one group's part of grad_input if there is one, and returns their
  // unscaled share of the gradient of the input scale.
  double (*backward_input)(const MixedConv2dBackwardArgs& args, int64_t sample, int64_t group,
                           const BackwardWeight& weight, void* scratch);
  size_t (*backward_filter_scratch_bytes)(const MixedConv2dBackwardArgs& args, int64_t channels);
  // Gradients of weight, weight scale, mul and add for output channels [begin, end) of one group.
  void (*backward_filter)(const MixedConv2dBackwardArgs& args, int64_t channel_begin,
                          int64_t channel_end, void* scratch);

  // Loops that do nothing but multiply and add in registers, on float32 and on codes; they return
  // the number of multiplications. Null where there are no vectors to measure.
  int64_t (*multiply_floats)(int64_t rounds);
  int64_t (*multiply_codes)(int64_t rounds);
};

extern const KernelTable kScalarKernels;
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512VnniKernels;
extern const KernelTable kAvx512VbmiKernels;

}  // namespace dfs
