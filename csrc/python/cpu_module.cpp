// The CPU kernels for Python. Addresses come in as ints (tensor.data_ptr()) and are borrowed: the
// caller keeps the memory alive and has checked shapes, strides and dtypes.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dfs/types.h"
#include "dispatch.h"
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

void bind_feature_map(py::module_& module) {
  using dfs::FeatureMap;
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
  module.def("tile_bytes", &dfs::tile_bytes, "geometry"_a, "bits"_a);
  module.def(
      "retile_weight",
      [](const dfs::ConvGeometry& geometry, Address canonical, int32_t bits, bool centred,
         Address out, int threads) {
        dfs::retile_weight(geometry, pointer<const void>(canonical), bits, centred,
                           pointer<void>(out), threads);
      },
      "geometry"_a, "canonical"_a, "bits"_a, "centred"_a, "out"_a, "threads"_a, Unlocked());
  module.def("mixed_conv2d", &dfs::mixed_conv2d, "args"_a, "threads"_a, Unlocked());
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
  bind_operations(module);
}
