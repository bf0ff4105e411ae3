// Random convolution geometries: small and odd ones, and some that are wide enough for vectors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <string>
#include <utility>

#include "dfs/types.h"
#include "random.h"

namespace dfs_test {

struct ConvSizes {
  dfs::ConvGeometry geometry;
  int64_t height = 0;
  int64_t width = 0;
  int64_t out_height = 0;
  int64_t out_width = 0;

  int64_t group_channels() const { return geometry.in_channels / geometry.groups; }
  int64_t group_outputs() const { return geometry.out_channels / geometry.groups; }
  int64_t taps() const { return geometry.kernel_h * geometry.kernel_w; }
};

// A square kernel, padded so that stride 1 keeps the size.
inline void set_layer(ConvSizes& sizes, int64_t channels, int64_t outputs, int64_t height,
                      int64_t width, int64_t kernel, int64_t stride) {
  dfs::ConvGeometry& g = sizes.geometry;
  g.in_channels = channels;
  g.out_channels = outputs;
  g.kernel_h = g.kernel_w = kernel;
  g.stride_h = g.stride_w = stride;
  g.pad_left = g.pad_right = g.pad_top = g.pad_bottom = kernel / 2;
  sizes.height = height;
  sizes.width = width;
  sizes.out_height = (height - 1) / stride + 1;
  sizes.out_width = (width - 1) / stride + 1;
}

// Around the multiples of 16, where vectors end, as often as anything else up to 70.
inline int64_t draw_channels(Random& random) {
  if (random.chance(0.5)) return 16 * random.integer(1, 4) + random.integer(-1, 1);
  return random.integer(1, 70);
}

inline void draw_small(Random& random, ConvSizes& sizes) {
  dfs::ConvGeometry& g = sizes.geometry;
  const int64_t group_kind = random.integer(0, 5);
  g.groups = group_kind == 0 ? random.integer(2, 12) : group_kind == 1 ? 2 : 1;
  const bool depthwise = group_kind == 0 && random.chance(0.6);
  g.in_channels = g.groups * (depthwise ? 1 : random.integer(1, 11));
  g.out_channels = g.groups * (depthwise ? random.integer(1, 2) : random.integer(1, 13));
  g.kernel_h = random.integer(1, 5);
  g.kernel_w = random.integer(1, 5);
  sizes.height = random.chance(0.2) ? 1 : random.integer(1, 11);
  sizes.width = random.chance(0.2) ? 1 : random.integer(1, 11);
}

// Enough channels, outputs or columns to fill vectors several times over.
inline void draw_wide(Random& random, ConvSizes& sizes) {
  dfs::ConvGeometry& g = sizes.geometry;
  const int64_t group_kind = random.integer(0, 5);
  if (group_kind == 0) {
    g.groups = draw_channels(random);
    g.in_channels = g.groups;
    g.out_channels = g.groups * random.integer(1, 2);
  } else {
    g.groups = group_kind == 1 ? random.integer(2, 4) : 1;
    g.in_channels = g.groups * draw_channels(random);
    g.out_channels = g.groups * random.integer(1, 40);
  }
  g.kernel_h = random.chance(0.3) ? 1 : random.chance(0.6) ? 3 : random.integer(1, 7);
  g.kernel_w = random.chance(0.7) ? g.kernel_h : random.integer(1, 7);
  sizes.height = random.integer(1, 8);
  sizes.width = random.integer(1, 40);
  if (random.chance(0.25)) std::swap(sizes.height, sizes.width);
}

inline ConvSizes draw_sizes(Random& random) {
  // The tests compute each product one by one, several times over.
  constexpr int64_t kMaxProducts = 1500000;
  ConvSizes sizes;
  dfs::ConvGeometry& g = sizes.geometry;
  for (;;) {
    g = {};
    if (random.chance(0.4)) {
      draw_wide(random, sizes);
    } else {
      draw_small(random, sizes);
    }
    g.stride_h = random.integer(1, 3);
    g.stride_w = random.integer(1, 3);
    g.dilation_h = random.chance(0.7) ? 1 : random.integer(2, 3);
    g.dilation_w = random.chance(0.7) ? 1 : random.integer(2, 3);
    const int64_t most = random.chance(0.1) ? 9 : 3;
    g.pad_left = random.integer(0, most);
    g.pad_right = random.integer(0, most);
    g.pad_top = random.integer(0, most);
    g.pad_bottom = random.integer(0, most);
    const int64_t spare_h =
        sizes.height + g.pad_top + g.pad_bottom - g.dilation_h * (g.kernel_h - 1) - 1;
    const int64_t spare_w =
        sizes.width + g.pad_left + g.pad_right - g.dilation_w * (g.kernel_w - 1) - 1;
    if (spare_h < 0 || spare_w < 0) continue;
    sizes.out_height = spare_h / g.stride_h + 1;
    sizes.out_width = spare_w / g.stride_w + 1;
    const int64_t outputs = sizes.out_height * sizes.out_width * g.out_channels;
    if (outputs * sizes.group_channels() * sizes.taps() <= kMaxProducts) return sizes;
  }
}

inline std::string describe(const ConvSizes& s) {
  const dfs::ConvGeometry& g = s.geometry;
  std::ostringstream text;
  text << "in " << g.in_channels << "x" << s.height << "x" << s.width << " out " << g.out_channels
       << "x" << s.out_height << "x" << s.out_width << " kernel " << g.kernel_h << "x" << g.kernel_w
       << " stride " << g.stride_h << "," << g.stride_w << " dilation " << g.dilation_h << ","
       << g.dilation_w << " pad " << g.pad_left << "," << g.pad_right << "," << g.pad_top << ","
       << g.pad_bottom << " groups " << g.groups;
  return text.str();
}

// Calls fn(y, x, kh, kw) for each tap of an output pixel that lies inside the input.
template <typename Fn>
void for_each_tap(const ConvSizes& s, int64_t out_y, int64_t out_x, Fn fn) {
  const dfs::ConvGeometry& g = s.geometry;
  for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      const int64_t y = out_y * g.stride_h - g.pad_top + kh * g.dilation_h;
      const int64_t x = out_x * g.stride_w - g.pad_left + kw * g.dilation_w;
      if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
      fn(y, x, kh, kw);
    }
  }
}

}  // namespace dfs_test
