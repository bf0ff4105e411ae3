// The CUDA kernels for Python. With DFS_CUDA_EMULATED it is the module of the tests, whose kernels
// run in the emulator on memory of the CPU.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "cuda_operations.h"
#include "structs.h"

#if defined(DFS_CUDA_EMULATED)
#define DFS_MODULE _cuda_emulated
#include "emulator/emulator.h"
#else
#define DFS_MODULE _cuda
#include "dfs/cuda_probe.h"
#endif

namespace py = pybind11;

namespace {

using namespace dfs_python;
using dfs::cuda::Stream;

Stream stream_of(Address address) { return pointer<void>(address); }

#if !defined(DFS_CUDA_EMULATED)
py::dict describe(const dfs::CudaDevice& device) {
  py::dict result;
  result["name"] = device.name;
  result["compute_capability"] =
      py::make_tuple(device.compute_capability_major, device.compute_capability_minor);
  result["total_memory"] = device.total_memory;
  result["runs"] = device.runs;
  result["binary_version"] = device.binary_version;
  if (!device.error.empty()) result["error"] = device.error;
  return result;
}

py::dict probe() {
  dfs::CudaProbe found;
  {
    py::gil_scoped_release release;
    found = dfs::probe_cuda();
  }
  py::list devices;
  for (const dfs::CudaDevice& device : found.devices) devices.append(describe(device));
  py::dict result;
  result["device_count"] = found.devices.size();
  result["devices"] = devices;
  result["driver_version"] = found.driver_version;
  result["runtime_version"] = found.runtime_version;
  if (!found.error.empty()) result["error"] = found.error;
  return result;
}

py::tuple architectures() {
  py::list names;
  std::istringstream stream(DFS_CUDA_ARCHITECTURES);
  for (std::string name; std::getline(stream, name, ',');) names.append(name);
  return py::tuple(names);
}

void bind_probe(py::module_& module) {
  module.def(
      "probe", &probe,
      "What the CUDA runtime sees, as a dict: device_count, devices (name, "
      "compute_capability, total_memory in bytes, runs: whether a kernel of this module ran "
      "there, binary_version), driver_version, runtime_version, and error where something is "
      "missing.");
  module.def("architectures", &architectures,
             "The GPU architectures compiled in: sm_* machine code, compute_* PTX.");
  module.def("set_device", &dfs::cuda::set_device, py::arg("index"),
             "Makes a device current in this module's own copy of the CUDA runtime.");
}
#endif

void bind_packing(py::module_& module) {
  using namespace py::literals;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "pack_bits",
      [](Address codes, int64_t rows, int64_t channels, int32_t bits, Address out, Address stream) {
        dfs::cuda::pack_bits(pointer<const uint8_t>(codes), rows, channels, bits,
                             pointer<uint8_t>(out), stream_of(stream));
      },
      "codes"_a, "rows"_a, "channels"_a, "bits"_a, "out"_a, "stream"_a, Unlocked());
  module.def(
      "unpack_bits",
      [](Address packed, int64_t rows, int64_t channels, int32_t bits, bool is_signed, Address out,
         Address stream) {
        dfs::cuda::unpack_bits(pointer<const uint8_t>(packed), rows, channels, bits, is_signed,
                               pointer<uint8_t>(out), stream_of(stream));
      },
      "packed"_a, "rows"_a, "channels"_a, "bits"_a, "signed"_a, "out"_a, "stream"_a, Unlocked());
  module.def(
      "quantize_pack",
      [](const dfs::FeatureMap& src, const dfs::FeatureMap& dst, int64_t batch, Address stream) {
        dfs::cuda::quantize_pack(src, dst, batch, stream_of(stream));
      },
      "src"_a, "dst"_a, "batch"_a, "stream"_a, Unlocked());
  module.def(
      "unpack_dequantize",
      [](const dfs::FeatureMap& src, const dfs::FeatureMap& dst, int64_t batch, Address stream) {
        dfs::cuda::unpack_dequantize(src, dst, batch, stream_of(stream));
      },
      "src"_a, "dst"_a, "batch"_a, "stream"_a, Unlocked());
}

void bind_convolution(py::module_& module) {
  using namespace py::literals;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  module.def(
      "quantize_weight",
      [](Address weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
         int64_t group_channels, Address scale, int32_t bits, bool centred, Address out,
         Address stream) {
        dfs::cuda::quantize_weight(pointer<const float>(weight), out_channels, kernel_h, kernel_w,
                                   group_channels, pointer<const float>(scale), bits, centred,
                                   pointer<uint8_t>(out), stream_of(stream));
      },
      "weight"_a, "out_channels"_a, "kernel_h"_a, "kernel_w"_a, "group_channels"_a, "scale"_a,
      "bits"_a, "centred"_a, "out"_a, "stream"_a, Unlocked());
  module.def("tile_bytes", &dfs::cuda::tile_bytes, "geometry"_a, "bits"_a, "centred"_a,
             "planes"_a = false);
  module.def(
      "retile_weight",
      [](const dfs::ConvGeometry& geometry, Address canonical, int32_t bits, bool centred,
         Address out, Address stream, bool planes) {
        dfs::cuda::retile_weight(geometry, pointer<const void>(canonical), bits, centred,
                                 pointer<void>(out), stream_of(stream), planes);
      },
      "geometry"_a, "canonical"_a, "bits"_a, "centred"_a, "out"_a, "stream"_a, "planes"_a = false,
      Unlocked());
  module.def(
      "mixed_conv2d",
      [](const dfs::MixedConv2dArgs& args, Address stream) {
        dfs::cuda::mixed_conv2d(args, stream_of(stream));
      },
      "args"_a, "stream"_a, Unlocked());
  module.def("backward_scratch_bytes", &dfs::cuda::backward_scratch_bytes, "args"_a);
  module.def(
      "mixed_conv2d_backward",
      [](const dfs::MixedConv2dBackwardArgs& args, Address scratch, bool tf32, Address stream) {
        dfs::cuda::mixed_conv2d_backward(args, pointer<void>(scratch), tf32, stream_of(stream));
      },
      "args"_a, "scratch"_a, "tf32"_a, "stream"_a, Unlocked());
  module.def(
      "rnn_gate",
      [](const dfs::RnnGateArgs& args, Address stream) {
        dfs::cuda::rnn_gate(args, stream_of(stream));
      },
      "args"_a, "stream"_a, Unlocked());
}

}  // namespace

PYBIND11_MODULE(DFS_MODULE, module) {
  module.doc() = "CUDA kernels of dfs_kernels; importing it needs neither a driver nor a GPU.";
  module.attr("tile_version") = dfs::cuda::kTileVersion;
#if defined(DFS_CUDA_EMULATED)
  module.def("take_launches", &dfs::cuda::emulator::take_launches,
             "Names of the kernels that were run since the last call.");
  module.def("skip_barrier", &dfs::cuda::emulator::skip_barrier,
             "Let all threads run past their barrier of this number; -1: past none.");
  module.def("barriers_met", &dfs::cuda::emulator::barriers_met,
             "How many barriers a thread of the last kernel met, at most.");
#else
  bind_probe(module);
#endif
  bind_structs(module);
  bind_packing(module);
  bind_convolution(module);
}
