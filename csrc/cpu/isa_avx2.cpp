// For processors with AVX2 and FMA but without VNNI.
#include "kernels/code_steps.h"
#include "kernels/conv_gradients.h"
#include "kernels/conv_rows.h"
#include "kernels/conv_vector.h"
#include "kernels/fake_quantize.h"
#include "kernels/gate_units.h"
#include "kernels/peak.h"
#include "kernels/pooling.h"

namespace dfs {

const KernelTable kAvx2Kernels = {
    "avx2",
    {0.009, 0.009, 0.016, 0.025},
    avx2::pack_pixels,
    avx2::unpack_pixels,
    avx2::convert_scratch_bytes,
    avx2::convert_rows,
    avx2::convert_rows,
    avx2::fake_quantize_values,
    avx2::fake_quantize_gradients,
    avx2::sum_pixels,
    avx2::map_columns,
    avx2::lstm_units,
    avx2::quantize_filter,
    avx2::vector_tile_bytes,
    avx2::vector_retile,
    avx2::vector_tile_form,
    avx2::find_code_steps,
    avx2::vector_conv_scratch_bytes,
    avx2::vector_conv_rows,
    avx2::skip_rows,
    avx2::backward_weight_bytes,
    avx2::backward_weight_blocks,
    avx2::backward_input_scratch_bytes,
    avx2::backward_input,
    avx2::backward_filter_scratch_bytes,
    avx2::backward_filter,
    avx2::multiply_floats,
    avx2::multiply_codes,
};

}  // namespace dfs
