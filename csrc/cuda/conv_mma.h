// The tensor-core convolution as the rest of the host code sees it.
#pragma once

#include "conv_layout.h"
#include "conv_params.h"
#include "dfs/types.h"

namespace dfs::cuda {

// Blocks that keep an H100's 132 multiprocessors busy, two each. The emulator makes large tiles of
// a few samples, as a GPU does of many.
#if defined(DFS_CUDA_EMULATED)
constexpr int kEnoughBlocks = 6;
#else
constexpr int kEnoughBlocks = 264;
#endif

// Whether the tensor-core kernel has this layer at this width; the general one has all.
bool takes_mma(const ConvGeometry& geometry, int bits, bool centred);

// Whether it can multiply 2-bit samples as bit planes, too: they take other tiles.
bool takes_planes(const ConvGeometry& geometry, bool centred);

// How its weights are laid out then, `planes` where that is asked for and can be.
WeightTiles weight_tiles(const ConvGeometry& geometry, int bits, bool centred, bool planes);

// Bytes of a pixel that are staged at a time.
int slice_bytes(int taps, int outputs);

// How blocks divide the work, filled into the parameters, and what to launch.
struct MmaPlan {
  ConvParams params;
  LaunchShape shape;
};
MmaPlan plan_mma(ConvParams params);

// Serves the widths in `params.serves`.
void launch_mma(const ConvParams& params, Stream stream);

}  // namespace dfs::cuda
