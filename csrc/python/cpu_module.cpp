// The CPU kernels for Python. Addresses come in as ints (tensor.data_ptr()) and are borrowed: the
// caller keeps the memory alive and has checked shapes, strides and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dfs/types.h"
#include "dispatch.h"
#include "engine_bindings.h"
#include "operations.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A pointer member as an attribute that takes an int, or None for null, and gives an int.
template <typename Struct, typename T>
void def_pointer(py::class_<Struct>& cls, const char* name, T* Struct::* member) {
  cls.def_property(
      name, [member](const Struct& self) { return reinterpret_cast<Address>(self.*member); },
      [member](Struct& self, std::optional<Address> address) {
        self.*member = pointer<T>(address.value_or(0));
      });
}

void check_count(size_t count) {
  if (count > static_cast<size_t>(dfs::kMaxWidths)) {
    throw std::invalid_argument("got " + std::to_string(count) + " widths; at most " +
                                std::to_string(dfs::kMaxWidths) + " are allowed");
  }
}

dfs::WidthTable make_widths(const std::vector<int32_t>& bits) {
  check_count(bits.size());
  dfs::WidthTable widths;
  widths.count = static_cast<int32_t>(bits.size());
  for (size_t i = 0; i < bits.size(); ++i) widths.bits[i] = bits[i];
  return widths;
}

template <typename Struct>
void def_widths(py::class_<Struct>& cls) {
  cls.def_property(
      "widths",
      [](const Struct& self) {
        return std::vector<int32_t>(self.widths.bits, self.widths.bits + self.widths.count);
      },
      [](Struct& self, const std::vector<int32_t>& bits) { self.widths = make_widths(bits); });
}

template <typename Struct>
void def_centred(py::class_<Struct>& cls) {
  cls.def_property(
      "centred",
      [](const Struct& self) {
        return std::vector<bool>(self.centred, self.centred + self.widths.count);
      },
      [](Struct& self, const std::vector<bool>& centred) {
        check_count(centred.size());
        for (size_t i = 0; i < centred.size(); ++i) self.centred[i] = centred[i];
      });
}

// Keyword constructors: Struct(name=value, ...) sets the attributes named.
template <typename Struct>
void def_keyword_constructor(py::class_<Struct>& cls) {
  cls.def(py::init([](const py::kwargs& attributes) {
    // Through a temporary Python object, so that the attributes' own setters do the conversion.
    Struct value;
    py::object view = py::cast(&value, py::return_value_policy::reference);
    for (const auto& [name, attribute] : attributes) py::setattr(view, name, attribute);
    return value;
  }));
}

void bind_quantizer(py::module_& module) {
  py::class_<dfs::Quantizer> cls(module, "Quantizer");
  def_keyword_constructor(cls);
  def_widths(cls);
  def_pointer(cls, "scale", &dfs::Quantizer::scale);
  def_pointer(cls, "zero_point", &dfs::Quantizer::zero_point);
}

dfs::FeatureMap map_of_values(Address values, int64_t channels, int64_t height, int64_t width,
                              const std::array<int64_t, 4>& strides) {
  dfs::FeatureMap map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.values = pointer<float>(values);
  map.stride_n = strides[0];
  map.stride_c = strides[1];
  map.stride_h = strides[2];
  map.stride_w = strides[3];
  return map;
}

dfs::FeatureMap map_of_codes(Address codes, int64_t channels, int64_t height, int64_t width,
                             int64_t row_bytes, Address bits, const std::vector<int32_t>& widths,
                             Address scale, Address zero_point) {
  dfs::FeatureMap map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.codes = pointer<uint8_t>(codes);
  map.row_bytes = row_bytes;
  map.bits = pointer<const int32_t>(bits);
  map.quantizer.widths = make_widths(widths);
  map.quantizer.scale = pointer<const float>(scale);
  map.quantizer.zero_point = pointer<const int32_t>(zero_point);
  return map;
}

void bind_feature_map(py::module_& module) {
  using dfs::FeatureMap;
  using namespace py::literals;
  py::class_<FeatureMap> cls(module, "FeatureMap");
  def_keyword_constructor(cls);
  cls.def_readwrite("channels", &FeatureMap::channels)
      .def_readwrite("height", &FeatureMap::height)
      .def_readwrite("width", &FeatureMap::width)
      .def_readwrite("stride_n", &FeatureMap::stride_n)
      .def_readwrite("stride_c", &FeatureMap::stride_c)
      .def_readwrite("stride_h", &FeatureMap::stride_h)
      .def_readwrite("stride_w", &FeatureMap::stride_w)
      .def_readwrite("row_bytes", &FeatureMap::row_bytes)
      .def_readwrite("quantizer", &FeatureMap::quantizer);
  def_pointer(cls, "values", &FeatureMap::values);
  def_pointer(cls, "codes", &FeatureMap::codes);
  def_pointer(cls, "bits", &FeatureMap::bits);
  // All of a map at once: setting its attributes one by one costs as much as a small convolution.
  cls.def_static("of_values", &map_of_values, "values"_a, "channels"_a, "height"_a, "width"_a,
                 "strides"_a);
  cls.def_static("of_codes", &map_of_codes, "codes"_a, "channels"_a, "height"_a, "width"_a,
                 "row_bytes"_a, "bits"_a, "widths"_a, "scale"_a, "zero_point"_a);
}

void bind_geometry(py::module_& module) {
  using dfs::ConvGeometry;
  py::class_<ConvGeometry> cls(module, "ConvGeometry");
  def_keyword_constructor(cls);
  cls.def_readwrite("in_channels", &ConvGeometry::in_channels)
      .def_readwrite("out_channels", &ConvGeometry::out_channels)
      .def_readwrite("kernel_h", &ConvGeometry::kernel_h)
      .def_readwrite("kernel_w", &ConvGeometry::kernel_w)
      .def_readwrite("stride_h", &ConvGeometry::stride_h)
      .def_readwrite("stride_w", &ConvGeometry::stride_w)
      .def_readwrite("pad_left", &ConvGeometry::pad_left)
      .def_readwrite("pad_right", &ConvGeometry::pad_right)
      .def_readwrite("pad_top", &ConvGeometry::pad_top)
      .def_readwrite("pad_bottom", &ConvGeometry::pad_bottom)
      .def_readwrite("dilation_h", &ConvGeometry::dilation_h)
      .def_readwrite("dilation_w", &ConvGeometry::dilation_w)
      .def_readwrite("groups", &ConvGeometry::groups);
}

void bind_weight(py::module_& module) {
  using dfs::ConvWeight;
  py::class_<ConvWeight> cls(module, "ConvWeight");
  def_keyword_constructor(cls);
  def_widths(cls);
  def_centred(cls);
  def_pointer(cls, "scale", &ConvWeight::scale);
  cls.def_property(
      "tiles",
      [](const ConvWeight& self) {
        std::vector<Address> tiles;
        for (int i = 0; i < self.widths.count; ++i) {
          tiles.push_back(reinterpret_cast<Address>(self.tiles[i]));
        }
        return tiles;
      },
      [](ConvWeight& self, const std::vector<Address>& tiles) {
        check_count(tiles.size());
        for (size_t i = 0; i < tiles.size(); ++i) self.tiles[i] = pointer<const void>(tiles[i]);
      });
}

void bind_mixed_conv2d(py::module_& module) {
  using dfs::MixedConv2dArgs;
  py::class_<MixedConv2dArgs> cls(module, "MixedConv2dArgs");
  def_keyword_constructor(cls);
  cls.def_readwrite("batch", &MixedConv2dArgs::batch)
      .def_readwrite("geometry", &MixedConv2dArgs::geometry)
      .def_readwrite("weight", &MixedConv2dArgs::weight)
      .def_readwrite("input", &MixedConv2dArgs::input)
      .def_readwrite("input_quantizer", &MixedConv2dArgs::input_quantizer)
      .def_readwrite("has_residual", &MixedConv2dArgs::has_residual)
      .def_readwrite("residual", &MixedConv2dArgs::residual)
      .def_readwrite("relu", &MixedConv2dArgs::relu)
      .def_readwrite("output", &MixedConv2dArgs::output);
  def_pointer(cls, "bits", &MixedConv2dArgs::bits);
  def_pointer(cls, "bias", &MixedConv2dArgs::bias);
  def_pointer(cls, "mul", &MixedConv2dArgs::mul);
  def_pointer(cls, "add", &MixedConv2dArgs::add);
}

void bind_mixed_conv2d_backward(py::module_& module) {
  using dfs::MixedConv2dBackwardArgs;
  py::class_<MixedConv2dBackwardArgs> cls(module, "MixedConv2dBackwardArgs");
  def_keyword_constructor(cls);
  def_widths(cls);
  def_centred(cls);
  cls.def_readwrite("batch", &MixedConv2dBackwardArgs::batch)
      .def_readwrite("geometry", &MixedConv2dBackwardArgs::geometry)
      .def_readwrite("input", &MixedConv2dBackwardArgs::input)
      .def_readwrite("input_quantizer", &MixedConv2dBackwardArgs::input_quantizer)
      .def_readwrite("grad_output", &MixedConv2dBackwardArgs::grad_output);
  def_pointer(cls, "bits", &MixedConv2dBackwardArgs::bits);
  def_pointer(cls, "weight", &MixedConv2dBackwardArgs::weight);
  def_pointer(cls, "weight_scale", &MixedConv2dBackwardArgs::weight_scale);
  def_pointer(cls, "mul", &MixedConv2dBackwardArgs::mul);
  def_pointer(cls, "bias", &MixedConv2dBackwardArgs::bias);
  def_pointer(cls, "grad_input", &MixedConv2dBackwardArgs::grad_input);
  def_pointer(cls, "grad_weight", &MixedConv2dBackwardArgs::grad_weight);
  def_pointer(cls, "grad_input_scale", &MixedConv2dBackwardArgs::grad_input_scale);
  def_pointer(cls, "grad_weight_scale", &MixedConv2dBackwardArgs::grad_weight_scale);
  def_pointer(cls, "grad_mul", &MixedConv2dBackwardArgs::grad_mul);
  def_pointer(cls, "grad_add", &MixedConv2dBackwardArgs::grad_add);
}

void bind_rnn_gate(py::module_& module) {
  using dfs::RnnGateArgs;
  py::class_<RnnGateArgs> cls(module, "RnnGateArgs");
  def_keyword_constructor(cls);
  cls.def_readwrite("batch", &RnnGateArgs::batch)
      .def_readwrite("input", &RnnGateArgs::input)
      .def_readwrite("hidden", &RnnGateArgs::hidden);
  cls.def_property(
      "choices",
      [](const RnnGateArgs& self) {
        return std::vector<int32_t>(self.choices, self.choices + self.choice_count);
      },
      [](RnnGateArgs& self, const std::vector<int32_t>& choices) {
        if (choices.empty() || choices.size() > static_cast<size_t>(dfs::kMaxChoices)) {
          throw std::invalid_argument("got " + std::to_string(choices.size()) + " choices; 1 to " +
                                      std::to_string(dfs::kMaxChoices) + " are allowed");
        }
        self.choice_count = static_cast<int64_t>(choices.size());
        std::copy(choices.begin(), choices.end(), self.choices);
      });
  def_pointer(cls, "state", &RnnGateArgs::state);
  def_pointer(cls, "embed_weight", &RnnGateArgs::embed_weight);
  def_pointer(cls, "embed_bias", &RnnGateArgs::embed_bias);
  def_pointer(cls, "weight_ih", &RnnGateArgs::weight_ih);
  def_pointer(cls, "weight_hh", &RnnGateArgs::weight_hh);
  def_pointer(cls, "bias_ih", &RnnGateArgs::bias_ih);
  def_pointer(cls, "bias_hh", &RnnGateArgs::bias_hh);
  def_pointer(cls, "proj_weight", &RnnGateArgs::proj_weight);
  def_pointer(cls, "proj_bias", &RnnGateArgs::proj_bias);
  def_pointer(cls, "choice_bias", &RnnGateArgs::choice_bias);
  def_pointer(cls, "out_bits", &RnnGateArgs::out_bits);
  def_pointer(cls, "out_logits", &RnnGateArgs::out_logits);
  def_pointer(cls, "out_state", &RnnGateArgs::out_state);
}

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
  bind_quantizer(module);
  bind_feature_map(module);
  bind_geometry(module);
  bind_weight(module);
  bind_mixed_conv2d(module);
  bind_mixed_conv2d_backward(module);
  bind_rnn_gate(module);
  bind_operations(module);
  bind_engine(module);
}
