// Reads and writes runs of pixels of one sample, as float32 with channels innermost, whatever form
// the sample is stored in.
#pragma once

#include "bit_packing.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"
#include "transpose.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// One sample of a feature map.
struct SampleView {
  int64_t channels;
  int64_t width;
  float* values;  // float32 form, else null
  int64_t stride_c;
  int64_t stride_h;
  int64_t stride_w;
  uint8_t* row;  // packed form
  int32_t bits;  // the stored width; 32 for the float32 form
  int64_t pixel_bytes;
  ActivationRange range;  // of the stored width, if that is an integer one
};

inline SampleView sample_view(const FeatureMap& map, int64_t sample) {
  SampleView view;
  view.channels = map.channels;
  view.width = map.width;
  view.values = nullptr;
  view.stride_c = map.stride_c;
  view.stride_h = map.stride_h;
  view.stride_w = map.stride_w;
  view.row = nullptr;
  view.bits = 32;
  view.range = ActivationRange{};
  if (is_packed(map)) {
    view.row = map.codes + sample * map.row_bytes;
    view.bits = map.bits[sample];
  } else {
    view.values = map.values + sample * map.stride_n;
  }
  view.pixel_bytes = packed_bytes(map.channels, view.bits);
  if (view.bits != 0 && view.bits != 32) {
    view.range = activation_range(map.quantizer, view.bits);
  }
  return view;
}

// Whether a packed input's codes enter the multiplication as they are.
inline bool loads_as_stored(const MixedConv2dArgs& args) {
  return args.input_quantizer.scale == nullptr;
}

// Of the codes that enter the multiplication.
inline ActivationRange loaded_range(const ConvTask& task, const SampleView& input) {
  if (task.bits == 32) return ActivationRange{};
  if (loads_as_stored(*task.args)) return input.range;
  return activation_range(task.args->input_quantizer, task.bits);
}

inline const uint8_t* pixel_codes(const SampleView& view, int64_t y, int64_t x) {
  return view.row + (y * view.width + x) * view.pixel_bytes;
}

inline void transpose_in(const float* src, int64_t stride_c, int64_t stride_w, int64_t channels,
                         int64_t pixels, float* dst) {
  if (stride_c == 1) {
    if (stride_w == channels) {
      std::memcpy(dst, src, static_cast<size_t>(pixels * channels) * sizeof(float));
      return;
    }
    for (int64_t x = 0; x < pixels; ++x) {
      std::memcpy(dst + x * channels, src + x * stride_w,
                  static_cast<size_t>(channels) * sizeof(float));
    }
    return;
  }
  if (stride_w == 1) {
    constexpr int64_t kBytes = sizeof(float);
    transpose(src, stride_c * kBytes, channels, pixels, dst, channels * kBytes);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const float* plane = src + c * stride_c;
    for (int64_t x = 0; x < pixels; ++x) dst[x * channels + c] = plane[x * stride_w];
  }
}

// Pixels [x, x + pixels) of row y. `codes` holds pixels * channels bytes of scratch. A sample of
// width 0 counts as zeros and is not read.
inline void read_pixels(const SampleView& view, int64_t y, int64_t x, int64_t pixels,
                        uint8_t* codes, float* values) {
  const int64_t count = pixels * view.channels;
  if (view.values != nullptr) {
    transpose_in(view.values + y * view.stride_h + x * view.stride_w, view.stride_c, view.stride_w,
                 view.channels, pixels, values);
  } else if (view.bits == 0) {
    for (int64_t i = 0; i < count; ++i) values[i] = 0.0f;
  } else if (view.bits == 32) {
    // A packed row need not be aligned for floats.
    std::memcpy(values, pixel_codes(view, y, x), static_cast<size_t>(count) * sizeof(float));
  } else {
    unpack_pixels(pixel_codes(view, y, x), pixels, view.channels, view.bits, false, codes);
    floats_from_codes(codes, count, view.range, values);
  }
}

inline void write_pixels(const SampleView& view, int64_t y, int64_t x, int64_t pixels,
                         const float* values, uint8_t* codes) {
  const int64_t count = pixels * view.channels;
  if (view.values != nullptr) {
    float* dst = view.values + y * view.stride_h + x * view.stride_w;
    if (view.stride_c == 1) {
      for (int64_t i = 0; i < pixels; ++i) {
        std::memcpy(dst + i * view.stride_w, values + i * view.channels,
                    static_cast<size_t>(view.channels) * sizeof(float));
      }
      return;
    }
    if (view.stride_w == 1) {
      constexpr int64_t kBytes = sizeof(float);
      transpose(values, view.channels * kBytes, pixels, view.channels, dst, view.stride_c * kBytes);
      return;
    }
    for (int64_t c = 0; c < view.channels; ++c) {
      float* plane = dst + c * view.stride_c;
      for (int64_t i = 0; i < pixels; ++i) {
        plane[i * view.stride_w] = values[i * view.channels + c];
      }
    }
  } else if (view.bits == 32) {
    std::memcpy(view.row + (y * view.width + x) * view.pixel_bytes, values,
                static_cast<size_t>(count) * sizeof(float));
  } else if (view.bits != 0) {
    codes_from_floats(values, count, view.range, codes);
    pack_pixels(codes, pixels, view.channels, view.bits,
                view.row + (y * view.width + x) * view.pixel_bytes);
  }
}

// Scratch for converting one row of pixels.
struct ConvertScratch {
  float* values;
  uint8_t* codes;
  size_t bytes;
};

inline ConvertScratch convert_scratch(int64_t channels, int64_t width, void* memory) {
  Arena arena(memory);
  ConvertScratch scratch;
  scratch.values = arena.take<float>(channels * width);
  scratch.codes = arena.take<uint8_t>(channels * width);
  scratch.bytes = arena.used();
  return scratch;
}

inline size_t convert_scratch_bytes(int64_t channels, int64_t width) {
  return convert_scratch(channels, width, nullptr).bytes;
}

// quantize_pack and unpack_dequantize are the same walk: each side knows its own form.
inline void convert_rows(const FeatureMap& src, const FeatureMap& dst, int64_t sample,
                         int64_t row_begin, int64_t row_end, void* memory) {
  const SampleView from = sample_view(src, sample);
  const SampleView to = sample_view(dst, sample);
  if (to.bits == 0) return;
  const ConvertScratch scratch = convert_scratch(src.channels, src.width, memory);
  for (int64_t y = row_begin; y < row_end; ++y) {
    read_pixels(from, y, 0, src.width, scratch.codes, scratch.values);
    write_pixels(to, y, 0, src.width, scratch.values, scratch.codes);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
