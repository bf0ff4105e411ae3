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

// The forms lie one after the other, each a multiple of the header, so that all stay aligned.
size_t form_bytes(const KernelTable& table, const ConvGeometry& geometry, int32_t bits,
                  bool centred, TileForm form) {
  const size_t payload = table.tile_bytes(geometry, bits, centred, form);
  return (payload + kTileHeaderBytes - 1) / kTileHeaderBytes * kTileHeaderBytes;
}

size_t form_offset(const KernelTable& table, const ConvGeometry& geometry, int32_t bits,
                   bool centred, TileForm form) {
  if (form == TileForm::kDots) return kTileHeaderBytes;
  return kTileHeaderBytes + form_bytes(table, geometry, bits, centred, TileForm::kDots);
}

}  // namespace

const void* tile_payload(const void* tile, const KernelTable& table, const ConvGeometry& geometry,
                         int32_t bits, bool centred, TileForm form) {
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
  return static_cast<const uint8_t*>(tile) + form_offset(table, geometry, bits, centred, form);
}

std::string tile_variant() { return std::string(kernels().name) + "/" + kTileFormat; }

size_t tile_bytes(const ConvGeometry& geometry, int32_t bits, bool centred) {
  check_geometry(geometry);
  check_weight_bits(bits, true);
  size_t bytes = kTileHeaderBytes;
  for (const TileForm form : kTileForms) {
    bytes += form_bytes(kernels(), geometry, bits, centred, form);
  }
  return bytes;
}

void retile_weight(const ConvGeometry& geometry, const void* canonical, int32_t bits, bool centred,
                   void* tile, int threads) {
  (void)threads;  // a copy that one thread makes at the speed of memory
  check_geometry(geometry);
  check_weight_bits(bits, true);
  const KernelTable& table = kernels();
  const TileHeader header = make_header(table, geometry, bits, centred);
  std::memcpy(tile, &header, sizeof(header));
  for (const TileForm form : kTileForms) {
    table.retile_weight(
        geometry, static_cast<const uint8_t*>(canonical), bits, centred, form,
        static_cast<uint8_t*>(tile) + form_offset(table, geometry, bits, centred, form));
  }
}

}  // namespace dfs
