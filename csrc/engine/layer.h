// A convolution of a frozen network, ready to run: weights re-tiled, scaling folded.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernel_table.h"
#include "network.h"

namespace dfs {

// Memory that a network owns, aligned for vectors.
class AlignedBytes {
 public:
  explicit AlignedBytes(size_t bytes = 0);
  ~AlignedBytes();
  AlignedBytes(AlignedBytes&& other) noexcept;
  AlignedBytes& operator=(AlignedBytes&& other) noexcept;

  uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// One sample's convolution.
struct LayerCall {
  int32_t bits = 0;  // 0 passes the residual on
  FeatureMap input;
  // Whether the codes of a packed input are multiplied as they are, rather than quantized again.
  bool reads_codes = false;
  const FeatureMap* residual = nullptr;
  bool relu = false;
  FeatureMap output;
};

class Layer {
 public:
  Layer(const LayerSpec& spec, const KernelTable& table);

  const ConvGeometry& geometry() const { return geometry_; }
  const WidthTable& widths() const { return weight_.widths; }
  // What quantizes its input; borrowed from this layer.
  Quantizer input_quantizer() const;
  // Drops the weights that calls with maps of these sizes do not take.
  void keep_form_for(const LayerCall& call);
  // Bytes of its weights.
  size_t weight_bytes() const;
  double nanoseconds(int32_t bits, int64_t out_pixels) const;

  // Tells beforehand what quantizes the output of calls without a residual, so that 2-bit codes can
  // be compared for instead of computed.
  void expect_output(const Quantizer& output);

  size_t scratch_bytes(const LayerCall& call) const;
  void run_rows(const LayerCall& call, int64_t row_begin, int64_t row_end, void* scratch) const;

 private:
  MixedConv2dArgs args_of(const LayerCall& call) const;

  const KernelTable* table_;
  ConvGeometry geometry_;
  ConvWeight weight_;
  std::vector<AlignedBytes> tiles_;  // (count, forms)
  std::vector<float> input_scale_;
  std::vector<int32_t> input_zero_point_;
  std::vector<float> multiplier_;
  std::vector<float> offset_;
  std::vector<int16_t> code_steps_;  // see ConvTask
};

}  // namespace dfs
