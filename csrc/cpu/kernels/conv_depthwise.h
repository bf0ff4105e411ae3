// The vectorized depthwise convolution: channels in the lanes.
#pragma once

#include "conv_direct.h"
#include "conv_rows.h"
#include "filter_layout.h"
#include "isa.h"
#include "kernel_table.h"
#include "vector_epilogue.h"
#include "vectors.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// One filter per channel.
inline bool is_depthwise(const ConvGeometry& g) {
  return g.groups == g.in_channels && g.groups == g.out_channels && g.groups >= kLanes;
}

// Pixels and vectors of channels that share a pass over the window.
constexpr int kDepthwisePixels = 4;
constexpr int kDepthwiseVectors = 2;

// Weights as int32 levels or floats, (taps, C rounded up).
inline int64_t depthwise_channels(const ConvGeometry& g) {
  return round_up(g.in_channels, kDepthwiseVectors * kLanes);
}

inline size_t depthwise_tile_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(g.kernel_h * g.kernel_w * depthwise_channels(g)) * 4;
}

// Of the only channel of a canonical run.
template <int kBits>
inline int32_t first_level(const uint8_t* run, bool centred) {
  const int32_t code = static_cast<int8_t>(extract_code<kBits, true>(*run, 0));
  return centred ? 2 * code + 1 : code;
}

inline void retile_depthwise(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                             bool centred, void* tile) {
  std::memset(tile, 0, depthwise_tile_bytes(g));
  const int64_t taps = g.kernel_h * g.kernel_w;
  const int64_t run_bytes = packed_bytes(1, bits);
  for (int64_t c = 0; c < g.in_channels; ++c) {
    for (int64_t tap = 0; tap < taps; ++tap) {
      const uint8_t* run = canonical + (c * taps + tap) * run_bytes;
      uint8_t* dst = static_cast<uint8_t*>(tile) + (tap * depthwise_channels(g) + c) * 4;
      if (bits == 32) {
        std::memcpy(dst, run, 4);
        continue;
      }
      int32_t level = 0;
      if (bits == 2) level = first_level<2>(run, centred);
      if (bits == 4) level = first_level<4>(run, centred);
      if (bits == 8) level = first_level<8>(run, centred);
      // In the low half of a lane, so that one multiplication of int16 pairs takes it.
      level &= 0xffff;
      std::memcpy(dst, &level, 4);
    }
  }
}

// All channels of a pixel side by side, as in one group.
inline WindowShape depthwise_window(const MixedConv2dArgs& args) {
  ConvGeometry g = args.geometry;
  g.groups = 1;
  return window_shape(g, args.input, args.output.width);
}

template <typename T>
struct DepthwiseScratch {
  Band<T> band;
  float* row_values;
  uint8_t* row_codes;
  float* sums;   // (pixels, vectors) of a pass
  float* block;  // (pixels of a block, C), if vectors cannot write the output
  float* block_values;
  uint8_t* block_codes;
  size_t bytes;
};

inline int64_t depthwise_block_pixels(const WindowShape& shape) {
  constexpr int64_t kBlockFloats = 16 << 10;
  const int64_t pixels = kBlockFloats / shape.geometry.out_channels;
  return min_of(max_of(pixels, int64_t{kDepthwisePixels}), shape.out_width);
}

template <typename T>
inline DepthwiseScratch<T> depthwise_scratch(const WindowShape& shape, int64_t out_height,
                                             void* memory) {
  Arena arena(memory);
  DepthwiseScratch<T> scratch;
  const int64_t rows = rows_per_band(shape, out_height, sizeof(T));
  const int64_t row_elements = shape.used_width * shape.geometry.in_channels;
  // The last pixel's vectors reach past its channels.
  scratch.band.data = arena.take<T>(band_elements(shape, rows) + kDepthwiseVectors * kLanes);
  scratch.row_values = arena.take<float>(row_elements);
  scratch.row_codes = arena.take<uint8_t>(row_elements);
  scratch.sums = arena.take<float>(kDepthwisePixels * kDepthwiseVectors * kLanes);
  const int64_t outputs = depthwise_block_pixels(shape) * shape.geometry.out_channels;
  scratch.block = arena.take<float>(outputs);
  scratch.block_values = arena.take<float>(outputs);
  scratch.block_codes = arena.take<uint8_t>(outputs);
  scratch.bytes = arena.used();
  return scratch;
}

#if defined(__AVX512VNNI__)
inline Ints multiply_add_levels(const int16_t* levels, const void* weights, Ints sums) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels));
  return _mm512_dpwssd_epi32(sums, _mm512_cvtepi16_epi32(narrow), load_ints(weights));
}
#else
inline Ints multiply_add_levels(const int16_t* levels, const void* weights, Ints sums) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(levels));
  return add(sums, _mm256_madd_epi16(_mm256_cvtepi16_epi32(narrow), load_ints(weights)));
}
#endif
inline Floats multiply_add_levels(const float* values, const void* weights, Floats sums) {
  return multiply_add(load_floats(values), load_floats(weights), sums);
}

template <typename T>
struct DepthwiseVector {
  using Type = Ints;
};
template <>
struct DepthwiseVector<float> {
  using Type = Floats;
};

// result[pixel][vector] for kPixels neighbouring output pixels; `input` and `weights` are those of
// the first tap and channel.
template <typename T, int kPixels>
inline void depthwise_pass(const WindowShape& shape, const T* input, const void* weights,
                           float* result) {
  using Vector = typename DepthwiseVector<T>::Type;
  const ConvGeometry& g = shape.geometry;
  const int64_t channels = g.in_channels;
  const int64_t weight_step = depthwise_channels(g) * 4;
  const uint8_t* weight = static_cast<const uint8_t*>(weights);
  Vector sums[kPixels * kDepthwiseVectors];
  unroll<kPixels * kDepthwiseVectors>([&](auto i) { sums[i] = Vector{}; });
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const T* row = input + kh * g.dilation_h * shape.band_width * channels;
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const T* tap = row + kw * g.dilation_w * channels;
      unroll<kPixels * kDepthwiseVectors>([&](auto i) {
        constexpr int64_t kPixel = i / kDepthwiseVectors;
        constexpr int64_t kFirst = i % kDepthwiseVectors * kLanes;
        sums[i] = multiply_add_levels(tap + kPixel * g.stride_w * channels + kFirst,
                                      weight + kFirst * 4, sums[i]);
      });
      weight += weight_step;
    }
  }
  unroll<kPixels * kDepthwiseVectors>([&](auto i) { store(result + i * kLanes, sums[i]); });
}

template <typename T>
inline void depthwise_run(const WindowShape& shape, const void* tile,
                          const DepthwiseScratch<T>& scratch, int64_t band_row, int64_t x_begin,
                          int64_t x_end, const VectorEpilogue& epilogue, int64_t out_y,
                          int64_t out_x) {
  const ConvGeometry& g = shape.geometry;
  for (int64_t channel = 0; channel < g.out_channels; channel += kDepthwiseVectors * kLanes) {
    const uint8_t* weights = static_cast<const uint8_t*>(tile) + channel * 4;
    for (int64_t x = x_begin; x < x_end;) {
      const int64_t pixels = x_end - x >= kDepthwisePixels ? kDepthwisePixels : 1;
      const T* input = window_origin(shape, scratch.band, 0, band_row, x) + channel;
      if (pixels == kDepthwisePixels) {
        depthwise_pass<T, kDepthwisePixels>(shape, input, weights, scratch.sums);
      } else {
        depthwise_pass<T, 1>(shape, input, weights, scratch.sums);
      }
      for (int64_t v = 0; v < kDepthwiseVectors; ++v) {
        const int64_t first = channel + v * kLanes;
        if (first >= g.out_channels) break;
        finish_vector(epilogue, out_y, out_x + x - x_begin, pixels, first,
                      min_of(g.out_channels - first, kLanes), [&](int64_t p) {
                        const float* sums = scratch.sums + (p * kDepthwiseVectors + v) * kLanes;
                        if constexpr (std::is_same<T, float>::value) {
                          return load_floats(sums);
                        } else {
                          return to_floats(load_ints(sums));
                        }
                      });
      }
      x += pixels;
    }
  }
}

template <typename T>
inline void conv_depthwise_as(const ConvTask& task, void* memory) {
  const MixedConv2dArgs& args = *task.args;
  const WindowShape shape = depthwise_window(args);
  DepthwiseScratch<T> scratch = depthwise_scratch<T>(shape, args.output.height, memory);
  const RowReader read = row_reader(task, shape, scratch.row_values, scratch.row_codes);
  const bool in_place = fits_vector_epilogue(task, args.geometry.out_channels);
  const VectorEpilogue epilogue =
      in_place ? vector_epilogue(task)
               : scaling_epilogue(task, scratch.block, args.geometry.out_channels);
  const Epilogue rest = block_epilogue(task, scratch.block_values, scratch.block_codes);
  const int64_t block_pixels = depthwise_block_pixels(shape);
  const int64_t band_rows = rows_per_band(shape, args.output.height, sizeof(T));
  for (int64_t begin = task.row_begin; begin < task.row_end; begin += band_rows) {
    const int64_t end = min_of(begin + band_rows, task.row_end);
    load_band(shape, begin, end, static_cast<T*>(nullptr), &scratch.band, read);
    for (int64_t y = begin; y < end; ++y) {
      if (in_place) {
        depthwise_run(shape, task.tile, scratch, y - begin, 0, shape.out_width, epilogue, y, 0);
        continue;
      }
      for (int64_t x = 0; x < shape.out_width; x += block_pixels) {
        const int64_t x_end = min_of(x + block_pixels, shape.out_width);
        depthwise_run(shape, task.tile, scratch, y - begin, x, x_end, epilogue, 0, 0);
        finish_run(rest, y, x, x_end - x, scratch.block);
      }
    }
  }
}

inline size_t depthwise_scratch_bytes(const MixedConv2dArgs& args, int32_t bits) {
  const WindowShape shape = depthwise_window(args);
  return bits == 32 ? depthwise_scratch<float>(shape, args.output.height, nullptr).bytes
                    : depthwise_scratch<int16_t>(shape, args.output.height, nullptr).bytes;
}

inline void conv_depthwise(const ConvTask& task, void* memory) {
  if (task.bits == 32) return conv_depthwise_as<float>(task, memory);
  conv_depthwise_as<int16_t>(task, memory);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
