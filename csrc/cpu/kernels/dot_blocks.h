// The inner loops: register blocks of integer dot products and of float32 products.
#pragma once

#include "float_lanes.h"
#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Depths of integer windows are padded to this with zeros, so that the loop has no remainder.
constexpr int64_t kDepthStep = 8;

// sums[p * sums_stride + o] = dot(windows + p * stride, filters + o * stride). Products of two
// levels and pairs of them fit int32: the compiler multiplies and adds pairs in one instruction.
template <int kPixels, int kOutputs>
inline void dot_block(const int16_t* windows, const int16_t* filters, int64_t stride, int32_t* sums,
                      int64_t sums_stride) {
  int32_t sum[kPixels][kOutputs] = {};
  const int64_t depth = stride / kDepthStep * kDepthStep;
  for (int64_t k = 0; k < depth; ++k) {
    for (int p = 0; p < kPixels; ++p) {
      for (int o = 0; o < kOutputs; ++o) {
        sum[p][o] += static_cast<int32_t>(windows[p * stride + k]) *
                     static_cast<int32_t>(filters[o * stride + k]);
      }
    }
  }
  for (int p = 0; p < kPixels; ++p) {
    for (int o = 0; o < kOutputs; ++o) sums[p * sums_stride + o] = sum[p][o];
  }
}

template <int kPixels>
inline void dot_pixels(const int16_t* windows, const int16_t* filters, int64_t stride,
                       int64_t outputs, int32_t* sums, int64_t sums_stride) {
  int64_t o = 0;
  for (; o + 4 <= outputs; o += 4) {
    dot_block<kPixels, 4>(windows, filters + o * stride, stride, sums + o, sums_stride);
  }
  for (; o < outputs; ++o) {
    dot_block<kPixels, 1>(windows, filters + o * stride, stride, sums + o, sums_stride);
  }
}

inline void dot_all(const int16_t* windows, int64_t pixels, const int16_t* filters, int64_t outputs,
                    int64_t stride, int32_t* sums, int64_t sums_stride) {
  // Four filters at a time stay in the first-level cache while all windows pass by.
  for (int64_t o = 0; o < outputs; o += 4) {
    const int64_t count = min_of(outputs - o, 4);
    int64_t p = 0;
    for (; p + 2 <= pixels; p += 2) {
      dot_pixels<2>(windows + p * stride, filters + o * stride, stride, count,
                    sums + p * sums_stride + o, sums_stride);
    }
    if (p < pixels) {
      dot_pixels<1>(windows + p * stride, filters + o * stride, stride, count,
                    sums + p * sums_stride + o, sums_stride);
    }
  }
}

// Columns of a float block: the right-hand matrix comes in panels of so many columns.
constexpr int64_t kFloatColumns = 2 * kFloatLanes;

// sums[i][j] = sum over k of a[i * a_row + k * a_step] * b[k * b_step + j], k ascending.
template <int kRows>
inline void float_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                        int64_t b_step, int64_t depth, float (*sums)[kFloatColumns]) {
  FloatLanes sum[2 * kRows];
  unroll<2 * kRows>([&](auto i) { sum[i] = FloatLanes{}; });
  for (int64_t k = 0; k < depth; ++k) {
    const FloatLanes left = load_lanes(b + k * b_step);
    const FloatLanes right = load_lanes(b + k * b_step + kFloatLanes);
    unroll<kRows>([&](auto i) {
      const float factor = a[i * a_row + k * a_step];
      add_product(&sum[2 * i], factor, left);
      add_product(&sum[2 * i + 1], factor, right);
    });
  }
  unroll<kRows>([&](auto i) {
    store_lanes(sums[i], sum[2 * i]);
    store_lanes(sums[i] + kFloatLanes, sum[2 * i + 1]);
  });
}

// Rows [*row, rows) as far as whole blocks of them go.
template <int kRows, typename Store>
inline void float_row_blocks(const float* a, int64_t* row, int64_t rows, int64_t a_row,
                             int64_t a_step, const float* b, int64_t b_step, int64_t depth,
                             Store store) {
  alignas(64) float sums[kRows][kFloatColumns];
  for (; *row + kRows <= rows; *row += kRows) {
    float_block<kRows>(a + *row * a_row, a_row, a_step, b, b_step, depth, sums);
    for (int r = 0; r < kRows; ++r) store(*row + r, sums[r]);
  }
}

// The same for any number of rows; store(i, sums) takes the results row by row.
template <typename Store>
inline void float_rows(const float* a, int64_t rows, int64_t a_row, int64_t a_step, const float* b,
                       int64_t b_step, int64_t depth, Store store) {
  int64_t row = 0;
  float_row_blocks<kFloatRows>(a, &row, rows, a_row, a_step, b, b_step, depth, store);
  float_row_blocks<4>(a, &row, rows, a_row, a_step, b, b_step, depth, store);
  float_row_blocks<1>(a, &row, rows, a_row, a_step, b, b_step, depth, store);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
