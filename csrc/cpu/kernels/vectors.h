// One vector register of float32 or int32 lanes, for AVX2 (8 lanes) and AVX-512 (16 lanes), under
// one set of names. A "dword" is what a lane multiplies at a time: four uint8 codes, or one float.
#pragma once

#include <immintrin.h>

#include "isa.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of the deliberately undefined operands in its own AVX-512 headers.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

constexpr int64_t kCodesPerDword = 4;

#if defined(__AVX512VNNI__)

constexpr int64_t kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats zero_floats() { return _mm512_setzero_ps(); }
inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Floats splat(float value) { return _mm512_set1_ps(value); }
inline Ints splat(int32_t value) { return _mm512_set1_epi32(value); }
inline Floats load_floats(const void* src) { return _mm512_loadu_ps(src); }
inline Ints load_ints(const void* src) { return _mm512_loadu_si512(src); }
inline void store(void* dst, Floats value) { _mm512_storeu_ps(dst, value); }
inline void store(void* dst, Ints value) { _mm512_storeu_si512(dst, value); }

inline __mmask16 lane_mask(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }
// The first `count` lanes; the others are zero, and their memory is not touched.
inline Floats load_floats(const void* src, int64_t count) {
  return _mm512_maskz_loadu_ps(lane_mask(count), src);
}
inline void store(void* dst, Floats value, int64_t count) {
  _mm512_mask_storeu_ps(dst, lane_mask(count), value);
}
inline Ints keep_lanes(Ints value, int64_t count) {
  return _mm512_maskz_mov_epi32(lane_mask(count), value);
}

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
// One rounding.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
// Zero where value <= 0; keeps NaN.
inline Floats rectify(Floats value) {
  const __mmask16 mask = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NLE_UQ);
  return _mm512_maskz_mov_ps(mask, value);
}

inline Ints add(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm512_or_si512(a, b); }
template <int kCount>
inline Ints shift_left(Ints value) {
  return _mm512_slli_epi32(value, kCount);
}
inline Floats to_floats(Ints value) { return _mm512_cvtepi32_ps(value); }
// To nearest even.
inline Ints round_to_ints(Floats value) { return _mm512_cvtps_epi32(value); }

inline Ints load_bytes(const uint8_t* src) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src)));
}
inline __m128i to_bytes(Ints value) { return _mm512_cvtepi32_epi8(value); }

// Adds, lane by lane, the products of four unsigned codes and four signed weights.
inline Ints dot(Ints sums, Ints codes, Ints weights) {
  return _mm512_dpbusd_epi32(sums, codes, weights);
}
// The same as fast as it gets, in sums of any kind.
inline Ints dot_fitting(Ints sums, Ints codes, Ints weights) { return dot(sums, codes, weights); }

#elif defined(__AVX2__)

constexpr int64_t kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats zero_floats() { return _mm256_setzero_ps(); }
inline Ints zero_ints() { return _mm256_setzero_si256(); }
inline Floats splat(float value) { return _mm256_set1_ps(value); }
inline Ints splat(int32_t value) { return _mm256_set1_epi32(value); }
inline Floats load_floats(const void* src) {
  return _mm256_loadu_ps(static_cast<const float*>(src));
}
inline Ints load_ints(const void* src) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(src));
}
inline void store(void* dst, Floats value) { _mm256_storeu_ps(static_cast<float*>(dst), value); }
inline void store(void* dst, Ints value) { _mm256_storeu_si256(static_cast<__m256i*>(dst), value); }

inline Ints lane_mask(int64_t count) {
  return _mm256_cmpgt_epi32(splat(static_cast<int32_t>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
// The first `count` lanes; the others are zero, and their memory is not touched.
inline Floats load_floats(const void* src, int64_t count) {
  return _mm256_maskload_ps(static_cast<const float*>(src), lane_mask(count));
}
inline void store(void* dst, Floats value, int64_t count) {
  _mm256_maskstore_ps(static_cast<float*>(dst), lane_mask(count), value);
}
inline Ints keep_lanes(Ints value, int64_t count) {
  return _mm256_and_si256(value, lane_mask(count));
}

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
// One rounding.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
// The second operand if either is NaN.
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
// Zero where value <= 0; keeps NaN.
inline Floats rectify(Floats value) {
  return _mm256_and_ps(_mm256_cmp_ps(value, _mm256_setzero_ps(), _CMP_NLE_UQ), value);
}

inline Ints add(Ints a, Ints b) { return _mm256_add_epi32(a, b); }
inline Ints subtract(Ints a, Ints b) { return _mm256_sub_epi32(a, b); }
inline Ints multiply(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints bit_or(Ints a, Ints b) { return _mm256_or_si256(a, b); }
template <int kCount>
inline Ints shift_left(Ints value) {
  return _mm256_slli_epi32(value, kCount);
}
inline Floats to_floats(Ints value) { return _mm256_cvtepi32_ps(value); }
// To nearest even.
inline Ints round_to_ints(Floats value) { return _mm256_cvtps_epi32(value); }

inline Ints load_bytes(const uint8_t* src) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(src)));
}
// Lanes hold 0 to 255.
inline __m128i to_bytes(Ints value) {
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  return _mm_packus_epi16(words, words);
}

// Sums of two products of unsigned codes and signed weights, two 16-bit words in a lane. They
// saturate (255 * -128 twice).
inline Ints dot_pairs(Ints codes, Ints weights) { return _mm256_maddubs_epi16(codes, weights); }
// Adds such sums where they fit into words.
inline Ints dot_fitting(Ints words, Ints codes, Ints weights) {
  return _mm256_add_epi16(words, dot_pairs(codes, weights));
}
// The sum of both words of each lane, times kFactor.
template <int kFactor>
inline Ints join_words(Ints words) {
  return _mm256_madd_epi16(words, _mm256_set1_epi16(kFactor));
}

// Adds, lane by lane, the products of four unsigned codes and four signed weights; pairs of them
// must fit into words.
inline Ints dot(Ints sums, Ints codes, Ints weights) {
  return add(sums, join_words<1>(dot_pairs(codes, weights)));
}

#else
#error "no vectors for this instruction set"
#endif

// The dword at any address in all lanes.
template <typename Dword>
inline auto splat_dword(const uint8_t* src) {
  std::conditional_t<std::is_same<Dword, float>::value, float, int32_t> value;
  std::memcpy(&value, src, sizeof(value));
  return splat(value);
}
inline Floats dot(Floats sums, Floats values, Floats weights) {
  return multiply_add(values, weights, sums);
}

inline Ints load_bytes(const uint8_t* src, int64_t count) {
  uint8_t padded[kLanes] = {};
  std::memcpy(padded, src, static_cast<size_t>(count));
  return load_bytes(padded);
}

// Packs codes of kBits into the low kLanes * kBits / 8 bytes.
template <int kBits>
inline __m128i pack_lanes(Ints codes) {
  __m128i bytes = to_bytes(codes);
  if constexpr (kBits == 8) return bytes;
  if constexpr (kBits == 4) {
    // low + 16 * high for each pair of bytes
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
    return _mm_packus_epi16(pairs, pairs);
  }
  const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x0401));
  const __m128i fours = _mm_madd_epi16(pairs, _mm_set1_epi32(0x00100001));
  const __m128i words = _mm_packus_epi32(fours, fours);
  return _mm_packus_epi16(words, words);
}

// Stores the codes of all lanes, kLanes * kBits / 8 bytes.
template <int kBits>
inline void store_lanes(uint8_t* dst, Ints codes) {
  const __m128i packed = pack_lanes<kBits>(codes);
  constexpr size_t kBytes = static_cast<size_t>(kLanes) * kBits / 8;
  if constexpr (kBytes == 16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), packed);
  } else if constexpr (kBytes == 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(dst), packed);
  } else {
    const int low = _mm_cvtsi128_si32(packed);
    std::memcpy(dst, &low, kBytes);
  }
}

// Pixels whose codes are stored together.
constexpr int kStoredPixels = 4;

// The codes of one pixel after the other, a byte each. What lies below the range of a byte becomes
// 0, what lies above it must not occur.
inline Ints join_pixels(const Ints (&codes)[kStoredPixels]) {
#if defined(__AVX512VNNI__)
  // Packing goes by 128-bit lanes: the dwords of a lane are four channels of each pixel.
  const Ints words[2] = {_mm512_packs_epi32(codes[0], codes[1]),
                         _mm512_packs_epi32(codes[2], codes[3])};
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(words[0], words[1]));
#else
  const Ints words[2] = {_mm256_packs_epi32(codes[0], codes[1]),
                         _mm256_packs_epi32(codes[2], codes[3])};
  const Ints order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(words[0], words[1]), order);
#endif
}

// Stores bytes as codes of kBits, kLanes * kBits / 8 bytes a pixel.
template <int kBits>
inline void store_joined(uint8_t* packed, Ints bytes) {
#if defined(__AVX512VNNI__)
  if constexpr (kBits == 8) {
    _mm512_store_si512(packed, bytes);
  } else {
    const Ints pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi16(kBits == 4 ? 0x1001 : 0x0401));
    if constexpr (kBits == 4) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(packed), _mm512_cvtepi16_epi8(pairs));
    } else {
      const Ints fours = _mm512_madd_epi16(pairs, _mm512_set1_epi32(0x00100001));
      _mm_store_si128(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi32_epi8(fours));
    }
  }
#else
  if constexpr (kBits == 8) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(packed), bytes);
  } else {
    const Ints pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(kBits == 4 ? 0x1001 : 0x0401));
    const Ints parts = kBits == 4 ? pairs : _mm256_madd_epi16(pairs, _mm256_set1_epi32(0x00100001));
    const __m128i low = _mm256_castsi256_si128(parts);
    const __m128i high = _mm256_extracti128_si256(parts, 1);
    if constexpr (kBits == 4) {
      _mm_store_si128(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(low, high));
    } else {
      const __m128i words = _mm_packus_epi32(low, high);
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm_packus_epi16(words, words));
    }
  }
#endif
}

// Stores the codes of kStoredPixels pixels, pixel_step bytes apart; see join_pixels.
template <int kBits>
inline void store_pixels(uint8_t* dst, int64_t pixel_step, const Ints (&codes)[kStoredPixels]) {
  constexpr size_t kBytes = static_cast<size_t>(kLanes) * kBits / 8;
  alignas(64) uint8_t packed[kStoredPixels * kBytes];
  store_joined<kBits>(packed, join_pixels(codes));
  if (pixel_step == static_cast<int64_t>(kBytes)) {
    std::memcpy(dst, packed, sizeof(packed));
    return;
  }
  for (int p = 0; p < kStoredPixels; ++p) {
    std::memcpy(dst + p * pixel_step, packed + static_cast<size_t>(p) * kBytes, kBytes);
  }
}

// The first `count` codes; the rest of the last byte is zero.
template <int kBits>
inline void store_lanes(uint8_t* dst, Ints codes, int64_t count) {
  alignas(16) uint8_t bytes[16];
  _mm_store_si128(reinterpret_cast<__m128i*>(bytes), pack_lanes<kBits>(keep_lanes(codes, count)));
  std::memcpy(dst, bytes, static_cast<size_t>(ceil_div(count * kBits, 8)));
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
