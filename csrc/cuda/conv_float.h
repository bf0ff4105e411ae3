#pragma once

#include "conv_params.h"

namespace dfs::cuda {

// Whether launch_float has this layer; the general kernel has all.
bool takes_float(const ConvGeometry& geometry);

// Serves the samples at 32 bits.
void launch_float(ConvParams params, Stream stream);

}  // namespace dfs::cuda
