// How the tensor-core convolution lays out its operands. Plain arithmetic, the same on both sides.
//
// One multiply_tile() takes 16 pixels x 32 products and 32 products x 8 output channels, all of 8
// bits: GPUs from 9.0 on have no narrower tensor cores, but for single bits, so that 2 and 4 bits
// save bytes, not products. (bit_planes.h has another way for 2 bits.) The order of the products is
// free as long as both operands share it. So a lane takes codes as they lie in memory, one *unit*
// at a time, and unpacks both operands alike:
//
//   bits  unit      codes  what an unpacked register holds, of codes 0, 1, ...     multiplications
//   8     2 words    8     a word, as it is                                       1 per unit
//   4     1 word     8     nibbles 0 2 4 6: w & 0x0f..., nibbles 1 3 5 7: w >> 4   1
//   2     1 word    16     pairs i, i + 4, i + 8, i + 12: (w >> 2i) & 0x03...      2
//
// Weights are signed. Moving their codes to the top of each byte keeps the sign and costs no more:
// a 4-bit code q becomes 16 q, a 2-bit code 64 q. With half a step added by the same instruction,
// (w & mask) | half, that is 8 (2q + 1) and 32 (2q + 1): centred levels. The sum is shifted back
// at the end. 8-bit centred levels need 9 bits: the general kernel has them.
//
// A *step* takes four units for each pixel, one per lane of a quarter warp. Units run over the
// channels of one tap, then over the taps, so that 16 channels at 8 bits put two taps into a step.
// Activations of units beyond the last are masked to zero, so the weights there may be anything.
//
// Instructions a multiplication, of a warp each; R and C are row and column tiles of 16 pixels and
// of 8 outputs: activations take 2/C loads (1/C at 2 bits) and 2/C additions for their addresses,
// weights 1/(4R) to 1/(2R) loads, unpacking 3/C + 3/R at 4 bits and 3.5/C + 3.5/R at 2 bits. An
// H100 starts a multiplication every 8 cycles at best in each quarter of a multiprocessor, and 8
// other instructions meanwhile, 4 of them on integers. The compiled loops have 4.3 to 8.7
// instructions a multiplication, itself included (tests/packaging/test_cuda_code.py).
//
// A sample of a 3x3 layer, packed in and packed out:
//   layer      products  steps of 32   multiplications       KiB at 8, 4, 2 bits
//   16x32x32     2.4 M   5 for 4.5         640               32, 16, 8
//   32x16x16     2.4 M   9                 576               16, 8, 4
//   64x8x8       2.4 M   18                576               8, 4, 2, and weights 36, 18, 9 from L2
//   64x56x56     116 M   18             32,256 for 28,224    392, 196, 98
// In cycles of one of an H100's multiprocessors, which moves about 15 bytes a cycle at 3.35 TB/s,
// starts a multiplication every 2 cycles and 4 instructions a cycle: about 165 to finish 16
// outputs, 150 before and 150 to stage for each warp of 64 pixels, beside the loops.
//   layer      memory at 8, 4, 2 bits   multiplications   instructions
//   16x32x32   2185, 1090, 550              1280              3800
//   32x16x16   1090, 550, 270               1150              1600
//   64x8x8     550, 270, 140                1150              1150
//   64x56x56   26800, 13400, 6700          64500             50000
// So the narrow layers are bound by what surrounds the products, and 2 bits save time there only as
// far as 8 bits wait for memory. All of this is counted and estimated; nothing is measured.
#pragma once

#include <cstdint>

#include "device.h"

namespace dfs::cuda {

// Division of numbers below 1024 by one divisor, in two instructions rather than twenty: exact, as
// rounding the reciprocal up adds less than 1024 / 2^20.
struct SmallDivisor {
  int reciprocal = 1 << 20;

  static SmallDivisor of(int divisor) { return {((1 << 20) + divisor - 1) / divisor}; }
  DFS_HOST_DEVICE int quotient(int x) const { return (x * reciprocal) >> 20; }
};

// How many channels and pixels the blocks of one instance cover.
struct TileShape {
  int column_tiles;  // of 8 output channels
  int row_tiles;     // of 16 pixels, for each warp
};

constexpr int kConvWarps = 4;
constexpr int kSliceBytes = 64;
// What a slice of weights may take, so that two blocks fit into a multiprocessor of 8.6.
constexpr int kMaxWeightBytes = 40 * 1024;

DFS_HOST_DEVICE int least(int a, int b) { return a < b ? a : b; }

// Codes and bytes of a unit.
DFS_HOST_DEVICE constexpr int unit_codes(int bits) { return bits == 2 ? 16 : 8; }
DFS_HOST_DEVICE constexpr int unit_bytes(int bits) { return bits == 8 ? 8 : 4; }
DFS_HOST_DEVICE constexpr int unit_words(int bits) { return bits == 8 ? 2 : 1; }

DFS_HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
DFS_HOST_DEVICE constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

DFS_HOST_DEVICE constexpr int packed_bytes(int channels, int bits) {
  return divide_up(channels * bits, 8);
}

// Which instance serves so many output channels: column tiles that stay idle cost as much.
inline TileShape tile_shape(int outputs, bool planes = false) {
  if (outputs <= 16) return {2, planes ? 2 : 4};
  if (outputs <= 32) return {4, planes ? 1 : 4};
  return {8, planes ? 1 : 2};
}

// Units of a step where 2-bit codes are multiplied as bit planes: two for each lane.
constexpr int kPlaneUnits = 8;

// The weights of a layer at one width: for each block of output channels and slice of input
// channels the fragments in the order in which lanes load them, before all of these the sums of the
// levels.
struct WeightTiles {
  int bits = 0;
  int outputs = 0;
  int channels = 0;
  int taps = 0;
  int column_tiles = 0;
  int slice_bytes = 0;  // of a pixel
  bool planes = false;  // at 2 bits: bit planes instead of codes, and ones beside them

  DFS_HOST_DEVICE int block_outputs() const { return 8 * column_tiles; }
  DFS_HOST_DEVICE int blocks() const { return divide_up(outputs, block_outputs()); }
  DFS_HOST_DEVICE int slice_channels() const { return slice_bytes * 8 / bits; }
  DFS_HOST_DEVICE int slices() const { return divide_up(channels, slice_channels()); }
  DFS_HOST_DEVICE int channels_of(int slice) const {
    return least(slice_channels(), channels - slice * slice_channels());
  }
  // Of one tap.
  DFS_HOST_DEVICE int units_of(int slice) const {
    return divide_up(channels_of(slice), unit_codes(bits));
  }
  DFS_HOST_DEVICE int step_units() const { return planes ? kPlaneUnits : 4; }
  DFS_HOST_DEVICE int steps_of(int slice) const {
    return divide_up(taps * units_of(slice), step_units());
  }
  // Of one column tile.
  DFS_HOST_DEVICE int column_words() const { return planes ? 2 : unit_words(bits); }
  // What a lane loads in a step, in pieces of a whole load each.
  DFS_HOST_DEVICE int lane_words() const { return column_tiles * column_words(); }
  DFS_HOST_DEVICE int load_words() const { return least(lane_words(), 4); }
  DFS_HOST_DEVICE int step_words() const { return 32 * (lane_words() + (planes ? 1 : 0)); }
  DFS_HOST_DEVICE int slice_words(int slice) const { return steps_of(slice) * step_words(); }
  // Slices before the last one are of one size.
  DFS_HOST_DEVICE int64_t block_words() const {
    return static_cast<int64_t>(slices() - 1) * slice_words(0) + slice_words(slices() - 1);
  }
  DFS_HOST_DEVICE int sum_words() const { return blocks() * block_outputs(); }
  DFS_HOST_DEVICE int64_t words() const { return sum_words() + blocks() * block_words(); }
  DFS_HOST_DEVICE int64_t slice_start(int block, int slice) const {
    return sum_words() + block * block_words() + static_cast<int64_t>(slice) * slice_words(0);
  }
};

// The units of a step, one for each of a quarter warp's lanes.
struct Unit {
  int index = 0;
  int half = 0;  // which half of its codes, where a step takes only one
};

// At 2 bits a step makes two multiplications. Where at most two units are left, a lane takes half
// of one instead, and one multiplication does: 9 taps of 16 channels need 5 of them rather than 6.
DFS_HOST_DEVICE bool is_half_step(int bits, int units, int step) {
  return bits == 2 && units - 4 * step <= 2;
}

DFS_HOST_DEVICE Unit unit_of(int bits, int units, int step, int lane) {
  if (is_half_step(bits, units, step)) return {4 * step + lane / 2, lane % 2};
  return {4 * step + lane, 0};
}

// The same for bit planes, where a lane has two units in a step: those of one load lie side by
// side.
DFS_HOST_DEVICE int plane_unit(int step, int lane, int half) {
  return kPlaneUnits * step + 4 * half + lane;
}

// What the tensor cores do for 16 pixels and a block's outputs, counted in multiplications of 32
// products of 8 bits, or of 256 of one bit, which take as long on an A100: 624 and 4992 tera
// operations a second. NVIDIA gives none of single bits for an H100. As bit planes, each step takes
// half of one for four products and for the sum of the codes, two planes. Of 2-bit samples:
//   layer         bytes   bit planes
//   16x32x32        10      10
//   32x16x16        36      27
//   64x8x8         144      85
//   64x56x56       144      85
//   128x28x28      288     153
//   256x14x14      576     306
DFS_HOST_DEVICE double multiplications(const WeightTiles& tiles) {
  double count = 0;
  for (int slice = 0; slice < tiles.slices(); ++slice) {
    const int steps = tiles.steps_of(slice);
    if (tiles.planes) {
      count += 0.5 * steps * (4 * tiles.column_tiles + 2);
      continue;
    }
    const int units = tiles.taps * tiles.units_of(slice);
    const bool half = units % 4 != 0 && is_half_step(tiles.bits, units, steps - 1);
    count += ((tiles.bits == 2 ? 2 : 1) * steps - (half ? 1 : 0)) * tiles.column_tiles;
  }
  return count;
}

// Bytes from a pixel to the next in shared memory: those that a quarter warp reads of neighbouring
// pixels should lie in different banks, which the odd multiples of what it reads of one give.
DFS_HOST_DEVICE int pixel_stride(int bits, int units) {
  const int chunk = 4 * unit_bytes(bits);
  const int bytes = units * unit_bytes(bits);
  return bytes % (2 * chunk) == 0 ? bytes + chunk : bytes;
}

}  // namespace dfs::cuda
