// The CUDA kernels in the emulator against the definition, on memory that notices every byte read
// or written beside its own when AddressSanitizer is there.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "conv_layout.h"
#include "cuda_operations.h"
#include "guarded_buffer.h"
#include "mixed_conv2d_case.h"
#include "mixed_conv2d_check.h"
#include "random.h"

namespace dfs_test {
namespace {

// Unlike those for CPUs, these kernels take a width only where the quantizer lists it.
void list_all_widths(TestQuantizer& quantizer) {
  if (quantizer.widths.back() == 32) return;
  quantizer.widths.push_back(32);
  quantizer.scale.push_back(1.0f);
  quantizer.zero_point.push_back(0);
}

void list_all_widths(ConvCase& c) {
  for (TestMap* map : {&c.input, &c.residual, &c.output}) {
    if (map->packed) list_all_widths(map->quantizer);
  }
  list_all_widths(c.input_quantizer);
}

// Codes of another width over those that are still to be read.
bool overwrites_what_it_reads(const ConvCase& c) {
  return c.in_place && c.output.packed && c.residual.bits != c.output.bits;
}

// Tiles aligned as allocations on a GPU are.
struct AlignedTiles {
  std::vector<std::vector<uint8_t>> memory;

  uint8_t* add(size_t bytes) {
    memory.emplace_back(bytes + 16);
    uint8_t* start = memory.back().data();
    return start + (16 - reinterpret_cast<uintptr_t>(start) % 16) % 16;
  }
};

void check_on_cuda(ConvCase& c, bool planes) {
  AlignedTiles tiles;
  TestMap out = c.output;
  c.weight.tiles = c.weight.packed;  // canonical, where there are no tiles
  dfs::MixedConv2dArgs args = c.args(out);
  args.weight.planes = planes;
  for (size_t i = 0; i < c.weight.widths.size(); ++i) {
    const int bits = c.weight.widths[i];
    const size_t bytes = dfs::cuda::tile_bytes(c.sizes.geometry, bits, c.weight.centred[i], planes);
    if (bytes == 0) continue;
    uint8_t* tile = tiles.add(bytes);
    dfs::cuda::retile_weight(c.sizes.geometry, c.weight.packed[i].data(), bits, c.weight.centred[i],
                             tile, nullptr, planes);
    args.weight.tiles[i] = tile;
  }
  dfs::cuda::mixed_conv2d(args, nullptr);
  check_output(c, expected_output(c), out);
}

}  // namespace

DFS_TEST(cuda_small_divisors_are_exact) {
  for (int divisor = 1; divisor <= 1024; ++divisor) {
    const auto small = dfs::cuda::SmallDivisor::of(divisor);
    for (int x = 0; x < 1024; ++x) {
      CHECK(small.quotient(x) == x / divisor, x, " / ", divisor);
    }
  }
}

DFS_TEST(cuda_mixed_conv2d_matches_the_definition) {
  Random random(seed());
  for (int i = 0; i < case_count(600); ++i) {
    ConvCase c = draw_case(random);
    if (overwrites_what_it_reads(c)) continue;
    list_all_widths(c);
    check_on_cuda(c, random.chance(0.3));
  }
}

// Shapes of the networks that the tensor-core kernel is for, with packed rows in and out.
DFS_TEST(cuda_mixed_conv2d_of_residual_networks) {
  struct Layer {
    int64_t channels;
    int64_t outputs;
    int64_t height;
    int64_t width;
    int64_t kernel;
    int64_t stride;
  };
  Random random(seed());
  for (const Layer& layer : {
           Layer{16, 16, 18, 18, 3, 1},
           Layer{16, 16, 16, 32, 3, 1},
           Layer{15, 8, 20, 20, 3, 1},
           Layer{32, 32, 9, 9, 3, 1},
           Layer{32, 32, 12, 16, 3, 1},
           Layer{32, 16, 12, 12, 5, 1},
           Layer{64, 64, 8, 8, 3, 1},
           Layer{64, 64, 5, 28, 3, 1},
           Layer{16, 32, 12, 12, 3, 2},
           Layer{32, 64, 8, 8, 1, 2},
           Layer{160, 72, 5, 5, 3, 1},
           Layer{160, 24, 9, 20, 3, 1},
           Layer{3, 16, 20, 20, 3, 1},
           Layer{16, 16, 9, 9, 5, 1},
       }) {
    ConvCase c;
    set_layer(c.sizes, layer.channels, layer.outputs, layer.height, layer.width, layer.kernel,
              layer.stride);
    c.bits = {2, 8, 0, 4};
    c.batch = 4;
    c.weight = draw_weight(random, c.sizes, false);
    c.input_quantizer = draw_quantizer(random, 0.015f);
    c.input = make_packed_map(random, 4, layer.channels, layer.height, layer.width, c.bits,
                              draw_quantizer(random, 0.015f));
    c.relu = random.chance(0.5);
    // As rows are on a GPU.
    c.input.row_bytes = dfs::cuda::round_up(static_cast<int>(c.input.row_bytes), 16);
    c.input.codes_offset = 0;
    c.input.allocate_codes();
    fill(random, c.input, false);
    c.output = make_packed_map(random, 4, layer.outputs, c.sizes.out_height, c.sizes.out_width,
                               {8, 4, 2, 8}, draw_quantizer(random, 0.03f));
    list_all_widths(c);
    for (const bool planes : {false, true}) check_on_cuda(c, planes);
  }
}

DFS_TEST(cuda_mixed_conv2d_rejects_tiles_that_are_not_aligned) {
  Random random(seed());
  ConvCase c;
  do {
    c = draw_case(random);
  } while (c.batch == 0 || dfs::cuda::tile_bytes(c.sizes.geometry, 4, c.weight.centred[1]) == 0);
  c.weight.tiles = c.weight.packed;
  TestMap out = c.output;
  dfs::MixedConv2dArgs args = c.args(out);
  args.weight.tiles[1] = reinterpret_cast<const void*>(uintptr_t{8});
  const std::string message = rejection_of([&] { dfs::cuda::mixed_conv2d(args, nullptr); });
  CHECK(message.find("aligned") != std::string::npos, message);
}

}  // namespace dfs_test
