// The plain structs of dfs/types.h for Python, for each of the native modules. Addresses come in as
// ints (tensor.data_ptr()) and are borrowed: the caller keeps the memory alive and has checked
// shapes, strides and dtypes.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "dfs/types.h"

namespace dfs_python {

namespace py = pybind11;

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

inline void check_count(size_t count) {
  if (count > static_cast<size_t>(dfs::kMaxWidths)) {
    throw std::invalid_argument("got " + std::to_string(count) + " widths; at most " +
                                std::to_string(dfs::kMaxWidths) + " are allowed");
  }
}

inline dfs::WidthTable make_widths(const std::vector<int32_t>& bits) {
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

// One address for each width.
template <typename Struct>
void def_pointers(py::class_<Struct>& cls, const char* name,
                  const void* (Struct::*member)[dfs::kMaxWidths]) {
  cls.def_property(
      name,
      [member](const Struct& self) {
        std::vector<Address> addresses;
        for (int i = 0; i < self.widths.count; ++i) {
          addresses.push_back(reinterpret_cast<Address>((self.*member)[i]));
        }
        return addresses;
      },
      [member](Struct& self, const std::vector<Address>& addresses) {
        check_count(addresses.size());
        for (size_t i = 0; i < addresses.size(); ++i) {
          (self.*member)[i] = pointer<const void>(addresses[i]);
        }
      });
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

inline void bind_quantizer(py::module_& module) {
  py::class_<dfs::Quantizer> cls(module, "Quantizer", py::module_local());
  def_keyword_constructor(cls);
  def_widths(cls);
  def_pointer(cls, "scale", &dfs::Quantizer::scale);
  def_pointer(cls, "zero_point", &dfs::Quantizer::zero_point);
}

inline dfs::FeatureMap map_of_values(Address values, int64_t channels, int64_t height,
                                     int64_t width, const std::array<int64_t, 4>& strides) {
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

inline dfs::FeatureMap map_of_codes(Address codes, int64_t channels, int64_t height, int64_t width,
                                    int64_t row_bytes, Address bits,
                                    const std::vector<int32_t>& widths, Address scale,
                                    Address zero_point) {
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

inline void bind_feature_map(py::module_& module) {
  using dfs::FeatureMap;
  using namespace py::literals;
  py::class_<FeatureMap> cls(module, "FeatureMap", py::module_local());
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

inline void bind_geometry(py::module_& module) {
  using dfs::ConvGeometry;
  py::class_<ConvGeometry> cls(module, "ConvGeometry", py::module_local());
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

inline void bind_weight(py::module_& module) {
  using dfs::ConvWeight;
  py::class_<ConvWeight> cls(module, "ConvWeight", py::module_local());
  def_keyword_constructor(cls);
  def_widths(cls);
  def_centred(cls);
  def_pointer(cls, "scale", &ConvWeight::scale);
  def_pointers(cls, "tiles", &ConvWeight::tiles);
  cls.def_readwrite("planes", &ConvWeight::planes);
}

inline void bind_mixed_conv2d(py::module_& module) {
  using dfs::MixedConv2dArgs;
  py::class_<MixedConv2dArgs> cls(module, "MixedConv2dArgs", py::module_local());
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

inline void bind_mixed_conv2d_backward(py::module_& module) {
  using dfs::MixedConv2dBackwardArgs;
  py::class_<MixedConv2dBackwardArgs> cls(module, "MixedConv2dBackwardArgs", py::module_local());
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
  def_pointers(cls, "packed_weight", &MixedConv2dBackwardArgs::packed_weight);
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

inline void bind_rnn_gate(py::module_& module) {
  using dfs::RnnGateArgs;
  py::class_<RnnGateArgs> cls(module, "RnnGateArgs", py::module_local());
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

// In this order: later ones hold earlier ones. Each module has classes of its own, so that they can
// be imported together.
inline void bind_structs(py::module_& module) {
  bind_quantizer(module);
  bind_feature_map(module);
  bind_geometry(module);
  bind_weight(module);
  bind_mixed_conv2d(module);
  bind_mixed_conv2d_backward(module);
  bind_rnn_gate(module);
}

}  // namespace dfs_python
