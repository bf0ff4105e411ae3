// How many dwords' products may be added up in 16-bit words before they are widened: without VNNI
// that takes half the instructions. It depends on the weights, so it is found when they are tiled.
#pragma once

#include "bit_packing.h"
#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// As kept with the weights of a vector.
#if defined(__AVX512VNNI__)
constexpr int64_t kWordRunBytes = 0;
#else
constexpr int64_t kWordRunBytes = sizeof(uint16_t);
#endif
constexpr int64_t kMaxWordRun = UINT16_MAX;

inline void set_word_run(uint8_t* dst, int64_t run) {
  const uint16_t value = static_cast<uint16_t>(run);
  std::memcpy(dst, &value, sizeof(value));
}

inline int64_t get_word_run(const uint8_t* src) {
  uint16_t value;
  std::memcpy(&value, src, sizeof(value));
  return value;
}

// The dwords of a filter, canonical codes of kBits (taps, channels) each beginning at a byte, are
// multiplied in that order. Of how many in a row the sums fit into words, whatever the activations:
// 0 to all of them. Leaving products out does not make a sum unfit.
template <int kBits>
inline int64_t word_run(const uint8_t* filter, int64_t channels, int64_t taps, bool centred) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kMostLevels = INT16_MAX / ((1 << kBits) - 1);
  const int64_t planes = ceil_div(channels, kCodesPerDword);
  const int64_t run_bytes = packed_bytes(channels, kBits);
  // The positive and the negative levels that meet in either word.
  int sums[2][2] = {};
  const auto add = [&](int64_t dword, int sign) {
    const uint8_t* packed = filter + dword / planes * run_bytes;
    const int64_t first = dword % planes * kCodesPerDword;
    const int64_t end = min_of(first + kCodesPerDword, channels);
    for (int64_t c = first; c < end; ++c) {
      const int code = static_cast<int8_t>(
          extract_code<kBits, true>(packed[c / kPerByte], static_cast<int>(c % kPerByte)));
      const int level = centred ? 2 * code + 1 : code;
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
      add(end, 1);
      if (fits()) continue;
      add(end, -1);
      break;
    }
    if (end == dwords) break;
    run = min_of(run, end - begin);
    add(begin, -1);
  }
  return run;
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
