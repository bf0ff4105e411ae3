// The inner loops of the vectorized convolution: a tile of neighbouring output pixels times one or
// two vectors of output channels, summed over the whole window in registers.
#pragma once

#include "isa.h"
#include "vectors.h"
#include "word_sums.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Widest tiles, by how many sums fit into the registers beside two weights and one input.
#if defined(__AVX512F__)
constexpr int kTilePixels[3] = {0, 16, 14};
#else
constexpr int kTilePixels[3] = {0, 8, 6};
#endif

// How a window lies in memory: dwords at kernel row * row_step + kernel column * column_step +
// plane * plane_step for a pixel, pixel_step further for the next; weights as vectors [kernel_h]
// [kernel_w][plane], vector_step apart for the next vector of output channels. In bytes.
struct WindowWalk {
  int64_t kernel_w;
  int64_t planes;
  int64_t row_step;
  int64_t column_step;
  int64_t plane_step;
  int64_t pixel_step;
  int64_t vector_step;
};

// The part of a window that is multiplied.
struct WindowPart {
  int64_t rows;      // those inside the input
  bool skips_left;   // the first kernel column of the first pixel
  bool skips_right;  // the last kernel column of the last pixel
  WordSums words;
};

// Keeps a number in a register of its own.
inline void pin(int64_t* value) {
#if defined(__GNUC__)
  asm("" : "+r"(*value));
#endif
}

// Where the pixels of a tile lie, as x86 addresses of one base and one index: pixel i = 2^k * odd
// takes 2^k times the register that holds odd * step. A step known to the compiler (kStep, else 0)
// takes no register, and a little less time where every product has an address of its own.
template <int kPixels, int kStep>
struct PixelOffsets {
  static constexpr int kOdds = kPixels > 1 ? kPixels / 2 : 1;
  int64_t odd[kOdds];

  explicit PixelOffsets(int64_t step) {
    if constexpr (kStep == 0) {
      unroll<kOdds>([&](auto i) {
        odd[i] = (2 * i + 1) * step;
        pin(&odd[i]);
      });
    }
  }

  template <int kPixel>
  const uint8_t* at(const uint8_t* base) const {
    if constexpr (kPixel == 0) return base;
    if constexpr (kStep != 0) return base + kPixel * kStep;
    constexpr int kPower = kPixel & -kPixel;
    return base + odd[kPixel / kPower / 2] * kPower;
  }
};

// Adds the products of `dwords` dwords of one kernel column for pixels [kFirst, kLast) of a tile;
// accumulate(sum, value, weight) adds one.
template <typename Dword, typename Vector, int kFirst, int kLast, int kPixels, int kVectors,
          int kStep, typename Accumulate>
inline __attribute__((always_inline)) void dot_column(const WindowWalk& walk,
                                                      const PixelOffsets<kPixels, kStep>& offsets,
                                                      const uint8_t* column, int64_t dwords,
                                                      const uint8_t** weights,
                                                      Vector (&sums)[kPixels * kVectors],
                                                      Accumulate accumulate) {
  const int64_t vector_step = walk.vector_step;
  const int64_t plane_step = walk.plane_step;
  const uint8_t* weight = *weights;
  const uint8_t* end = weight + dwords * static_cast<int64_t>(sizeof(Vector));
  for (; weight != end; weight += sizeof(Vector)) {
    Vector w[kVectors];
    unroll<kVectors>([&](auto v) { std::memcpy(&w[v], weight + v * vector_step, sizeof(w[v])); });
    unroll<kLast - kFirst>([&](auto i) {
      constexpr int kPixel = kFirst + i;
      const Vector value = splat_dword<Dword>(offsets.template at<kPixel>(column));
      unroll<kVectors>([&](auto v) {
        Vector& sum = sums[kPixel * kVectors + v];
        sum = accumulate(sum, value, w[v]);
      });
    });
    column += plane_step;
  }
  *weights = end;
}

#if !defined(__AVX512VNNI__)
// dot_tile for codes. With kParts the two vectors of weights are the low and the high parts of one,
// and so is the result.
template <int kPixels, int kVectors, int kStep, bool kParts>
inline void dot_tile_in_words(const WindowWalk& walk, const WindowPart& part, const uint8_t* input,
                              const uint8_t* weights, const Ints* start, Ints* result) {
  constexpr int kResultVectors = kParts ? 1 : kVectors;
  const PixelOffsets<kPixels, kStep> offsets(walk.pixel_step);
  const uint8_t* row = input;
  const uint8_t* column = row;
  int64_t columns = walk.kernel_w;  // of the row that are left
  int64_t planes = walk.planes;     // of the column
  const int64_t run = part.words.run;
  // Whole columns where they fit: loops that are all as long end without a wrong guess.
  const int64_t longest = planes <= run ? run - run % planes : run;
  int64_t rest = part.rows * columns * planes;
  bool is_first = true;
  do {
    Ints words[kPixels * kVectors];
    unroll<kPixels * kVectors>([&](auto i) { words[i] = zero_ints(); });
    for (int64_t left = min_of(longest, rest); left > 0;) {
      const int64_t dwords = min_of(left, planes);
      dot_column<uint32_t, Ints, 0, kPixels, kPixels, kVectors>(
          walk, offsets, column, dwords, &weights, words,
          [](Ints sum, Ints value, Ints weight) { return dot_fitting(sum, value, weight); });
      left -= dwords;
      rest -= dwords;
      planes -= dwords;
      column += dwords * walk.plane_step;
      if (planes > 0) continue;
      planes = walk.planes;
      column += walk.column_step - planes * walk.plane_step;
      if (--columns > 0) continue;
      columns = walk.kernel_w;
      row += walk.row_step;
      column = row;
    }
    unroll<kPixels * kResultVectors>([&](auto i) {
      Ints sum = is_first ? start[i % kResultVectors] : result[i];
      if constexpr (kParts) {
        sum = add(sum, add(join_words<1>(words[2 * i]), join_words<16>(words[2 * i + 1])));
      } else {
        sum = add(sum, join_words<1>(words[i]));
      }
      result[i] = sum;
    });
    is_first = false;
  } while (rest > 0);
}
#endif

// result[pixel][vector][lane] = start[vector][lane] + dot(window, weights). Parts of the same
// weights count as two vectors that have one result.
template <typename Dword, typename Vector, int kPixels, int kVectors, int kStep>
inline void dot_tile(const WindowWalk& walk, const WindowPart& part, const uint8_t* input,
                     const uint8_t* weights, const Vector* start, Vector* result) {
#if !defined(__AVX512VNNI__)
  if constexpr (!std::is_same<Dword, float>::value) {
    if constexpr (kVectors == 2) {
      if (part.words.split) {
        return dot_tile_in_words<kPixels, 2, kStep, true>(walk, part, input, weights, start,
                                                          result);
      }
    }
    return dot_tile_in_words<kPixels, kVectors, kStep, false>(walk, part, input, weights, start,
                                                              result);
  }
#endif
  Vector sums[kPixels * kVectors];
  unroll<kPixels * kVectors>([&](auto i) { sums[i] = start[i % kVectors]; });
  const PixelOffsets<kPixels, kStep> offsets(walk.pixel_step);
  for (int64_t kh = 0; kh < part.rows; ++kh) {
    const uint8_t* column = input + kh * walk.row_step;
    for (int64_t kw = 0; kw < walk.kernel_w; ++kw) {
      const auto columns = [&](auto begin, auto end) {
        dot_column<Dword, Vector, begin, end, kPixels, kVectors>(
            walk, offsets, column, walk.planes, &weights, sums,
            [](Vector sum, Vector value, Vector weight) { return dot(sum, value, weight); });
      };
      constexpr std::integral_constant<int, 0> kBegin;
      constexpr std::integral_constant<int, kPixels> kEnd;
      if constexpr (kPixels > 1) {
        constexpr std::integral_constant<int, 1> kSecond;
        constexpr std::integral_constant<int, kPixels - 1> kLast;
        if (part.skips_left && kw == 0) {
          columns(kSecond, kEnd);
        } else if (part.skips_right && kw == walk.kernel_w - 1) {
          columns(kBegin, kLast);
        } else {
          columns(kBegin, kEnd);
        }
      } else {
        columns(kBegin, kEnd);
      }
      column += walk.column_step;
    }
  }
  unroll<kPixels * kVectors>([&](auto i) { result[i] = sums[i]; });
}

template <typename Vector>
using DotTile = void (*)(const WindowWalk&, const WindowPart&, const uint8_t*, const uint8_t*,
                         const Vector*, Vector*);

template <typename Dword, typename Vector, int kVectors, int kStep, int... kIndex>
inline DotTile<Vector> tile_of(int64_t pixels, std::integer_sequence<int, kIndex...>) {
  static constexpr DotTile<Vector> kTiles[] = {
      dot_tile<Dword, Vector, kIndex + 1, kVectors, kStep>...};
  return kTiles[pixels - 1];
}

// The tile of 1 to kTilePixels[vectors] pixels, pixel_step bytes apart, and one or two vectors.
template <typename Dword, typename Vector>
inline DotTile<Vector> dot_tile_for(int64_t pixels, int64_t vectors, int64_t pixel_step) {
  constexpr std::make_integer_sequence<int, kTilePixels[1]> kNarrow;
  constexpr std::make_integer_sequence<int, kTilePixels[2]> kWide;
  if (vectors == 2) return tile_of<Dword, Vector, 2, 0>(pixels, kWide);
  // 16 channels in as many bytes.
  if (pixel_step == 16) return tile_of<Dword, Vector, 1, 16>(pixels, kNarrow);
  return tile_of<Dword, Vector, 1, 0>(pixels, kNarrow);
}

// Calls fn(x, pixels) for tiles of nearly equal width that make up `width` pixels.
template <typename Fn>
inline void for_each_tile(int64_t width, int64_t max_pixels, Fn fn) {
  int64_t tiles = 1;
  int64_t pixels = width;
  if (width > max_pixels) {
    tiles = ceil_div(width, max_pixels);
    pixels = width / tiles;
  }
  int64_t wider = width - tiles * pixels;
  for (int64_t x = 0; x < width; --wider) {
    const int64_t count = pixels + (wider > 0 ? 1 : 0);
    fn(x, count);
    x += count;
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
