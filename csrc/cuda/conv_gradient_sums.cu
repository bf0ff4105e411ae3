// From the partial sums of a convolution's gradients to what is returned.
#include "conv_gradients.h"

namespace dfs::cuda {
namespace {

constexpr int kSumColumns = 32;

// Adds the parts of 32 products: each warp some of them in their order, then one after the other.
DFS_KERNEL(kGradientThreads, 4)
sum_products_kernel(DFS_PARAMS(GradientParams) p) {
  auto* sums = reinterpret_cast<float*>(shared_memory());
  const int64_t width_products = static_cast<int64_t>(p.grad_output.channels) * p.window;
  const int64_t product =
      static_cast<int64_t>(block_index()) * kSumColumns + thread_index() % kSumColumns;
  const bool exists = product < p.widths * width_products;
  float sum = 0.0f;
  if (exists) {
    const int width = static_cast<int>(product / width_products);
    const int slot = slot_at(p, width);
    // The others had nothing to sum, and have written nothing.
    const PartShare all = part_share(p, slot);
    const int used = all.share == 0 ? 0 : static_cast<int>((all.parts + all.share - 1) / all.share);
    const float* partial =
        to_global(p.partials) + width * p.splits * width_products + product % width_products;
    for (int i = thread_index() / 32; i < used; i += kGradientWarps) {
      sum = add(sum, partial[i * width_products]);
    }
  }
  sums[thread_index()] = sum;
  sync_block();
  if (!exists || thread_index() >= 32) return;
  for (int i = 1; i < kGradientWarps; ++i) sum = add(sum, sums[i * 32 + thread_index()]);
  to_global(p.products)[product] = sum;
}

// What one width contributes to the gradients of one output channel.
struct WidthSums {
  double scale = 0.0;
  double mul = 0.0;
};

// One product of the window, at one width: adds to its sums and, in `gradient`, to that of the
// weight.
DFS_DEVICE void finish_product(const GradientParams& p, int slot, const WeightStep& step,
                               double mul, int o, int k, double* gradient, WidthSums* sums) {
  const int channel = k % p.padded_channels;
  const int tap = k / p.padded_channels;
  const int64_t row = static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + o;
  const double product = static_cast<double>(to_global(p.products)[row * p.window + k]);
  const float code = weight_code(p, slot, step, o, channel, tap);
  const double change = multiply(mul, product);
  sums->mul = add(sums->mul, multiply(static_cast<double>(step.value(code)), product));
  if (!step.quantizes) {
    *gradient = add(*gradient, change);
    return;
  }
  if (p.weight == nullptr) return;
  const int64_t filter = static_cast<int64_t>(o) * p.group_channels * p.taps();
  const float w = to_global(p.weight)[filter + channel * p.taps() + tap];
  const float t = multiply(w, step.reciprocal);
  const float shifted = add(t, -step.centre);
  const bool inside = shifted >= step.low && shifted <= step.high;
  const float slope = inside ? add(add(code, step.centre), -t)
                             : add(smaller(larger(shifted, step.low), step.high), step.centre);
  sums->scale = add(sums->scale, multiply(change, static_cast<double>(slope)));
  if (inside) *gradient = add(*gradient, change);
}

// The sum of the output's gradient over the samples of a width, in a part for each thread.
DFS_DEVICE double my_grad_sum(const GradientParams& p, int slot, int o) {
  double sum = 0.0;
  for (int i = thread_index(); i < to_global(p.counts)[slot]; i += kGradientThreads) {
    const int64_t n = to_global(p.order)[slot * p.batch + i];
    sum = add(sum, to_global(p.grad_sums)[n * p.grad_output.channels + o]);
  }
  return sum;
}

// A block for each output channel.
DFS_KERNEL(kGradientThreads, 4)
finish_weight_kernel(DFS_PARAMS(GradientParams) p) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  const int o = block_index();
  const int window = p.wants_products() ? p.window : 0;
  const int filter = p.group_channels * p.taps();
  WidthSums sums[kSlots];
  for (int k = thread_index(); k < window; k += kGradientThreads) {
    const int channel = k % p.padded_channels;
    if (channel >= p.group_channels) continue;
    double gradient = 0.0;
    DFS_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
      if (p.index[slot] < 0) continue;
      const int64_t row = static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + o;
      const double mul = p.mul == nullptr ? 1.0 : static_cast<double>(p.mul[row]);
      finish_product(p, slot, weight_step(p, slot, o), mul, o, k, &gradient, &sums[slot]);
    }
    if (p.grad_weight != nullptr) {
      const int64_t place =
          static_cast<int64_t>(o) * filter + channel * p.taps() + k / p.padded_channels;
      p.grad_weight[place] = to_float(gradient);
    }
  }
  DFS_UNROLL for (int slot = 0; slot < kSlots; ++slot) {
    if (p.index[slot] < 0) continue;
    const int64_t row = static_cast<int64_t>(p.index[slot]) * p.grad_output.channels + o;
    const double scale = sum_block(sums[slot].scale, scratch);
    const double mul = sum_block(sums[slot].mul, scratch);
    const double grad_sum = sum_block(p.wants_sums() ? my_grad_sum(p, slot, o) : 0.0, scratch);
    if (thread_index() != 0) continue;
    if (p.grad_weight_scale != nullptr) {
      const double reach = static_cast<double>(int64_t{1} << (bits_of(slot) - 1));
      const double root = sqrt(multiply(static_cast<double>(filter), reach));
      p.grad_weight_scale[row] = slot == 3 ? 0.0f : to_float(scale / root);
    }
    if (p.grad_mul != nullptr) {
      const double bias = p.bias == nullptr ? 0.0 : static_cast<double>(p.bias[o]);
      p.grad_mul[row] = to_float(add(mul, multiply(bias, grad_sum)));
    }
    if (p.grad_add != nullptr) p.grad_add[row] = to_float(grad_sum);
  }
}

// A block for each width that is on offer.
DFS_KERNEL(kGradientThreads, 4)
finish_input_scale_kernel(DFS_PARAMS(GradientParams) p) {
  const int width = block_index();
  const int slot = slot_at(p, width);
  const int count = to_global(p.counts)[slot];
  double mine = 0.0;
  const int64_t slopes = static_cast<int64_t>(count) * p.input_blocks;
  for (int64_t i = thread_index(); slot != 3 && i < slopes; i += kGradientThreads) {
    const int64_t n = to_global(p.order)[slot * p.batch + i / p.input_blocks];
    mine = add(mine, to_global(p.slopes)[n * p.input_blocks + i % p.input_blocks]);
  }
  const double sum = sum_block(mine, reinterpret_cast<double*>(shared_memory()));
  if (thread_index() != 0) return;
  const double values = static_cast<double>(p.input.channels) * p.input.pixels() * count;
  const double top = static_cast<double>((int64_t{1} << bits_of(slot)) - 1);
  p.grad_input_scale[width] =
      slot == 3 || count == 0 ? 0.0f : to_float(sum / sqrt(multiply(values, top)));
}

}  // namespace

void launch_sum_products(const GradientParams& p, Stream stream) {
  const int64_t products = static_cast<int64_t>(p.widths) * p.grad_output.channels * p.window;
  launch("sum_products", &sum_products_kernel,
         {ceil_div(products, kSumColumns), kGradientThreads, kGradientThreads * 4}, p, stream);
}

void launch_finish_weight(const GradientParams& p, Stream stream) {
  launch("finish_weight", &finish_weight_kernel,
         {p.grad_output.channels, kGradientThreads, kGradientWarps * 8}, p, stream);
}

void launch_finish_input_scale(const GradientParams& p, Stream stream) {
  launch("finish_input_scale", &finish_input_scale_kernel,
         {p.widths, kGradientThreads, kGradientWarps * 8}, p, stream);
}

}  // namespace dfs::cuda
