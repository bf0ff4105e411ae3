// What a convolution and its gradients have in common.
#pragma once

#include "device.h"
#include "dfs/types.h"

namespace dfs::cuda {

struct Geometry {
  int kernel_h = 0;
  int kernel_w = 0;
  int stride_h = 0;
  int stride_w = 0;
  int pad_top = 0;
  int pad_left = 0;
  int dilation_h = 0;
  int dilation_w = 0;
  int groups = 0;

  DFS_HOST_DEVICE int taps() const { return kernel_h * kernel_w; }
};

inline Geometry to_geometry(const ConvGeometry& g) {
  Geometry result;
  result.kernel_h = static_cast<int>(g.kernel_h);
  result.kernel_w = static_cast<int>(g.kernel_w);
  result.stride_h = static_cast<int>(g.stride_h);
  result.stride_w = static_cast<int>(g.stride_w);
  result.pad_top = static_cast<int>(g.pad_top);
  result.pad_left = static_cast<int>(g.pad_left);
  result.dilation_h = static_cast<int>(g.dilation_h);
  result.dilation_w = static_cast<int>(g.dilation_w);
  result.groups = static_cast<int>(g.groups);
  return result;
}

}  // namespace dfs::cuda
