#include <cuda_runtime.h>

#include "dfs/cuda_probe.h"

namespace dfs {
namespace {

constexpr unsigned kExpected = 0x0df50df5u;

__global__ void write_expected(unsigned* out) { *out = kExpected; }

std::string describe(cudaError_t status) {
  return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
}

cudaError_t run_kernel(unsigned* value) {
  unsigned* device_value = nullptr;
  cudaError_t status = cudaMalloc(&device_value, sizeof(unsigned));
  if (status != cudaSuccess) return status;
  write_expected<<<1, 1>>>(device_value);
  status = cudaGetLastError();
  if (status == cudaSuccess) {
    status = cudaMemcpy(value, device_value, sizeof(unsigned), cudaMemcpyDeviceToHost);
  }
  const cudaError_t freed = cudaFree(device_value);
  return status != cudaSuccess ? status : freed;
}

CudaDevice probe_device(int index) {
  CudaDevice device;
  cudaDeviceProp properties;
  cudaError_t status = cudaGetDeviceProperties(&properties, index);
  if (status != cudaSuccess) {
    device.error = describe(status);
    return device;
  }
  device.name = properties.name;
  device.compute_capability_major = properties.major;
  device.compute_capability_minor = properties.minor;
  device.total_memory = properties.totalGlobalMem;

  unsigned value = 0;
  cudaFuncAttributes attributes;
  status = cudaSetDevice(index);
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, write_expected);
  if (status == cudaSuccess) {
    device.binary_version = attributes.binaryVersion;
    status = run_kernel(&value);
  }
  if (status != cudaSuccess) {
    device.error = describe(status);
  } else if (value != kExpected) {
    device.error = "a kernel ran and left a wrong value";
  } else {
    device.runs = true;
  }
  cudaGetLastError();  // so that the caller's next check does not find an error of ours
  return device;
}

}  // namespace

CudaProbe probe_cuda() {
  CudaProbe probe;
  cudaRuntimeGetVersion(&probe.runtime_version);
  cudaDriverGetVersion(&probe.driver_version);

  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    probe.error = describe(status);
    cudaGetLastError();
    return probe;
  }
  if (count == 0) {
    probe.error = "no CUDA device";
    return probe;
  }
  int previous = 0;
  const bool restore = cudaGetDevice(&previous) == cudaSuccess;
  for (int index = 0; index < count; ++index) probe.devices.push_back(probe_device(index));
  if (restore) cudaSetDevice(previous);
  return probe;
}

}  // namespace dfs
