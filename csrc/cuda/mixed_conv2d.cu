// Which kernels serve a mixed convolution. Host code only.
#include <limits>
#include <stdexcept>
#include <string>

#include "conv_float.h"
#include "conv_general.h"
#include "conv_mma.h"
#include "cuda_operations.h"

namespace dfs::cuda {
namespace {

[[noreturn]] void reject(const std::string& message) { throw std::invalid_argument(message); }

// Kernels index within a sample with 32 bits.
void check_size(const FeatureMap& map, const char* name) {
  const int64_t values = map.channels * map.height * map.width;
  if (values > std::numeric_limits<int32_t>::max() / 4) {
    reject(std::string(name) + " has " + std::to_string(values) +
           " values a sample; at most 2^29 are");
  }
}

bool same_memory(const FeatureMap& a, const FeatureMap& b) {
  if (is_packed(a) != is_packed(b)) return false;
  if (is_packed(a)) {
    return a.codes == b.codes && a.bits == b.bits && a.quantizer.scale == b.quantizer.scale;
  }
  return a.values == b.values && a.stride_n == b.stride_n && a.stride_c == b.stride_c &&
         a.stride_h == b.stride_h && a.stride_w == b.stride_w;
}

ConvParams make_params(const MixedConv2dArgs& args) {
  ConvParams p;
  p.batch = args.batch;
  p.bits = args.bits;
  p.input = to_map(args.input);
  p.quantizes = args.input_quantizer.scale != nullptr || !is_packed(args.input);
  p.input_quantizer = by_slot(args.input_quantizer);
  p.has_residual = args.has_residual;
  if (args.has_residual) p.residual = to_map(args.residual);
  p.output = to_map(args.output);
  p.in_place = args.has_residual && same_memory(args.residual, args.output);
  p.relu = args.relu;
  const ConvGeometry& g = args.geometry;
  static_cast<Geometry&>(p) = to_geometry(g);
  p.bias = args.bias;
  for (int i = 0; i < args.weight.widths.count; ++i) {
    const int slot = slot_of(args.weight.widths.bits[i]);
    if (slot < 0) reject("weight lists " + std::to_string(args.weight.widths.bits[i]) + " bits");
    const int64_t row = i * g.out_channels;
    p.tiles[slot] = args.weight.tiles[i];
    p.centred[slot] = args.weight.centred[i];
    p.offered[slot] = true;
    p.weight_scale[slot] = args.weight.scale == nullptr ? nullptr : args.weight.scale + row;
    p.mul[slot] = args.mul == nullptr ? nullptr : args.mul + row;
    p.add[slot] = args.add == nullptr ? nullptr : args.add + row;
  }
  return p;
}

enum class Path { kMma, kBits, kGeneral, kFloat };

Path path_of(const ConvGeometry& g, int slot, bool centred, bool planes) {
  if (slot == 3) return takes_float(g) ? Path::kFloat : Path::kGeneral;
  if (slot == 0 && planes && takes_planes(g, centred)) return Path::kBits;
  return takes_mma(g, bits_of(slot), centred) ? Path::kMma : Path::kGeneral;
}

}  // namespace

#if !defined(DFS_CUDA_EMULATED)
void set_device(int index) {
  check(cudaSetDevice(index), "cudaSetDevice(" + std::to_string(index) + ")");
}
#endif

void mixed_conv2d(const MixedConv2dArgs& args, Stream stream) {
  check_size(args.input, "input");
  check_size(args.output, "output");
  if (args.batch == 0) return;
  const ConvParams params = make_params(args);
  bool rest = true;  // the first launch serves skipped and unknown samples too
  for (const Path path : {Path::kMma, Path::kBits, Path::kGeneral, Path::kFloat}) {
    ConvParams p = params;
    p.planes = path == Path::kBits;
    const bool tiled = path == Path::kMma || path == Path::kBits;
    bool any = false;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (!p.offered[slot]) continue;
      p.serves[slot] = path_of(args.geometry, slot, p.centred[slot], args.weight.planes) == path;
      any |= p.serves[slot];
      if (p.serves[slot] && tiled && !is_aligned(p.tiles[slot], 16)) {
        reject("weight: tiles must be aligned to 16 bytes");
      }
    }
    if (!any) continue;
    p.serves_rest = rest;
    rest = false;
    if (tiled) {
      launch_mma(p, stream);
    } else if (path == Path::kGeneral) {
      launch_general(p, stream);
    } else {
      launch_float(p, stream);
    }
  }
}

}  // namespace dfs::cuda
