// Without VNNI the cheapest product is that of bytes, whose pairs are summed in 16-bit words.
// Widening every pair takes as long as multiplying it, so words are added up as far as they hold
// the sums. How far that is depends on the weights, and is found when they are tiled.
//
// Levels of 8 bits that are too large for that are split, level = 16 * high + low, both within
// [-8, 8]: they are multiplied twice instead of being widened four times as often.
#pragma once

#include "bit_packing.h"
#include "isa.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr bool kSumsInWords = false;
#else
constexpr bool kSumsInWords = true;
#endif
constexpr int64_t kWordSumsBytes = kSumsInWords ? 2 : 0;

// How the products of a filter bank are summed.
struct WordSums {
  bool split = false;
  // Products of so many dwords in a row fit into words, whatever the activations and whichever of
  // them are left out.
  int64_t run = 0;

  void store(uint8_t* dst) const {
    const uint16_t value = static_cast<uint16_t>(min_of(run, INT16_MAX) | (split ? 0x8000 : 0));
    std::memcpy(dst, &value, sizeof(value));
  }

  void load(const uint8_t* src) {
    uint16_t value;
    std::memcpy(&value, src, sizeof(value));
    split = (value & 0x8000) != 0;
    run = value & INT16_MAX;
  }
};

// Of a level of 8 bits.
inline int low_part(int level) { return ((level & 15) ^ 8) - 8; }
inline int high_part(int level) { return ((level >> 4 & 15) ^ 8) - 8 + (level >> 3 & 1); }

// WordSums::run for one filter: canonical codes of kBits (taps, channels), the channels of each tap
// beginning at a byte, whose dwords are multiplied in that order. level_of gives the level, or part
// of one, that a code is multiplied as.
template <int kBits, typename LevelOf>
inline int64_t word_run(const uint8_t* filter, int64_t channels, int64_t taps, LevelOf level_of) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kMostLevels = INT16_MAX / ((1 << kBits) - 1);
  const int64_t planes = ceil_div(channels, kCodesPerDword);
  const int64_t tap_bytes = packed_bytes(channels, kBits);
  // The positive and the negative levels that meet in either word.
  int sums[2][2] = {};
  const auto add_dword = [&](int64_t dword, int sign) {
    const uint8_t* packed = filter + dword / planes * tap_bytes;
    const int64_t first = dword % planes * kCodesPerDword;
    const int64_t end = min_of(first + kCodesPerDword, channels);
    for (int64_t c = first; c < end; ++c) {
      const int level = level_of(static_cast<int8_t>(
          extract_code<kBits, true>(packed[c / kPerByte], static_cast<int>(c % kPerByte))));
      sums[(c - first) / 2][level < 0] += sign * level;
    }
  };
  const auto fits = [&] {
    for (const auto& word : sums) {
      if (word[0] > kMostLevels || word[1] < -kMostLevels) return false;
    }
    return true;
  };
  const int64_t dwords = taps * planes;
  int64_t run = dwords;
  int64_t end = 0;
  for (int64_t begin = 0; run > 0; ++begin) {
    for (; end < dwords; ++end) {
      add_dword(end, 1);
      if (fits()) continue;
      add_dword(end, -1);
      break;
    }
    if (end == dwords) break;
    run = min_of(run, end - begin);
    add_dword(begin, -1);
  }
  return run;
}

// For all filters of a bank.
template <int kBits>
inline WordSums word_sums(const uint8_t* canonical, int64_t filters, int64_t channels, int64_t taps,
                          bool centred) {
  const int64_t filter_bytes = taps * packed_bytes(channels, kBits);
  const auto shortest = [&](auto level_of) {
    int64_t run = INT16_MAX;
    for (int64_t o = 0; o < filters; ++o) {
      const uint8_t* filter = canonical + o * filter_bytes;
      run = min_of(run, word_run<kBits>(filter, channels, taps, level_of));
    }
    return run;
  };
  WordSums sums;
  sums.run = shortest([&](int code) { return centred ? 2 * code + 1 : code; });
  // A run of one among others takes longer than both parts do.
  if (kBits == 8 && sums.run < min_of(2, taps * ceil_div(channels, kCodesPerDword))) {
    sums.split = true;
    sums.run = min_of(shortest(low_part), shortest(high_part));
  }
  return sums;
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
