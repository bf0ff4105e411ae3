// How kernels are started. Plain C++, so that code which only prepares launches needs no CUDA.
#pragma once

#include <cstdint>

namespace dfs::cuda {

// A cudaStream_t, which is a pointer; null is the default stream. The emulator ignores it.
using Stream = void*;

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;  // a multiple of 32
  int shared_bytes = 0;
};

// What a block may use of shared memory on the smallest GPU served (8.6 and 8.9: 99 KiB).
constexpr int kMaxSharedBytes = 99 * 1024;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace dfs::cuda
