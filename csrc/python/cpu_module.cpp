// The CPU kernels for Python.
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "engine_bindings.h"
#include "operations.h"
#include "structs.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace {

using namespace dfs_python;

// The checks that look at values, for callers that have not made them. What they refuse, Python
// refuses with a message of its own, so these say only whether to go on.

bool is_allowed(const dfs::Quantizer& quantizer) {
  constexpr float kMinScale = 0x1p-126f;
  constexpr float kMaxScale = 0x1p126f;
  for (int i = 0; i < quantizer.widths.count; ++i) {
    const int32_t bits = quantizer.widths.bits[i];
    if (bits == 32) continue;
    const float scale = quantizer.scale[i];
    if (!(scale >= kMinScale && scale <= kMaxScale)) return false;
    const int64_t zero_point = quantizer.zero_point[i];
    if (zero_point < 0 || zero_point >= int64_t{1} << bits) return false;
  }
  return true;
}

bool are_listed(const int32_t* bits, int64_t batch, const dfs::WidthTable& widths) {
  for (int64_t n = 0; n < batch; ++n) {
    if (bits[n] != 0 && index_of(widths, bits[n]) < 0) return false;
  }
  return true;
}

// Whether rows have the size that the widest option takes, and samples one of the options.
bool is_well_formed(const dfs::FeatureMap& map, int64_t batch) {
  const dfs::WidthTable& widths = map.quantizer.widths;
  if (widths.count == 0) return false;
  const int64_t pixel_bytes = (map.channels * widths.bits[widths.count - 1] + 7) / 8;
  return map.row_bytes == map.height * map.width * pixel_bytes &&
         are_listed(map.bits, batch, widths);
}

// Whether each sample of a packed input is stored at a width that can serve the one wanted.
bool can_serve(const dfs::MixedConv2dArgs& args) {
  if (!is_packed(args.input)) return true;
  if (!is_well_formed(args.input, args.batch)) return false;
  const bool as_they_are = args.input_quantizer.scale == nullptr;
  for (int64_t n = 0; n < args.batch; ++n) {
    const int32_t stored = args.input.bits[n];
    if (args.bits[n] == 0) continue;
    if (stored == 0 || (as_they_are && stored != args.bits[n])) return false;
  }
  return true;
}

// A convolution from the parts that change from call to call and those that do not. Gives false,
// with nothing done, for values that mixed_conv2d must not be called with. Without an output the
// residual is added into.
bool try_mixed_conv2d(const dfs::ConvGeometry& geometry, const dfs::ConvWeight& weight,
                      Address weight_scale, int64_t batch, Address bits,
                      const dfs::FeatureMap& input, Address input_scale, Address input_zero_point,
                      Address bias, Address mul, Address add, const dfs::FeatureMap* residual,
                      bool relu, const dfs::FeatureMap* output, int threads) {
  dfs::MixedConv2dArgs args;
  args.batch = batch;
  args.bits = pointer<const int32_t>(bits);
  args.geometry = geometry;
  args.weight = weight;
  args.weight.scale = pointer<const float>(weight_scale);
  args.input = input;
  if (input_scale != 0) {
    args.input_quantizer.widths = weight.widths;
    args.input_quantizer.scale = pointer<const float>(input_scale);
    args.input_quantizer.zero_point = pointer<const int32_t>(input_zero_point);
    if (!is_allowed(args.input_quantizer)) return false;
  }
  args.bias = pointer<const float>(bias);
  args.mul = pointer<const float>(mul);
  args.add = pointer<const float>(add);
  args.has_residual = residual != nullptr;
  if (residual != nullptr) args.residual = *residual;
  args.relu = relu;
  if (output == nullptr) {
    if (residual == nullptr) throw std::invalid_argument("neither an output nor a residual");
    args.output = *residual;
  } else {
    args.output = *output;
    if (is_packed(args.output) && !is_allowed(args.output.quantizer)) return false;
  }
  if (!are_listed(args.bits, batch, weight.widths) || !can_serve(args)) return false;
  if (args.has_residual && is_packed(args.residual) && !is_well_formed(args.residual, batch)) {
    return false;
  }
  dfs::mixed_conv2d(args, threads);
  return true;
}

bool try_quantize_pack(const dfs::FeatureMap& src, const dfs::FeatureMap& dst, int64_t batch,
                       int threads) {
  if (!is_allowed(dst.quantizer) || !is_well_formed(dst, batch)) return false;
  dfs::quantize_pack(src, dst, batch, threads);
  return true;
}

bool try_unpack_dequantize(const dfs::FeatureMap& src, const dfs::FeatureMap& dst, int64_t batch,
                           int threads) {
  if (!is_well_formed(src, batch)) return false;
  dfs::unpack_dequantize(src, dst, batch, threads);
  return true;
}

bool try_rnn_gate(const dfs::RnnGateArgs& args, int threads) {
  if (is_packed(args.input) && !is_well_formed(args.input, args.batch)) return false;
  dfs::rnn_gate(args, threads);
  return true;
}

void bind_operations(py::module_& module) {
  using namespace py::literals;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "pack_bits",
      [](Address codes, int64_t rows, int64_t channels, int32_t bits, Address out, int threads) {
        dfs::pack_bits(pointer<const uint8_t>(codes), rows, channels, bits, pointer<uint8_t>(out),
                       threads);
      },
      "codes"_a, "rows"_a, "channels"_a, "bits"_a, "out"_a, "threads"_a, Unlocked());
  module.def(
      "unpack_bits",
      [](Address packed, int64_t rows, int64_t channels, int32_t bits, bool is_signed, Address out,
         int threads) {
        dfs::unpack_bits(pointer<const uint8_t>(packed), rows, channels, bits, is_signed,
                         pointer<uint8_t>(out), threads);
      },
      "packed"_a, "rows"_a, "channels"_a, "bits"_a, "signed"_a, "out"_a, "threads"_a, Unlocked());
  module.def("quantize_pack", &dfs::quantize_pack, "src"_a, "dst"_a, "batch"_a, "threads"_a,
             Unlocked());
  module.def("unpack_dequantize", &dfs::unpack_dequantize, "src"_a, "dst"_a, "batch"_a, "threads"_a,
             Unlocked());
  module.def(
      "fake_quantize",
      [](Address values, int64_t count, int32_t bits, float scale, int32_t zero_point, Address out,
         int threads) {
        dfs::fake_quantize(pointer<const float>(values), count, {bits, scale, zero_point},
                           pointer<float>(out), threads);
      },
      "values"_a, "count"_a, "bits"_a, "scale"_a, "zero_point"_a, "out"_a, "threads"_a, Unlocked());
  module.def(
      "fake_quantize_backward",
      [](Address grads, Address values, int64_t count, int32_t bits, float scale,
         int32_t zero_point, Address out, int threads) {
        return dfs::fake_quantize_backward(pointer<const float>(grads),
                                           pointer<const float>(values), count,
                                           {bits, scale, zero_point}, pointer<float>(out), threads);
      },
      "grads"_a, "values"_a, "count"_a, "bits"_a, "scale"_a, "zero_point"_a, "out"_a, "threads"_a,
      Unlocked());
  module.def(
      "quantize_weight",
      [](Address weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
         int64_t group_channels, Address scale, int32_t bits, bool centred, Address out,
         int threads) {
        dfs::quantize_weight(pointer<const float>(weight), out_channels, kernel_h, kernel_w,
                             group_channels, pointer<const float>(scale), bits, centred,
                             pointer<uint8_t>(out), threads);
      },
      "weight"_a, "out_channels"_a, "kernel_h"_a, "kernel_w"_a, "group_channels"_a, "scale"_a,
      "bits"_a, "centred"_a, "out"_a, "threads"_a, Unlocked());
  module.def(
      "peak_rates",
      []() -> py::object {
        const dfs::PeakRates rates = dfs::peak_rates();
        if (rates.fma == 0.0) return py::none();
        return py::dict("fma"_a = rates.fma, "int8"_a = rates.int8);
      },
      "Multiply-accumulates a second of one thread at best; None for the scalar kernels.");
  module.def("tile_variant", &dfs::tile_variant);
  module.def("tile_bytes", &dfs::tile_bytes, "geometry"_a, "bits"_a, "centred"_a);
  module.def(
      "retile_weight",
      [](const dfs::ConvGeometry& geometry, Address canonical, int32_t bits, bool centred,
         Address out, int threads) {
        dfs::retile_weight(geometry, pointer<const void>(canonical), bits, centred,
                           pointer<void>(out), threads);
      },
      "geometry"_a, "canonical"_a, "bits"_a, "centred"_a, "out"_a, "threads"_a, Unlocked());
  module.def("mixed_conv2d", &dfs::mixed_conv2d, "args"_a, "threads"_a, Unlocked());
  module.def("try_quantize_pack", &try_quantize_pack, "src"_a, "dst"_a, "batch"_a, "threads"_a,
             Unlocked());
  module.def("try_unpack_dequantize", &try_unpack_dequantize, "src"_a, "dst"_a, "batch"_a,
             "threads"_a, Unlocked());
  module.def("try_mixed_conv2d", &try_mixed_conv2d, "geometry"_a, "weight"_a, "weight_scale"_a,
             "batch"_a, "bits"_a, "input"_a, "input_scale"_a, "input_zero_point"_a, "bias"_a,
             "mul"_a, "add"_a, "residual"_a, "relu"_a, "output"_a, "threads"_a, Unlocked());
  module.def("rnn_gate", &dfs::rnn_gate, "args"_a, "threads"_a, Unlocked());
  module.def("try_rnn_gate", &try_rnn_gate, "args"_a, "threads"_a, Unlocked());
  module.def("mixed_conv2d_backward", &dfs::mixed_conv2d_backward, "args"_a, "threads"_a,
             Unlocked());
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of mixed-bitwidth convolution.";
  module.def("supported_isas", &dfs::supported_isas);
  module.def("isa", [] { return std::string(dfs::kernels().name); });
  module.def("set_isa", &dfs::set_isa, py::arg("name"));
  // For tests, which split small work too.
  module.def("min_thread_cost", &dfs::min_thread_cost);
  module.def("set_min_thread_cost", &dfs::set_min_thread_cost, py::arg("nanoseconds"));
  bind_structs(module);
  bind_operations(module);
  bind_engine(module);
}
