// The gradient of a convolution's weight, for each width over its own samples: a product of
// matrices, (taps, channels) x pixels and pixels x outputs.
//
// The pixels of all samples of a width, in parts of kPartPixels, are shared out among a number of
// blocks that depends on shapes only. What each sums up is added later, in their order.
#include "conv_gradients.h"
#include "gradient_product.h"

namespace dfs::cuda {
namespace {

// Enough to fill an H100 about once with what one width has; counted, not measured.
constexpr int64_t kWantedBlocks = 528;
// Bytes of partial sums.
constexpr int64_t kMostPartialBytes = 64 << 20;

struct WeightTask {
  int slot;
  int64_t first;  // parts
  int64_t last;
  int split;
};

// Parts first to last of a width's for one of the blocks that share them.
DFS_DEVICE WeightTask weight_task(const GradientParams& p, int width, int split) {
  WeightTask task;
  task.slot = slot_at(p, width);
  const PartShare all = part_share(p, task.slot);
  task.first = split * all.share;
  task.last = task.first + all.share < all.parts ? task.first + all.share : all.parts;
  task.split = split;
  return task;
}

// Pixels of a part of a sample.
struct PixelRange {
  int64_t sample;
  int first;
  int last;
};

DFS_DEVICE PixelRange pixel_range(const GradientParams& p, const WeightTask& task, int64_t part) {
  const int within = static_cast<int>(part % p.parts);
  const int64_t place = task.slot * p.batch + part / p.parts;
  return {to_global(p.order)[place], within * kPartPixels,
          least((within + 1) * kPartPixels, p.grad_output.pixels())};
}

DFS_DEVICE float* partial_of(const GradientParams& p, const WeightTask& task, int o) {
  const int64_t split = static_cast<int64_t>(p.index[task.slot]) * p.splits + task.split;
  return to_global(p.partials) + (split * p.grad_output.channels + o) * p.window;
}

// Stages kDepth pixels at a time: their windows as [pixel][tap, channel], gradients as
// [pixel][output].
template <typename Tile>
struct WeightSource {
  static constexpr int kRowQuads = Tile::kRows / 4;
  static constexpr int kColumnQuads = Tile::kColumns / 4;
  static constexpr int kPixelsTogether = kGradientThreads / kRowQuads;

  const GradientParams& p;
  const WeightTask& task;
  // From the group's first channel, or the tile's first output, on.
  const float* input;
  const float* grad;
  int outputs;  // of the tile, at most
  // What this thread copies of windows: a quad of channels at one tap, of some pixels.
  bool exists;
  int tap_y;  // from the window's first pixel
  int tap_x;
  int64_t part;
  PixelRange range;
  int pixel = 0;
  PixelWalk my_pixel;

  DFS_DEVICE WeightSource(const GradientParams& params, const WeightTask& weight_task, int group,
                          int first_row, int first_output)
      : p(params), task(weight_task) {
    const int row = first_row + thread_index() % kRowQuads * 4;
    const int tap = row / p.padded_channels;
    exists = row < p.window;
    tap_y = tap / p.kernel_w * p.dilation_h - p.pad_top;
    tap_x = tap % p.kernel_w * p.dilation_w - p.pad_left;
    input = to_global(p.arranged_input) + group * p.padded_channels + row % p.padded_channels;
    grad = to_global(p.arranged_grad) + group * p.padded_outputs + first_output;
    outputs = p.padded_outputs - first_output;
    my_pixel = walk_of(p.grad_output.width, kPixelsTogether);
    part = task.first;
    begin_part();
  }

  DFS_DEVICE bool stage(float* rows, float* columns) {
    if (part >= task.last) return false;
    stage_windows(rows);
    stage_grad(columns);
    pixel += kDepth;
    if (pixel >= range.last) {
      ++part;
      begin_part();
    }
    return true;
  }

 private:
  DFS_DEVICE void begin_part() {
    if (part >= task.last) return;
    range = pixel_range(p, task, part);
    pixel = range.first;
    my_pixel.begin(pixel + thread_index() / kRowQuads);
  }

  // Leaves my_pixel at the next step's.
  DFS_DEVICE void stage_windows(float* rows) {
    const int stride = p.input_stride();
    const float* image = input + range.sample * p.input.pixels() * stride;
    const int mine = thread_index() / kRowQuads;
    float* to = rows + mine * Tile::kRowStride + thread_index() % kRowQuads * 4;
    DFS_UNROLL for (int k = 0; k < kDepth; k += kPixelsTogether) {
      const int y = my_pixel.y * p.stride_h + tap_y;
      const int x = my_pixel.x * p.stride_w + tap_x;
      const bool inside = exists && pixel + k + mine < range.last && y >= 0 && y < p.input.height &&
                          x >= 0 && x < p.input.width;
      const int place = inside ? (y * p.input.width + x) * stride : 0;
      copy_or_clear_async(to + k * Tile::kRowStride, image + place, inside);
      my_pixel.next();
    }
  }

  DFS_DEVICE void stage_grad(float* columns) const {
    const int stride = p.grad_stride();
    const float* image = grad + range.sample * p.grad_output.pixels() * stride;
    for_each_piece<kDepth * kColumnQuads>([&](int i) {
      const int k = i / kColumnQuads;
      const int output = i % kColumnQuads * 4;
      const bool inside = output < outputs && pixel + k < range.last;
      const int place = inside ? (pixel + k) * stride + output : 0;
      copy_or_clear_async(columns + k * Tile::kColumnStride + output, image + place, inside);
    });
  }
};

template <typename Tile, bool kTf32>
DFS_KERNEL(kGradientThreads, 4)
weight_gradient_kernel(DFS_PARAMS(GradientParams) p) {
  int rest = block_index();
  const int first_row = rest % p.window_tiles * Tile::kRows;
  rest /= p.window_tiles;
  const int first_output = rest % p.output_tiles * Tile::kColumns;
  rest /= p.output_tiles;
  const int group = rest % p.groups;
  rest /= p.groups;
  const WeightTask task = weight_task(p, rest / p.splits, rest % p.splits);
  if (task.first >= task.last) return;
  using Memory = ProductMemory<Tile, false>;
  typename SumsOf<Tile, false, kTf32>::Type sums;
  WeightSource<Tile> source(p, task, group, first_row, first_output);
  multiply_all<Memory>(source, sums);
  sums.store(Memory::tile());
  sync_block();
  constexpr int kQuads = Tile::kRows / 4;
  for (int i = thread_index(); i < kQuads * Tile::kColumns; i += kGradientThreads) {
    const int row = i % kQuads * 4;
    const int column = i / kQuads;
    const int output = first_output + column;
    if (output >= p.group_outputs || first_row + row >= p.window) continue;
    float* partial = partial_of(p, task, group * p.group_outputs + output);
    *reinterpret_cast<Words4*>(partial + first_row + row) =
        *reinterpret_cast<const Words4*>(Memory::tile() + Tile::place(column, row));
  }
}

// A warp for each product of the window and output channel, for groups too narrow for tiles.
DFS_KERNEL(kGradientThreads, 4)
weight_gradient_direct_kernel(DFS_PARAMS(GradientParams) p) {
  const int filter = p.taps() * p.group_channels;
  const int64_t item = static_cast<int64_t>(block_index()) * kGradientWarps + thread_index() / 32;
  const int64_t width_items = static_cast<int64_t>(p.splits) * p.grad_output.channels * filter;
  if (item >= p.widths * width_items) return;
  const int k = static_cast<int>(item % filter);
  const int o = static_cast<int>(item / filter % p.grad_output.channels);
  const int split = static_cast<int>(item / filter / p.grad_output.channels % p.splits);
  const WeightTask task = weight_task(p, static_cast<int>(item / width_items), split);
  if (task.first >= task.last) return;
  const int tap = k / p.group_channels;
  const int channel = k % p.group_channels;
  const int c = o / p.group_outputs * p.group_channels + channel;
  const int first_y = tap / p.kernel_w * p.dilation_h - p.pad_top;
  const int first_x = tap % p.kernel_w * p.dilation_w - p.pad_left;
  const bool quantizes = task.slot != 3;
  const Step step = step_of(p.input_quantizer, bits_of(task.slot));
  float sum = 0.0f;
  for (int64_t part = task.first; part < task.last; ++part) {
    const PixelRange range = pixel_range(p, task, part);
    const SampleReader grad = reader_of(p.grad_output, range.sample);
    const SampleReader input = reader_of(p.input, range.sample);
    for (int pixel = range.first + thread_index() % 32; pixel < range.last; pixel += 32) {
      const int out_y = pixel / p.grad_output.width;
      const int out_x = pixel % p.grad_output.width;
      const int y = out_y * p.stride_h + first_y;
      const int x = out_x * p.stride_w + first_x;
      if (y < 0 || y >= p.input.height || x < 0 || x >= p.input.width) continue;
      const float value = *input.address(y, x, c);
      sum = multiply_add(*grad.address(out_y, out_x, o),
                         quantizes ? fake_quantize(step, value) : value, sum);
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
  if (thread_index() % 32 == 0) partial_of(p, task, o)[tap * p.padded_channels + channel] = sum;
}

TileKind weight_tile(const GradientParams& p) {
  return choose_tile_kind(p.window, p.group_outputs);
}

int64_t direct_warps(const GradientParams& p) {
  return static_cast<int64_t>(p.widths) * p.splits * p.grad_output.channels * p.taps() *
         p.group_channels;
}

}  // namespace

void plan_weight_gradient(GradientParams& p) {
  p.parts = divide_up(p.grad_output.pixels(), kPartPixels);
  with_tile(weight_tile(p), [&p](auto tile) {
    using Tile = decltype(tile);
    p.window_tiles = divide_up(p.window, Tile::kRows);
    p.output_tiles = divide_up(p.group_outputs, Tile::kColumns);
  });
  p.splits = 1;
  const int64_t blocks = p.direct
                             ? ceil_div(direct_warps(p), kGradientWarps * p.widths)
                             : static_cast<int64_t>(p.window_tiles) * p.output_tiles * p.groups;
  const int64_t bytes = static_cast<int64_t>(p.widths) * p.grad_output.channels * p.window * 4;
  int64_t splits = ceil_div(kWantedBlocks, blocks);
  for (const int64_t most : {p.batch * p.parts, kMostPartialBytes / bytes}) {
    if (splits > most) splits = most;
  }
  p.splits = splits < 1 ? 1 : static_cast<int>(splits);
}

void launch_weight_gradient(const GradientParams& p, Stream stream) {
  if (p.direct) {
    launch("weight_gradient_direct", &weight_gradient_direct_kernel,
           {ceil_div(direct_warps(p), kGradientWarps), kGradientThreads, 0}, p, stream);
    return;
  }
  const int64_t blocks =
      static_cast<int64_t>(p.widths) * p.splits * p.groups * p.output_tiles * p.window_tiles;
  with_tile(weight_tile(p), [&p, blocks, stream](auto tile) {
    using Tile = decltype(tile);
    const LaunchShape shape{blocks, kGradientThreads, ProductMemory<Tile, false>::kBytes};
    if (p.tf32) {
      launch("weight_gradient", &weight_gradient_kernel<Tile, true>, shape, p, stream);
    } else {
      launch("weight_gradient", &weight_gradient_kernel<Tile, false>, shape, p, stream);
    }
  });
}

}  // namespace dfs::cuda
