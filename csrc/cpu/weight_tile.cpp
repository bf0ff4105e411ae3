#include "weight_tile.h"

#include <cstring>

#include "checks.h"
#include "dispatch.h"
#include "operations.h"

namespace dfs {
namespace {

struct TileHeader {
  char magic[4];
  int32_t bits;
  int32_t centred;
  int32_t groups;
  int32_t in_channels;
  int32_t out_channels;
  int32_t kernel_h;
  int32_t kernel_w;
  char isa[32];
};
static_assert(sizeof(TileHeader) == kTileHeaderBytes);

TileHeader make_header(const KernelTable& table, const ConvGeometry& g, int32_t bits,
                       bool centred) {
  TileHeader header;
  std::memset(&header, 0, sizeof(header));
  std::memcpy(header.magic, "DFS", 3);
  header.magic[3] = kTileFormat;
  header.bits = bits;
  header.centred = bits != 32 && centred;
  header.groups = static_cast<int32_t>(g.groups);
  header.in_channels = static_cast<int32_t>(g.in_channels);
  header.out_channels = static_cast<int32_t>(g.out_channels);
  header.kernel_h = static_cast<int32_t>(g.kernel_h);
  header.kernel_w = static_cast<int32_t>(g.kernel_w);
  std::strncpy(header.isa, table.name, sizeof(header.isa) - 1);
  return header;
}

}  // namespace

const void* tile_payload(const void* tile, const KernelTable& table, const ConvGeometry& geometry,
                         int32_t bits, bool centred) {
  if (tile == nullptr) {
    reject("weight has no tile for " + std::to_string(bits) + " bits");
  }
  TileHeader found;
  std::memcpy(&found, tile, sizeof(found));
  const TileHeader expected = make_header(table, geometry, bits, centred);
  if (std::memcmp(&found, &expected, sizeof(found)) != 0) {
    if (std::memcmp(found.magic, expected.magic, sizeof(found.magic)) != 0) {
      reject("the weight tile for " + std::to_string(bits) +
             " bits does not come from retile_weight");
    }
    found.isa[sizeof(found.isa) - 1] = '\0';
    reject("the weight tile for " + std::to_string(bits) + " bits was made for " +
           std::string(found.isa) + ", " + std::to_string(found.bits) +
           " bits and maybe another geometry or level kind; this call runs on " + table.name);
  }
  return static_cast<const uint8_t*>(tile) + kTileHeaderBytes;
}

std::string tile_variant() { return std::string(kernels().name) + "/" + kTileFormat; }

// A multiple of the header, so that tiles laid end to end stay aligned.
size_t tile_bytes(const ConvGeometry& geometry, int32_t bits, bool centred) {
  check_geometry(geometry);
  check_weight_bits(bits, true);
  const size_t payload = kernels().tile_bytes(geometry, bits, centred);
  return kTileHeaderBytes + (payload + kTileHeaderBytes - 1) / kTileHeaderBytes * kTileHeaderBytes;
}

void retile_weight(const ConvGeometry& geometry, const void* canonical, int32_t bits, bool centred,
                   void* tile, int threads) {
  (void)threads;  // a copy that one thread makes at the speed of memory
  check_geometry(geometry);
  check_weight_bits(bits, true);
  const KernelTable& table = kernels();
  const TileHeader header = make_header(table, geometry, bits, centred);
  std::memcpy(tile, &header, sizeof(header));
  table.retile_weight(geometry, static_cast<const uint8_t*>(canonical), bits, centred,
                      static_cast<uint8_t*>(tile) + kTileHeaderBytes);
}

}  // namespace dfs
