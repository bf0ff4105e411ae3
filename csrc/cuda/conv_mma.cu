// Mixed convolution on the tensor cores, for 2, 4 and 8 bits without groups.
//
// A block computes a rectangle of output pixels of one sample for up to 64 output channels. It
// stages the input that these need, halo included, and the weights, both packed, in shared memory;
// then every tap reads the same patch at another offset. So a byte of the input is read from global
// memory about once, and a weight once a block. conv_layout.h has the order of everything.
//
// More channels than 64 bytes hold are worked off in slices, the sums staying in registers. At the
// end these go through shared memory, so that a thread has 16 channels of a pixel in a row: 16, 8
// or 4 bytes to load and store at once, whatever the tensor cores' order. Several blocks share a
// multiprocessor, and one computes while another waits for its copies: staging in two halves would
// take the shared memory that these need.
#include "bit_planes.h"
#include "conv_mma.h"
#include "epilogue.h"
#include "stage.h"

namespace dfs::cuda {
namespace {

// Shared memory of a block, each part aligned to 16 bytes.
struct SharedLayout {
  int scalings;  // Affine of each output channel, then its first sum
  int offsets;   // int32 of each unit: from a pixel to its bytes
  int lookup;    // uint8 of each stored code: the code at the sample's width
  int weights;
  int patch;
  int end;
  // Once all has been multiplied, from `offsets` on: int32 [pixel][sum_stride].
  int sums;
};

// The outputs of a row tile come eight pixels and two channels at a time: in different banks.
DFS_HOST_DEVICE int sum_stride(const WeightTiles& tiles) { return tiles.block_outputs() + 8; }

DFS_HOST_DEVICE SharedLayout shared_layout(const WeightTiles& tiles, int patch_pixels,
                                           int tile_pixels) {
  SharedLayout layout;
  layout.scalings = 0;
  layout.offsets = layout.sums = tiles.block_outputs() * 12;
  layout.lookup = layout.offsets + tiles.steps_of(0) * tiles.step_units() * 4;
  layout.weights = layout.lookup + kLookupBytes;
  layout.patch = layout.weights + tiles.slice_words(0) * 4;
  const int patch_bytes = patch_pixels * pixel_stride(tiles.bits, tiles.units_of(0));
  const int sums_end = layout.sums + tile_pixels * sum_stride(tiles) * 4;
  const int staged_end = round_up(layout.patch + patch_bytes, 16);
  layout.end = staged_end > sums_end ? staged_end : sums_end;
  return layout;
}

// A register of four activations, or of four weights in the top bits of each byte.
template <int kBits>
DFS_DEVICE uint32_t activations(uint32_t word, int part) {
  return kBits == 4 ? (word >> (4 * part)) & 0x0f0f0f0fu : (word >> (2 * part)) & 0x03030303u;
}
template <int kBits>
DFS_DEVICE uint32_t weights(uint32_t word, int part, uint32_t half_step) {
  return kBits == 4 ? ((word << (4 - 4 * part)) & 0xf0f0f0f0u) | half_step
                    : ((word << (6 - 2 * part)) & 0xc0c0c0c0u) | half_step;
}

template <int kColumnTiles, int kRowTiles>
struct Sums {
  int32_t at[kRowTiles][kColumnTiles][4];
};

// Multiplies with register pair `pair` of each word: codes 8 * pair and so on, in unpacked order.
template <int kBits, int kC, int kR>
DFS_DEVICE void multiply_words(Sums<kC, kR>& sums, const uint32_t (&x)[kR][2],
                               const uint32_t (&w)[kC], int pair, uint32_t half_step) {
  uint32_t a[kR][4];
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    DFS_UNROLL for (int i = 0; i < 4; ++i) a[r][i] =
        activations<kBits>(x[r][i % 2], 2 * pair + i / 2);
  }
  DFS_UNROLL for (int c = 0; c < kC; ++c) {
    const uint32_t b0 = weights<kBits>(w[c], 2 * pair, half_step);
    const uint32_t b1 = weights<kBits>(w[c], 2 * pair + 1, half_step);
    DFS_UNROLL for (int r = 0; r < kR; ++r) multiply_tile(sums.at[r][c], a[r], b0, b1);
  }
}

// A lane's weights of one step, `kWords` of them in loads of up to 16 bytes.
template <int kWords>
DFS_DEVICE void load_weights(const uint32_t* step, uint32_t (&w)[kWords]) {
  constexpr int kLoad = kWords < 4 ? kWords : 4;
  const int lane = thread_index() % 32;
  DFS_UNROLL for (int i = 0; i < kWords / kLoad; ++i) {
    const uint32_t* from = step + (i * 32 + lane) * kLoad;
    if constexpr (kLoad == 4) {
      const Words4 all = *reinterpret_cast<const Words4*>(from);
      DFS_UNROLL for (int j = 0; j < 4; ++j) w[i * 4 + j] = all.word[j];
    } else {
      const Words2 all = *reinterpret_cast<const Words2*>(from);
      w[0] = all.word[0];
      w[1] = all.word[1];
    }
  }
}

enum class StepKind { kWhole, kMasked, kHalf };

// One step. `pixels`: a lane's pixels in the patch, two of each row tile. `mask`: 0 for a lane
// whose unit is beyond the last, in a step that is not whole.
template <int kBits, int kC, int kR, StepKind kKind>
DFS_DEVICE void multiply_step(Sums<kC, kR>& sums, const uint32_t* step, const uint8_t* patch,
                              const int (&pixels)[kR][2], int offset, uint32_t mask,
                              uint32_t half_step) {
  constexpr bool kMasks = kKind != StepKind::kWhole;
  if constexpr (kBits == 8) {
    uint32_t w[2 * kC];
    load_weights<2 * kC>(step, w);
    uint32_t a[kR][4];
    DFS_UNROLL for (int r = 0; r < kR; ++r) {
      DFS_UNROLL for (int i = 0; i < 2; ++i) {
        const Words2 x = *in_shared<Words2>(patch + pixels[r][i] + offset);
        a[r][i] = kMasks ? x.word[0] & mask : x.word[0];
        a[r][2 + i] = kMasks ? x.word[1] & mask : x.word[1];
      }
    }
    DFS_UNROLL for (int c = 0; c < kC; ++c) {
      DFS_UNROLL for (int r = 0; r < kR; ++r) {
        multiply_tile(sums.at[r][c], a[r], w[2 * c], w[2 * c + 1]);
      }
    }
  } else {
    uint32_t w[kC];
    load_weights<kC>(step, w);
    uint32_t x[kR][2];
    DFS_UNROLL for (int r = 0; r < kR; ++r) {
      DFS_UNROLL for (int i = 0; i < 2; ++i) {
        x[r][i] = *in_shared<uint32_t>(patch + pixels[r][i] + offset);
        if (kMasks) x[r][i] &= mask;
      }
    }
    if constexpr (kKind == StepKind::kHalf) {
      // Registers 0 and 1 of the lower lane, 2 and 3 of the upper one.
      const int shift = thread_index() % 2 * 4;
      DFS_UNROLL for (int c = 0; c < kC; ++c) w[c] >>= shift;
      DFS_UNROLL for (int r = 0; r < kR; ++r) {
        x[r][0] >>= shift;
        x[r][1] >>= shift;
      }
    }
    multiply_words<kBits, kC, kR>(sums, x, w, 0, half_step);
    if constexpr (kBits == 2 && kKind != StepKind::kHalf) {
      multiply_words<kBits, kC, kR>(sums, x, w, 1, half_step);
    }
  }
}

template <int kBits, int kC, int kR>
DFS_DEVICE void multiply_slice(Sums<kC, kR>& sums, const uint32_t* fragments, const uint8_t* patch,
                               const int32_t* offsets, const int (&pixels)[kR][2], int units,
                               uint32_t half_step) {
  constexpr int kStepWords = 32 * kC * unit_words(kBits);
  const int lane = thread_index() % 4;
  const int whole = units / 4;
  DFS_NO_UNROLL
  for (int step = 0; step < whole; ++step) {
    multiply_step<kBits, kC, kR, StepKind::kWhole>(sums, fragments + step * kStepWords, patch,
                                                   pixels, offsets[4 * step + lane], 0, half_step);
  }
  if (units % 4 == 0) return;
  const uint32_t* last = fragments + whole * kStepWords;
  const int offset = offsets[4 * whole + lane];
  const uint32_t mask = unit_of(kBits, units, whole, lane).index < units ? ~0u : 0u;
  if (is_half_step(kBits, units, whole)) {
    if constexpr (kBits == 2) {
      multiply_step<kBits, kC, kR, StepKind::kHalf>(sums, last, patch, pixels, offset, mask,
                                                    half_step);
    }
  } else {
    multiply_step<kBits, kC, kR, StepKind::kMasked>(sums, last, patch, pixels, offset, mask,
                                                    half_step);
  }
}

// From a pixel of the patch to the bytes of each unit.
DFS_DEVICE void fill_offsets(const ConvParams& p, const WeightTiles& tiles, int slice, int stride,
                             int32_t* offsets) {
  const int units = tiles.units_of(slice);
  const int dilation_h = p.kernel_h == 1 ? 0 : p.dilation_h;
  const int dilation_w = p.kernel_w == 1 ? 0 : p.dilation_w;
  for (int i = thread_index(); i < tiles.step_units() * tiles.steps_of(slice);
       i += block_threads()) {
    const int unit = tiles.planes ? plane_unit(i / kPlaneUnits, i / 2 % 4, i % 2)
                                  : unit_of(tiles.bits, units * tiles.taps, i / 4, i % 4).index;
    const int tap = unit / units;
    int offset = 0;
    if (tap < tiles.taps) {
      const int row = tap / p.kernel_w * dilation_h;
      const int column = tap % p.kernel_w * dilation_w;
      offset = (row * p.patch_w + column) * stride + unit % units * unit_bytes(tiles.bits);
    }
    offsets[i] = offset;
  }
}

// Sums are those of shifted weights, but not of bit planes.
DFS_DEVICE int sum_shift(const ConvParams& p, const BlockTask& task, const WeightTiles& tiles) {
  if (task.bits == 8 || tiles.planes) return 0;
  return (task.bits == 4 ? 4 : 6) - (p.centred[task.slot] ? 1 : 0);
}

// Whether sums lie within 2^22 and so in the low bits of a float, to which they need no conversion.
DFS_DEVICE bool has_small_sums(const WeightTiles& tiles) {
  const int64_t products = static_cast<int64_t>(tiles.channels) * tiles.taps;
  return products * ((1 << tiles.bits) - 1) * 128 < 1 << 22;
}

// What is known of an output channel before its products: the scaling of its sum, and where the sum
// starts, which is what the zero point contributes, taken off, and the bits of the float, if any.
DFS_DEVICE void fill_scalings(const ConvParams& p, const BlockTask& task, const WeightTiles& tiles,
                              int first, Affine* affines, uint32_t* starts) {
  const Step step = input_step(p, task.bits);
  const auto* level_sums = to_global(static_cast<const int32_t*>(p.tiles[task.slot]));
  const uint32_t raise = has_small_sums(tiles) ? kRounderBits : 0u;
  for (int i = thread_index(); i < tiles.block_outputs(); i += block_threads()) {
    const int o = first + i;
    affines[i] = o < tiles.outputs ? affine_of(p, task.slot, step.scale, o) : Affine{0.0f, 0.0f};
    const uint32_t level_sum = o < tiles.outputs ? static_cast<uint32_t>(level_sums[o]) : 0u;
    const uint32_t zeros = level_sum * static_cast<uint32_t>(step.zero_point);
    starts[i] = raise - (zeros << sum_shift(p, task, tiles));
  }
}

// A lane's pixels in the tile: rows g and g + 8 of each row tile.
template <int kR>
DFS_DEVICE int tile_pixel(int row_tile, int half) {
  const int lane = thread_index() % 32;
  return thread_index() / 32 * (16 * kR) + 16 * row_tile + 8 * half + lane / 4;
}

template <int kC, int kR>
DFS_DEVICE void store_sums(const ConvParams& p, const Sums<kC, kR>& sums, int stride, int32_t* to) {
  const int column = 2 * (thread_index() % 4);
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    DFS_UNROLL for (int i = 0; i < 2; ++i) {
      const int pixel = tile_pixel<kR>(r, i);
      if (pixel >= p.tile_h * p.tile_w) continue;
      DFS_UNROLL for (int c = 0; c < kC; ++c) {
        const Words2 pair{{static_cast<uint32_t>(sums.at[r][c][2 * i]),
                           static_cast<uint32_t>(sums.at[r][c][2 * i + 1])}};
        *reinterpret_cast<Words2*>(to + pixel * stride + 8 * c + column) = pair;
      }
    }
  }
}

template <int kC, int kR>
DFS_DEVICE void start_sums(const uint32_t* starts, Sums<kC, kR>& sums) {
  const int column = 2 * (thread_index() % 4);
  DFS_UNROLL for (int c = 0; c < kC; ++c) {
    const Words2 pair = *reinterpret_cast<const Words2*>(starts + 8 * c + column);
    DFS_UNROLL for (int r = 0; r < kR; ++r) {
      DFS_UNROLL for (int i = 0; i < 4; ++i) {
        sums.at[r][c][i] = static_cast<int32_t>(pair.word[i % 2]);
      }
    }
  }
}

// Where a block's outputs lie.
struct TilePlace {
  int y;
  int x;
  int output;
};

DFS_DEVICE void finish_tile(const ConvParams& p, const BlockTask& task, const WeightTiles& tiles,
                            const TilePlace& tile, const int32_t* sums, const Affine* affines) {
  constexpr int kRun = 16;
  const int shift = sum_shift(p, task, tiles);
  const bool small = has_small_sums(tiles);
  // 2^-shift, and the same of kRounder: exact, both.
  const float unit = bits_to_float(static_cast<uint32_t>(127 - shift) << 23);
  const float rounder = multiply(kRounder, unit);
  const Epilogue epilogue = epilogue_of(p, task.sample);
  const int runs = tiles.block_outputs() / kRun;
  DFS_NO_UNROLL
  for (int i = thread_index(); i < p.tile_h * p.tile_w * runs; i += block_threads()) {
    const int pixel = i / runs;
    const int first = i % runs * kRun;
    const int count = least(kRun, tiles.outputs - tile.output - first);
    const int row = p.tile_w_divisor.quotient(pixel);
    const RunPlace place{tile.y + row, tile.x + pixel - row * p.tile_w, tile.output + first, count};
    if (count <= 0 || place.y >= p.output.height || place.x >= p.output.width) continue;
    float y[kRun];
    DFS_UNROLL for (int j = 0; j < kRun; j += 4) {
      const Words4 four =
          *reinterpret_cast<const Words4*>(sums + pixel * sum_stride(tiles) + first + j);
      DFS_UNROLL for (int k = 0; k < 4; ++k) {
        y[j + k] = small ? multiply_add(bits_to_float(four.word[k]), unit, -rounder)
                         : to_float(static_cast<int32_t>(four.word[k]) >> shift);
      }
    }
    DFS_UNROLL for (int j = 0; j < kRun; j += 2) {
      const Words4 two = *reinterpret_cast<const Words4*>(affines + first + j);
      y[j] = add(multiply(y[j], bits_to_float(two.word[0])), bits_to_float(two.word[1]));
      y[j + 1] = add(multiply(y[j + 1], bits_to_float(two.word[2])), bits_to_float(two.word[3]));
    }
    epilogue.finish<kRun>(place, y);
  }
}

// What all slices need.
DFS_DEVICE void prepare_block(const ConvParams& p, const BlockTask& task, const WeightTiles& tiles,
                              const SharedLayout& layout, int first_output) {
  uint8_t* shared = shared_memory();
  auto* affines = reinterpret_cast<Affine*>(shared + layout.scalings);
  auto* starts = reinterpret_cast<uint32_t*>(affines + tiles.block_outputs());
  fill_scalings(p, task, tiles, first_output, affines, starts);
  const PatchSource source(p, task.sample, input_step(p, task.bits), task.bits);
  if (source.looks_up()) source.fill_lookup(shared + layout.lookup);
  sync_block();
}

DFS_DEVICE void stage_slice(const ConvParams& p, const BlockTask& task, const WeightTiles& tiles,
                            const SharedLayout& layout, const TilePlace& place, int slice) {
  uint8_t* shared = shared_memory();
  PatchSource source(p, task.sample, input_step(p, task.bits), task.bits);
  source.origin_y = place.y * p.stride_h - p.pad_top;
  source.origin_x = place.x * p.stride_w - p.pad_left - p.lead_w;
  source.stage(shared + layout.patch, shared + layout.lookup, tiles, slice,
               pixel_stride(task.bits, tiles.units_of(0)));
}

// `kPlanes`: 2-bit samples only.
template <int kC, int kR, bool kPlanes>
DFS_DEVICE void convolve(const ConvParams& p, const BlockTask& task) {
  const WeightTiles tiles{kPlanes ? 2 : task.bits,
                          p.output.channels,
                          p.input.channels,
                          p.taps(),
                          kC,
                          p.slice_bytes,
                          kPlanes};
  const SharedLayout layout = shared_layout(tiles, p.patch_h * p.patch_w, p.tile_h * p.tile_w);
  uint8_t* shared = shared_memory();
  auto* affines = reinterpret_cast<Affine*>(shared + layout.scalings);
  const auto* starts = reinterpret_cast<const uint32_t*>(affines + tiles.block_outputs());
  auto* offsets = reinterpret_cast<int32_t*>(shared + layout.offsets);
  auto* fragments = reinterpret_cast<uint32_t*>(shared + layout.weights);
  uint8_t* patch = shared + layout.patch;
  const int stride = pixel_stride(task.bits, tiles.units_of(0));

  // Mostly there is one block of outputs, and a tile as wide as the image: nothing to divide.
  const int blocks = tiles.blocks();
  const int tile = blocks == 1 ? task.part : task.part / blocks;
  const int block = task.part - tile * blocks;
  const int tile_row = p.tiles_w == 1 ? tile : tile / p.tiles_w;
  const TilePlace place{tile_row * p.tile_h, (tile - tile_row * p.tiles_w) * p.tile_w,
                        block * tiles.block_outputs()};
  prepare_block(p, task, tiles, layout, place.output);

  int pixels[kR][2];
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    DFS_UNROLL for (int i = 0; i < 2; ++i) {
      const int pixel = tile_pixel<kR>(r, i);
      const bool inside = pixel < p.tile_h * p.tile_w;
      const int y = p.tile_w_divisor.quotient(pixel);
      const int x = pixel - y * p.tile_w;
      const int in_patch = y * p.pixel_step_h * p.patch_w + x * p.pixel_step_w + p.lead_w;
      pixels[r][i] = inside ? in_patch * stride : 0;
    }
  }

  Sums<kC, kR> sums;
  BitSums<kPlanes ? kC : 1, kPlanes ? kR : 1> bit_sums;
  if constexpr (!kPlanes) start_sums(starts, sums);
  const bool centred = p.centred[task.slot];
  const uint32_t half_step = !centred ? 0u : task.bits == 4 ? 0x08080808u : 0x20202020u;
  const auto* words = static_cast<const uint32_t*>(p.tiles[task.slot]);
  DFS_NO_UNROLL
  for (int slice = 0; slice < tiles.slices(); ++slice) {
    if (slice > 0) sync_block();
    copy_words(words + tiles.slice_start(block, slice), tiles.slice_words(slice), fragments);
    fill_offsets(p, tiles, slice, stride, offsets);
    stage_slice(p, task, tiles, layout, place, slice);
    wait_for_copies();
    sync_block();
    const int units = tiles.units_of(slice) * tiles.taps;
    if constexpr (kPlanes) {
      multiply_planes<kC, kR>(bit_sums, fragments, patch, offsets, pixels, tiles.steps_of(slice));
    } else if (task.bits == 8) {
      multiply_slice<8, kC, kR>(sums, fragments, patch, offsets, pixels, units, half_step);
    } else if (task.bits == 4) {
      multiply_slice<4, kC, kR>(sums, fragments, patch, offsets, pixels, units, half_step);
    } else {
      multiply_slice<2, kC, kR>(sums, fragments, patch, offsets, pixels, units, half_step);
    }
  }

  if constexpr (kPlanes) {
    start_sums(starts, sums);
    add_levels<kC, kR>(bit_sums, centred, sums.at);
  }
  sync_block();
  auto* stored = reinterpret_cast<int32_t*>(shared + layout.sums);
  store_sums(p, sums, sum_stride(tiles), stored);
  sync_block();
  finish_tile(p, task, tiles, place, stored, affines);
}

// Four blocks to a multiprocessor leave 128 registers to a thread. 64 sums and what goes with them
// do not fit into these, and 8.x needs some more than 9.0 does.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kNarrowBlocks = 3;
#else
constexpr int kNarrowBlocks = 4;
#endif

template <int kC, int kR>
DFS_KERNEL(32 * kConvWarps, kC == 2 ? kNarrowBlocks : 3)
conv_mma_kernel(DFS_PARAMS(ConvParams) p) {
  const BlockTask task = block_task(p);
  if (is_rest(p, task)) return;
  convolve<kC, kR, false>(p, task);
}

// Three counts for each output leave no room for more.
template <int kC, int kR>
DFS_KERNEL(32 * kConvWarps, 3)
conv_bits_kernel(DFS_PARAMS(ConvParams) p) {
  const BlockTask task = block_task(p);
  if (is_rest(p, task)) return;
  convolve<kC, kR, true>(p, task);
}

// Of the widest operands that a layer may have.
int widest_stride(int channels, int slice_bytes) {
  return pixel_stride(8, divide_up(least(channels, slice_bytes), unit_codes(8)));
}

struct PatchSize {
  int height;
  int width;
  int pixels() const { return height * width; }
};

// Whether narrow pixels can be staged 16 bytes of a row at a time, PatchSource::stage_rows.
bool can_be_even(const ConvParams& p, int tile_w) {
  const bool narrow = !p.quantizes && packed_bytes(p.input.channels, 2) < 16;
  const bool aligned_tiles = tile_w >= p.output.width || tile_w * p.stride_w % 4 == 0;
  return narrow && p.kernel_w > 1 && p.input.width % 4 == 0 && aligned_tiles;
}

int lead_columns(const ConvParams& p, int tile_w) {
  return can_be_even(p, tile_w) ? (4 - p.pad_left % 4) % 4 : 0;
}

// Outputs a stride apart share no input if the kernel covers one pixel: then only that is staged.
PatchSize patch_size(const ConvParams& p, int tile_h, int tile_w) {
  const int height =
      p.kernel_h == 1 ? tile_h : (tile_h - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h + 1;
  int width =
      p.kernel_w == 1 ? tile_w : (tile_w - 1) * p.stride_w + (p.kernel_w - 1) * p.dilation_w + 1;
  if (can_be_even(p, tile_w)) width = round_up(width + lead_columns(p, tile_w), 4);
  return {height, width};
}

int shared_bytes(const ConvParams& p, int tile_h, int tile_w) {
  const int patch_pixels = patch_size(p, tile_h, tile_w).pixels();
  const int columns = tile_shape(p.output.channels).column_tiles;
  int bytes = 0;
  for (int slot = 0; slot < 3; ++slot) {
    if (!p.serves[slot]) continue;
    const WeightTiles tiles{bits_of(slot), p.output.channels, p.input.channels, p.taps(),
                            columns,       p.slice_bytes,     p.planes};
    const int needed = shared_layout(tiles, patch_pixels, tile_h * tile_w).end;
    bytes = needed > bytes ? needed : bytes;
  }
  return bytes;
}

// How long a tile is thought to take, in multiplications of a row tile: those of its warps' pixels,
// a third of one for each pixel that is staged, and less where that goes by rows. A guess that only
// chooses between tiles.
double tile_cost(const ConvParams& p, int tile_h, int tile_w) {
  const int64_t tiles = ceil_div(p.output.height, tile_h) * ceil_div(p.output.width, tile_w);
  const TileShape shape = tile_shape(p.output.channels, p.planes);
  const double pixels = round_up(tile_h * tile_w, 16 * shape.row_tiles);
  const double staged = patch_size(p, tile_h, tile_w).pixels();
  return static_cast<double>(tiles) * (pixels + (can_be_even(p, tile_w) ? 0.1 : 0.33) * staged);
}

int output_blocks(const ConvParams& p) {
  return divide_up(p.output.channels, 8 * tile_shape(p.output.channels).column_tiles);
}

int64_t block_count(const ConvParams& p) {
  return p.batch * output_blocks(p) * ceil_div(p.output.height, p.tile_h) *
         ceil_div(p.output.width, p.tile_w);
}

void choose_tile(ConvParams& p, int most_pixels) {
  double best = 0.0;
  for (int parts = 1; parts <= p.output.width; ++parts) {
    const int tile_w = divide_up(p.output.width, parts);
    if (best > 0.0 && (parts > 16 || tile_w < 8)) break;
    if (tile_w > most_pixels) continue;
    int tile_h = least(p.output.height, most_pixels / tile_w);
    while (tile_h > 1 && shared_bytes(p, tile_h, tile_w) > kMaxSharedBytes) --tile_h;
    if (shared_bytes(p, tile_h, tile_w) > kMaxSharedBytes) continue;
    // Tiles of one height.
    tile_h = divide_up(p.output.height, divide_up(p.output.height, tile_h));
    const double cost = tile_cost(p, tile_h, tile_w);
    if (best == 0.0 || cost < best) {
      best = cost;
      p.tile_h = tile_h;
      p.tile_w = tile_w;
    }
  }
  // Few samples: rather more blocks than full ones, down to two row tiles.
  while (p.tile_h > 1 && p.tile_h * p.tile_w > 32 && block_count(p) < kEnoughBlocks) {
    p.tile_h = divide_up(p.tile_h, 2);
  }
}

}  // namespace

int slice_bytes(int taps, int outputs) {
  const TileShape shape = tile_shape(outputs);
  int bytes = kSliceBytes;
  while (bytes > 16) {
    const int weights = divide_up(taps * bytes / 8, 4) * 32 * shape.column_tiles * 8;
    if (weights <= kMaxWeightBytes) break;
    bytes /= 2;
  }
  return bytes;
}

namespace {

WeightTiles make_tiles(const ConvGeometry& g, int bits, bool planes) {
  const int taps = static_cast<int>(g.kernel_h * g.kernel_w);
  const int outputs = static_cast<int>(g.out_channels);
  return {bits,
          outputs,
          static_cast<int>(g.in_channels),
          taps,
          tile_shape(outputs).column_tiles,
          slice_bytes(taps, outputs),
          planes};
}

// Whether the smallest tile fits into shared memory.
bool fits(const ConvGeometry& g, int bits, bool planes) {
  // With the columns that even rows may add.
  const int64_t patch =
      ((g.kernel_h - 1) * g.dilation_h + 1) * ((g.kernel_w - 1) * g.dilation_w + 7);
  if (patch > kMaxSharedBytes || g.kernel_h * g.kernel_w > 1024) return false;
  const WeightTiles tiles = make_tiles(g, bits, planes);
  const int64_t fixed = shared_layout(tiles, 0, 1).end;
  return fixed + patch * widest_stride(tiles.channels, tiles.slice_bytes) <= kMaxSharedBytes;
}

}  // namespace

bool takes_mma(const ConvGeometry& g, int bits, bool centred) {
  if (g.groups != 1 || bits == 32 || (bits == 8 && centred)) return false;
  // The sums of shifted weights.
  const int64_t products = g.in_channels * g.kernel_h * g.kernel_w;
  const int64_t largest = bits == 8 ? 1 : (int64_t{1} << bits) - 1;
  if (products > 0x7fffffff / (largest * 128)) return false;
  return fits(g, bits, false);
}

bool takes_planes(const ConvGeometry& g, bool centred) {
  return takes_mma(g, 2, centred) && fits(g, 2, true);
}

WeightTiles weight_tiles(const ConvGeometry& g, int bits, bool centred, bool planes) {
  return make_tiles(g, bits, planes && bits == 2 && takes_planes(g, centred));
}

MmaPlan plan_mma(ConvParams p) {
  const TileShape tile = tile_shape(p.output.channels, p.planes);
  p.slice_bytes = slice_bytes(p.taps(), p.output.channels);
  choose_tile(p, 16 * tile.row_tiles * kConvWarps);
  const PatchSize patch = patch_size(p, p.tile_h, p.tile_w);
  p.patch_h = patch.height;
  p.patch_w = patch.width;
  p.has_even_patch = can_be_even(p, p.tile_w);
  p.lead_w = lead_columns(p, p.tile_w);
  p.patch_step_h = p.kernel_h == 1 ? p.stride_h : 1;
  p.patch_step_w = p.kernel_w == 1 ? p.stride_w : 1;
  p.pixel_step_h = p.kernel_h == 1 ? 1 : p.stride_h;
  p.pixel_step_w = p.kernel_w == 1 ? 1 : p.stride_w;
  p.tiles_w = divide_up(p.output.width, p.tile_w);
  p.tile_w_divisor = SmallDivisor::of(p.tile_w);
  p.tiles_per_sample = divide_up(p.output.height, p.tile_h) * p.tiles_w * output_blocks(p);
  LaunchShape shape;
  shape.blocks = p.batch * p.tiles_per_sample;
  shape.threads = 32 * divide_up(p.tile_h * p.tile_w, 16 * tile.row_tiles);
  shape.shared_bytes = shared_bytes(p, p.tile_h, p.tile_w);
  return {p, shape};
}

void launch_mma(const ConvParams& params, Stream stream) {
  const MmaPlan plan = plan_mma(params);
  const int column_tiles = tile_shape(params.output.channels).column_tiles;
  if (params.planes) {
    launch("conv_bits",
           column_tiles == 2   ? &conv_bits_kernel<2, 2>
           : column_tiles == 4 ? &conv_bits_kernel<4, 1>
                               : &conv_bits_kernel<8, 1>,
           plan.shape, plan.params, stream);
  } else if (column_tiles == 2) {
    launch("conv_mma", &conv_mma_kernel<2, 4>, plan.shape, plan.params, stream);
  } else if (column_tiles == 4) {
    launch("conv_mma", &conv_mma_kernel<4, 4>, plan.shape, plan.params, stream);
  } else {
    launch("conv_mma", &conv_mma_kernel<8, 2>, plan.shape, plan.params, stream);
  }
}

}  // namespace dfs::cuda
