// The gradient of a convolution's input, sample by sample at its own width: a convolution of the
// output's gradient.
//
// With a stride, input pixels whose coordinates leave the same rests belong to the same taps: a
// *phase*. Each is a product of matrices of its own, pixels x (taps, outputs) and (taps, outputs) x
// channels, so that nothing is multiplied by the zeros between output pixels.
#include "conv_gradients.h"
#include "gradient_product.h"

namespace dfs::cuda {
namespace {

// Pixels of the input at `first + stride * i` of one dimension.
struct Phase {
  int first;
  int count;
};

DFS_HOST_DEVICE Phase phase_of(int size, int stride, int index) {
  return {index, divide_up(size - index, stride)};
}

struct InputTask {
  Phase rows;
  Phase columns;
  int first_pixel;  // of the phase
  int group;
  int first_channel;  // within the group

  DFS_DEVICE int pixels() const { return rows.count * columns.count; }
};

template <typename Tile>
DFS_DEVICE InputTask input_task(const GradientParams& p, int part) {
  InputTask task;
  task.first_channel = part % p.channel_tiles * Tile::kColumns;
  part /= p.channel_tiles;
  task.group = part % p.groups;
  part /= p.groups;
  task.first_pixel = part % p.pixel_tiles * Tile::kRows;
  part /= p.pixel_tiles;
  const int phases_w = least(p.stride_w, p.input.width);
  task.columns = phase_of(p.input.width, p.stride_w, part % phases_w);
  task.rows = phase_of(p.input.height, p.stride_h, part / phases_w);
  return task;
}

// The output pixel at which a tap meets a phase's first pixel, if it meets any of them.
struct TapOffset {
  int offset;
  bool meets;
};

DFS_DEVICE TapOffset tap_offset(int first, int pad, int tap, int dilation, int stride) {
  const int distance = first + pad - tap * dilation;
  return {distance / stride, distance % stride == 0};
}

// Stages pixels of the gradient x kDepth outputs, as [pixel][output], and weights, as
// [output][channel], one tap after the other. kKernel: the size of the kernel, 0 for any.
template <typename Tile, int kKernel>
struct InputSource {
  static constexpr int kQuads = kDepth / 4;
  static constexpr int kRowsTogether = kGradientThreads / kQuads;
  static constexpr int kColumnQuads = Tile::kColumns / 4;

  const GradientParams& p;
  const InputTask& task;
  const float* grad;     // of the sample, from this thread's outputs on
  const float* weights;  // of the width and group, from the tile's channels on
  PixelWalk first_pixel;
  int tap = -1;
  int first_output = 0;
  int offset_h = 0;
  int offset_w = 0;

  DFS_DEVICE InputSource(const GradientParams& params, const InputTask& input_task, int64_t sample,
                         int slot)
      : p(params), task(input_task) {
    grad = to_global(p.arranged_grad) + sample * p.grad_output.pixels() * p.grad_stride() +
           task.group * p.padded_outputs + my_output();
    const int64_t filters =
        static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + task.group * p.group_outputs;
    weights = to_global(p.values) + filters * p.window + task.first_channel;
    first_pixel = walk_of(task.columns.count, kRowsTogether);
    first_pixel.begin(task.first_pixel + thread_index() / kQuads);
    next_tap();
  }

  DFS_DEVICE bool stage(float* rows, float* columns) {
    if (tap >= taps()) return false;
    stage_grad(rows);
    stage_weights(columns);
    first_output += kDepth;
    if (first_output >= p.group_outputs) {
      first_output = 0;
      next_tap();
    }
    return true;
  }

 private:
  DFS_DEVICE static int my_output() { return thread_index() % kQuads * 4; }
  DFS_DEVICE int kernel_w() const { return kKernel == 0 ? p.kernel_w : kKernel; }
  DFS_DEVICE int taps() const { return kKernel == 0 ? p.taps() : kKernel * kKernel; }

  DFS_DEVICE void next_tap() {
    for (++tap; tap < taps(); ++tap) {
      const TapOffset h =
          tap_offset(task.rows.first, p.pad_top, tap / kernel_w(), p.dilation_h, p.stride_h);
      const TapOffset w =
          tap_offset(task.columns.first, p.pad_left, tap % kernel_w(), p.dilation_w, p.stride_w);
      offset_h = h.offset;
      offset_w = w.offset;
      if (h.meets && w.meets) return;
    }
  }

  DFS_DEVICE void stage_grad(float* rows) const {
    const int stride = p.grad_stride();
    const bool has_outputs = first_output + my_output() < p.padded_outputs;
    float* to = rows + thread_index() / kQuads * kDepthStride + my_output();
    // Pixels beyond the last one only have to be read within bounds.
    PixelWalk pixel = first_pixel;
    DFS_UNROLL for (int row = 0; row < Tile::kRows; row += kRowsTogether) {
      const int y = pixel.y + offset_h;
      const int x = pixel.x + offset_w;
      const bool inside =
          has_outputs && y >= 0 && y < p.grad_output.height && x >= 0 && x < p.grad_output.width;
      const int place = inside ? (y * p.grad_output.width + x) * stride + first_output : 0;
      copy_or_clear_async(to + row * kDepthStride, grad + place, inside);
      pixel.next();
    }
  }

  DFS_DEVICE void stage_weights(float* columns) const {
    const int left = p.group_outputs - first_output;
    const int channels = p.padded_channels - task.first_channel;
    const int64_t first_row = static_cast<int64_t>(tap) * p.group_outputs + first_output;
    const float* from = weights + first_row * p.padded_channels;
    for_each_piece<kDepth * kColumnQuads>([&](int i) {
      const int k = i / kColumnQuads;
      const int channel = i % kColumnQuads * 4;
      const bool exists = k < left && channel < channels;
      const int place = exists ? k * p.padded_channels + channel : 0;
      copy_or_clear_async(columns + k * Tile::kColumnStride + channel, from + place, exists);
    });
  }
};

// From sums to the gradient in memory, and the sum of the slopes.
struct InputFinish {
  const GradientParams& p;
  int64_t sample;
  bool quantized;
  Step step;
  double slopes = 0.0;

  DFS_DEVICE float* target(int y, int x, int channel) const {
    const int64_t plane = sample * p.input.channels + channel;
    return to_global(p.grad_input) + (plane * p.input.height + y) * p.input.width + x;
  }
  DFS_DEVICE const float* source(int y, int x, int channel) const {
    return to_global(p.input.values) + sample * p.input.stride_n + channel * p.input.stride_c +
           y * p.input.stride_h + x * p.input.stride_w;
  }

  DFS_DEVICE float finish(float gradient, float x) {
    if (quantized) slopes = add(slopes, static_cast<double>(pass_through(step, x, &gradient)));
    return gradient;
  }

  DFS_DEVICE void put(int y, int x, int channel, float gradient) {
    const float finished = finish(gradient, quantized ? *source(y, x, channel) : 0.0f);
    if (p.grad_input != nullptr) *target(y, x, channel) = finished;
  }

  // Four pixels that lie next to each other in whole planes.
  DFS_DEVICE void put_quad(int pixel, int channel, const Words4& gradients) {
    const int y = pixel / p.input.width;
    const int x = pixel % p.input.width;
    Words4 inputs = {};
    if (quantized) inputs = *reinterpret_cast<const Words4*>(source(y, x, channel));
    Words4 finished;
    DFS_UNROLL for (int i = 0; i < 4; ++i) {
      finished.word[i] =
          float_to_bits(finish(bits_to_float(gradients.word[i]), bits_to_float(inputs.word[i])));
    }
    if (p.grad_input != nullptr) {
      *reinterpret_cast<Words4*>(target(y, x, channel)) = finished;
    }
  }

  DFS_DEVICE bool has_quads() const {
    const Map& x = p.input;
    const bool planes = p.stride_h == 1 && p.stride_w == 1 && x.pixels() % 4 == 0;
    const bool reads =
        !quantized || (is_aligned(x.values, 16) && x.stride_w == 1 && x.stride_h == x.width &&
                       x.stride_c % 4 == 0 && x.stride_n % 4 == 0);
    return planes && reads && is_aligned(p.grad_input, 16);
  }
};

template <typename Tile>
DFS_DEVICE void finish_tile(const GradientParams& p, const InputTask& task, const float* tile,
                            InputFinish& finish) {
  constexpr int kQuads = Tile::kRows / 4;
  const bool has_quads = finish.has_quads();
  for (int i = thread_index(); i < kQuads * Tile::kColumns; i += kGradientThreads) {
    const int column = i / kQuads;
    const int channel = task.first_channel + column;
    const int first = task.first_pixel + i % kQuads * 4;
    if (channel >= p.group_channels || first >= task.pixels()) continue;
    const Words4 sums =
        *reinterpret_cast<const Words4*>(tile + Tile::place(column, i % kQuads * 4));
    const int c = task.group * p.group_channels + channel;
    if (has_quads) {
      finish.put_quad(first, c, sums);
      continue;
    }
    DFS_UNROLL for (int j = 0; j < 4; ++j) {
      const int pixel = first + j;
      if (pixel >= task.pixels()) break;
      const int y = task.rows.first + pixel / task.columns.count * p.stride_h;
      const int x = task.columns.first + pixel % task.columns.count * p.stride_w;
      finish.put(y, x, c, bits_to_float(sums.word[j]));
    }
  }
}

DFS_DEVICE void store_slopes(const GradientParams& p, double slopes) {
  if (p.grad_input_scale == nullptr) return;
  sync_block();
  const double sum = sum_block(slopes, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() == 0) p.slopes[block_index()] = sum;
}

template <typename Tile, int kKernel, bool kTf32>
DFS_KERNEL(kGradientThreads, 4)
input_gradient_kernel(DFS_PARAMS(GradientParams) p) {
  const int64_t sample = block_index() / p.input_blocks;
  const int part = block_index() % p.input_blocks;
  const int slot = gradient_slot(p, sample);
  if (slot < 0) {
    clear_share(p, sample, part);
    return;
  }
  using Memory = ProductMemory<Tile, true>;
  const InputTask task = input_task<Tile>(p, part);
  InputFinish finish{p, sample, slot != 3, {}};
  if (task.first_pixel < task.pixels()) {
    typename SumsOf<Tile, true, kTf32>::Type sums;
    InputSource<Tile, kKernel> source(p, task, sample, slot);
    multiply_all<Memory>(source, sums);
    sums.store(Memory::tile());
    sync_block();
    if (slot != 3) finish.step = step_of(p.input_quantizer, bits_of(slot));
    finish_tile<Tile>(p, task, Memory::tile(), finish);
  }
  store_slopes(p, finish.slopes);
}

// The sum for one value of the input, product by product.
DFS_DEVICE float sum_directly(const GradientParams& p, int64_t sample, int slot, int y, int x,
                              int channel) {
  const int group = channel / p.group_channels;
  const SampleReader grad = reader_of(p.grad_output, sample);
  const int64_t filters =
      static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + group * p.group_outputs;
  const float* weights = to_global(p.values) + filters * p.window + channel % p.group_channels;
  float sum = 0.0f;
  for (int tap = 0; tap < p.taps(); ++tap) {
    const TapOffset h = tap_offset(y, p.pad_top, tap / p.kernel_w, p.dilation_h, p.stride_h);
    const TapOffset w = tap_offset(x, p.pad_left, tap % p.kernel_w, p.dilation_w, p.stride_w);
    const bool inside = h.meets && w.meets && h.offset >= 0 && w.offset >= 0 &&
                        h.offset < p.grad_output.height && w.offset < p.grad_output.width;
    if (!inside) continue;
    for (int i = 0; i < p.group_outputs; ++i) {
      const float g = *grad.address(h.offset, w.offset, group * p.group_outputs + i);
      const int64_t row = tap * p.group_outputs + i;
      sum = multiply_add(g, weights[row * p.padded_channels], sum);
    }
  }
  return sum;
}

// A value for each thread, for groups that are too narrow for tiles.
DFS_KERNEL(kGradientThreads, 4)
input_gradient_direct_kernel(DFS_PARAMS(GradientParams) p) {
  const int64_t sample = block_index() / p.input_blocks;
  const int part = block_index() % p.input_blocks;
  const int slot = gradient_slot(p, sample);
  if (slot < 0) {
    clear_share(p, sample, part);
    return;
  }
  const int item = part * kGradientThreads + thread_index();
  InputFinish finish{p, sample, slot != 3, {}};
  if (item < p.input.channels * p.input.pixels()) {
    const int channel = item / p.input.pixels();
    const int y = item % p.input.pixels() / p.input.width;
    const int x = item % p.input.width;
    if (slot != 3) finish.step = step_of(p.input_quantizer, bits_of(slot));
    finish.put(y, x, channel, sum_directly(p, sample, slot, y, x, channel));
  }
  store_slopes(p, finish.slopes);
}

int phase_count(const GradientParams& p) {
  return least(p.stride_h, p.input.height) * least(p.stride_w, p.input.width);
}

// The first phase has the most.
int phase_pixels(const GradientParams& p) {
  return divide_up(p.input.height, p.stride_h) * divide_up(p.input.width, p.stride_w);
}

TileKind input_tile(const GradientParams& p) {
  return choose_tile_kind(phase_pixels(p), p.group_channels);
}

template <typename Tile, bool kTf32>
void launch_tiles(const GradientParams& p, Stream stream) {
  const LaunchShape shape{p.batch * p.input_blocks, kGradientThreads,
                          ProductMemory<Tile, true>::kBytes};
  const bool square = p.kernel_h == p.kernel_w;
  if (square && p.kernel_h == 3) {
    launch("input_gradient", &input_gradient_kernel<Tile, 3, kTf32>, shape, p, stream);
  } else if (square && p.kernel_h == 1) {
    launch("input_gradient", &input_gradient_kernel<Tile, 1, kTf32>, shape, p, stream);
  } else {
    launch("input_gradient", &input_gradient_kernel<Tile, 0, kTf32>, shape, p, stream);
  }
}

}  // namespace

void plan_input_gradient(GradientParams& p) {
  if (p.direct) {
    p.input_blocks = divide_up(p.input.channels * p.input.pixels(), kGradientThreads);
    return;
  }
  with_tile(input_tile(p), [&p](auto tile) {
    using Tile = decltype(tile);
    p.pixel_tiles = divide_up(phase_pixels(p), Tile::kRows);
    p.channel_tiles = divide_up(p.group_channels, Tile::kColumns);
  });
  p.input_blocks = phase_count(p) * p.pixel_tiles * p.groups * p.channel_tiles;
}

void launch_input_gradient(const GradientParams& p, Stream stream) {
  if (p.direct) {
    launch("input_gradient_direct", &input_gradient_direct_kernel,
           {p.batch * p.input_blocks, kGradientThreads, kGradientWarps * 8}, p, stream);
    return;
  }
  with_tile(input_tile(p), [&p, stream](auto tile) {
    if (p.tf32) {
      launch_tiles<decltype(tile), true>(p, stream);
    } else {
      launch_tiles<decltype(tile), false>(p, stream);
    }
  });
}

}  // namespace dfs::cuda
