// The operations on whole tensors: they check widths, split the work into tasks for the kernels of
// the chosen instruction set and hand these to the thread pool. Results do not depend on `threads`
// or on the composition of the batch. All throw std::invalid_argument for what cannot be run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dfs/types.h"

namespace dfs {

// (rows, channels) bytes, the low `bits` of each -> (rows, ceil(channels * bits / 8)); bits is 1,
// 2, 4 or 8.
void pack_bits(const uint8_t* codes, int64_t rows, int64_t channels, int32_t bits, uint8_t* packed,
               int threads);
void unpack_bits(const uint8_t* packed, int64_t rows, int64_t channels, int32_t bits,
                 bool is_signed, uint8_t* codes, int threads);

// Sample n of a float map to dst.bits[n] with dst.quantizer. A row of width 0 is not touched.
void quantize_pack(const FeatureMap& src, const FeatureMap& dst, int64_t batch, int threads);

// Back to a float map; a row of width 0 gives zeros.
void unpack_dequantize(const FeatureMap& src, const FeatureMap& dst, int64_t batch, int threads);

// The values that quantizing leaves of `count` floats; NaN becomes the lowest.
void fake_quantize(const float* values, int64_t count, const FakeQuantizer& quantizer,
                   float* result, int threads);

// The straight-through gradient of the values, from that of what fake_quantize gives, and,
// returned, the sum over the values of gradient times slope: that of the scale, before it is
// divided by a root. The sum is in float64, in an order that depends on `count` only.
double fake_quantize_backward(const float* grads, const float* values, int64_t count,
                              const FakeQuantizer& quantizer, float* result, int threads);

// (O, Cg, KH, KW) float32 -> canonical packed weights; scale is (O).
void quantize_weight(const float* weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                     int64_t group_channels, const float* scale, int32_t bits, bool centred,
                     uint8_t* packed, int threads);

// Canonical packed weights (float32 in the same order at 32 bits) -> the private layout of the
// instruction set in use, which mixed_conv2d refuses under another one.
size_t tile_bytes(const ConvGeometry& geometry, int32_t bits, bool centred);
// Names that layout: the instruction set and the version.
std::string tile_variant();
void retile_weight(const ConvGeometry& geometry, const void* canonical, int32_t bits, bool centred,
                   void* tile, int threads);

// Multiplications a second of one thread at best, on float32 and on 8-bit codes (16-bit ones where
// these are what is multiplied); 0 for the scalar kernels. Takes some milliseconds.
struct PeakRates {
  double fma = 0.0;
  double int8 = 0.0;
};
PeakRates peak_rates();

// Chooses a width for every sample; equal logits go to the first choice.
void rnn_gate(const RnnGateArgs& args, int threads);

void mixed_conv2d(const MixedConv2dArgs& args, int threads);
void mixed_conv2d_backward(const MixedConv2dBackwardArgs& args, int threads);

}  // namespace dfs
