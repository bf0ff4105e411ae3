// m and c of y = acc * m + c, folded in double and rounded once.
#pragma once

#include <cstdint>

#include "dfs/types.h"

namespace dfs {

// Those of one width, each (out_channels). `input_scale` is ignored at 32 bits.
void fold_output_scaling(const ConvWeight& weight, int width_index, int64_t out_channels,
                         float input_scale, const float* bias, const float* mul, const float* add,
                         float* multiplier, float* offset);

}  // namespace dfs
