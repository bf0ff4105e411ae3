// The input rows that some output rows need, padded with zeros and with the channels of each group
// innermost, and the windows cut out of them.
#pragma once

#include "feature_map_rows.h"
#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Sizes that all tasks of a convolution share.
struct WindowShape {
  ConvGeometry geometry;
  int64_t in_height;
  int64_t in_width;
  int64_t out_width;
  int64_t group_channels;
  int64_t depth;       // values in a window: kernel_h * kernel_w * group_channels
  int64_t band_width;  // padded columns that the windows of an output row touch
  int64_t used_width;  // of these, input columns
};

inline WindowShape window_shape(const ConvGeometry& geometry, const FeatureMap& input,
                                int64_t out_width) {
  WindowShape shape{};
  shape.geometry = geometry;
  shape.in_height = input.height;
  shape.in_width = input.width;
  shape.out_width = out_width;
  shape.group_channels = geometry.in_channels / geometry.groups;
  shape.depth = geometry.kernel_h * geometry.kernel_w * shape.group_channels;
  shape.band_width =
      (out_width - 1) * geometry.stride_w + (geometry.kernel_w - 1) * geometry.dilation_w + 1;
  shape.used_width = max_of(min_of(input.width, shape.band_width - geometry.pad_left), 0);
  return shape;
}

inline int64_t band_height(const WindowShape& shape, int64_t out_rows) {
  const ConvGeometry& g = shape.geometry;
  return (out_rows - 1) * g.stride_h + (g.kernel_h - 1) * g.dilation_h + 1;
}

inline int64_t band_elements(const WindowShape& shape, int64_t out_rows) {
  return band_height(shape, out_rows) * shape.band_width * shape.geometry.in_channels;
}

// Output rows worked on at a time, so that their input stays in the second-level cache.
inline int64_t rows_per_band(const WindowShape& shape, int64_t out_rows, size_t element_bytes) {
  constexpr int64_t kBandBytes = 256 << 10;
  const int64_t row_bytes =
      shape.band_width * shape.geometry.in_channels * static_cast<int64_t>(element_bytes);
  const int64_t affordable = kBandBytes / max_of(row_bytes, 1) - band_height(shape, 1);
  return max_of(min_of(out_rows, affordable / shape.geometry.stride_h + 1), 1);
}

// Whether any window of the band reads the band's row `row` (strides may jump over some).
inline bool row_is_used(const ConvGeometry& g, int64_t row) {
  if (g.dilation_h == 1 && g.stride_h <= g.kernel_h) return true;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    if ((row - kh * g.dilation_h) % g.stride_h == 0) return true;
  }
  return false;
}

template <typename T>
struct Band {
  T* data = nullptr;  // (groups, height, band_width, group_channels)
  int64_t height = 0;
};

// Fills the band for output rows [row_begin, row_end). read(y, dst) gives the first used_width
// pixels of input row y with all channels innermost; `pixels` is room for one such row.
template <typename T, typename ReadRow>
inline void load_band(const WindowShape& shape, int64_t row_begin, int64_t row_end, T* pixels,
                      Band<T>* band, ReadRow read) {
  const ConvGeometry& g = shape.geometry;
  const int64_t channels = shape.group_channels;
  const int64_t row_elements = shape.band_width * channels;
  band->height = band_height(shape, row_end - row_begin);
  const int64_t group_elements = band->height * row_elements;
  const int64_t first = row_begin * g.stride_h - g.pad_top;
  const int64_t left = min_of(g.pad_left, shape.band_width) * channels;
  const int64_t used = shape.used_width * channels;
  const int64_t right = row_elements - left - used;
  for (int64_t row = 0; row < band->height; ++row) {
    if (!row_is_used(g, row)) continue;
    T* dst = band->data + row * row_elements;
    const int64_t y = first + row;
    const bool inside = y >= 0 && y < shape.in_height && used > 0;
    if (!inside) {
      for (int64_t i = 0; i < g.groups; ++i) {
        std::memset(dst + i * group_elements, 0, static_cast<size_t>(row_elements) * sizeof(T));
      }
      continue;
    }
    for (int64_t i = 0; i < g.groups; ++i) {
      T* group = dst + i * group_elements;
      std::memset(group, 0, static_cast<size_t>(left) * sizeof(T));
      std::memset(group + left + used, 0, static_cast<size_t>(right) * sizeof(T));
    }
    if (g.groups == 1) {
      read(y, dst + left);
      continue;
    }
    read(y, pixels);
    for (int64_t i = 0; i < g.groups; ++i) {
      T* group = dst + i * group_elements + left;
      const T* src = pixels + i * channels;
      for (int64_t x = 0; x < shape.used_width; ++x) {
        for (int64_t c = 0; c < channels; ++c) {
          group[x * channels + c] = src[x * g.in_channels + c];
        }
      }
    }
  }
}

// Calls fn(y, x, run, offset) for each piece of an output row in pixels [first, first + count).
template <typename Fn>
inline void for_each_run(int64_t first, int64_t count, int64_t width, Fn fn) {
  int64_t offset = 0;
  while (offset < count) {
    const int64_t y = (first + offset) / width;
    const int64_t x = (first + offset) % width;
    const int64_t run = min_of(width - x, count - offset);
    fn(y, x, run, offset);
    offset += run;
  }
}

// The first of a window's runs of contiguous values; see copy_window.
template <typename T>
inline T* window_origin(const WindowShape& shape, const Band<T>& band, int64_t group, int64_t row,
                        int64_t x) {
  const ConvGeometry& g = shape.geometry;
  return band.data +
         ((group * band.height + row * g.stride_h) * shape.band_width + x * g.stride_w) *
             shape.group_channels;
}

// The window of one output pixel (row counts from the band's first output row) in kernel_h,
// kernel_w, channel order.
template <typename T>
inline void copy_window(const WindowShape& shape, const Band<T>& band, int64_t group, int64_t row,
                        int64_t x, T* dst) {
  const ConvGeometry& g = shape.geometry;
  const T* origin = window_origin(shape, band, group, row, x);
  const int64_t row_step = g.dilation_h * shape.band_width * shape.group_channels;
  const bool dense = g.dilation_w == 1;
  const int64_t runs = dense ? 1 : g.kernel_w;
  const int64_t run = (dense ? g.kernel_w : 1) * shape.group_channels;
  const int64_t run_step = g.dilation_w * shape.group_channels;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    const T* src = origin + kh * row_step;
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t c = 0; c < run; ++c) dst[c] = src[i * run_step + c];
      dst += run;
    }
  }
}

// The transpose of copy_window: adds a window back into the band it came from.
inline void add_window(const WindowShape& shape, const Band<float>& band, int64_t group,
                       int64_t row, int64_t x, const float* src) {
  const ConvGeometry& g = shape.geometry;
  float* origin = window_origin(shape, band, group, row, x);
  const int64_t row_step = g.dilation_h * shape.band_width * shape.group_channels;
  const bool dense = g.dilation_w == 1;
  const int64_t runs = dense ? 1 : g.kernel_w;
  const int64_t run = (dense ? g.kernel_w : 1) * shape.group_channels;
  const int64_t run_step = g.dilation_w * shape.group_channels;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    float* dst = origin + kh * row_step;
    for (int64_t i = 0; i < runs; ++i) {
      for (int64_t c = 0; c < run; ++c) dst[i * run_step + c] += src[c];
      src += run;
    }
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
