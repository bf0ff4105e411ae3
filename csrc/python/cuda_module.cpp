#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

#include "dfs/cuda_probe.h"

namespace py = pybind11;

namespace {

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

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of dfs_kernels; importing it needs neither a driver nor a GPU.";
  m.def("probe", &probe,
        "What the CUDA runtime sees, as a dict: device_count, devices (name, compute_capability, "
        "total_memory in bytes, runs: whether a kernel of this module ran there, binary_version), "
        "driver_version, runtime_version, and error where something is missing.");
  m.def("architectures", &architectures,
        "The GPU architectures compiled in: sm_* machine code, compute_* PTX.");
}
