// The mixed convolution of some output rows of one sample, epilogue included.
#pragma once

#include "dot_blocks.h"
#include "feature_map_rows.h"
#include "filter_layout.h"
#include "isa.h"
#include "kernel_table.h"
#include "quantizer.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// What happens to y: + residual, ReLU, store.
struct Epilogue {
  bool has_residual;
  SampleView residual;
  bool relu;
  SampleView output;
  float* values;   // scratch, one block of pixels
  uint8_t* codes;  // scratch, one block of pixels
};

inline void finish_run(const Epilogue& epilogue, int64_t y, int64_t x, int64_t pixels,
                       float* values) {
  const int64_t count = pixels * epilogue.output.channels;
  if (epilogue.has_residual) {
    read_pixels(epilogue.residual, y, x, pixels, epilogue.codes, epilogue.values);
    const float* residual = epilogue.values;
    for (int64_t i = 0; i < count; ++i) values[i] += residual[i];
  }
  if (epilogue.relu) {
    for (int64_t i = 0; i < count; ++i) {
      // Keeps NaN.
      const float value = values[i];
      values[i] = value <= 0.0f ? 0.0f : value;
    }
  }
  write_pixels(epilogue.output, y, x, pixels, values, epilogue.codes);
}

inline void finish_pixels(const Epilogue& epilogue, int64_t first, int64_t count, float* values) {
  const int64_t channels = epilogue.output.channels;
  for_each_run(first, count, epilogue.output.width,
               [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                 finish_run(epilogue, y, x, run, values + offset * channels);
               });
}

// Pixels worked on at a time: their windows stay in the first-level cache.
inline int64_t pixels_per_block(int64_t window_bytes) {
  constexpr int64_t kBlockBytes = 16 << 10;
  return max_of(min_of(kBlockBytes / window_bytes, 32), 4) / 4 * 4;
}

template <typename T>
struct ConvScratch {
  Band<T> band;
  T* row;  // one input row before its channels are split into groups
  float* row_values;
  uint8_t* row_codes;
  T* windows;
  int32_t* sums;
  float* block;
  float* epilogue_values;
  uint8_t* epilogue_codes;
  size_t bytes;
};

template <typename T>
inline int64_t window_stride(const WindowShape& shape) {
  return round_up(shape.depth, kDepthStep);
}

template <typename T>
inline ConvScratch<T> conv_scratch(const WindowShape& shape, int64_t out_height, void* memory) {
  Arena arena(memory);
  ConvScratch<T> scratch;
  const int64_t rows = rows_per_band(shape, out_height, sizeof(T));
  const int64_t row_elements = shape.used_width * shape.geometry.in_channels;
  const int64_t stride = window_stride<T>(shape);
  const int64_t pixels = pixels_per_block(stride * static_cast<int64_t>(sizeof(T)));
  const int64_t outputs = pixels * shape.geometry.out_channels;
  scratch.band.data = arena.take<T>(band_elements(shape, rows));
  scratch.row = arena.take<T>(row_elements);
  scratch.row_values = arena.take<float>(row_elements);
  scratch.row_codes = arena.take<uint8_t>(row_elements);
  scratch.windows = arena.take<T>(pixels * stride);
  scratch.sums = arena.take<int32_t>(outputs);
  scratch.block = arena.take<float>(outputs);
  scratch.epilogue_values = arena.take<float>(outputs);
  scratch.epilogue_codes = arena.take<uint8_t>(outputs);
  scratch.bytes = arena.used();
  return scratch;
}

inline Epilogue conv_epilogue(const ConvTask& task, float* values, uint8_t* codes) {
  const MixedConv2dArgs& args = *task.args;
  Epilogue epilogue;
  epilogue.has_residual = args.has_residual;
  if (args.has_residual) {
    epilogue.residual = sample_view(args.residual, task.sample);
    // Never written through.
    epilogue.residual.row = const_cast<uint8_t*>(task.residual_row);
  }
  epilogue.relu = args.relu;
  epilogue.output = sample_view(args.output, task.sample);
  epilogue.values = values;
  epilogue.codes = codes;
  return epilogue;
}

// One block of pixels of a group: float32 products, the output channels of a panel side by side.
inline void multiply_windows(const ConvTask& task, const WindowShape& shape, int64_t group,
                             const ConvScratch<float>& scratch, int64_t pixels) {
  const int64_t out_channels = shape.geometry.out_channels;
  const int64_t outputs = out_channels / shape.geometry.groups;
  const int64_t panels = ceil_div(outputs, kFloatColumns);
  const int64_t stride = window_stride<float>(shape);
  const float* tile =
      static_cast<const float*>(task.tile) + group * panels * shape.depth * kFloatColumns;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t first = panel * kFloatColumns;
    const int64_t count = min_of(outputs - first, kFloatColumns);
    float* dst = scratch.block + group * outputs + first;
    float_rows(scratch.windows, pixels, stride, 1, tile + panel * shape.depth * kFloatColumns,
               kFloatColumns, shape.depth, [&](int64_t pixel, const float* sums) {
                 for (int64_t o = 0; o < count; ++o) dst[pixel * out_channels + o] = sums[o];
               });
  }
}

inline void multiply_windows(const ConvTask& task, const WindowShape& shape, int64_t group,
                             const ConvScratch<int16_t>& scratch, int64_t pixels) {
  const int64_t out_channels = shape.geometry.out_channels;
  const int64_t outputs = out_channels / shape.geometry.groups;
  const int64_t stride = window_stride<int16_t>(shape);
  const int16_t* tile = static_cast<const int16_t*>(task.tile) + group * outputs * stride;
  dot_all(scratch.windows, pixels, tile, outputs, stride, scratch.sums + group * outputs,
          out_channels);
}

inline void scale_sums(const ConvTask& task, int64_t pixels, int64_t channels,
                       const ConvScratch<float>& scratch) {
  for (int64_t p = 0; p < pixels; ++p) {
    float* values = scratch.block + p * channels;
    for (int64_t o = 0; o < channels; ++o) {
      values[o] = values[o] * task.multiplier[o] + task.offset[o];
    }
  }
}

inline void scale_sums(const ConvTask& task, int64_t pixels, int64_t channels,
                       const ConvScratch<int16_t>& scratch) {
  const float* multiplier = task.multiplier;
  const float* offset = task.offset;
  for (int64_t p = 0; p < pixels; ++p) {
    const int32_t* sums = scratch.sums + p * channels;
    float* values = scratch.block + p * channels;
    for (int64_t o = 0; o < channels; ++o) {
      values[o] = static_cast<float>(sums[o]) * multiplier[o] + offset[o];
    }
  }
}

template <typename T, typename ReadRow>
inline void conv_rows_of(const ConvTask& task, const WindowShape& shape, ConvScratch<T> scratch,
                         ReadRow read) {
  const ConvGeometry& g = shape.geometry;
  const int64_t stride = window_stride<T>(shape);
  const int64_t block = pixels_per_block(stride * static_cast<int64_t>(sizeof(T)));
  const int64_t band_rows = rows_per_band(shape, task.args->output.height, sizeof(T));
  const Epilogue epilogue = conv_epilogue(task, scratch.epilogue_values, scratch.epilogue_codes);
  for (int64_t p = 0; p < block; ++p) {
    for (int64_t k = shape.depth; k < stride; ++k) scratch.windows[p * stride + k] = T{0};
  }
  for (int64_t begin = task.row_begin; begin < task.row_end; begin += band_rows) {
    const int64_t end = min_of(begin + band_rows, task.row_end);
    load_band(shape, begin, end, scratch.row, &scratch.band, read);
    const int64_t pixels = (end - begin) * shape.out_width;
    for (int64_t first = 0; first < pixels; first += block) {
      const int64_t count = min_of(pixels - first, block);
      for (int64_t group = 0; group < g.groups; ++group) {
        for_each_run(first, count, shape.out_width,
                     [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                       for (int64_t i = 0; i < run; ++i) {
                         copy_window(shape, scratch.band, group, y, x + i,
                                     scratch.windows + (offset + i) * stride);
                       }
                     });
        multiply_windows(task, shape, group, scratch, count);
      }
      scale_sums(task, count, g.out_channels, scratch);
      finish_pixels(epilogue, begin * shape.out_width + first, count, scratch.block);
    }
  }
}

inline size_t conv_scratch_bytes(const MixedConv2dArgs& args, int32_t bits) {
  if (bits == 0) return convert_scratch_bytes(args.output.channels, args.output.width);
  const WindowShape shape = window_shape(args.geometry, args.input, args.output.width);
  return bits == 32 ? conv_scratch<float>(shape, args.output.height, nullptr).bytes
                    : conv_scratch<int16_t>(shape, args.output.height, nullptr).bytes;
}

// Reads the first used_width pixels of an input row, as what is multiplied: floats at 32 bits, else
// distances from the zero point.
struct RowReader {
  SampleView input;
  int64_t pixels;
  bool as_stored;  // codes are used as they are
  ActivationRange range;
  float* values;  // scratch, one row
  uint8_t* codes;

  void operator()(int64_t y, float* dst) const { read_pixels(input, y, 0, pixels, codes, dst); }

  void operator()(int64_t y, int16_t* levels) const {
    const int64_t count = pixels * input.channels;
    if (as_stored) {
      unpack_pixels(pixel_codes(input, y, 0), pixels, input.channels, input.bits, false, codes);
      levels_from_codes(codes, count, range.zero_point, levels);
      return;
    }
    read_pixels(input, y, 0, pixels, codes, values);
    levels_from_floats(values, count, range, levels);
  }
};

inline RowReader row_reader(const ConvTask& task, const WindowShape& shape, float* values,
                            uint8_t* codes) {
  const MixedConv2dArgs& args = *task.args;
  RowReader reader;
  reader.input = sample_view(args.input, task.sample);
  reader.pixels = shape.used_width;
  reader.as_stored = loads_as_stored(args);
  reader.range = loaded_range(task, reader.input);
  reader.values = values;
  reader.codes = codes;
  return reader;
}

template <typename T>
inline void conv_rows_as(const ConvTask& task, void* memory) {
  const MixedConv2dArgs& args = *task.args;
  const WindowShape shape = window_shape(args.geometry, args.input, args.output.width);
  const auto scratch = conv_scratch<T>(shape, args.output.height, memory);
  conv_rows_of(task, shape, scratch,
               row_reader(task, shape, scratch.row_values, scratch.row_codes));
}

inline void conv_rows(const ConvTask& task, void* memory) {
  if (task.bits == 32) return conv_rows_as<float>(task, memory);
  conv_rows_as<int16_t>(task, memory);
}

inline bool same_encoding(const SampleView& a, const SampleView& b) {
  return a.values == nullptr && b.values == nullptr && a.bits == b.bits &&
         (a.bits == 32 ||
          (a.range.scale == b.range.scale && a.range.zero_point == b.range.zero_point));
}

// Calls fn(first element, elements) for runs of neighbouring float32 elements in rows [row_begin,
// row_end) of a sample, as long as the strides allow. False if no elements are neighbours.
template <typename Fn>
inline bool for_each_dense_run(const SampleView& view, int64_t row_begin, int64_t row_end, Fn fn) {
  const int64_t rows = row_end - row_begin;
  const bool interleaved = view.stride_c == 1 && view.stride_w == view.channels;
  if (!interleaved && view.stride_w != 1) return false;
  const int64_t row_elements = interleaved ? view.width * view.channels : view.width;
  const bool dense_rows = view.stride_h == row_elements;
  for (int64_t c = 0; c < (interleaved ? 1 : view.channels); ++c) {
    for (int64_t y = row_begin; y < row_end; y += dense_rows ? rows : 1) {
      fn(c * view.stride_c + y * view.stride_h, dense_rows ? rows * row_elements : row_elements);
    }
  }
  return true;
}

// Calls fn(element) for every element of some rows.
template <typename Fn>
inline void for_each_element(const SampleView& view, int64_t row_begin, int64_t row_end, Fn fn) {
  for (int64_t y = row_begin; y < row_end; ++y) {
    for (int64_t c = 0; c < view.channels; ++c) {
      for (int64_t x = 0; x < view.width; ++x) fn(c, y, x);
    }
  }
}

inline void zero_rows(const SampleView& to, int64_t row_begin, int64_t row_end) {
  const bool done = for_each_dense_run(to, row_begin, row_end, [&](int64_t first, int64_t count) {
    std::memset(to.values + first, 0, static_cast<size_t>(count) * sizeof(float));
  });
  if (done) return;
  for_each_element(to, row_begin, row_end, [&](int64_t c, int64_t y, int64_t x) {
    to.values[c * to.stride_c + y * to.stride_h + x * to.stride_w] = 0.0f;
  });
}

inline void copy_rows(const SampleView& from, const SampleView& to, int64_t row_begin,
                      int64_t row_end) {
  if (from.stride_c == to.stride_c && from.stride_h == to.stride_h &&
      from.stride_w == to.stride_w) {
    const bool done = for_each_dense_run(to, row_begin, row_end, [&](int64_t first, int64_t count) {
      std::memcpy(to.values + first, from.values + first,
                  static_cast<size_t>(count) * sizeof(float));
    });
    if (done) return;
  }
  for_each_element(to, row_begin, row_end, [&](int64_t c, int64_t y, int64_t x) {
    to.values[c * to.stride_c + y * to.stride_h + x * to.stride_w] =
        from.values[c * from.stride_c + y * from.stride_h + x * from.stride_w];
  });
}

inline void skip_rows(const ConvTask& task, void* memory) {
  const FeatureMap& output_map = task.args->output;
  const ConvertScratch scratch = convert_scratch(output_map.channels, output_map.width, memory);
  const Epilogue epilogue = conv_epilogue(task, nullptr, nullptr);
  const SampleView& to = epilogue.output;
  if (to.bits == 0) return;
  const int64_t width = output_map.width;
  const SampleView& from = epilogue.residual;
  if (epilogue.has_residual) {
    if (from.values != nullptr && from.values == to.values && from.stride_c == to.stride_c &&
        from.stride_h == to.stride_h && from.stride_w == to.stride_w) {
      return;
    }
    if (same_encoding(from, to)) {
      if (from.row == to.row) return;
      const int64_t row_bytes = width * to.pixel_bytes;
      std::memcpy(to.row + task.row_begin * row_bytes, from.row + task.row_begin * row_bytes,
                  static_cast<size_t>((task.row_end - task.row_begin) * row_bytes));
      return;
    }
    if (from.values != nullptr && to.values != nullptr) {
      return copy_rows(from, to, task.row_begin, task.row_end);
    }
    for (int64_t y = task.row_begin; y < task.row_end; ++y) {
      read_pixels(from, y, 0, width, scratch.codes, scratch.values);
      write_pixels(to, y, 0, width, scratch.values, scratch.codes);
    }
    return;
  }
  if (to.values != nullptr) return zero_rows(to, task.row_begin, task.row_end);
  for (int64_t i = 0; i < width * to.channels; ++i) scratch.values[i] = 0.0f;
  for (int64_t y = task.row_begin; y < task.row_end; ++y) {
    write_pixels(to, y, 0, width, scratch.values, scratch.codes);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
