// Sums of each channel over pixels, for the global average pool of a gate.
#pragma once

#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Sums of this many bytes fit 16 bits.
constexpr int64_t kPooledRun = 257;
constexpr int64_t kPooledChannels = 64;

// sums[c] += bytes of `pixels` runs, `stride` bytes apart, for `count` <= 64 channels. A constant
// count leaves the loops to the vectorizer.
template <typename Count>
inline void sum_runs(const uint8_t* codes, int64_t pixels, int64_t stride, Count count,
                     int32_t* sums) {
  for (int64_t first = 0; first < pixels; first += kPooledRun) {
    const int64_t last = min_of(first + kPooledRun, pixels);
    uint16_t partial[kPooledChannels] = {};
    for (int64_t p = first; p < last; ++p) {
      const uint8_t* run = codes + p * stride;
      for (int64_t c = 0; c < count; ++c) partial[c] = static_cast<uint16_t>(partial[c] + run[c]);
    }
    for (int64_t c = 0; c < count; ++c) sums[c] += partial[c];
  }
}

// Overwrites sums (channels) with those of `pixels` runs of `channels` bytes.
inline void sum_pixels(const uint8_t* codes, int64_t pixels, int64_t channels, int32_t* sums) {
  constexpr std::integral_constant<int64_t, kPooledChannels> whole{};
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  if (channels < kPooledChannels && kPooledChannels % channels == 0) {
    // Several pixels side by side fill a run of 64.
    const int64_t together = kPooledChannels / channels;
    int32_t wide[kPooledChannels] = {};
    sum_runs(codes, pixels / together, kPooledChannels, whole, wide);
    for (int64_t i = 0; i < kPooledChannels; ++i) sums[i % channels] += wide[i];
    const int64_t done = pixels / together * together;
    sum_runs(codes + done * channels, pixels - done, channels, channels, sums);
    return;
  }
  int64_t c = 0;
  for (; c + kPooledChannels <= channels; c += kPooledChannels) {
    sum_runs(codes + c, pixels, channels, whole, sums + c);
  }
  if (c < channels) sum_runs(codes + c, pixels, channels, channels - c, sums + c);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
