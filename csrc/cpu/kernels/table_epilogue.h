// The epilogue of the table kernel where pixels stay in the lanes: integer codes out, no residual
// or one of 8 bits.
#pragma once

#include "isa.h"
#include "kernel_table.h"
#include "table_codes.h"
#include "vector_epilogue.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// 16-bit sums of 64 pixels, those at even and at odd positions.
struct PixelSums {
  __m512i even;
  __m512i odd;

  // The even positions also hold 256 times the odd ones, until finish().
  void add_bytes(__m512i bytes) {
    even = _mm512_add_epi16(even, bytes);
    odd = _mm512_add_epi16(odd, _mm512_srli_epi16(bytes, 8));
  }
  void finish() { even = _mm512_sub_epi16(even, _mm512_slli_epi16(odd, 8)); }
};

// Joins planes, one per byte of a pixel, into pixels: the inverse of split_bytes. `halves` holds
// twice as many bytes as the pixels, and some more for whole vectors.
inline void join_bytes(const uint8_t* planes, int64_t plane_step, int64_t count, int64_t bytes,
                       uint8_t* halves, uint8_t* pixels) {
  if (bytes == 1) {
    std::memcpy(pixels, planes, static_cast<size_t>(count));
    return;
  }
  if ((bytes == 4 || bytes == 16) && count % kTableLanes == 0) {
    const auto join = bytes == 4 ? join_in_registers<4> : join_in_registers<16>;
    for (int64_t i = 0; i < count; i += kTableLanes) {
      join(planes + i, plane_step, pixels + i * bytes);
    }
    return;
  }
  if (bytes % 2 != 0) {
    for (int64_t j = 0; j < bytes; ++j) {
      for (int64_t i = 0; i < count; ++i) pixels[i * bytes + j] = planes[j * plane_step + i];
    }
    return;
  }
  alignas(64) uint8_t order[2][kTableLanes];
  for (int i = 0; i < kTableLanes; ++i) {
    order[0][i] = static_cast<uint8_t>(i / 2 + i % 2 * kTableLanes);
    order[1][i] = static_cast<uint8_t>(kTableLanes / 2 + i / 2 + i % 2 * kTableLanes);
  }
  const __m512i low = _mm512_load_si512(order[0]);
  const __m512i high = _mm512_load_si512(order[1]);
  const int64_t half = count * bytes / 2;
  const int64_t half_step = round_up(half, kTableLanes);
  uint8_t* rest = halves + 2 * half_step;
  join_bytes(planes, 2 * plane_step, count, bytes / 2, rest, halves);
  join_bytes(planes + plane_step, 2 * plane_step, count, bytes / 2, rest, halves + half_step);
  const auto put = [&](int64_t position, __m512i value) {
    const int64_t left = 2 * half - position;
    if (left >= kTableLanes) {
      _mm512_storeu_si512(pixels + position, value);
    } else if (left > 0) {
      _mm512_mask_storeu_epi8(pixels + position, (uint64_t{1} << left) - 1, value);
    }
  };
  for (int64_t i = 0; i < half; i += kTableLanes) {
    const __m512i even = _mm512_loadu_si512(halves + i);
    const __m512i odd = _mm512_loadu_si512(halves + half_step + i);
    put(2 * i, _mm512_permutex2var_epi8(even, low, odd));
    put(2 * i + kTableLanes, _mm512_permutex2var_epi8(even, high, odd));
  }
}

// Whether this epilogue can be used: sums have to fit int16 with their sign.
inline bool fits_plane_epilogue(const ConvTask& task) {
  const MixedConv2dArgs& args = *task.args;
  const ConvGeometry& g = args.geometry;
  const SampleView output = sample_view(args.output, task.sample);
  if (output.values != nullptr || output.bits == 32 || output.bits == 0) return false;
  if (g.in_channels * g.kernel_h * g.kernel_w * 9 > 0x7fff) return false;
  if (!args.has_residual) return true;
  const SampleView residual = sample_view(args.residual, task.sample);
  return residual.values == nullptr && residual.bits == 8;
}

// Codes of 64 pixels of one output channel, whose sums are `sums`. Four times 16 pixels, p % 4 = 0,
// 1, 2, 3, are worked on side by side.
template <bool kResidual>
inline __m512i plane_codes(const VectorEpilogue& e, int64_t channel, const PixelSums& sums,
                           __m512i residual) {
  const Floats multiplier = splat(e.multiplier[channel]);
  const Floats offset = splat(e.offset[channel]);
  const Floats inverse_scale = splat(e.range.inverse_scale);
  const Ints quarters[4] = {_mm512_srai_epi32(_mm512_slli_epi32(sums.even, 16), 16),
                            _mm512_srai_epi32(_mm512_slli_epi32(sums.odd, 16), 16),
                            _mm512_srai_epi32(sums.even, 16), _mm512_srai_epi32(sums.odd, 16)};
  Floats values[4];
  unroll<4>([&](auto i) {
    values[i] = add(multiply(to_floats(quarters[i]), multiplier), offset);
    if constexpr (kResidual) {
      const Ints byte = _mm512_and_si512(_mm512_srli_epi32(residual, 8 * i), splat(0xff));
      const Ints level = subtract(byte, splat(e.residual_range.zero_point));
      values[i] = add(values[i], multiply(to_floats(level), splat(e.residual_range.scale)));
    }
    if (e.relu) values[i] = rectify(values[i]);
    values[i] = min(splat(e.range.high), multiply(values[i], inverse_scale));
  });
  if (e.range.zero_point == 0) {
    // Packing turns what is negative to 0; see VectorFinish::code_or_negative().
    const Ints low_words = _mm512_packs_epi32(round_to_ints(values[0]), round_to_ints(values[1]));
    const Ints high_words = _mm512_packs_epi32(round_to_ints(values[2]), round_to_ints(values[3]));
    const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(_mm512_packus_epi16(low_words, high_words),
                               _mm512_broadcast_i32x4(order));
  }
  // Bytes of the sum are the codes: each is between 0 and 255 once its zero point is added.
  Ints codes = splat(static_cast<int32_t>(static_cast<uint32_t>(e.range.zero_point) * 0x01010101u));
  unroll<4>([&](auto i) {
    const Floats level = max(values[i], splat(e.range.low));
    codes = add(codes, shift_left<8 * i>(round_to_ints(level)));
  });
  return codes;
}

struct PlaneScratch {
  uint8_t* planes;     // (O, pixels), then as many bytes of pixels
  uint8_t* residuals;  // (O, pixels)
  uint8_t* halves;
};

// Room for `pixels` pixels, a multiple of 64.
inline PlaneScratch plane_scratch(int64_t channels, int64_t pixels, Arena* arena) {
  PlaneScratch scratch;
  const int64_t bytes = round_up(channels, 4) * pixels;
  scratch.planes = arena->take<uint8_t>(bytes);
  scratch.residuals = arena->take<uint8_t>(bytes);
  scratch.halves = arena->take<uint8_t>(2 * bytes + 16 * kTableLanes);
  return scratch;
}

// Merges planes of codes of kBits bits into planes of bytes, in place.
template <int kBits>
inline void merge_planes(uint8_t* planes, int64_t channels, int64_t pixels) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t bytes = ceil_div(channels, kPerByte);
  for (int64_t j = 0; j < bytes; ++j) {
    const int64_t count = min_of(channels - j * kPerByte, kPerByte);
    for (int64_t i = 0; i < pixels; i += kTableLanes) {
      __m512i merged = _mm512_setzero_si512();
      for (int64_t k = count - 1; k >= 0; --k) {
        const uint8_t* plane = planes + (j * kPerByte + k) * pixels + i;
        merged = _mm512_or_si512(_mm512_slli_epi16(merged, kBits), _mm512_loadu_si512(plane));
      }
      _mm512_storeu_si512(planes + j * pixels + i, merged);
    }
  }
}

// Planes of the codes of all channels, `step` bytes apart, to `count` pixels at `dst`.
inline void store_planes(const PlaneScratch& scratch, int32_t bits, int64_t channels, int64_t step,
                         int64_t count, uint8_t* dst) {
  if (bits == 2) merge_planes<2>(scratch.planes, channels, step);
  if (bits == 4) merge_planes<4>(scratch.planes, channels, step);
  join_bytes(scratch.planes, step, count, packed_bytes(channels, bits), scratch.halves, dst);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
