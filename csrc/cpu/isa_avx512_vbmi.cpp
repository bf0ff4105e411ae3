// For processors with AVX-512, VNNI and VBMI.
#include "kernels/code_steps.h"
#include "kernels/conv_gradients.h"
#include "kernels/conv_rows.h"
#include "kernels/conv_vector.h"
#include "kernels/fake_quantize.h"
#include "kernels/gate_units.h"
#include "kernels/peak.h"
#include "kernels/pooling.h"

namespace dfs {

const KernelTable kAvx512VbmiKernels = {
    "avx512_vbmi",
    {0.003, 0.005, 0.005, 0.02},
    avx512_vbmi::pack_pixels,
    avx512_vbmi::unpack_pixels,
    avx512_vbmi::convert_scratch_bytes,
    avx512_vbmi::convert_rows,
    avx512_vbmi::convert_rows,
    avx512_vbmi::fake_quantize_values,
    avx512_vbmi::fake_quantize_gradients,
    avx512_vbmi::sum_pixels,
    avx512_vbmi::map_columns,
    avx512_vbmi::lstm_units,
    avx512_vbmi::quantize_filter,
    avx512_vbmi::vector_tile_bytes,
    avx512_vbmi::vector_retile,
    avx512_vbmi::vector_tile_form,
    avx512_vbmi::find_code_steps,
    avx512_vbmi::vector_conv_scratch_bytes,
    avx512_vbmi::vector_conv_rows,
    avx512_vbmi::skip_rows,
    avx512_vbmi::backward_weight_bytes,
    avx512_vbmi::backward_weight_blocks,
    avx512_vbmi::backward_input_scratch_bytes,
    avx512_vbmi::backward_input,
    avx512_vbmi::backward_filter_scratch_bytes,
    avx512_vbmi::backward_filter,
    avx512_vbmi::multiply_floats,
    avx512_vbmi::multiply_codes,
};

}  // namespace dfs
