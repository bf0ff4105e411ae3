// Transposition of matrices of 4-byte elements: pixels of interleaved channels to planes and back.
#pragma once

#include "isa.h"
#if defined(__AVX2__)
#include "vectors.h"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

#if defined(__AVX2__)

// Four columns of 4 rows in each 128-bit lane, given as the rows r, r + 1, r + 2, r + 3 of all
// lanes, to four columns of 4 consecutive rows.
#if defined(__AVX512F__)
inline __m512i load_rows(const uint8_t* src, int64_t stride) {
  const auto row = [&](int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * stride));
  };
  __m512i rows = _mm512_castsi128_si512(row(0));
  rows = _mm512_inserti32x4(rows, row(4), 1);
  rows = _mm512_inserti32x4(rows, row(8), 2);
  return _mm512_inserti32x4(rows, row(12), 3);
}

inline void transpose_block(const uint8_t* src, int64_t src_stride, uint8_t* dst,
                            int64_t dst_stride) {
  const __m512i a = load_rows(src, src_stride);
  const __m512i b = load_rows(src + src_stride, src_stride);
  const __m512i c = load_rows(src + 2 * src_stride, src_stride);
  const __m512i d = load_rows(src + 3 * src_stride, src_stride);
  const __m512i ab_low = _mm512_unpacklo_epi32(a, b);
  const __m512i ab_high = _mm512_unpackhi_epi32(a, b);
  const __m512i cd_low = _mm512_unpacklo_epi32(c, d);
  const __m512i cd_high = _mm512_unpackhi_epi32(c, d);
  store(dst, _mm512_unpacklo_epi64(ab_low, cd_low));
  store(dst + dst_stride, _mm512_unpackhi_epi64(ab_low, cd_low));
  store(dst + 2 * dst_stride, _mm512_unpacklo_epi64(ab_high, cd_high));
  store(dst + 3 * dst_stride, _mm512_unpackhi_epi64(ab_high, cd_high));
}
#else
inline __m256i load_rows(const uint8_t* src, int64_t stride) {
  return _mm256_loadu2_m128i(reinterpret_cast<const __m128i*>(src + 4 * stride),
                             reinterpret_cast<const __m128i*>(src));
}

inline void transpose_block(const uint8_t* src, int64_t src_stride, uint8_t* dst,
                            int64_t dst_stride) {
  const __m256i a = load_rows(src, src_stride);
  const __m256i b = load_rows(src + src_stride, src_stride);
  const __m256i c = load_rows(src + 2 * src_stride, src_stride);
  const __m256i d = load_rows(src + 3 * src_stride, src_stride);
  const __m256i ab_low = _mm256_unpacklo_epi32(a, b);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b);
  const __m256i cd_low = _mm256_unpacklo_epi32(c, d);
  const __m256i cd_high = _mm256_unpackhi_epi32(c, d);
  store(dst, _mm256_unpacklo_epi64(ab_low, cd_low));
  store(dst + dst_stride, _mm256_unpackhi_epi64(ab_low, cd_low));
  store(dst + 2 * dst_stride, _mm256_unpacklo_epi64(ab_high, cd_high));
  store(dst + 3 * dst_stride, _mm256_unpackhi_epi64(ab_high, cd_high));
}
#endif

inline void transpose_4x4(const uint8_t* src, int64_t src_stride, uint8_t* dst,
                          int64_t dst_stride) {
  const auto row = [&](int64_t i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i * src_stride));
  };
  const auto put = [&](int64_t i, __m128i value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst + i * dst_stride), value);
  };
  const __m128i a = row(0);
  const __m128i b = row(1);
  const __m128i c = row(2);
  const __m128i d = row(3);
  const __m128i ab_low = _mm_unpacklo_epi32(a, b);
  const __m128i ab_high = _mm_unpackhi_epi32(a, b);
  const __m128i cd_low = _mm_unpacklo_epi32(c, d);
  const __m128i cd_high = _mm_unpackhi_epi32(c, d);
  put(0, _mm_unpacklo_epi64(ab_low, cd_low));
  put(1, _mm_unpackhi_epi64(ab_low, cd_low));
  put(2, _mm_unpacklo_epi64(ab_high, cd_high));
  put(3, _mm_unpackhi_epi64(ab_high, cd_high));
}

#endif

// dst[column][row] = src[row][column], elements of 4 bytes at any address; strides in bytes.
inline void transpose(const void* source, int64_t src_stride, int64_t rows, int64_t columns,
                      void* target, int64_t dst_stride) {
  const uint8_t* src = static_cast<const uint8_t*>(source);
  uint8_t* dst = static_cast<uint8_t*>(target);
  const auto copy = [&](int64_t row, int64_t column) {
    std::memcpy(dst + column * dst_stride + row * 4, src + row * src_stride + column * 4, 4);
  };
  int64_t row = 0;
#if defined(__AVX2__)
  for (; row + kLanes <= rows; row += kLanes) {
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4) {
      transpose_block(src + row * src_stride + column * 4, src_stride,
                      dst + column * dst_stride + row * 4, dst_stride);
    }
    for (; column < columns; ++column) {
      for (int64_t i = 0; i < kLanes; ++i) copy(row + i, column);
    }
  }
  for (; row + 4 <= rows; row += 4) {
    int64_t column = 0;
    for (; column + 4 <= columns; column += 4) {
      transpose_4x4(src + row * src_stride + column * 4, src_stride,
                    dst + column * dst_stride + row * 4, dst_stride);
    }
    for (; column < columns; ++column) {
      for (int64_t i = 0; i < 4; ++i) copy(row + i, column);
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) copy(row, column);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
