// uint8 images as what the stem reads, by a table: normalizing them takes no arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dfs/types.h"

namespace dfs {

// N images of uint8 pixels with any strides, in elements.
struct PixelImages {
  const uint8_t* data = nullptr;
  int64_t stride_n = 0;
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;
};

// What each pixel stands for, per channel: a code where the stem multiplies 8-bit codes, else a
// float that the stem takes as from any float image. Either way the stem sees the same input as
// from a float image of the table's values.
class PixelTable {
 public:
  // Takes no images.
  PixelTable() = default;
  // `values`: (channels, 256). `quantizer`: of the stem's input, borrowed.
  PixelTable(const float* values, int64_t channels, const Quantizer& quantizer);

  bool empty() const { return channels_ == 0; }
  bool gives_codes() const { return !codes_.empty(); }
  // Of one image.
  size_t bytes(int64_t height, int64_t width) const;
  // The form of what load() writes to `memory`.
  FeatureMap map(uint8_t* memory, int64_t height, int64_t width) const;
  void load(const PixelImages& images, int64_t sample, const FeatureMap& target) const;

 private:
  int64_t channels_ = 0;
  std::vector<float> values_;   // (channels, 256)
  std::vector<uint8_t> codes_;  // (channels, 256), or none
  Quantizer quantizer_;
};

}  // namespace dfs
