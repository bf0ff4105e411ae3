// Which launches give the gradients of a mixed convolution, and their scratch memory. Host code
// only.
#include <limits>
#include <stdexcept>
#include <string>

#include "conv_gradients.h"
#include "cuda_operations.h"

namespace dfs::cuda {
namespace {

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

// Kernels index within a sample with 32 bits, where a channel may take the place of four.
void check_size(const FeatureMap& map, const char* name) {
  const int64_t values = ceil_div(map.channels, 4) * 4 * map.height * map.width;
  if (values > std::numeric_limits<int32_t>::max() / 4) {
    reject(std::string(name) + " has " + std::to_string(values) +
           " values a sample, its channels filled up to four; at most 2^29 are");
  }
}

// Tiles are four channels deep and eight outputs wide at least.
bool is_narrow(const ConvGeometry& g) {
  return g.groups > 1 && (g.in_channels / g.groups < 4 || g.out_channels / g.groups < 8);
}

void set_geometry(GradientParams& p, const ConvGeometry& g) {
  static_cast<Geometry&>(p) = to_geometry(g);
  p.group_channels = static_cast<int>(g.in_channels / g.groups);
  p.group_outputs = static_cast<int>(g.out_channels / g.groups);
  p.padded_channels = round_up(p.group_channels, 4);
  p.padded_outputs = round_up(p.group_outputs, 4);
  p.window = p.taps() * p.padded_channels;
}

GradientParams make_params(const MixedConv2dBackwardArgs& args, bool tf32) {
  GradientParams p;
  p.batch = args.batch;
  p.bits = args.bits;
  p.input = to_map(args.input);
  p.grad_output = to_map(args.grad_output);
  p.input_quantizer = by_slot(args.input_quantizer);
  set_geometry(p, args.geometry);
  p.widths = args.widths.count;
  for (int i = 0; i < args.widths.count; ++i) {
    const int slot = slot_of(args.widths.bits[i]);
    if (slot < 0) reject("widths list " + std::to_string(args.widths.bits[i]) + " bits");
    p.index[slot] = static_cast<int8_t>(i);
    p.centred[slot] = args.centred[i];
    p.packed_weight[slot] = args.packed_weight[i];
  }
  p.weight = args.weight;
  p.weight_scale = args.weight_scale;
  p.mul = args.mul;
  p.bias = args.bias;
  p.grad_input = args.grad_input;
  p.grad_weight = args.grad_weight;
  p.grad_input_scale = args.grad_input_scale;
  p.grad_weight_scale = args.grad_weight_scale;
  p.grad_mul = args.grad_mul;
  p.grad_add = args.grad_add;
  p.direct = is_narrow(args.geometry);
  p.tf32 = tf32 && !p.direct;
  if (p.wants_input()) plan_input_gradient(p);
  if (p.wants_products()) plan_weight_gradient(p);
  return p;
}

// Hands out pieces of a buffer, or only counts them where there is none.
class Scratch {
 public:
  explicit Scratch(void* memory) : memory_(static_cast<uint8_t*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kAlignment = 128;

  uint8_t* memory_;
  int64_t used_ = 0;
};

int64_t lay_out(GradientParams& p, void* memory) {
  Scratch scratch(memory);
  const int64_t filters = static_cast<int64_t>(p.widths) * p.grad_output.channels;
  p.counts = scratch.take<int32_t>(kSlots);
  p.order = scratch.take<int32_t>(kSlots * p.batch);
  if (p.wants_input()) {
    p.values = scratch.take<float>(filters * p.window);
    p.slopes = scratch.take<double>(p.batch * p.input_blocks);
  }
  if (p.wants_products()) {
    p.partials = scratch.take<float>(p.splits * filters * p.window);
    p.products = scratch.take<float>(filters * p.window);
  }
  if (p.wants_sums()) p.grad_sums = scratch.take<double>(p.batch * p.grad_output.channels);
  if (p.direct) return scratch.used();
  if (p.wants_input() || p.wants_products()) {
    p.arranged_grad = scratch.take<float>(p.batch * p.grad_output.pixels() * p.grad_stride());
  }
  if (p.wants_products()) {
    p.arranged_input = scratch.take<float>(p.batch * p.input.pixels() * p.input_stride());
  }
  return scratch.used();
}

}  // namespace

int64_t backward_scratch_bytes(const MixedConv2dBackwardArgs& args) {
  check_size(args.input, "input");
  check_size(args.grad_output, "grad_output");
  GradientParams p = make_params(args, false);
  return lay_out(p, nullptr);
}

void mixed_conv2d_backward(const MixedConv2dBackwardArgs& args, void* scratch, bool tf32,
                           Stream stream) {
  if (!is_aligned(scratch, 16)) reject("scratch must be aligned to 16 bytes");
  GradientParams p = make_params(args, tf32);
  lay_out(p, scratch);
  launch_sort_samples(p, stream);
  if (!p.direct && (p.wants_input() || p.wants_products())) launch_arrange_grad(p, stream);
  if (p.wants_input()) {
    launch_gradient_weights(p, stream);
    launch_input_gradient(p, stream);
  }
  if (p.grad_input_scale != nullptr) launch_finish_input_scale(p, stream);
  if (p.wants_products()) {
    if (!p.direct) launch_arrange_input(p, stream);
    launch_weight_gradient(p, stream);
    launch_sum_products(p, stream);
  }
  if (p.wants_sums()) launch_sum_grad(p, stream);
  if (p.wants_products() || p.wants_sums()) launch_finish_weight(p, stream);
}

}  // namespace dfs::cuda
