// The input rows that some output rows need, as dwords (see vectors.h): a dword holds neighbouring
// channels of one pixel, so that a convolution multiplies it by a vector of weights after one
// broadcast from memory. The dwords of a pixel lie together, or in planes where the input does.
// Codes are multiplied as they are; the zero point is corrected for in the sums.
#pragma once

#include <type_traits>

#include "feature_map_rows.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"
#include "requantize.h"
#include "transpose.h"
#include "vectors.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

template <typename Dword>
constexpr int64_t channels_per_dword() {
  return std::is_same<Dword, float>::value ? 1 : kCodesPerDword;
}

template <typename Dword>
inline int64_t dword_planes(int64_t group_channels) {
  return ceil_div(group_channels, channels_per_dword<Dword>());
}

// Where the dwords are: steps in bytes.
struct DwordBand {
  const uint8_t* data;  // of the first row, column and plane
  int64_t row_step;
  int64_t group_step;
  int64_t plane_step;
  int64_t pixel_step;
  int64_t first_row;  // the input row that comes first

  const uint8_t* row(int64_t y) const { return data + (y - first_row) * row_step; }
};

// Bytes of one row.
template <typename Dword>
inline int64_t dword_row_bytes(const WindowShape& shape) {
  return shape.geometry.groups * dword_planes<Dword>(shape.group_channels) * shape.band_width * 4;
}

// Whether a float input's rows lie in planes.
inline bool is_planar(const SampleView& input) {
  return input.values != nullptr && input.stride_w == 1 && input.stride_c != 1;
}

// Memory for reading one row.
struct RowScratch {
  float* values;
  uint8_t* codes;
};

inline RowScratch row_scratch(const WindowShape& shape, Arena* arena) {
  const int64_t count = shape.used_width * shape.geometry.in_channels;
  RowScratch scratch;
  scratch.values = arena->take<float>(count);
  scratch.codes = arena->take<uint8_t>(count);
  return scratch;
}

// How the rows of one sample are read.
struct RowSource {
  SampleView input;
  bool as_stored;           // codes are used as they are
  ActivationRange range;    // that the codes are made with
  Requantizer requantizer;  // from the codes of the input, if it has others
  RowScratch scratch;
};

inline bool has_codes(const SampleView& input) {
  return input.values == nullptr && input.bits != 0 && input.bits != 32;
}

inline RowSource row_source(const ConvTask& task, const RowScratch& scratch) {
  const MixedConv2dArgs& args = *task.args;
  RowSource source;
  source.input = sample_view(args.input, task.sample);
  source.as_stored = loads_as_stored(args);
  source.range = loaded_range(task, source.input);
  source.scratch = scratch;
  if (!source.as_stored && has_codes(source.input)) {
    source.requantizer.set(source.input.range, source.range);
  }
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
  } else if (has_codes(input)) {
    const uint8_t* packed = pixel_codes(input, y, 0);
    if (input.bits != 8) {
      unpack_pixels(packed, pixels, channels, input.bits, false, source.scratch.codes);
      packed = source.scratch.codes;
    }
    source.requantizer.run(packed, pixels * channels, source.scratch.codes);
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

// Pixels of interleaved codes to pixels whose groups begin at a dword. What fills up a group's last
// dword is multiplied by zeros.
inline void align_groups(const uint8_t* src, int64_t pixels, int64_t groups, int64_t channels,
                         uint8_t* dst) {
  const int64_t step = round_up(channels, kCodesPerDword);
  if (channels == step) {
    std::memcpy(dst, src, static_cast<size_t>(pixels * groups * channels));
    return;
  }
  for (int64_t i = 0; i < pixels * groups; ++i) {
    for (int64_t k = 0; k < channels; ++k) dst[k] = src[k];
    for (int64_t k = channels; k < step; ++k) dst[k] = 0;
    src += channels;
    dst += step;
  }
}

// Quantizes up to kCodesPerDword planes of floats into one plane of dwords.
inline void quantize_plane(const float* values, int64_t channel_step, int64_t channels,
                           int64_t pixels, const ActivationRange& range, uint32_t* plane) {
  const Floats inverse_scale = splat(range.inverse_scale);
  const Floats low = splat(range.low);
  const Floats high = splat(range.high);
  const Ints shift = splat(range.zero_point);
  const auto part = [&](int64_t channel, int64_t x, int64_t count) {
    if (channel >= channels) return zero_ints();
    const float* src = values + channel * channel_step + x;
    const Floats value = count == kLanes ? load_floats(src) : load_floats(src, count);
    const Floats level = min(max(multiply(value, inverse_scale), low), high);
    return add(round_to_ints(level), shift);
  };
  for (int64_t x = 0; x < pixels; x += kLanes) {
    const int64_t count = min_of(pixels - x, kLanes);
    const Ints low_half = bit_or(part(0, x, count), shift_left<8>(part(1, x, count)));
    const Ints high_half = bit_or(part(2, x, count), shift_left<8>(part(3, x, count)));
    const Ints dwords = bit_or(low_half, shift_left<16>(high_half));
    if (count == kLanes) {
      store(plane + x, dwords);
    } else {
      uint32_t lanes[kLanes];
      store(lanes, dwords);
      std::memcpy(plane + x, lanes, static_cast<size_t>(count) * sizeof(uint32_t));
    }
  }
}

// Row y of one plane of a planar input.
inline void load_plane_row(const WindowShape& shape, const RowSource& source, int64_t plane,
                           int64_t y, uint32_t* dst) {
  const SampleView& input = source.input;
  const int64_t channels = shape.group_channels;
  const int64_t planes = dword_planes<uint32_t>(channels);
  const int64_t first = plane % planes * kCodesPerDword;
  const float* src =
      input.values + y * input.stride_h + (plane / planes * channels + first) * input.stride_c;
  quantize_plane(src, input.stride_c, min_of(channels - first, kCodesPerDword), shape.used_width,
                 source.range, dst);
}

inline void load_plane_row(const WindowShape& shape, const RowSource& source, int64_t plane,
                           int64_t y, float* dst) {
  const SampleView& input = source.input;
  std::memcpy(dst, input.values + y * input.stride_h + plane * input.stride_c,
              static_cast<size_t>(shape.used_width) * sizeof(float));
}

// Row y of an input whose channels are brought together.
inline void load_row(const WindowShape& shape, const RowSource& source, int64_t y, uint32_t* dst) {
  const int64_t pixels = shape.used_width;
  const uint8_t* codes = read_codes(source, y, pixels);
  align_groups(codes, pixels, shape.geometry.groups, shape.group_channels,
               reinterpret_cast<uint8_t*>(dst));
}

inline void load_row(const WindowShape& shape, const RowSource& source, int64_t y, float* dst) {
  read_pixels(source.input, y, 0, shape.used_width, source.scratch.codes, dst);
}

// Whether the windows can be read where the input is stored.
template <typename Dword>
inline bool reads_in_place(const WindowShape& shape, const RowSource& source) {
  const ConvGeometry& g = shape.geometry;
  if (g.pad_left + g.pad_right + g.pad_top + g.pad_bottom > 0) return false;
  const SampleView& input = source.input;
  if (std::is_same<Dword, float>::value) {
    return is_planar(input) || (input.values != nullptr && input.stride_c == 1) ||
           (input.values == nullptr && input.bits == 32);
  }
  return source.as_stored && input.bits == 8 && shape.group_channels % kCodesPerDword == 0;
}

template <typename Dword>
inline DwordBand stored_band(const WindowShape& shape, const SampleView& input) {
  constexpr int64_t kFloatBytes = sizeof(float);
  DwordBand band;
  band.first_row = 0;
  band.plane_step = 4;
  if (input.values == nullptr) {
    band.data = input.row;
    band.pixel_step = input.pixel_bytes;
    band.row_step = input.width * input.pixel_bytes;
  } else {
    band.data = reinterpret_cast<const uint8_t*>(input.values);
    band.pixel_step = input.stride_w * kFloatBytes;
    band.row_step = input.stride_h * kFloatBytes;
    band.plane_step = input.stride_c * kFloatBytes;
  }
  band.group_step = dword_planes<Dword>(shape.group_channels) * band.plane_step;
  return band;
}

template <typename Dword>
inline void pad_dwords(Dword* dst, int64_t count, Dword padding) {
  uint32_t bits;
  std::memcpy(&bits, &padding, sizeof(bits));
  const __m128i value = _mm_set1_epi32(static_cast<int>(bits));
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i), value);
  for (; i < count; ++i) std::memcpy(dst + i, &bits, sizeof(bits));
}

// The band of the input rows that output rows [row_begin, row_end) read. Rows outside the input are
// left out, columns outside it hold what counts as zero.
template <typename Dword>
inline DwordBand load_dword_band(const WindowShape& shape, const RowSource& source,
                                 int64_t row_begin, int64_t row_end, Dword* memory) {
  if (reads_in_place<Dword>(shape, source)) return stored_band<Dword>(shape, source.input);
  const ConvGeometry& g = shape.geometry;
  const int64_t first = row_begin * g.stride_h - g.pad_top;
  const int64_t end = (row_end - 1) * g.stride_h - g.pad_top + (g.kernel_h - 1) * g.dilation_h + 1;
  const int64_t planes = dword_planes<Dword>(shape.group_channels);
  const int64_t all_planes = g.groups * planes;
  const bool planar = is_planar(source.input);
  DwordBand band;
  band.data = reinterpret_cast<const uint8_t*>(memory);
  band.row_step = dword_row_bytes<Dword>(shape);
  band.plane_step = planar ? shape.band_width * 4 : 4;
  band.pixel_step = planar ? 4 : all_planes * 4;
  band.group_step = planes * band.plane_step;
  band.first_row = max_of(first, 0);
  const int64_t left = min_of(g.pad_left, shape.band_width);
  const int64_t right = left + shape.used_width;
  Dword padding{};
  if constexpr (!std::is_same<Dword, float>::value) {
    padding = static_cast<uint32_t>(source.range.zero_point) * 0x01010101u;
  }
  // A row is one run of pixels, or so many runs of one plane.
  const int64_t runs = planar ? all_planes : 1;
  const int64_t scale = planar ? 1 : all_planes;
  for (int64_t y = band.first_row; y < min_of(end, shape.in_height); ++y) {
    if (!row_is_used(g, y - first)) continue;
    for (int64_t run = 0; run < runs; ++run) {
      Dword* dst =
          memory + (y - band.first_row) * (band.row_step / 4) + run * shape.band_width * scale;
      pad_dwords(dst, left * scale, padding);
      if (shape.used_width > 0) {
        if (planar) {
          load_plane_row(shape, source, run, y, dst + left);
        } else {
          load_row(shape, source, y, dst + left * scale);
        }
      }
      pad_dwords(dst + right * scale, (shape.band_width - right) * scale, padding);
    }
  }
  return band;
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
