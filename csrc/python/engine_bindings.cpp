#include "engine_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine.h"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

dfs::LayerSpec make_layer(const dfs::ConvGeometry& geometry, const std::vector<int32_t>& widths,
                          const std::vector<Address>& codes, const std::vector<bool>& centred,
                          Address weight_scale, Address input_scale, Address input_zero_point,
                          Address bias, Address mul, Address add) {
  if (widths.empty() || widths.size() > static_cast<size_t>(dfs::kMaxWidths) ||
      codes.size() != widths.size() || centred.size() != widths.size()) {
    throw std::invalid_argument("layer: one to four widths, each with codes and a kind of levels");
  }
  dfs::LayerSpec layer;
  layer.geometry = geometry;
  layer.widths.count = static_cast<int32_t>(widths.size());
  for (size_t i = 0; i < widths.size(); ++i) {
    layer.widths.bits[i] = widths[i];
    layer.codes[i] = pointer<const void>(codes[i]);
    layer.centred[i] = centred[i];
  }
  layer.weight_scale = pointer<const float>(weight_scale);
  layer.input_scale = pointer<const float>(input_scale);
  layer.input_zero_point = pointer<const int32_t>(input_zero_point);
  layer.bias = pointer<const float>(bias);
  layer.mul = pointer<const float>(mul);
  layer.add = pointer<const float>(add);
  return layer;
}

dfs::GateKind gate_kind(const std::string& name) {
  if (name == "rnn") return dfs::GateKind::kRecurrent;
  if (name == "feedforward") return dfs::GateKind::kFeedForward;
  if (name == "constant") return dfs::GateKind::kConstant;
  throw std::invalid_argument("gate: kind must be rnn, feedforward or constant, got " + name);
}

dfs::GateSpec make_gate(const std::string& kind, bool deviation, Address embed_weight,
                        Address embed_bias, Address proj_weight, Address proj_bias) {
  dfs::GateSpec gate;
  gate.kind = gate_kind(kind);
  gate.deviation = deviation;
  gate.embed_weight = pointer<const float>(embed_weight);
  gate.embed_bias = pointer<const float>(embed_bias);
  gate.proj_weight = pointer<const float>(proj_weight);
  gate.proj_bias = pointer<const float>(proj_bias);
  return gate;
}

// A float attribute of the network's shared parameters, by name.
template <typename T>
void def_address(py::class_<dfs::NetworkSpec>& cls, const char* name,
                 const T* dfs::NetworkSpec::* member) {
  cls.def_property(
      name,
      [member](const dfs::NetworkSpec& self) { return reinterpret_cast<Address>(self.*member); },
      [member](dfs::NetworkSpec& self, Address address) {
        self.*member = pointer<const T>(address);
      });
}

void bind_network(py::module_& module) {
  using namespace py::literals;
  py::class_<dfs::LayerSpec>(module, "LayerSpec")
      .def(py::init(&make_layer), "geometry"_a, "widths"_a, "codes"_a, "centred"_a,
           "weight_scale"_a, "input_scale"_a, "input_zero_point"_a, "bias"_a, "mul"_a, "add"_a);
  py::class_<dfs::StreamSpec>(module, "StreamSpec")
      .def(py::init([](bool is_packed, float scale) { return dfs::StreamSpec{is_packed, scale}; }),
           "is_packed"_a, "scale"_a);
  py::class_<dfs::BlockSpec>(module, "BlockSpec")
      .def(py::init([](const std::vector<dfs::LayerSpec>& layers,
                       const std::vector<dfs::LayerSpec>& shortcut, const dfs::StreamSpec& stream,
                       int32_t fixed_bits) {
             if (shortcut.size() > 1) throw std::invalid_argument("block: more than one shortcut");
             return dfs::BlockSpec{layers, shortcut, stream, fixed_bits};
           }),
           "layers"_a, "shortcut"_a, "stream"_a, "fixed_bits"_a = -1);
  py::class_<dfs::GateSpec>(module, "GateSpec")
      .def(py::init(&make_gate), "kind"_a, "deviation"_a, "embed_weight"_a, "embed_bias"_a,
           "proj_weight"_a, "proj_bias"_a);
  py::class_<dfs::NetworkSpec> network(module, "NetworkSpec");
  network.def(py::init<>())
      .def_readwrite("in_channels", &dfs::NetworkSpec::in_channels)
      .def_readwrite("height", &dfs::NetworkSpec::height)
      .def_readwrite("width", &dfs::NetworkSpec::width)
      .def_readwrite("stem", &dfs::NetworkSpec::stem)
      .def_readwrite("stem_stream", &dfs::NetworkSpec::stem_stream)
      .def_readwrite("pool_size", &dfs::NetworkSpec::pool_size)
      .def_readwrite("pool_stride", &dfs::NetworkSpec::pool_stride)
      .def_readwrite("pool_padding", &dfs::NetworkSpec::pool_padding)
      .def_readwrite("blocks", &dfs::NetworkSpec::blocks)
      .def_readwrite("gates", &dfs::NetworkSpec::gates)
      .def_readwrite("hidden", &dfs::NetworkSpec::hidden)
      .def_readwrite("choices", &dfs::NetworkSpec::choices)
      .def_readwrite("classifier", &dfs::NetworkSpec::classifier);
  def_address(network, "pixel_values", &dfs::NetworkSpec::pixel_values);
  def_address(network, "weight_ih", &dfs::NetworkSpec::weight_ih);
  def_address(network, "weight_hh", &dfs::NetworkSpec::weight_hh);
  def_address(network, "bias_ih", &dfs::NetworkSpec::bias_ih);
  def_address(network, "bias_hh", &dfs::NetworkSpec::bias_hh);
  def_address(network, "proj_weight", &dfs::NetworkSpec::proj_weight);
  def_address(network, "proj_bias", &dfs::NetworkSpec::proj_bias);
  def_address(network, "choice_bias", &dfs::NetworkSpec::choice_bias);
}

void run_engine(const dfs::Engine& engine, const dfs::FeatureMap& images, Address pixels,
                int64_t batch, Address policy, Address choice_bias, Address logits, Address bits,
                Address cost, Address block_times, Address gate_times, int threads) {
  dfs::EngineCall call;
  call.images = images;
  call.pixels = {pointer<const uint8_t>(pixels), images.stride_n, images.stride_c, images.stride_h,
                 images.stride_w};
  call.batch = batch;
  call.policy = pointer<const int32_t>(policy);
  call.choice_bias = pointer<const double>(choice_bias);
  call.threads = threads;
  dfs::EngineOutput output;
  output.logits = pointer<float>(logits);
  output.bits = pointer<int32_t>(bits);
  output.cost = pointer<double>(cost);
  output.block_times = pointer<double>(block_times);
  output.gate_times = pointer<double>(gate_times);
  engine.run(call, output);
}

}  // namespace

void bind_engine(py::module_& module) {
  using namespace py::literals;
  bind_network(module);
  py::class_<dfs::Engine, std::shared_ptr<dfs::Engine>>(module, "Engine")
      .def(py::init<const dfs::NetworkSpec&>(), "spec"_a)
      .def("weight_bytes", &dfs::Engine::weight_bytes)
      .def("run", &run_engine, "images"_a, "pixels"_a, "batch"_a, "policy"_a, "choice_bias"_a,
           "logits"_a, "bits"_a, "cost"_a, "block_times"_a, "gate_times"_a, "threads"_a,
           py::call_guard<py::gil_scoped_release>());
}
