#pragma once

#include "conv_params.h"

namespace dfs::cuda {

// Serves the widths in `params.serves` of any geometry, one product at a time.
void launch_general(ConvParams params, Stream stream);

}  // namespace dfs::cuda
