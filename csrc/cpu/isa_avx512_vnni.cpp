// For processors with AVX-512 and VNNI.
#include "kernels/code_steps.h"
#include "kernels/conv_gradients.h"
#include "kernels/conv_rows.h"
#include "kernels/conv_vector.h"
#include "kernels/fake_quantize.h"
#include "kernels/gate_units.h"
#include "kernels/peak.h"
#include "kernels/pooling.h"

namespace dfs {

const KernelTable kAvx512VnniKernels = {
    "avx512_vnni",
    {0.005, 0.005, 0.005, 0.02},
    avx512_vnni::pack_pixels,
    avx512_vnni::unpack_pixels,
    avx512_vnni::convert_scratch_bytes,
    avx512_vnni::convert_rows,
    avx512_vnni::convert_rows,
    avx512_vnni::fake_quantize_values,
    avx512_vnni::fake_quantize_gradients,
    avx512_vnni::sum_pixels,
    avx512_vnni::map_columns,
    avx512_vnni::lstm_units,
    avx512_vnni::quantize_filter,
    avx512_vnni::vector_tile_bytes,
    avx512_vnni::vector_retile,
    avx512_vnni::vector_tile_form,
    avx512_vnni::find_code_steps,
    avx512_vnni::vector_conv_scratch_bytes,
    avx512_vnni::vector_conv_rows,
    avx512_vnni::skip_rows,
    avx512_vnni::backward_weight_bytes,
    avx512_vnni::backward_weight_blocks,
    avx512_vnni::backward_input_scratch_bytes,
    avx512_vnni::backward_input,
    avx512_vnni::backward_filter_scratch_bytes,
    avx512_vnni::backward_filter,
    avx512_vnni::multiply_floats,
    avx512_vnni::multiply_codes,
};

}  // namespace dfs
