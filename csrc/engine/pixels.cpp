#include "pixels.h"

#include "dispatch.h"
#include "float_environment.h"
#include "layer.h"

namespace dfs {
namespace {

constexpr int64_t kLevels = 256;
constexpr int32_t kCodeBits = 8;

template <typename T>
void look_up(const std::vector<T>& table, const PixelImages& images, int64_t sample,
             int64_t channels, int64_t height, int64_t width, T* target) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* levels = table.data() + c * kLevels;
    for (int64_t y = 0; y < height; ++y) {
      const uint8_t* row =
          images.data + sample * images.stride_n + c * images.stride_c + y * images.stride_h;
      T* pixel = target + y * width * channels + c;
      for (int64_t x = 0; x < width; ++x) pixel[x * channels] = levels[row[x * images.stride_w]];
    }
  }
}

}  // namespace

PixelTable::PixelTable(const float* values, int64_t channels, const Quantizer& quantizer)
    : channels_(channels), values_(values, values + channels * kLevels), quantizer_(quantizer) {
  if (index_of(quantizer.widths, kCodeBits) < 0) return;
  // The kernels' own quantizer, so that codes are those of a float image.
  const DefaultFloatEnvironment environment;
  const KernelTable& table = kernels();
  FeatureMap levels;
  levels.channels = 1;
  levels.height = channels;
  levels.width = kLevels;
  levels.values = values_.data();
  levels.stride_h = kLevels;
  levels.stride_w = 1;
  codes_.resize(values_.size());
  FeatureMap codes = levels;
  codes.codes = codes_.data();
  codes.row_bytes = channels * kLevels;
  codes.bits = &kCodeBits;
  codes.quantizer = quantizer;
  const AlignedBytes scratch(table.convert_scratch_bytes(1, kLevels));
  table.quantize_rows(levels, codes, 0, 0, channels, scratch.data());
}

size_t PixelTable::bytes(int64_t height, int64_t width) const {
  return static_cast<size_t>(channels_ * height * width) * (gives_codes() ? 1 : sizeof(float));
}

FeatureMap PixelTable::map(uint8_t* memory, int64_t height, int64_t width) const {
  FeatureMap map;
  map.channels = channels_;
  map.height = height;
  map.width = width;
  if (gives_codes()) {
    map.codes = memory;
    map.row_bytes = channels_ * height * width;
    map.bits = &kCodeBits;
    map.quantizer = quantizer_;
    return map;
  }
  map.values = reinterpret_cast<float*>(memory);
  map.stride_c = 1;
  map.stride_h = width * channels_;
  map.stride_w = channels_;
  return map;
}

void PixelTable::load(const PixelImages& images, int64_t sample, const FeatureMap& target) const {
  if (gives_codes()) {
    look_up(codes_, images, sample, channels_, target.height, target.width, target.codes);
  } else {
    look_up(values_, images, sample, channels_, target.height, target.width, target.values);
  }
}

}  // namespace dfs
