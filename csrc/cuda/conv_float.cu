// Convolution of the samples at 32 bits in float32, as a product of matrices: pixels x products and
// products x output channels, both staged in shared memory 16 products at a time. A thread sums 4
// pixels x 4 channels, each sum in the order of taps and then channels, whatever the batch.
#include "conv_float.h"
#include "epilogue.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kPixels = 64;
constexpr int kOutputs = 32;
constexpr int kProducts = 16;
constexpr int kRun = 4;
// A row more than needed, so that storing columns meets different banks.
constexpr int kPixelStride = kPixels + 4;
constexpr int kOutputStride = kOutputs + 4;

struct FloatTask {
  int first_pixel;
  int group;
  int first_output;  // within the group
};

DFS_DEVICE FloatTask float_task(const ConvParams& p, int part) {
  const int output_tiles = divide_up(p.group_outputs(), kOutputs);
  FloatTask task;
  task.first_output = part % output_tiles * kOutputs;
  part /= output_tiles;
  task.group = part % p.groups;
  task.first_pixel = part / p.groups * kPixels;
  return task;
}

// Values of products `first` and so on: [kProducts][kPixelStride], zero in the padding.
DFS_DEVICE void stage_input(const ConvParams& p, const SampleReader& reader, const FloatTask& task,
                            int first, float* to) {
  const int channels = p.group_channels();
  // Pixels lie next to each other in planes, channels in rows.
  const bool pixels_first = reader.row == nullptr && reader.stride_c != 1;
  for (int i = thread_index(); i < kProducts * kPixels; i += kThreads) {
    const int k = pixels_first ? i / kPixels : i % kProducts;
    const int j = pixels_first ? i % kPixels : i / kProducts;
    const int product = first + k;
    const int pixel = task.first_pixel + j;
    float value = 0.0f;
    if (product < channels * p.taps() && pixel < p.output.pixels()) {
      const int tap = product / channels;
      const int y =
          pixel / p.output.width * p.stride_h - p.pad_top + tap / p.kernel_w * p.dilation_h;
      const int x =
          pixel % p.output.width * p.stride_w - p.pad_left + tap % p.kernel_w * p.dilation_w;
      if (y >= 0 && y < p.input.height && x >= 0 && x < p.input.width) {
        value = reader.value(y, x, task.group * channels + product % channels);
      }
    }
    to[k * kPixelStride + j] = value;
  }
}

// [kProducts][kOutputStride]
DFS_DEVICE void stage_weights(const ConvParams& p, const FloatTask& task, int first, float* to) {
  const int products = p.group_channels() * p.taps();
  const auto* weights = to_global(static_cast<const float*>(p.tiles[3]));
  for (int i = thread_index(); i < kProducts * kOutputs; i += kThreads) {
    const int k = i % kProducts;
    const int j = i / kProducts;
    const int o = task.first_output + j;
    float value = 0.0f;
    if (first + k < products && o < p.group_outputs()) {
      const int64_t row = static_cast<int64_t>(task.group) * p.group_outputs() + o;
      value = weights[row * products + first + k];
    }
    to[k * kOutputStride + j] = value;
  }
}

DFS_KERNEL(kThreads, 4)
conv_float_kernel(DFS_PARAMS(ConvParams) p) {
  const BlockTask task = block_task(p);
  if (is_rest(p, task)) return;
  auto* input = reinterpret_cast<float*>(shared_memory());
  float* weights = input + kProducts * kPixelStride;
  const FloatTask part = float_task(p, task.part);
  const SampleReader reader = reader_of(p.input, task.sample);
  const int my_pixel = thread_index() / 8 * 4;
  const int my_output = thread_index() % 8 * kRun;
  float sums[4][kRun] = {};
  for (int first = 0; first < p.group_channels() * p.taps(); first += kProducts) {
    if (first > 0) sync_block();
    stage_input(p, reader, part, first, input);
    stage_weights(p, part, first, weights);
    sync_block();
    DFS_UNROLL for (int k = 0; k < kProducts; ++k) {
      const Words4 x = *reinterpret_cast<const Words4*>(input + k * kPixelStride + my_pixel);
      const Words4 w = *reinterpret_cast<const Words4*>(weights + k * kOutputStride + my_output);
      DFS_UNROLL for (int i = 0; i < 4; ++i) {
        DFS_UNROLL for (int j = 0; j < kRun; ++j) {
          sums[i][j] = multiply_add(bits_to_float(x.word[i]), bits_to_float(w.word[j]), sums[i][j]);
        }
      }
    }
  }
  const int count = least(kRun, p.group_outputs() - part.first_output - my_output);
  if (count <= 0) return;
  const int first = part.group * p.group_outputs() + part.first_output + my_output;
  const Epilogue epilogue = epilogue_of(p, task.sample);
  Affine affines[kRun];
  DFS_UNROLL for (int j = 0; j < kRun; ++j) affines[j] =
      affine_of(p, 3, 1.0f, first + (j < count ? j : 0));
  DFS_UNROLL for (int i = 0; i < 4; ++i) {
    const int pixel = part.first_pixel + my_pixel + i;
    if (pixel < p.output.pixels()) {
      const RunPlace place{pixel / p.output.width, pixel % p.output.width, first, count};
      float y[kRun];
      DFS_UNROLL for (int j = 0; j < kRun; ++j) {
        y[j] = add(multiply(sums[i][j], affines[j].multiplier), affines[j].offset);
      }
      epilogue.finish<kRun>(place, y);
    }
  }
}

}  // namespace

// Runs of channels must begin at whole bytes.
bool takes_float(const ConvGeometry& g) {
  return g.groups == 1 || g.out_channels / g.groups % kRun == 0;
}

void launch_float(ConvParams p, Stream stream) {
  const int64_t pixel_tiles = ceil_div(p.output.pixels(), kPixels);
  p.tiles_per_sample =
      static_cast<int>(pixel_tiles * p.groups * divide_up(p.group_outputs(), kOutputs));
  constexpr int kShared = kProducts * (kPixelStride + kOutputStride) * 4;
  launch("conv_float", &conv_float_kernel, {p.batch * p.tiles_per_sample, kThreads, kShared}, p,
         stream);
}

}  // namespace dfs::cuda
