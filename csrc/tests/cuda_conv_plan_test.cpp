// How the tensor-core kernel's work is divided: host code that launches nothing.
#include <cstdint>

#include "check.h"
#include "conv_layout.h"
#include "conv_mma.h"
#include "random.h"

namespace dfs_test {
namespace {

using dfs::cuda::ConvParams;
using dfs::cuda::MmaPlan;

ConvParams make_params(int64_t batch, int channels, int outputs, int height, int width, int kernel,
                       int stride) {
  ConvParams p;
  p.batch = batch;
  p.input.channels = channels;
  p.input.height = (height - 1) * stride + 1;
  p.input.width = (width - 1) * stride + 1;
  p.output.channels = outputs;
  p.output.height = height;
  p.output.width = width;
  p.kernel_h = p.kernel_w = kernel;
  p.stride_h = p.stride_w = stride;
  p.pad_top = p.pad_left = kernel / 2;
  p.dilation_h = p.dilation_w = 1;
  p.groups = 1;
  for (int slot = 0; slot < 3; ++slot) p.offered[slot] = p.serves[slot] = true;
  return p;
}

void check_plan(const ConvParams& given) {
  const MmaPlan plan = dfs::cuda::plan_mma(given);
  const ConvParams& p = plan.params;
  const dfs::cuda::TileShape tile = dfs::cuda::tile_shape(p.output.channels, p.planes);
  const int pixels = p.tile_h * p.tile_w;
  const int warps = plan.shape.threads / 32;
  CHECK(p.tile_h >= 1 && p.tile_w >= 1, p.tile_h, "x", p.tile_w);
  CHECK(plan.shape.threads % 32 == 0 && warps <= dfs::cuda::kConvWarps, plan.shape.threads);
  CHECK(pixels <= warps * 16 * tile.row_tiles, pixels, " pixels for ", warps, " warps");
  CHECK(plan.shape.shared_bytes <= dfs::cuda::kMaxSharedBytes, plan.shape.shared_bytes);
  const int rows = dfs::cuda::divide_up(p.output.height, p.tile_h);
  const int columns = dfs::cuda::divide_up(p.output.width, p.tile_w);
  const int outputs = dfs::cuda::divide_up(p.output.channels, 8 * tile.column_tiles);
  CHECK(p.tiles_w == columns, p.tiles_w);
  CHECK(plan.shape.blocks == p.batch * rows * columns * outputs, plan.shape.blocks);
  // The last pixel of a tile needs the last of the patch.
  CHECK((p.tile_h - 1) * p.pixel_step_h + (p.kernel_h - 1) * p.dilation_h < p.patch_h, p.patch_h);
  const int reach = p.lead_w + (p.tile_w - 1) * p.pixel_step_w + (p.kernel_w - 1) * p.dilation_w;
  CHECK(reach < p.patch_w, p.patch_w);
  if (p.has_even_patch) {
    CHECK(p.patch_w % 4 == 0 && (p.pad_left + p.lead_w) % 4 == 0, p.patch_w, ", ", p.lead_w);
    CHECK(columns == 1 || p.tile_w * p.stride_w % 4 == 0, p.tile_w);
  }
}

}  // namespace

DFS_TEST(cuda_plans_cover_the_output_and_fit) {
  Random random(seed());
  for (int i = 0; i < case_count(3000); ++i) {
    const int kernel = static_cast<int>(random.chance(0.3) ? 1 : random.integer(1, 5));
    check_plan(make_params(
        random.integer(1, 300), static_cast<int>(random.integer(1, 300)),
        static_cast<int>(random.integer(1, 200)), static_cast<int>(random.integer(1, 120)),
        static_cast<int>(random.integer(1, 300)), kernel, static_cast<int>(random.integer(1, 3))));
  }
}

DFS_TEST(cuda_plans_of_bit_planes_cover_the_output_and_fit) {
  Random random(seed());
  for (int i = 0; i < case_count(1000); ++i) {
    const int kernel = static_cast<int>(random.chance(0.3) ? 1 : random.integer(1, 5));
    ConvParams p = make_params(
        random.integer(1, 300), static_cast<int>(random.integer(1, 300)),
        static_cast<int>(random.integer(1, 200)), static_cast<int>(random.integer(1, 120)),
        static_cast<int>(random.integer(1, 300)), kernel, static_cast<int>(random.integer(1, 3)));
    for (int slot = 1; slot < 3; ++slot) p.serves[slot] = false;
    p.planes = true;
    check_plan(p);
  }
}

// The table in conv_layout.h.
DFS_TEST(cuda_multiplications_of_known_layers_at_2_bits) {
  struct Layer {
    int channels;
    double bytes;
    double planes;
  };
  for (const Layer& layer : {Layer{16, 10, 10}, Layer{32, 36, 27}, Layer{64, 144, 85},
                             Layer{128, 288, 153}, Layer{256, 576, 306}}) {
    dfs::ConvGeometry g;
    g.in_channels = g.out_channels = layer.channels;
    g.kernel_h = g.kernel_w = 3;
    const double bytes =
        dfs::cuda::multiplications(dfs::cuda::weight_tiles(g, 2, true, /*planes=*/false));
    const double planes =
        dfs::cuda::multiplications(dfs::cuda::weight_tiles(g, 2, true, /*planes=*/true));
    CHECK(bytes == layer.bytes, layer.channels, ": ", bytes);
    CHECK(planes == layer.planes, layer.channels, ": ", planes);
  }
}

// What conv_layout.h says of these layers rests on it.
DFS_TEST(cuda_plans_fill_tiles_of_known_layers) {
  struct Layer {
    int channels;
    int size;
    int pixels;  // of a tile
  };
  for (const Layer& layer : {Layer{16, 32, 256}, Layer{32, 16, 256}, Layer{64, 8, 64}}) {
    const ConvParams p =
        make_params(1024, layer.channels, layer.channels, layer.size, layer.size, 3, 1);
    const MmaPlan plan = dfs::cuda::plan_mma(p);
    CHECK(plan.params.tile_h * plan.params.tile_w == layer.pixels, layer.channels, ": ",
          plan.params.tile_h, "x", plan.params.tile_w);
  }
  const MmaPlan large = dfs::cuda::plan_mma(make_params(64, 64, 64, 56, 56, 3, 1));
  CHECK(large.params.tile_h * large.params.tile_w >= 112, large.params.tile_h, "x",
        large.params.tile_w);
  // One sample is divided so that enough multiprocessors have something to do.
  const MmaPlan alone = dfs::cuda::plan_mma(make_params(1, 16, 16, 32, 32, 3, 1));
  CHECK(alone.shape.blocks >= dfs::cuda::kEnoughBlocks, alone.shape.blocks);
}

}  // namespace dfs_test
