// The input rows that some output rows need, as planes of dwords (see vectors.h): a dword holds
// neighbouring channels of one pixel, so that a convolution multiplies it by a vector of weights
// after one broadcast from memory, with no arithmetic on addresses.
#pragma once

#include <type_traits>

#include "feature_map_rows.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"
#include "transpose.h"
#include "vectors.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// With VNNI codes are multiplied as they are and the zero point is corrected for in the sums;
// without, their distances from the zero point are.
#if defined(__AVX512VNNI__)
using DwordPart = uint8_t;
constexpr bool kSubtractsZeroPoint = false;
#else
using DwordPart = int16_t;
constexpr bool kSubtractsZeroPoint = true;
#endif

template <typename Dword>
constexpr int64_t channels_per_dword() {
  return std::is_same<Dword, float>::value ? 1 : kCodesPerDword;
}

template <typename Dword>
inline int64_t dword_planes(int64_t group_channels) {
  return ceil_div(group_channels, channels_per_dword<Dword>());
}

template <typename Dword>
struct DwordBand {
  Dword* data = nullptr;  // (rows, groups, planes, band_width)
  int64_t planes = 0;
  int64_t row_step = 0;
  int64_t first_row = 0;  // the input row that comes first

  const Dword* row(int64_t y) const { return data + (y - first_row) * row_step; }
};

template <typename Dword>
inline int64_t dword_row_step(const WindowShape& shape) {
  return shape.geometry.groups * dword_planes<Dword>(shape.group_channels) * shape.band_width;
}

// Memory for reading one row.
struct RowScratch {
  float* values;
  uint8_t* codes;
  int16_t* levels;
};

inline RowScratch row_scratch(const WindowShape& shape, Arena* arena) {
  const int64_t count = shape.used_width * shape.geometry.in_channels;
  RowScratch scratch;
  scratch.values = arena->take<float>(count);
  scratch.codes = arena->take<uint8_t>(count);
  scratch.levels = arena->take<int16_t>(kSubtractsZeroPoint ? count : 0);
  return scratch;
}

// How the rows of one sample are read.
struct RowSource {
  SampleView input;
  bool as_stored;         // codes are used as they are
  ActivationRange range;  // that the codes are made with
  RowScratch scratch;
};

inline RowSource row_source(const ConvTask& task, const RowScratch& scratch) {
  const MixedConv2dArgs& args = *task.args;
  RowSource source;
  source.input = sample_view(args.input, task.sample);
  source.as_stored = args.input_quantizer.scale == nullptr;
  source.range = task.bits == 32    ? ActivationRange{}
                 : source.as_stored ? source.input.range
                                    : activation_range(args.input_quantizer, task.bits);
  source.scratch = scratch;
  return source;
}

// The first `pixels` pixels of row y as codes with channels innermost: in the scratch memory, or
// where they are stored.
inline const uint8_t* read_codes(const RowSource& source, int64_t y, int64_t pixels) {
  const SampleView& input = source.input;
  const int64_t channels = input.channels;
  if (source.as_stored) {
    const uint8_t* packed = pixel_codes(input, y, 0);
    if (input.bits == 8) return packed;
    unpack_pixels(packed, pixels, channels, input.bits, false, source.scratch.codes);
  } else if (input.values == nullptr && input.bits != 0 && input.bits != 32) {
    const uint8_t* packed = pixel_codes(input, y, 0);
    if (input.bits != 8) {
      unpack_pixels(packed, pixels, channels, input.bits, false, source.scratch.codes);
      packed = source.scratch.codes;
    }
    requantize_codes(packed, pixels * channels, input.range, source.range, source.scratch.codes);
  } else if (input.values != nullptr && input.stride_c == 1) {
    const float* src = input.values + y * input.stride_h;
    if (input.stride_w == channels) {
      codes_from_floats(src, pixels * channels, source.range, source.scratch.codes);
    } else {
      for (int64_t x = 0; x < pixels; ++x) {
        codes_from_floats(src + x * input.stride_w, channels, source.range,
                          source.scratch.codes + x * channels);
      }
    }
  } else {
    read_pixels(input, y, 0, pixels, source.scratch.codes, source.scratch.values);
    codes_from_floats(source.scratch.values, pixels * channels, source.range, source.scratch.codes);
  }
  return source.scratch.codes;
}

// Pixels of interleaved channels, four bytes of them to a dword.
inline void planes_from_pixels(const void* pixels, int64_t count, int64_t pixel_bytes,
                               int64_t channel_bytes, int64_t plane_step, uint32_t* planes) {
  const uint8_t* src = static_cast<const uint8_t*>(pixels);
  const int64_t whole = channel_bytes / 4;
  transpose(src, pixel_bytes, count, whole, planes, plane_step * 4);
  if (whole * 4 == channel_bytes) return;
  const size_t rest = static_cast<size_t>(channel_bytes - whole * 4);
  for (int64_t x = 0; x < count; ++x) {
    uint32_t dword = 0;
    std::memcpy(&dword, src + x * pixel_bytes + whole * 4, rest);
    planes[whole * plane_step + x] = dword;
  }
}

// Quantizes up to kCodesPerDword planes of floats into one plane of dwords.
inline void quantize_plane(const float* values, int64_t channel_step, int64_t channels,
                           int64_t pixels, const ActivationRange& range, uint32_t* plane) {
  const Floats inverse_scale = splat(range.inverse_scale);
  const Floats low = splat(range.low);
  const Floats high = splat(range.high);
  const Ints shift = splat(kSubtractsZeroPoint ? 0 : range.zero_point);
  const auto part = [&](int64_t channel, int64_t x, int64_t count) {
    if (channel >= channels) return zero_ints();
    const float* src = values + channel * channel_step + x;
    const Floats value = count == kLanes ? load_floats(src) : load_floats(src, count);
    const Floats level = min(max(multiply(value, inverse_scale), low), high);
    return add(round_to_ints(level), shift);
  };
  for (int64_t x = 0; x < pixels; x += kLanes) {
    const int64_t count = min_of(pixels - x, kLanes);
#if defined(__AVX512VNNI__)
    const Ints low_half = bit_or(part(0, x, count), shift_left<8>(part(1, x, count)));
    const Ints high_half = bit_or(part(2, x, count), shift_left<8>(part(3, x, count)));
    const Ints dwords = bit_or(low_half, shift_left<16>(high_half));
#else
    const Ints even = _mm256_and_si256(part(0, x, count), splat(0xffff));
    const Ints dwords = bit_or(even, shift_left<16>(part(1, x, count)));
#endif
    if (count == kLanes) {
      store(plane + x, dwords);
    } else {
      uint32_t lanes[kLanes];
      store(lanes, dwords);
      std::memcpy(plane + x, lanes, static_cast<size_t>(count) * sizeof(uint32_t));
    }
  }
}

// Row y of the input into `dst`, (groups, planes, band_width), from column `left` on.
inline void load_dwords(const WindowShape& shape, const RowSource& source, int64_t y, int64_t left,
                        uint32_t* dst) {
  const SampleView& input = source.input;
  const int64_t pixels = shape.used_width;
  const int64_t channels = shape.group_channels;
  const int64_t planes = dword_planes<uint32_t>(channels);
  const int64_t plane_step = shape.band_width;
  const bool planar = input.values != nullptr && input.stride_w == 1;
  if (planar) {
    for (int64_t group = 0; group < shape.geometry.groups; ++group) {
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t first = plane * kCodesPerDword;
        const float* src =
            input.values + y * input.stride_h + (group * channels + first) * input.stride_c;
        quantize_plane(src, input.stride_c, min_of(channels - first, kCodesPerDword), pixels,
                       source.range, dst + (group * planes + plane) * plane_step + left);
      }
    }
    return;
  }
  const uint8_t* codes = read_codes(source, y, pixels);
  const int64_t all_channels = input.channels;
  const DwordPart* parts;
  if constexpr (kSubtractsZeroPoint) {
    levels_from_codes(codes, pixels * all_channels, source.range.zero_point, source.scratch.levels);
    parts = reinterpret_cast<const DwordPart*>(source.scratch.levels);
  } else {
    parts = reinterpret_cast<const DwordPart*>(codes);
  }
  constexpr int64_t kPartBytes = sizeof(DwordPart);
  for (int64_t group = 0; group < shape.geometry.groups; ++group) {
    planes_from_pixels(parts + group * channels, pixels, all_channels * kPartBytes,
                       channels * kPartBytes, plane_step, dst + group * planes * plane_step + left);
  }
}

inline void load_dwords(const WindowShape& shape, const RowSource& source, int64_t y, int64_t left,
                        float* dst) {
  const SampleView& input = source.input;
  const int64_t pixels = shape.used_width;
  const int64_t plane_step = shape.band_width;
  constexpr int64_t kBytes = sizeof(float);
  // Groups follow each other like the channels do, since a plane has one channel.
  if (input.values != nullptr && input.stride_w == 1) {
    for (int64_t c = 0; c < input.channels; ++c) {
      std::memcpy(dst + c * plane_step + left,
                  input.values + y * input.stride_h + c * input.stride_c,
                  static_cast<size_t>(pixels) * sizeof(float));
    }
  } else if (input.values != nullptr && input.stride_c == 1) {
    transpose(input.values + y * input.stride_h, input.stride_w * kBytes, pixels, input.channels,
              dst + left, plane_step * kBytes);
  } else if (input.values == nullptr && input.bits == 32) {
    transpose(pixel_codes(input, y, 0), input.pixel_bytes, pixels, input.channels, dst + left,
              plane_step * kBytes);
  } else {
    read_pixels(input, y, 0, pixels, source.scratch.codes, source.scratch.values);
    transpose(source.scratch.values, input.channels * kBytes, pixels, input.channels, dst + left,
              plane_step * kBytes);
  }
}

// Writes whole vectors: up to kLanes dwords more, which are filled afterwards or not needed.
template <typename Dword>
inline void pad_dwords(Dword* dst, int64_t count, Dword padding) {
  for (int64_t i = 0; i < count; i += kLanes) {
    if constexpr (std::is_same<Dword, float>::value) {
      store(dst + i, splat(padding));
    } else {
      store(dst + i, splat(static_cast<int32_t>(padding)));
    }
  }
}

// Fills the band with the input rows that output rows [row_begin, row_end) read. Rows outside the
// input are left out, columns outside it hold what counts as zero.
template <typename Dword>
inline void load_dword_band(const WindowShape& shape, const RowSource& source, int64_t row_begin,
                            int64_t row_end, Dword* memory, DwordBand<Dword>* band) {
  const ConvGeometry& g = shape.geometry;
  const int64_t first = row_begin * g.stride_h - g.pad_top;
  const int64_t end = (row_end - 1) * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h + 1;
  band->data = memory;
  band->planes = dword_planes<Dword>(shape.group_channels);
  band->row_step = dword_row_step<Dword>(shape);
  band->first_row = max_of(first, 0);
  const int64_t left = min_of(g.pad_left, shape.band_width);
  const int64_t right = left + shape.used_width;
  Dword padding{};
  if constexpr (!std::is_same<Dword, float>::value) {
    if (!kSubtractsZeroPoint) {
      padding = static_cast<uint32_t>(source.range.zero_point) * 0x01010101u;
    }
  }
  for (int64_t y = band->first_row; y < min_of(end, shape.in_height); ++y) {
    if (!row_is_used(g, y - first)) continue;
    Dword* row = memory + (y - band->first_row) * band->row_step;
    for (int64_t i = 0; i < g.groups * band->planes; ++i) {
      Dword* plane = row + i * shape.band_width;
      pad_dwords(plane, left, padding);
      pad_dwords(plane + right, shape.band_width - right, padding);
    }
    if (shape.used_width > 0) load_dwords(shape, source, y, left, row);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
