// The vectorized convolution: output channels in the lanes, pixels one after the other. It serves
// every geometry, and float32 as well as the integer widths.
#pragma once

#include "conv_rows.h"
#include "dense_codes.h"
#include "dot_tiles.h"
#include "dword_band.h"
#include "filter_layout.h"
#include "isa.h"
#include "kernel_table.h"
#include "prefetch.h"
#include "vector_epilogue.h"
#include "vectors.h"
#include "word_sums.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Centred levels of 8 bits do not fit int8.
inline bool direct_takes(int32_t bits, bool centred) { return bits != 8 || !centred; }

// Sizes of the weights of one group: as they are multiplied, vectors of dwords [vectors][kernel_h]
// [kernel_w][planes], and as they are held. Floats are held as they are multiplied; integers as
// dense codes (see dense_codes.h) of one vector after the other, in the same order but without the
// lanes and the codes of a dword that stand for no channel. Where sums are kept in words their
// WordSums follow.
struct DirectLayout {
  int64_t outputs;  // of one group
  int64_t channels;
  int64_t taps;
  int64_t vectors;
  int64_t planes;
  int64_t vector_step;  // dwords
  int64_t group_dwords;

  int64_t lanes(int64_t vector) const { return min_of(outputs - vector * kLanes, kLanes); }
  int64_t codes(int64_t vector) const { return lanes(vector) * channels * taps; }
  int64_t held_vector_bytes(int32_t bits) const { return dense_bytes(codes(0), bits); }
  int64_t held_group_bytes(int32_t bits) const {
    return (vectors - 1) * held_vector_bytes(bits) + dense_bytes(codes(vectors - 1), bits);
  }
  bool is_padded(int64_t vector) const {
    return lanes(vector) < kLanes || channels % kCodesPerDword != 0;
  }
};

template <typename Dword>
inline DirectLayout direct_layout(const ConvGeometry& g) {
  DirectLayout layout;
  layout.outputs = g.out_channels / g.groups;
  layout.channels = g.in_channels / g.groups;
  layout.taps = g.kernel_h * g.kernel_w;
  layout.vectors = ceil_div(layout.outputs, kLanes);
  layout.planes = dword_planes<Dword>(layout.channels);
  layout.vector_step = layout.taps * layout.planes * kLanes;
  layout.group_dwords = layout.vectors * layout.vector_step;
  return layout;
}

inline size_t direct_tile_bytes(const ConvGeometry& g, int32_t bits) {
  if (bits == 32) return static_cast<size_t>(g.groups * direct_layout<float>(g).group_dwords) * 4;
  const DirectLayout layout = direct_layout<uint32_t>(g);
  return static_cast<size_t>(g.groups * layout.held_group_bytes(bits)) + kWordSumsBytes;
}

// Calls fn(group, o, tap, run) for every run of channels of a filter bank, o counted within the
// group; runs lie in this order.
template <typename Fn>
inline void for_each_channel_run(const ConvGeometry& g, Fn fn) {
  const int64_t outputs = g.out_channels / g.groups;
  const int64_t taps = g.kernel_h * g.kernel_w;
  int64_t run = 0;
  for (int64_t group = 0; group < g.groups; ++group) {
    for (int64_t o = 0; o < outputs; ++o) {
      for (int64_t tap = 0; tap < taps; ++tap) fn(group, o, tap, run++);
    }
  }
}

template <int kBits>
inline void retile_direct_codes(const ConvGeometry& g, const uint8_t* canonical, bool centred,
                                uint8_t* tile) {
  constexpr int kPerByte = 8 / kBits;
  const DirectLayout layout = direct_layout<uint32_t>(g);
  const int64_t run_bytes = packed_bytes(layout.channels, kBits);
  for_each_channel_run(g, [&](int64_t group, int64_t o, int64_t tap, int64_t run) {
    const int64_t vector = o / kLanes;
    const int64_t lanes = layout.lanes(vector);
    const int64_t count = layout.codes(vector);
    uint8_t* dense =
        tile + group * layout.held_group_bytes(kBits) + vector * layout.held_vector_bytes(kBits);
    const uint8_t* packed = canonical + run * run_bytes;
    for (int64_t first = 0; first < layout.channels; first += kCodesPerDword) {
      const int64_t dword = min_of(layout.channels - first, kCodesPerDword);
      const int64_t index = (tap * layout.channels + first) * lanes + o % kLanes * dword;
      for (int64_t i = 0; i < dword; ++i) {
        const int64_t c = first + i;
        insert_dense<kBits>(
            dense, index + i, count,
            extract_code<kBits, true>(packed[c / kPerByte], static_cast<int>(c % kPerByte)));
      }
    }
  });
  if constexpr (kSumsInWords) {
    word_sums<kBits>(canonical, g.out_channels, layout.channels, layout.taps, centred)
        .store(tile + g.groups * layout.held_group_bytes(kBits));
  }
}

inline void retile_direct_floats(const ConvGeometry& g, const uint8_t* canonical, float* tile) {
  const DirectLayout layout = direct_layout<float>(g);
  const int64_t channels = g.in_channels / g.groups;
  for_each_channel_run(g, [&](int64_t group, int64_t o, int64_t tap, int64_t run) {
    float* dst = tile + group * layout.group_dwords + o / kLanes * layout.vector_step +
                 tap * channels * kLanes + o % kLanes;
    const uint8_t* src = canonical + run * channels * static_cast<int64_t>(sizeof(float));
    for (int64_t c = 0; c < channels; ++c) {
      std::memcpy(dst + c * kLanes, src + c * static_cast<int64_t>(sizeof(float)), sizeof(float));
    }
  });
}

inline void retile_direct(const ConvGeometry& g, const uint8_t* canonical, int32_t bits,
                          bool centred, void* tile) {
  std::memset(tile, 0, direct_tile_bytes(g, bits));
  switch (bits) {
    case 2:
      return retile_direct_codes<2>(g, canonical, centred, static_cast<uint8_t*>(tile));
    case 4:
      return retile_direct_codes<4>(g, canonical, centred, static_cast<uint8_t*>(tile));
    case 8:
      return retile_direct_codes<8>(g, canonical, centred, static_cast<uint8_t*>(tile));
    default:
      return retile_direct_floats(g, canonical, static_cast<float*>(tile));
  }
}

// Pixels whose sums are turned into results together; they stay in the first-level cache.
constexpr int64_t kFinishedPixels = 64;

// Results that vectors cannot write in place are gathered in a block of so many bytes.
inline int64_t direct_block_pixels(const ConvGeometry& g, int64_t out_width) {
  constexpr int64_t kBlockBytes = 64 << 10;
  const int64_t pixels = kBlockBytes / (g.out_channels * static_cast<int64_t>(sizeof(float)));
  return min_of(max_of(pixels, kTilePixels[1]), out_width);
}

template <typename Dword>
inline int64_t direct_band_rows(const WindowShape& shape, int64_t out_rows) {
  constexpr int64_t kBandBytes = 256 << 10;
  const int64_t row_bytes = dword_row_bytes<Dword>(shape);
  const int64_t affordable = kBandBytes / max_of(row_bytes, 1) - band_height(shape, 1);
  return max_of(min_of(out_rows, affordable / shape.geometry.stride_h + 1), 1);
}

// Weights of one or two vectors of output channels, ready to be multiplied: vectors of dwords, or
// the low and the high part of one after the other.
struct DirectWeights {
  const uint8_t* dwords;
  const Ints* level_sums;  // [vectors][kernel_h], if there is a zero point to correct for
  WordSums words;
};

// kCount levels of each lane, and zeros beside them.
template <int64_t kCount>
inline const int8_t* spread_dwords(const int8_t* levels, int64_t lanes, int8_t* dwords) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    unroll<kCount>([&](auto i) { dwords[lane * kCodesPerDword + i] = levels[lane * kCount + i]; });
  }
  return levels + lanes * kCount;
}

// Puts the levels of one vector where they belong among zeros.
inline void spread_levels(const DirectLayout& layout, int64_t lanes, const int8_t* levels,
                          int8_t* dwords) {
  std::memset(dwords, 0, static_cast<size_t>(layout.vector_step) * 4);
  const int64_t whole = layout.channels / kCodesPerDword;
  for (int64_t tap = 0; tap < layout.taps; ++tap) {
    for (int64_t plane = 0; plane < layout.planes; ++plane) {
      switch (plane < whole ? kCodesPerDword : layout.channels % kCodesPerDword) {
        case 1:
          levels = spread_dwords<1>(levels, lanes, dwords);
          break;
        case 2:
          levels = spread_dwords<2>(levels, lanes, dwords);
          break;
        case 3:
          levels = spread_dwords<3>(levels, lanes, dwords);
          break;
        default:
          levels = spread_dwords<4>(levels, lanes, dwords);
      }
      dwords += kLanes * kCodesPerDword;
    }
  }
}

// Sums of the levels of one vector, per row of the kernel.
inline void sum_levels(const ConvGeometry& g, const DirectLayout& layout, const uint8_t* dwords,
                       Ints* sums) {
  // Chains of additions whose latencies overlap.
  constexpr int64_t kChains = 4;
  const Ints ones = splat(0x01010101);
  const int64_t count = g.kernel_w * layout.planes;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    Ints chains[kChains];
    for (Ints& chain : chains) chain = zero_ints();
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
      unroll<kChains>([&](auto k) {
        chains[k] = dot(chains[k], ones, load_ints(dwords + (i + k) * kLanes * 4));
      });
    }
    for (; i < count; ++i) chains[0] = dot(chains[0], ones, load_ints(dwords + i * kLanes * 4));
    sums[kh] = add(add(chains[0], chains[1]), add(chains[2], chains[3]));
    dwords += count * kLanes * 4;
  }
}

// The parts of levels, see word_sums.h; `levels` may be where the low ones go.
inline void split_levels(const uint8_t* levels, int64_t count, uint8_t* low, uint8_t* high) {
  for (int64_t i = 0; i < count; ++i) high[i] = static_cast<uint8_t>(high_part(levels[i]));
  for (int64_t i = 0; i < count; ++i) low[i] = static_cast<uint8_t>(low_part(levels[i]));
}

struct DirectWeightScratch {
  uint8_t* dwords;   // (groups, vectors, parts, vector_step)
  int8_t* levels;    // of one vector, before they are spread
  Ints* level_sums;  // (groups, vectors, kernel_h)
};

inline DirectWeightScratch direct_weight_scratch(const ConvGeometry& g, int32_t bits,
                                                 Arena* arena) {
  DirectWeightScratch scratch{};
  if (bits == 32) return scratch;
  const DirectLayout layout = direct_layout<uint32_t>(g);
  const int64_t parts = kSumsInWords && bits == 8 ? 2 : 1;
  scratch.dwords = arena->take<uint8_t>(g.groups * layout.group_dwords * 4 * parts);
  scratch.levels = arena->take<int8_t>(layout.codes(0));
  scratch.level_sums = arena->take<Ints>(g.groups * layout.vectors * g.kernel_h);
  return scratch;
}

// Makes weights ready. They take the scratch memory of vectors `slot` and following.
struct DirectWeightSource {
  const uint8_t* held;
  ConvGeometry geometry;
  DirectLayout layout;
  int32_t bits;
  bool centred;
  bool needs_sums;
  WordSums words;
  DirectWeightScratch scratch;

  DirectWeights load(int64_t group, int64_t vector, int64_t vectors, int64_t slot) const {
    const DirectWeights ready = loaded(group, vector, vectors, slot);
    if (bits == 32) return ready;
    const int64_t bytes = layout.vector_step * 4;
    for (int64_t v = 0; v < vectors; ++v) {
      const uint8_t* levels = held_vector(group, vector + v);
      uint8_t* own = scratch.dwords + (slot + v) * slot_bytes();
      if (!is_whole(vector, vectors)) {
        read(levels, vector + v, own);
        levels = own;
      }
      if (needs_sums) {
        sum_levels(geometry, layout, levels, scratch.level_sums + (slot + v) * geometry.kernel_h);
      }
      if (words.split) split_levels(levels, bytes, own, own + bytes);
    }
    return ready;
  }

  // What load() has returned for the same vectors.
  DirectWeights loaded(int64_t group, int64_t vector, int64_t vectors, int64_t slot) const {
    const Ints* level_sums = scratch.level_sums + slot * geometry.kernel_h;
    if (is_whole(vector, vectors) && !words.split) {
      return {held_vector(group, vector), level_sums, words};
    }
    return {scratch.dwords + slot * slot_bytes(), level_sums, words};
  }

 private:
  int64_t slot_bytes() const { return layout.vector_step * 4 * (words.split ? 2 : 1); }

  // Whether levels are held as they are.
  bool is_whole(int64_t vector, int64_t vectors) const {
    return bits == 32 || (bits == 8 && !layout.is_padded(vector + vectors - 1));
  }

  const uint8_t* held_vector(int64_t group, int64_t vector) const {
    if (bits == 32) return held + (group * layout.group_dwords + vector * layout.vector_step) * 4;
    return held + group * layout.held_group_bytes(bits) + vector * layout.held_vector_bytes(bits);
  }

  void read(const uint8_t* dense, int64_t vector, uint8_t* dwords) const {
    const int64_t count = layout.codes(vector);
    if (!layout.is_padded(vector)) {
      return read_dense_levels(dense, count, bits, centred, reinterpret_cast<int8_t*>(dwords));
    }
    read_dense_levels(dense, count, bits, centred, scratch.levels);
    spread_levels(layout, layout.lanes(vector), scratch.levels, reinterpret_cast<int8_t*>(dwords));
  }
};

inline DirectWeightSource direct_weight_source(const ConvTask& task, const DirectLayout& layout,
                                               int32_t zero_point,
                                               const DirectWeightScratch& scratch) {
  const ConvWeight& weight = task.args->weight;
  const bool centred = task.bits != 32 && weight.centred[index_of(weight.widths, task.bits)];
  const bool needs_sums = task.bits != 32 && zero_point != 0;
  const uint8_t* held = static_cast<const uint8_t*>(task.tile);
  WordSums words;
  if (kSumsInWords && task.bits != 32) {
    words.load(held + task.args->geometry.groups * layout.held_group_bytes(task.bits));
  }
  return {held, task.args->geometry, layout, task.bits, centred, needs_sums, words, scratch};
}

template <typename Dword, typename Vector>
struct DirectScratch {
  RowScratch row;
  Dword* band;
  Vector* sums;  // (kFinishedPixels, 2)
  float* block;
  float* block_values;
  uint8_t* block_codes;
  DirectWeightScratch weights;
  size_t bytes;
};

template <typename Dword, typename Vector>
inline DirectScratch<Dword, Vector> direct_scratch(const WindowShape& shape, int64_t out_height,
                                                   int32_t bits, void* memory) {
  Arena arena(memory);
  DirectScratch<Dword, Vector> scratch;
  scratch.row = row_scratch(shape, &arena);
  const int64_t rows = direct_band_rows<Dword>(shape, out_height);
  scratch.band = arena.take<Dword>(band_height(shape, rows) * (dword_row_bytes<Dword>(shape) / 4));
  scratch.sums = arena.take<Vector>(2 * kFinishedPixels);
  const int64_t outputs =
      direct_block_pixels(shape.geometry, shape.out_width) * shape.geometry.out_channels;
  scratch.block = arena.take<float>(outputs);
  scratch.block_values = arena.take<float>(outputs);
  scratch.block_codes = arena.take<uint8_t>(outputs);
  scratch.weights = direct_weight_scratch(shape.geometry, bits, &arena);
  scratch.bytes = arena.used();
  return scratch;
}

// Everything that stays the same while a band is multiplied.
template <typename Dword, typename Vector>
struct DirectMultiply {
  const ConvTask* task;
  const WindowShape* shape;
  DirectLayout layout;
  int32_t zero_point;  // that the sums are still to be corrected for
  Vector* sums;
  DwordBand band;
  WindowWalk walk;
  WindowWalk long_walk;  // the same, the columns of the kernel taken as one if they lie together
  // Whether the first pixel's first column and the last one's last column lie outside the input
  // and can be left out without a correction.
  bool pads_left;
  bool pads_right;

  void set_band(const DwordBand& loaded) {
    const ConvGeometry& g = shape->geometry;
    band = loaded;
    walk.kernel_w = g.kernel_w;
    walk.planes = layout.planes;
    walk.row_step = g.dilation_h * band.row_step;
    walk.column_step = g.dilation_w * band.pixel_step;
    walk.plane_step = band.plane_step;
    walk.pixel_step = g.stride_w * band.pixel_step;
    walk.vector_step = layout.vector_step * 4;
    long_walk = walk;
    if (walk.column_step == walk.planes * walk.plane_step) {
      long_walk.kernel_w = 1;
      long_walk.planes = walk.kernel_w * walk.planes;
    }
    const int64_t last = (shape->out_width - 1) * g.stride_w + (g.kernel_w - 1) * g.dilation_w;
    pads_left = zero_point == 0 && g.pad_left > 0;
    pads_right = zero_point == 0 && last - g.pad_left >= shape->in_width;
  }

  // The rows of the window of output row y that lie inside the input.
  void inner_rows(int64_t y, int64_t* begin, int64_t* end) const {
    const ConvGeometry& g = shape->geometry;
    const int64_t top = y * g.stride_h - g.pad_top;
    const int64_t below = shape->in_height - top;
    *begin = 0;
    *end = g.kernel_h;
    if (top < 0) *begin = min_of(ceil_div(-top, g.dilation_h), g.kernel_h);
    if (below <= (g.kernel_h - 1) * g.dilation_h) {
      *end = max_of(below <= 0 ? 0 : ceil_div(below, g.dilation_h), *begin);
    }
  }

  void start_sums(const DirectWeights& weights, int64_t vectors, int64_t row_begin, int64_t row_end,
                  Ints* start) const {
    start[0] = start[1] = zero_ints();
    if (zero_point == 0) return;
    for (int64_t v = 0; v < vectors; ++v) {
      Ints sums = zero_ints();
      for (int64_t kh = row_begin; kh < row_end; ++kh) {
        sums = add(sums, weights.level_sums[v * shape->geometry.kernel_h + kh]);
      }
      start[v] = subtract(start[v], multiply(sums, splat(zero_point)));
    }
  }

  void start_sums(const DirectWeights&, int64_t, int64_t, int64_t, Floats* start) const {
    start[0] = start[1] = zero_floats();
  }

  // Output pixels [x_begin, x_end) of row y, channels of one or two vectors of a group, into
  // `epilogue` with (out_y, 0) for (y, x_begin).
  void run(int64_t y, int64_t x_begin, int64_t x_end, int64_t group, int64_t vector,
           int64_t vectors, const DirectWeights& ready, const VectorEpilogue& epilogue,
           int64_t out_y, int64_t out_x) const {
    const ConvGeometry& g = shape->geometry;
    int64_t row_begin;
    int64_t row_end;
    inner_rows(y, &row_begin, &row_end);
    Vector start[2];
    start_sums(ready, vectors, row_begin, row_end, start);
    const uint8_t* row =
        band.row(y * g.stride_h - g.pad_top + row_begin * g.dilation_h) + group * band.group_step;
    const uint8_t* weights = ready.dwords + row_begin * g.kernel_w * layout.planes * kLanes * 4;
    constexpr bool kWords = kSumsInWords && !std::is_same<Dword, float>::value;
    const auto run_tiles = [&](int64_t v, int64_t count, const uint8_t* of_vectors) {
      const int64_t multiplied = ready.words.split ? 2 : count;
      const auto multiply = [&](int64_t x, int64_t pixels, Vector* result) {
        // What is left out has to outweigh the ends of three loops instead of one: with 16 products
        // a loop lost 15 %, with 32 gained 6 % (8 pixels, 8 bits, Zen 4).
        const bool may_skip = !kWords && layout.planes * multiplied >= 32;
        const WindowPart part = {row_end - row_begin, may_skip && pads_left && x == 0,
                                 may_skip && pads_right && x + pixels == shape->out_width,
                                 ready.words};
        const bool whole = !part.skips_left && !part.skips_right;
        const auto tile = dot_tile_for<Dword, Vector>(pixels, multiplied, walk.pixel_step);
        tile(whole ? long_walk : walk, part, row + x * walk.pixel_step, of_vectors, start + v,
             result);
      };
      // Finishing many pixels at a time takes less than finishing tile by tile.
      for_each_tile(x_end - x_begin, kFinishedPixels, [&](int64_t first, int64_t pixels) {
        for_each_tile(pixels, kTilePixels[multiplied], [&](int64_t inner, int64_t tile_pixels) {
          multiply(x_begin + first + inner, tile_pixels, sums + inner * count);
        });
        for (int64_t i = 0; i < count; ++i) {
          const int64_t channel = (vector + v + i) * kLanes;
          const Vector* column = sums + i;
          finish_vector(epilogue, out_y, out_x + first, pixels, group * layout.outputs + channel,
                        min_of(layout.outputs - channel, kLanes),
                        [&](int64_t p) { return as_floats(column[p * count]); });
        }
      });
    };
    if (!ready.words.split) return run_tiles(0, vectors, weights);
    for (int64_t v = 0; v < vectors; ++v) {
      run_tiles(v, 1, weights + v * 2 * layout.vector_step * 4);
    }
  }

  static Floats as_floats(Ints value) { return to_floats(value); }
  static Floats as_floats(Floats value) { return value; }
};

// Calls fn(group, vector, vectors) for pairs of vectors of output channels and what is left over.
template <typename Fn>
inline void for_each_vector_pair(int64_t groups, int64_t vectors, Fn fn) {
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t vector = 0; vector < vectors; vector += 2) {
      fn(group, vector, min_of(vectors - vector, 2));
    }
  }
}

template <typename Dword, typename Vector>
inline void conv_direct(const ConvTask& task, void* memory) {
  const MixedConv2dArgs& args = *task.args;
  const ConvGeometry& g = args.geometry;
  const WindowShape shape = window_shape(g, args.input, args.output.width);
  const auto scratch = direct_scratch<Dword, Vector>(shape, args.output.height, task.bits, memory);
  const RowSource source = row_source(task, scratch.row);

  DirectMultiply<Dword, Vector> multiply;
  multiply.task = &task;
  multiply.shape = &shape;
  multiply.layout = direct_layout<Dword>(g);
  multiply.zero_point = source.range.zero_point;
  multiply.sums = scratch.sums;
  const DirectWeightSource weights =
      direct_weight_source(task, multiply.layout, multiply.zero_point, scratch.weights);

  const bool in_place = fits_vector_epilogue(task, g.out_channels / g.groups);
  const VectorEpilogue epilogue =
      in_place ? vector_epilogue(task) : scaling_epilogue(task, scratch.block, g.out_channels);
  const Epilogue rest = block_epilogue(task, scratch.block_values, scratch.block_codes);
  const DirectLayout& layout = multiply.layout;
  if (!in_place) {
    for_each_vector_pair(g.groups, layout.vectors,
                         [&](int64_t group, int64_t vector, int64_t vectors) {
                           weights.load(group, vector, vectors, group * layout.vectors + vector);
                         });
  }
  const NextSample next(task);
  const int64_t block_pixels = direct_block_pixels(g, shape.out_width);
  const int64_t band_rows = direct_band_rows<Dword>(shape, args.output.height);
  for (int64_t begin = task.row_begin; begin < task.row_end; begin += band_rows) {
    const int64_t end = min_of(begin + band_rows, task.row_end);
    multiply.set_band(load_dword_band(shape, source, begin, end, scratch.band));
    if (in_place) {
      for_each_vector_pair(
          g.groups, layout.vectors, [&](int64_t group, int64_t vector, int64_t vectors) {
            // The levels of two vectors at most: they stay in the first or second-level cache.
            const DirectWeights ready = weights.load(group, vector, vectors, 0);
            for (int64_t y = begin; y < end; ++y) {
              multiply.run(y, 0, shape.out_width, group, vector, vectors, ready, epilogue, y, 0);
            }
          });
      continue;
    }
    for (int64_t y = begin; y < end; ++y) {
      next.fetch(y, args.output.height);
      for (int64_t x = 0; x < shape.out_width; x += block_pixels) {
        const int64_t x_end = min_of(x + block_pixels, shape.out_width);
        for_each_vector_pair(
            g.groups, layout.vectors, [&](int64_t group, int64_t vector, int64_t vectors) {
              const DirectWeights ready =
                  weights.loaded(group, vector, vectors, group * layout.vectors + vector);
              multiply.run(y, x, x_end, group, vector, vectors, ready, epilogue, 0, 0);
            });
        finish_run(rest, y, x, x_end - x, scratch.block);
      }
    }
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
