// The inner loops: register blocks of integer dot products and of float32 products.
#pragma once

#include "float4.h"
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
constexpr int64_t kFloatColumns = 8;

// sums[i][j] = sum over k of a[i * a_row + k * a_step] * b[k * b_step + j], k ascending, each
// product rounded before it is added.
template <int kRows>
inline void float_block(const float* a, int64_t a_row, int64_t a_step, const float* b,
                        int64_t b_step, int64_t depth, float (*sums)[kFloatColumns]) {
  constexpr int kVectors = static_cast<int>(kFloatColumns) / 4;
  Float4 sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) {
      const float left = a[i * a_row + k * a_step];
      for (int j = 0; j < kVectors; ++j) {
        add_product(&sum[i][j], left, load4(b + k * b_step + 4 * j));
      }
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) store4(sums[i] + 4 * j, sum[i][j]);
  }
}

// The same for any number of rows; store(i, sums) takes the results row by row.
template <typename Store>
inline void float_rows(const float* a, int64_t rows, int64_t a_row, int64_t a_step, const float* b,
                       int64_t b_step, int64_t depth, Store store) {
  constexpr int kRows = 4;
  float sums[kRows][kFloatColumns];
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    float_block<kRows>(a + i * a_row, a_row, a_step, b, b_step, depth, sums);
    for (int r = 0; r < kRows; ++r) store(i + r, sums[r]);
  }
  for (; i < rows; ++i) {
    float_block<1>(a + i * a_row, a_row, a_step, b, b_step, depth, sums);
    store(i, sums[0]);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
