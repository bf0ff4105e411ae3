#include "layer.h"

#include <iterator>
#include <new>
#include <utility>

#include "checks.h"
#include "output_scaling.h"

namespace dfs {
namespace {

constexpr std::align_val_t kAlignment{64};

}  // namespace

AlignedBytes::AlignedBytes(size_t bytes) : size_(bytes) {
  if (bytes > 0) data_ = static_cast<uint8_t*>(::operator new(bytes, kAlignment));
}

AlignedBytes::~AlignedBytes() { ::operator delete(data_, kAlignment); }

AlignedBytes::AlignedBytes(AlignedBytes&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

AlignedBytes& AlignedBytes::operator=(AlignedBytes&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

Layer::Layer(const LayerSpec& spec, const KernelTable& table)
    : table_(&table), geometry_(spec.geometry) {
  check_geometry(geometry_);
  check_widths(spec.widths, "layer");
  if (spec.widths.count == 0) reject("layer: it offers no width");
  const int count = spec.widths.count;
  const int64_t outputs = geometry_.out_channels;
  weight_.widths = spec.widths;
  weight_.scale = spec.weight_scale;
  input_scale_.assign(spec.input_scale, spec.input_scale + count);
  input_zero_point_.assign(spec.input_zero_point, spec.input_zero_point + count);
  multiplier_.resize(static_cast<size_t>(count * outputs));
  offset_.resize(multiplier_.size());
  for (int i = 0; i < count; ++i) {
    const int32_t bits = spec.widths.bits[i];
    weight_.centred[i] = spec.centred[i];
    for (const TileForm form : kTileForms) {
      AlignedBytes tile(table.tile_bytes(geometry_, bits, spec.centred[i], form));
      table.retile_weight(geometry_, static_cast<const uint8_t*>(spec.codes[i]), bits,
                          spec.centred[i], form, tile.data());
      tiles_.push_back(std::move(tile));
    }
    fold_output_scaling(weight_, i, outputs, input_scale_[static_cast<size_t>(i)], spec.bias,
                        spec.mul, spec.add, multiplier_.data() + i * outputs,
                        offset_.data() + i * outputs);
  }
  weight_.scale = nullptr;  // borrowed, and folded by now
}

Quantizer Layer::input_quantizer() const {
  Quantizer quantizer;
  quantizer.widths = weight_.widths;
  quantizer.scale = input_scale_.data();
  quantizer.zero_point = input_zero_point_.data();
  return quantizer;
}

void Layer::keep_form_for(const LayerCall& call) {
  const int index = index_of(weight_.widths, call.bits);
  const TileForm kept = table_->tile_form(args_of(call), call.bits);
  AlignedBytes* tiles = &tiles_[static_cast<size_t>(index) * std::size(kTileForms)];
  for (const TileForm form : kTileForms) {
    if (form != kept) tiles[static_cast<size_t>(form)] = AlignedBytes();
  }
  weight_.tiles[index] = tiles[static_cast<size_t>(kept)].data();
}

size_t Layer::weight_bytes() const {
  size_t bytes = 0;
  for (const AlignedBytes& tile : tiles_) bytes += tile.size();
  return bytes;
}

double Layer::nanoseconds(int32_t bits, int64_t out_pixels) const {
  constexpr WidthTable kWidths = {kMaxWidths, {2, 4, 8, 32}};
  const int index = index_of(kWidths, bits);
  if (index < 0) return 0.0;
  const ConvGeometry& g = geometry_;
  const int64_t macs =
      out_pixels * g.out_channels * (g.in_channels / g.groups) * g.kernel_h * g.kernel_w;
  return static_cast<double>(macs) * table_->nanoseconds_per_mac[index];
}

void Layer::expect_output(const Quantizer& output) {
  constexpr int32_t kBits = 2;
  const int index = index_of(weight_.widths, kBits);
  const int out_index = index_of(output.widths, kBits);
  if (index < 0 || out_index < 0 || output.zero_point[out_index] != 0) return;
  const int64_t outputs = geometry_.out_channels;
  code_steps_.resize(static_cast<size_t>((kCodeSteps + 1) * outputs));
  table_->find_code_steps(multiplier_.data() + index * outputs, offset_.data() + index * outputs,
                          outputs, output, code_steps_.data());
}

MixedConv2dArgs Layer::args_of(const LayerCall& call) const {
  MixedConv2dArgs args;
  args.batch = 1;
  args.bits = &call.bits;
  args.geometry = geometry_;
  args.weight = weight_;
  args.input = call.input;
  if (!call.reads_codes) args.input_quantizer = input_quantizer();
  args.has_residual = call.residual != nullptr;
  if (call.residual != nullptr) args.residual = *call.residual;
  args.relu = call.relu;
  args.output = call.output;
  return args;
}

size_t Layer::scratch_bytes(const LayerCall& call) const {
  return table_->conv_scratch_bytes(args_of(call), call.bits);
}

void Layer::run_rows(const LayerCall& call, int64_t row_begin, int64_t row_end,
                     void* scratch) const {
  const MixedConv2dArgs args = args_of(call);
  ConvTask task;
  task.args = &args;
  task.row_begin = row_begin;
  task.row_end = row_end;
  task.bits = call.bits;
  if (call.residual != nullptr && is_packed(*call.residual)) {
    task.residual_row = call.residual->codes;
  }
  if (call.bits == 0) return table_->skip_rows(task, scratch);
  const int index = index_of(weight_.widths, call.bits);
  task.tile = weight_.tiles[index];
  task.multiplier = multiplier_.data() + index * geometry_.out_channels;
  task.offset = offset_.data() + index * geometry_.out_channels;
  if (call.bits == 2 && call.residual == nullptr && is_packed(call.output) &&
      !code_steps_.empty()) {
    task.code_steps = code_steps_.data();
  }
  table_->conv_rows(task, scratch);
}

}  // namespace dfs
