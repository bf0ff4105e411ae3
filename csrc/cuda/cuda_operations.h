// The operations on whole tensors in the memory of a GPU: each launches kernels on a stream and
// returns, waiting for nothing. Values on the GPU can't be checked here: a width that is no option
// fills its sample with NaN, 0xff if packed. All throw std::runtime_error if CUDA refuses a launch,
// std::invalid_argument for what cannot be run.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dfs/types.h"
#include "launch.h"

namespace dfs::cuda {

// Makes a device current for the calling thread: a CUDA runtime that is linked statically keeps its
// own record of that.
void set_device(int index);

// (rows, channels) bytes, the low `bits` of each -> (rows, ceil(channels * bits / 8)); 2, 4 or 8.
void pack_bits(const uint8_t* codes, int64_t rows, int64_t channels, int32_t bits, uint8_t* packed,
               Stream stream);
void unpack_bits(const uint8_t* packed, int64_t rows, int64_t channels, int32_t bits,
                 bool is_signed, uint8_t* codes, Stream stream);

// Sample n of a float map to dst.bits[n] with dst.quantizer. A row of width 0 is not touched.
void quantize_pack(const FeatureMap& src, const FeatureMap& dst, int64_t batch, Stream stream);

// Back to a float map; a row of width 0 gives zeros.
void unpack_dequantize(const FeatureMap& src, const FeatureMap& dst, int64_t batch, Stream stream);

// (O, Cg, KH, KW) float32 -> canonical packed weights; scale is (O).
void quantize_weight(const float* weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                     int64_t group_channels, const float* scale, int32_t bits, bool centred,
                     uint8_t* packed, Stream stream);

// Version of the layout below.
constexpr int kTileVersion = 1;

// Canonical weights -> the layout of the tensor-core kernel. 0 bytes: the layer takes another one
// at this width, which reads canonical weights. `planes`: at 2 bits, as bit planes, for
// `ConvWeight::planes`; nothing changes where a layer can't have them.
size_t tile_bytes(const ConvGeometry& geometry, int32_t bits, bool centred, bool planes = false);
void retile_weight(const ConvGeometry& geometry, const void* canonical, int32_t bits, bool centred,
                   void* tile, Stream stream, bool planes = false);

// `args.weight.tiles` holds tiles, aligned to 16 bytes, or canonical weights where tile_bytes is 0,
// float32 (O, KH, KW, C/groups) at 32 bits. At most four launches: tensor cores, these on bit
// planes, general, float32.
void mixed_conv2d(const MixedConv2dArgs& args, Stream stream);

// Gradients of a mixed convolution with float weights, or packed ones, where gradients of the
// weight and its steps can't be wanted. `scratch`, aligned to 16 bytes, may hold anything. `tf32`:
// products may be of factors that are rounded to TF32. At most ten launches.
int64_t backward_scratch_bytes(const MixedConv2dBackwardArgs& args);
void mixed_conv2d_backward(const MixedConv2dBackwardArgs& args, void* scratch, bool tf32,
                           Stream stream);

// One step of a recurrent gate, in one launch.
void rnn_gate(const RnnGateArgs& args, Stream stream);

}  // namespace dfs::cuda
