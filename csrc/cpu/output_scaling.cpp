#include "output_scaling.h"

namespace dfs {

void fold_output_scaling(const ConvWeight& weight, int width_index, int64_t out_channels,
                         float input_scale, const float* bias, const float* mul, const float* add,
                         float* multiplier, float* offset) {
  const bool is_float = weight.widths.bits[width_index] == 32;
  const double step = is_float ? 1.0 : static_cast<double>(input_scale);
  for (int64_t o = 0; o < out_channels; ++o) {
    const int64_t entry = width_index * out_channels + o;
    double weight_scale = is_float ? 1.0 : static_cast<double>(weight.scale[entry]);
    if (!is_float && weight.centred[width_index]) weight_scale *= 0.5;
    const double gain = mul == nullptr ? 1.0 : static_cast<double>(mul[entry]);
    const double shift = add == nullptr ? 0.0 : static_cast<double>(add[entry]);
    const double added = bias == nullptr ? 0.0 : static_cast<double>(bias[o]);
    multiplier[o] = static_cast<float>(step * weight_scale * gain);
    offset[o] = static_cast<float>(added * gain + shift);
  }
}

}  // namespace dfs
