// Re-tiled weights carry a header that says what they are, so that weights tiled for another
// geometry, width or instruction set are refused rather than misread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "dfs/types.h"
#include "kernel_table.h"

namespace dfs {

// Raised whenever a layout changes: what was compiled for another one must not be used again.
constexpr char kTileFormat = '6';

// A multiple of the alignment that vector loads want.
constexpr size_t kTileHeaderBytes = 64;

// The kernels' part of a tile; throws std::invalid_argument if the header does not fit the call.
const void* tile_payload(const void* tile, const KernelTable& table, const ConvGeometry& geometry,
                         int32_t bits, bool centred, TileForm form);

}  // namespace dfs
