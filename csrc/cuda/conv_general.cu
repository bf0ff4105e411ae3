// Mixed convolution of any geometry, product by product: grouped and depthwise layers, kernels too
// large for shared memory, 8-bit centred weights. Reads canonical weights. A thread computes a run
// of four output channels of one pixel.
#include "conv_general.h"
#include "epilogue.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRun = 4;

// Where a thread's products come from.
struct Window {
  int first_y;
  int first_x;
};

// Calls fn(y, x, tap) for each tap inside the input, in order.
template <typename Fn>
DFS_DEVICE void for_each_tap(const ConvParams& p, const Window& window, Fn fn) {
  for (int kh = 0; kh < p.kernel_h; ++kh) {
    const int y = window.first_y + kh * p.dilation_h;
    if (y < 0 || y >= p.input.height) continue;
    for (int kw = 0; kw < p.kernel_w; ++kw) {
      const int x = window.first_x + kw * p.dilation_w;
      if (x >= 0 && x < p.input.width) fn(y, x, kh * p.kernel_w + kw);
    }
  }
}

// (q - z) of an input element.
DFS_DEVICE int input_level(const ConvParams& p, const SampleReader& reader, const Step& step, int y,
                           int x, int channel) {
  const int code =
      p.quantizes ? step.quantize(reader.value(y, x, channel)) : reader.code(y, x, channel);
  return code - step.zero_point;
}

struct WeightRow {
  const uint8_t* codes;
  int bits;
  bool centred;

  DFS_DEVICE int level(int channel) const {
    const int bit = channel * bits;
    const int sign = 1 << (bits - 1);
    const int low = (codes[bit >> 3] >> (bit & 7)) & (2 * sign - 1);
    const int code = (low ^ sign) - sign;
    return centred ? 2 * code + 1 : code;
  }
};

DFS_DEVICE int32_t integer_sum(const ConvParams& p, const BlockTask& task,
                               const SampleReader& reader, const Step& step, const Window& window,
                               int o) {
  const int channels = p.group_channels();
  const int first = o / p.group_outputs() * channels;
  const int row_bytes = packed_bytes(channels, task.bits);
  const auto* filter = to_global(static_cast<const uint8_t*>(p.tiles[task.slot])) +
                       static_cast<int64_t>(o) * p.taps() * row_bytes;
  int32_t sum = 0;
  for_each_tap(p, window, [&](int y, int x, int tap) {
    const WeightRow row{filter + tap * row_bytes, task.bits, p.centred[task.slot]};
    for (int c = 0; c < channels; ++c) {
      sum += input_level(p, reader, step, y, x, first + c) * row.level(c);
    }
  });
  return sum;
}

DFS_DEVICE float float_sum(const ConvParams& p, const SampleReader& reader, const Window& window,
                           int o) {
  const int channels = p.group_channels();
  const int first = o / p.group_outputs() * channels;
  const auto* filter = to_global(static_cast<const float*>(p.tiles[3])) +
                       static_cast<int64_t>(o) * p.taps() * channels;
  float sum = 0.0f;
  for_each_tap(p, window, [&](int y, int x, int tap) {
    for (int c = 0; c < channels; ++c) {
      sum = multiply_add(reader.value(y, x, first + c), filter[tap * channels + c], sum);
    }
  });
  return sum;
}

DFS_KERNEL(kThreads, 4)
conv_general_kernel(DFS_PARAMS(ConvParams) p) {
  const BlockTask task = block_task(p);
  if (is_rest(p, task)) return;
  const int runs = divide_up(p.output.channels, kRun);
  const int item = task.part * kThreads + thread_index();
  const int pixel = item / runs;
  if (pixel >= p.output.pixels()) return;
  const int first = item % runs * kRun;
  const RunPlace place{pixel / p.output.width, pixel % p.output.width, first,
                       least(kRun, p.output.channels - first)};
  const Window window{place.y * p.stride_h - p.pad_top, place.x * p.stride_w - p.pad_left};
  const SampleReader reader = reader_of(p.input, task.sample);
  const Step step = input_step(p, task.bits);
  float y[kRun];
  for (int i = 0; i < kRun; ++i) {
    const int o = first + least(i, place.count - 1);
    const Affine affine = affine_of(p, task.slot, step.scale, o);
    const float sum = task.slot == 3 ? float_sum(p, reader, window, o)
                                     : to_float(integer_sum(p, task, reader, step, window, o));
    y[i] = add(multiply(sum, affine.multiplier), affine.offset);
  }
  epilogue_of(p, task.sample).finish<kRun>(place, y);
}

}  // namespace

void launch_general(ConvParams p, Stream stream) {
  const int64_t runs = divide_up(p.output.channels, kRun);
  p.tiles_per_sample = static_cast<int>(ceil_div(p.output.pixels() * runs, kThreads));
  launch("conv_general", &conv_general_kernel, {p.batch * p.tiles_per_sample, kThreads, 0}, p,
         stream);
}

}  // namespace dfs::cuda
