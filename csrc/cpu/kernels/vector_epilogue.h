// From sums to stored results, a vector of output channels at a time: y = sum * m + c, + residual,
// ReLU, store, for the forms whose channels lie side by side in memory.
#pragma once

#include "conv_rows.h"
#include "feature_map_rows.h"
#include "isa.h"
#include "kernel_table.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Memory of pixels whose channels are adjacent; steps in bytes.
struct PixelMemory {
  uint8_t* base = nullptr;
  int64_t row_step = 0;
  int64_t pixel_step = 0;

  uint8_t* at(int64_t y, int64_t x) const { return base + y * row_step + x * pixel_step; }
};

enum class ResidualForm { kNone, kBytes, kFloats };

struct VectorEpilogue {
  const float* multiplier = nullptr;  // (O)
  const float* offset = nullptr;
  ResidualForm residual_form = ResidualForm::kNone;
  PixelMemory residual;
  ActivationRange residual_range;
  bool relu = false;
  int32_t bits = 32;  // of the output
  PixelMemory output;
  ActivationRange range;
};

inline PixelMemory pixel_memory(const SampleView& view) {
  if (view.values == nullptr) return {view.row, view.width * view.pixel_bytes, view.pixel_bytes};
  constexpr int64_t kFloatBytes = sizeof(float);
  return {reinterpret_cast<uint8_t*>(view.values), view.stride_h * kFloatBytes,
          view.stride_w * kFloatBytes};
}

inline bool has_adjacent_channels(const SampleView& view) {
  return view.values == nullptr || view.stride_c == 1 || view.channels == 1;
}

// Whether vectors can read the residual and write the output where they are. The runs of so many
// channels that vectors are counted in must begin at a byte.
inline bool fits_vector_epilogue(const ConvTask& task, int64_t run_channels) {
  const MixedConv2dArgs& args = *task.args;
  const SampleView output = sample_view(args.output, task.sample);
  if (output.bits == 0 || !has_adjacent_channels(output)) return false;
  if (run_channels < output.channels && run_channels * output.bits % 8 != 0) return false;
  if (!args.has_residual) return true;
  const SampleView residual = sample_view(args.residual, task.sample);
  return has_adjacent_channels(residual) && (residual.bits == 8 || residual.bits == 32);
}

inline VectorEpilogue vector_epilogue(const ConvTask& task) {
  const MixedConv2dArgs& args = *task.args;
  VectorEpilogue epilogue;
  epilogue.multiplier = task.multiplier;
  epilogue.offset = task.offset;
  if (args.has_residual) {
    SampleView residual = sample_view(args.residual, task.sample);
    if (residual.values == nullptr) residual.row = const_cast<uint8_t*>(task.residual_row);
    epilogue.residual_form = residual.bits == 8 ? ResidualForm::kBytes : ResidualForm::kFloats;
    epilogue.residual = pixel_memory(residual);
    epilogue.residual_range = residual.range;
  }
  const SampleView output = sample_view(args.output, task.sample);
  epilogue.bits = output.bits;
  epilogue.output = pixel_memory(output);
  epilogue.range = output.range;
  // Codes of a zero point of 0 are rectified by their range: negative values and NaN give 0.
  epilogue.relu = args.relu && (output.bits == 32 || output.range.zero_point != 0);
  return epilogue;
}

// y of a block of pixels, before a residual, into float memory; block_epilogue does the rest.
inline VectorEpilogue scaling_epilogue(const ConvTask& task, float* block, int64_t channels) {
  VectorEpilogue epilogue;
  epilogue.relu = task.args->relu && !task.args->has_residual;
  epilogue.multiplier = task.multiplier;
  epilogue.offset = task.offset;
  epilogue.output.base = reinterpret_cast<uint8_t*>(block);
  epilogue.output.pixel_step = channels * static_cast<int64_t>(sizeof(float));
  return epilogue;
}

inline Epilogue block_epilogue(const ConvTask& task, float* values, uint8_t* codes) {
  Epilogue epilogue = conv_epilogue(task, values, codes);
  epilogue.relu = epilogue.relu && epilogue.has_residual;
  return epilogue;
}

// What is needed to finish one vector of channels [first, first + count), count <= kLanes.
template <ResidualForm kResidual, bool kWhole>
struct VectorFinish {
  const VectorEpilogue& e;
  int64_t count;
  Floats multiplier;
  Floats offset;
  Floats inverse_scale;
  Floats low;
  Floats high;
  Ints zero_point;
  Floats residual_scale;
  Ints residual_zero_point;

  VectorFinish(const VectorEpilogue& epilogue, int64_t first, int64_t channels)
      : e(epilogue), count(channels) {
    multiplier = load(e.multiplier + first);
    offset = load(e.offset + first);
    inverse_scale = splat(e.range.inverse_scale);
    low = splat(e.range.low);
    high = splat(e.range.high);
    zero_point = splat(e.range.zero_point);
    residual_scale = splat(e.residual_range.scale);
    residual_zero_point = splat(e.residual_range.zero_point);
  }

  Floats load(const void* src) const { return kWhole ? load_floats(src) : load_floats(src, count); }

  // y of one pixel.
  Floats value(Floats sums, const uint8_t* residual) const {
    Floats y = add(multiply(sums, multiplier), offset);
    if constexpr (kResidual == ResidualForm::kBytes) {
      const Ints codes = kWhole ? load_bytes(residual) : load_bytes(residual, count);
      y = add(y, multiply(to_floats(subtract(codes, residual_zero_point)), residual_scale));
    } else if constexpr (kResidual == ResidualForm::kFloats) {
      y = add(y, load(residual));
    }
    return e.relu ? rectify(y) : y;
  }

  Ints code(Floats y) const {
    const Floats level = min(max(multiply(y, inverse_scale), low), high);
    return add(round_to_ints(level), zero_point);
  }

  // The same for a zero point of 0, except that any negative number stands for 0. (Of two operands
  // min gives the second if either is NaN, and NaN is rounded to the smallest integer.)
  Ints code_or_negative(Floats y) const {
    return round_to_ints(min(high, multiply(y, inverse_scale)));
  }
};

// One vector of channels [first, first + count) of a run of pixels, count <= kLanes; sums_of(p)
// gives the sums of its pixel p as floats. kBits is the output's, 32 for floats.
template <int kBits, ResidualForm kResidual, bool kWhole, typename Sums>
inline void finish_vector_as(const VectorEpilogue& e, int64_t y, int64_t x, int64_t pixels,
                             int64_t first, int64_t count, Sums sums_of) {
  constexpr int64_t kFloatBytes = sizeof(float);
  const VectorFinish<kResidual, kWhole> finish(e, first, count);
  const int64_t residual_step = e.residual.pixel_step;
  const int64_t output_step = e.output.pixel_step;
  const uint8_t* residual = nullptr;
  if constexpr (kResidual != ResidualForm::kNone) {
    residual = e.residual.at(y, x) +
               first * (kResidual == ResidualForm::kFloats ? kFloatBytes : int64_t{1});
  }
  uint8_t* output = e.output.at(y, x) + first * kBits / 8;
  int64_t p = 0;
  if constexpr (kBits != 32 && kWhole) {
    if (e.range.zero_point == 0) {
      for (; p + kStoredPixels <= pixels; p += kStoredPixels) {
        Ints codes[kStoredPixels];
        unroll<kStoredPixels>([&](auto i) {
          const Floats value = finish.value(sums_of(p + i), residual + i * residual_step);
          codes[i] = finish.code_or_negative(value);
        });
        store_pixels<kBits>(output, output_step, codes);
        residual += kStoredPixels * residual_step;
        output += kStoredPixels * output_step;
      }
    }
  }
  for (; p < pixels; ++p) {
    const Floats value = finish.value(sums_of(p), residual);
    if constexpr (kBits == 32) {
      if constexpr (kWhole) {
        store(output, value);
      } else {
        store(output, value, count);
      }
    } else if constexpr (kWhole) {
      store_lanes<kBits>(output, finish.code(value));
    } else {
      store_lanes<kBits>(output, finish.code(value), count);
    }
    residual += residual_step;
    output += output_step;
  }
}

template <int kBits, ResidualForm kResidual, typename Sums>
inline void finish_vector_of(const VectorEpilogue& e, int64_t y, int64_t x, int64_t pixels,
                             int64_t first, int64_t count, Sums sums_of) {
  if (count == kLanes) {
    finish_vector_as<kBits, kResidual, true>(e, y, x, pixels, first, count, sums_of);
  } else {
    finish_vector_as<kBits, kResidual, false>(e, y, x, pixels, first, count, sums_of);
  }
}

template <int kBits, typename Sums>
inline void finish_vector_at(const VectorEpilogue& e, int64_t y, int64_t x, int64_t pixels,
                             int64_t first, int64_t count, Sums sums_of) {
  switch (e.residual_form) {
    case ResidualForm::kNone:
      return finish_vector_of<kBits, ResidualForm::kNone>(e, y, x, pixels, first, count, sums_of);
    case ResidualForm::kBytes:
      return finish_vector_of<kBits, ResidualForm::kBytes>(e, y, x, pixels, first, count, sums_of);
    case ResidualForm::kFloats:
      return finish_vector_of<kBits, ResidualForm::kFloats>(e, y, x, pixels, first, count, sums_of);
  }
}

template <typename Sums>
inline void finish_vector(const VectorEpilogue& e, int64_t y, int64_t x, int64_t pixels,
                          int64_t first, int64_t count, Sums sums_of) {
  switch (e.bits) {
    case 2:
      return finish_vector_at<2>(e, y, x, pixels, first, count, sums_of);
    case 4:
      return finish_vector_at<4>(e, y, x, pixels, first, count, sums_of);
    case 8:
      return finish_vector_at<8>(e, y, x, pixels, first, count, sums_of);
    default:
      return finish_vector_at<32>(e, y, x, pixels, first, count, sums_of);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
