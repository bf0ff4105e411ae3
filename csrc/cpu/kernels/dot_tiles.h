// The inner loops of the vectorized convolution: a tile of neighbouring output pixels times one or
// two vectors of output channels, summed over the whole window in registers.
#pragma once

#include <utility>

#include "isa.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Widest tiles, by how many sums fit into the registers beside two weights and one input.
#if defined(__AVX512F__)
constexpr int kTilePixels[3] = {0, 16, 14};
#else
constexpr int kTilePixels[3] = {0, 8, 6};
#endif
// With a stride that the code does not know, addresses take registers too.
constexpr int kStridedTilePixels = 4;

// How a window lies in memory. Input: dwords [kernel_h][plane][x]; weights: vectors
// [kernel_h][kernel_w][plane] for each vector of output channels. Steps are in dwords.
struct WindowWalk {
  int64_t kernel_w;
  int64_t planes;
  int64_t row_step;
  int64_t column_step;
  int64_t plane_step;
  int64_t pixel_step;
  int64_t vector_step;  // weights of one vector of output channels
};

// sums[pixel][vector][lane] = start[vector][lane] + dot(window, weights) over `rows` rows of the
// window, those that lie inside the input. kStep is the distance of two pixels, 0 if it is only
// known at run time.
template <typename Dword, typename Vector, int kPixels, int kVectors, int kStep>
inline void dot_tile(const WindowWalk& walk, int64_t rows, const void* input, const void* weights,
                     const Vector* start, Vector* result) {
  const Dword* row = static_cast<const Dword*>(input);
  const Dword* weight = static_cast<const Dword*>(weights);
  const int64_t step = kStep == 0 ? walk.pixel_step : kStep;
  Vector sums[kPixels][kVectors];
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < kVectors; ++v) sums[p][v] = start[v];
  }
  for (int64_t kh = 0; kh < rows; ++kh) {
    const Dword* column = row;
    for (int64_t kw = 0; kw < walk.kernel_w; ++kw) {
      const Dword* x = column;
      for (int64_t plane = 0; plane < walk.planes; ++plane) {
        Vector w[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          std::memcpy(&w[v], weight + v * walk.vector_step, sizeof(Vector));
        }
        for (int p = 0; p < kPixels; ++p) {
          const Vector value = splat_dword(x + p * step);
          for (int v = 0; v < kVectors; ++v) sums[p][v] = dot(sums[p][v], value, w[v]);
        }
        weight += kLanes;
        x += walk.plane_step;
      }
      column += walk.column_step;
    }
    row += walk.row_step;
  }
  for (int p = 0; p < kPixels; ++p) {
    for (int v = 0; v < kVectors; ++v) result[p * kVectors + v] = sums[p][v];
  }
}

template <typename Vector>
using DotTile = void (*)(const WindowWalk&, int64_t, const void*, const void*, const Vector*,
                         Vector*);

// The tiles of 1 to so many pixels.
template <typename Vector>
struct DotTiles {
  const DotTile<Vector>* tiles;
  int64_t max_pixels;
};

template <typename Dword, typename Vector, int kVectors, int kStep, int... kIndex>
inline DotTiles<Vector> tiles_up_to(std::integer_sequence<int, kIndex...>) {
  static constexpr DotTile<Vector> kTiles[] = {
      dot_tile<Dword, Vector, kIndex + 1, kVectors, kStep>...};
  return {kTiles, static_cast<int64_t>(sizeof...(kIndex))};
}

template <typename Dword, typename Vector, int kVectors>
inline DotTiles<Vector> tiles_for_step(int64_t step) {
  using Sizes = std::make_integer_sequence<int, kTilePixels[kVectors]>;
  if (step == 1) return tiles_up_to<Dword, Vector, kVectors, 1>(Sizes{});
  if (step == 2) return tiles_up_to<Dword, Vector, kVectors, 2>(Sizes{});
  return tiles_up_to<Dword, Vector, kVectors, 0>(
      std::make_integer_sequence<int, kStridedTilePixels>{});
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
