// Sums of each channel over pixels, for the global average pool of a gate.
#pragma once

#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Sums of this many bytes fit 16 bits.
constexpr int64_t kPooledRun = 257;
constexpr int64_t kPooledChannels = 64;

// A run of 64 bytes by pairs.
typedef uint16_t BytePairs __attribute__((vector_size(kPooledChannels)));

// sums[c] += byte c of each of `pixels` runs of 64 bytes, `stride` bytes apart.
inline void sum_whole_runs(const uint8_t* codes, int64_t pixels, int64_t stride, int32_t* sums) {
  for (int64_t first = 0; first < pixels; first += kPooledRun) {
    const int64_t last = min_of(first + kPooledRun, pixels);
    // Of the second bytes of pairs, and of pairs, modulo 2^16; by turns, since each addition waits
    // for the one before.
    constexpr int kTurns = 4;
    BytePairs seconds[kTurns];
    BytePairs pairs[kTurns];
    unroll<kTurns>([&](auto turn) { seconds[turn] = pairs[turn] = BytePairs{}; });
    const auto add_run = [&](int64_t p, auto turn) {
      BytePairs run;
      std::memcpy(&run, codes + p * stride, sizeof(run));
      pairs[turn] += run;
      seconds[turn] += run >> 8;
    };
    int64_t p = first;
    for (; p + kTurns <= last; p += kTurns) {
      unroll<kTurns>([&](auto turn) { add_run(p + turn, turn); });
    }
    for (; p < last; ++p) add_run(p, std::integral_constant<int, 0>{});
    const BytePairs second = (seconds[0] + seconds[1]) + (seconds[2] + seconds[3]);
    const BytePairs firsts = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]) - (second << 8);
    for (int64_t i = 0; i < kPooledChannels / 2; ++i) {
      sums[2 * i] += firsts[i];
      sums[2 * i + 1] += second[i];
    }
  }
}

// sums[c] += bytes of `pixels` runs, `stride` bytes apart, for `count` <= 64 channels.
inline void sum_runs(const uint8_t* codes, int64_t pixels, int64_t stride, int64_t count,
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
  for (int64_t c = 0; c < channels; ++c) sums[c] = 0;
  if (channels < kPooledChannels && kPooledChannels % channels == 0) {
    // Several pixels side by side fill a run of 64.
    const int64_t together = kPooledChannels / channels;
    int32_t wide[kPooledChannels] = {};
    sum_whole_runs(codes, pixels / together, kPooledChannels, wide);
    for (int64_t i = 0; i < kPooledChannels; i += channels) {
      for (int64_t c = 0; c < channels; ++c) sums[c] += wide[i + c];
    }
    const int64_t done = pixels / together * together;
    sum_runs(codes + done * channels, pixels - done, channels, channels, sums);
    return;
  }
  int64_t c = 0;
  for (; c + kPooledChannels <= channels; c += kPooledChannels) {
    sum_whole_runs(codes + c, pixels, channels, sums + c);
  }
  if (c < channels) sum_runs(codes + c, pixels, channels, channels - c, sums + c);
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
