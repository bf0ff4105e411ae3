// The portable kernels: plain loops that a compiler vectorizes for the baseline instruction set.
#include "kernels/code_steps.h"
#include "kernels/conv_gradients.h"
#include "kernels/conv_rows.h"
#include "kernels/fake_quantize.h"
#include "kernels/gate_units.h"
#include "kernels/pooling.h"

namespace dfs {

const KernelTable kScalarKernels = {
    "scalar",
    {0.04, 0.04, 0.04, 0.1},
    scalar::pack_pixels,
    scalar::unpack_pixels,
    scalar::convert_scratch_bytes,
    scalar::convert_rows,
    scalar::convert_rows,
    scalar::fake_quantize_values,
    scalar::fake_quantize_gradients,
    scalar::sum_pixels,
    scalar::map_columns,
    scalar::lstm_units,
    scalar::quantize_filter,
    scalar::portable_tile_bytes,
    scalar::portable_retile,
    scalar::portable_tile_form,
    scalar::find_code_steps,
    scalar::conv_scratch_bytes,
    scalar::conv_rows,
    scalar::skip_rows,
    scalar::backward_weight_bytes,
    scalar::backward_weight_blocks,
    scalar::backward_input_scratch_bytes,
    scalar::backward_input,
    scalar::backward_filter_scratch_bytes,
    scalar::backward_filter,
    nullptr,
    nullptr,
};

}  // namespace dfs
