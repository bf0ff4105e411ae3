// What the gradients of a convolution are made from: the samples of every width, arranged maps and
// weights, and the sums of the output's gradient.
#include "conv_gradients.h"

namespace dfs::cuda {
namespace {

// One block for all: each thread counts the samples of a run, and places them after those of the
// threads before it.
DFS_KERNEL(kGradientThreads, 1)
sort_samples_kernel(DFS_PARAMS(GradientParams) p) {
  auto* counts = reinterpret_cast<Words4*>(shared_memory());
  const int thread = thread_index();
  const int64_t run = (p.batch + kGradientThreads - 1) / kGradientThreads;
  const int64_t first = thread * run;
  const int64_t last = first + run < p.batch ? first + run : p.batch;
  Words4 mine = {};
  for (int64_t n = first; n < last; ++n) {
    const int slot = gradient_slot(p, n);
    DFS_UNROLL for (int i = 0; i < kSlots; ++i) mine.word[i] += slot == i ? 1u : 0u;
  }
  counts[thread] = mine;
  sync_block();
  Words4 before = {};
  Words4 all = {};
  for (int other = 0; other < kGradientThreads; ++other) {
    const Words4 theirs = counts[other];
    DFS_UNROLL for (int i = 0; i < kSlots; ++i) {
      before.word[i] += other < thread ? theirs.word[i] : 0u;
      all.word[i] += theirs.word[i];
    }
  }
  for (int64_t n = first; n < last; ++n) {
    const int slot = gradient_slot(p, n);
    DFS_UNROLL for (int i = 0; i < kSlots; ++i) {
      if (slot == i) p.order[i * p.batch + before.word[i]++] = static_cast<int32_t>(n);
    }
  }
  if (thread == 0) {
    DFS_UNROLL for (int i = 0; i < kSlots; ++i) p.counts[i] = static_cast<int32_t>(all.word[i]);
  }
}

// A value for each thread: (widths, groups, taps, O/groups, padded C/groups).
DFS_KERNEL(kGradientThreads, 4)
gradient_weights_kernel(DFS_PARAMS(GradientParams) p) {
  const int64_t item = static_cast<int64_t>(block_index()) * kGradientThreads + thread_index();
  const int64_t width_values = static_cast<int64_t>(p.grad_output.channels) * p.window;
  if (item >= p.widths * width_values) return;
  const int width = static_cast<int>(item / width_values);
  int64_t rest = item % width_values;
  const int channel = static_cast<int>(rest % p.padded_channels);
  rest /= p.padded_channels;
  const int output = static_cast<int>(rest % p.group_outputs);
  rest /= p.group_outputs;
  const int tap = static_cast<int>(rest % p.taps());
  const int o = static_cast<int>(rest / p.taps()) * p.group_outputs + output;
  float value = 0.0f;
  if (channel < p.group_channels) {
    const int slot = slot_at(p, width);
    const WeightStep step = weight_step(p, slot, o);
    value = step.value(weight_code(p, slot, step, o, channel, tap));
    if (p.mul != nullptr) {
      value = multiply(value, p.mul[static_cast<int64_t>(width) * p.grad_output.channels + o]);
    }
    if (p.tf32) value = round_to_tf32(value);
  }
  p.values[item] = value;
}

struct ArrangeParams {
  GradientParams gradients;
  Map map;
  float* arranged = nullptr;
  bool quantizes = false;
  int group_channels = 0;
  int padded = 0;
  int pixel_tiles = 0;
  int channel_tiles = 0;      // of a group
  bool reads_planes = false;  // four pixels at a time
  bool reads_pixels = false;  // four channels at a time
};

constexpr int kArrangedPixels = 64;
constexpr int kArrangedChannels = 32;

// What a block arranges: pixels and channels of one group of one sample.
struct ArrangeTask {
  int64_t sample;
  int first_pixel;
  int group;
  int first_channel;  // within the group
  bool quantizes;
  Step step;

  // Of a channel within the group.
  DFS_DEVICE float load(const ArrangeParams& p, int pixel, int channel) const {
    if (pixel >= p.map.pixels() || channel >= p.group_channels) return 0.0f;
    return *address(p, pixel, channel);
  }
  DFS_DEVICE const float* address(const ArrangeParams& p, int pixel, int channel) const {
    const int c = group * p.group_channels + channel;
    return to_global(p.map.values) + sample * p.map.stride_n + c * p.map.stride_c +
           pixel / p.map.width * p.map.stride_h + pixel % p.map.width * p.map.stride_w;
  }
  DFS_DEVICE float finish(const ArrangeParams& p, float value) const {
    if (quantizes) value = fake_quantize(step, value);
    return p.gradients.tf32 ? round_to_tf32(value) : value;
  }
  // `values` of four channels.
  DFS_DEVICE void store(const ArrangeParams& p, int pixel, int channel,
                        const float (&values)[4]) const {
    Words4 words;
    DFS_UNROLL for (int i = 0; i < 4; ++i) {
      const bool exists = channel + i < p.group_channels;
      words.word[i] = exists ? float_to_bits(finish(p, values[i])) : 0u;
    }
    const int groups = p.gradients.groups;
    const int64_t place = (sample * p.map.pixels() + pixel) * groups + group;
    *reinterpret_cast<Words4*>(to_global(p.arranged) + place * p.padded + channel) = words;
  }
};

// Through shared memory: lanes read pixels that lie next to each other, and write channels. It
// holds [channel][pixel], where the quads of a channel are exchanged, by an amount that is its own,
// so that lanes that read four channels of some pixels each meet different banks.
DFS_DEVICE void transpose(const ArrangeParams& p, const ArrangeTask& task, int quads) {
  auto* tile = reinterpret_cast<float*>(shared_memory());
  int lane_quads = 1;
  while (lane_quads < quads) lane_quads *= 2;
  const int spread = 8 / lane_quads;
  const auto place = [spread](int channel, int pixel_quad) {
    return channel * kArrangedPixels + ((pixel_quad ^ channel / 4 * spread) * 4);
  };
  for (int i = thread_index(); i < 4 * quads * (kArrangedPixels / 4); i += kGradientThreads) {
    const int channel = i / (kArrangedPixels / 4);
    const int pixel_quad = i % (kArrangedPixels / 4);
    const int pixel = task.first_pixel + 4 * pixel_quad;
    const int c = task.first_channel + channel;
    Words4 words = {};
    if (p.reads_planes) {
      if (pixel < p.map.pixels() && c < p.group_channels) {
        words = *reinterpret_cast<const Words4*>(task.address(p, pixel, c));
      }
    } else {
      DFS_UNROLL for (int j = 0; j < 4; ++j) words.word[j] =
          float_to_bits(task.load(p, pixel + j, c));
    }
    *reinterpret_cast<Words4*>(tile + place(channel, pixel_quad)) = words;
  }
  sync_block();
  for (int i = thread_index(); i < lane_quads * kArrangedPixels; i += kGradientThreads) {
    const int quad = i % lane_quads;
    const int pixel = i / lane_quads;
    if (quad >= quads || task.first_pixel + pixel >= p.map.pixels()) continue;
    float values[4];
    DFS_UNROLL for (int j = 0; j < 4; ++j) {
      values[j] = tile[place(4 * quad + j, pixel / 4) + pixel % 4];
    }
    task.store(p, task.first_pixel + pixel, task.first_channel + 4 * quad, values);
  }
}

// Where the channels of a pixel lie next to each other already.
DFS_DEVICE void copy_pixels(const ArrangeParams& p, const ArrangeTask& task, int quads) {
  for (int i = thread_index(); i < quads * kArrangedPixels; i += kGradientThreads) {
    const int pixel = task.first_pixel + i / quads;
    const int channel = task.first_channel + i % quads * 4;
    if (pixel >= p.map.pixels()) return;
    const Words4 words = *reinterpret_cast<const Words4*>(task.address(p, pixel, channel));
    float values[4];
    DFS_UNROLL for (int j = 0; j < 4; ++j) values[j] = bits_to_float(words.word[j]);
    task.store(p, pixel, channel, values);
  }
}

DFS_KERNEL(kGradientThreads, 4)
arrange_kernel(DFS_PARAMS(ArrangeParams) p) {
  int64_t rest = block_index();
  ArrangeTask task;
  task.first_channel = static_cast<int>(rest % p.channel_tiles) * kArrangedChannels;
  rest /= p.channel_tiles;
  task.group = static_cast<int>(rest % p.gradients.groups);
  rest /= p.gradients.groups;
  task.first_pixel = static_cast<int>(rest % p.pixel_tiles) * kArrangedPixels;
  task.sample = rest / p.pixel_tiles;
  const int slot = gradient_slot(p.gradients, task.sample);
  if (slot < 0) return;
  task.quantizes = p.quantizes && slot != 3;
  if (task.quantizes) task.step = step_of(p.gradients.input_quantizer, bits_of(slot));
  const int quads = least(kArrangedChannels, p.padded - task.first_channel) / 4;
  if (p.reads_pixels) {
    copy_pixels(p, task, quads);
  } else {
    transpose(p, task, quads);
  }
}

void launch_arrange(const char* name, const GradientParams& gradients, const Map& map,
                    float* arranged, bool quantizes, Stream stream) {
  ArrangeParams p;
  p.gradients = gradients;
  p.map = map;
  p.arranged = arranged;
  p.quantizes = quantizes;
  p.group_channels = map.channels / gradients.groups;
  p.padded = round_up(p.group_channels, 4);
  p.pixel_tiles = divide_up(map.pixels(), kArrangedPixels);
  p.channel_tiles = divide_up(p.padded, kArrangedChannels);
  const bool aligned = is_aligned(map.values, 16) && map.stride_n % 4 == 0;
  p.reads_planes = aligned && map.stride_w == 1 && map.stride_h == map.width &&
                   map.stride_c % 4 == 0 && map.pixels() % 4 == 0;
  p.reads_pixels = aligned && map.stride_c == 1 && map.stride_h % 4 == 0 && map.stride_w % 4 == 0 &&
                   p.group_channels % 4 == 0;
  const int64_t blocks = gradients.batch * p.pixel_tiles * gradients.groups * p.channel_tiles;
  launch(name, &arrange_kernel, {blocks, kGradientThreads, kArrangedPixels * kArrangedChannels * 4},
         p, stream);
}

// A warp for each sample and output channel.
DFS_KERNEL(kGradientThreads, 4)
sum_grad_kernel(DFS_PARAMS(GradientParams) p) {
  const int64_t item = static_cast<int64_t>(block_index()) * kGradientWarps + thread_index() / 32;
  const int channels = p.grad_output.channels;
  if (item >= p.batch * channels) return;
  const int64_t n = item / channels;
  if (gradient_slot(p, n) < 0) return;
  const SampleReader reader = reader_of(p.grad_output, n);
  const int channel = static_cast<int>(item % channels);
  const int width = p.grad_output.width;
  double sum = 0.0;
  for (int pixel = thread_index() % 32; pixel < p.grad_output.pixels(); pixel += 32) {
    const float* value = reader.address(pixel / width, pixel % width, channel);
    sum = add(sum, static_cast<double>(*value));
  }
  for (int mask = 16; mask > 0; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
  if (thread_index() % 32 == 0) p.grad_sums[item] = sum;
}

}  // namespace

void launch_sort_samples(const GradientParams& p, Stream stream) {
  launch("sort_samples", &sort_samples_kernel, {1, kGradientThreads, kGradientThreads * 16}, p,
         stream);
}

void launch_gradient_weights(const GradientParams& p, Stream stream) {
  const int64_t values = static_cast<int64_t>(p.widths) * p.grad_output.channels * p.window;
  launch("gradient_weights", &gradient_weights_kernel,
         {ceil_div(values, kGradientThreads), kGradientThreads, 0}, p, stream);
}

void launch_arrange_grad(const GradientParams& p, Stream stream) {
  launch_arrange("arrange_grad", p, p.grad_output, p.arranged_grad, false, stream);
}

void launch_arrange_input(const GradientParams& p, Stream stream) {
  launch_arrange("arrange_input", p, p.input, p.arranged_input, true, stream);
}

void launch_sum_grad(const GradientParams& p, Stream stream) {
  const int64_t warps = p.batch * p.grad_output.channels;
  launch("sum_grad", &sum_grad_kernel, {ceil_div(warps, kGradientWarps), kGradientThreads, 0}, p,
         stream);
}

}  // namespace dfs::cuda
