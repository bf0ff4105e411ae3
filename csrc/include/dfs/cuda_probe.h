// What the CUDA runtime sees, in plain C++: usable where there is no driver and no CUDA header.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dfs {

struct CudaDevice {
  std::string name;
  int compute_capability_major = 0;
  int compute_capability_minor = 0;
  uint64_t total_memory = 0;  // bytes
  // Whether a kernel of this binary ran here and left what it should have.
  bool runs = false;
  // The architecture of the code that was chosen, 10 * major + minor.
  int binary_version = 0;
  std::string error;
};

struct CudaProbe {
  int driver_version = 0;  // 1000 * major + 10 * minor; 0 without a driver
  int runtime_version = 0;
  std::vector<CudaDevice> devices;
  std::string error;
};

// Never throws for want of a driver or a device: `error` says what is missing. Runs a kernel on
// every device, and so creates a context on each.
CudaProbe probe_cuda();

}  // namespace dfs
