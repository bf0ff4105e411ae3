// What follows the sums: residual, ReLU, and storing as floats or codes. A thread has a *run* of
// consecutive output channels of one pixel, 4, 8 or 16, the first a multiple of 4: whole bytes at
// every width, so that packing needs no other thread.
#pragma once

#include <cstdint>

#include "codes.h"
#include "conv_params.h"

namespace dfs::cuda {

// Where a run lies.
struct RunPlace {
  int y;
  int x;
  int first;  // output channel
  int count;  // at most the run's length
};

// The bytes of a run as words, missing ones 0; at once where its address allows it.
template <int kBytes>
DFS_DEVICE void load_run_bytes(const uint8_t* from, int count, uint32_t* words) {
  constexpr int kWords = (kBytes + 3) / 4;
  if (count == kBytes && is_aligned(from, kBytes)) {
    if constexpr (kBytes == 16) {
      const Words4 all = *reinterpret_cast<const Words4*>(from);
      DFS_UNROLL for (int i = 0; i < 4; ++i) words[i] = all.word[i];
    } else if constexpr (kBytes == 8) {
      const Words2 all = *reinterpret_cast<const Words2*>(from);
      words[0] = all.word[0];
      words[1] = all.word[1];
    } else if constexpr (kBytes == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kBytes == 2) {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    } else {
      words[0] = *from;
    }
    return;
  }
  DFS_UNROLL for (int i = 0; i < kWords; ++i) words[i] = 0;
  DFS_UNROLL for (int i = 0; i < kBytes; ++i) {
    if (i < count) words[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
  }
}

template <int kBytes>
DFS_DEVICE void store_run_bytes(uint8_t* to, int count, const uint32_t* words) {
  if (count == kBytes && is_aligned(to, kBytes)) {
    if constexpr (kBytes == 16) {
      *reinterpret_cast<Words4*>(to) = Words4{{words[0], words[1], words[2], words[3]}};
    } else if constexpr (kBytes == 8) {
      *reinterpret_cast<Words2*>(to) = Words2{{words[0], words[1]}};
    } else if constexpr (kBytes == 4) {
      *reinterpret_cast<uint32_t*>(to) = words[0];
    } else if constexpr (kBytes == 2) {
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
    } else {
      *to = static_cast<uint8_t>(words[0]);
    }
    return;
  }
  DFS_UNROLL for (int i = 0; i < kBytes; ++i) {
    if (i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

template <int kRun, int kBits>
DFS_DEVICE void load_run_codes(const uint8_t* pixel, const RunPlace& place, int (&codes)[kRun]) {
  uint32_t words[(kRun * kBits + 31) / 32];
  load_run_bytes<kRun * kBits / 8>(pixel + place.first * kBits / 8,
                                   packed_bytes(place.count, kBits), words);
  DFS_UNROLL for (int i = 0; i < kRun; ++i) {
    codes[i] = static_cast<int>(words[i * kBits / 32] >> (i * kBits % 32)) & ((1 << kBits) - 1);
  }
}

// Codes with kRounderBits added.
template <int kRun, int kBits>
DFS_DEVICE void store_run_codes(uint8_t* pixel, const RunPlace& place,
                                const uint32_t (&raised)[kRun]) {
  constexpr int kWordCodes = 32 / kBits;
  uint32_t words[(kRun * kBits + 31) / 32];
  DFS_UNROLL for (int w = 0; w < (kRun * kBits + 31) / 32; ++w) {
    WordPacker<kBits> packer;
    DFS_UNROLL for (int i = 0; i < least(kWordCodes, kRun); ++i) {
      const int j = w * kWordCodes + i;
      packer.put(i, j < place.count ? raised[j] : kRounderBits);
    }
    words[w] = packer.packed();
  }
  store_run_bytes<kRun * kBits / 8>(pixel + place.first * kBits / 8,
                                    packed_bytes(place.count, kBits), words);
}

template <int kRun>
DFS_DEVICE void load_codes(const uint8_t* pixel, int bits, const RunPlace& place,
                           int (&codes)[kRun]) {
  if (bits == 8) {
    load_run_codes<kRun, 8>(pixel, place, codes);
  } else if (bits == 4) {
    load_run_codes<kRun, 4>(pixel, place, codes);
  } else {
    load_run_codes<kRun, 2>(pixel, place, codes);
  }
}

template <int kRun>
DFS_DEVICE void store_codes(uint8_t* pixel, int bits, const RunPlace& place,
                            const uint32_t (&codes)[kRun]) {
  if (bits == 8) {
    store_run_codes<kRun, 8>(pixel, place, codes);
  } else if (bits == 4) {
    store_run_codes<kRun, 4>(pixel, place, codes);
  } else {
    store_run_codes<kRun, 2>(pixel, place, codes);
  }
}

// The parts of an epilogue that a sample's outputs share.
struct Epilogue {
  SampleReader residual;
  bool has_residual = false;
  bool relu = false;
  float* values = nullptr;  // float output
  int64_t stride_c = 0;
  int64_t stride_h = 0;
  int64_t stride_w = 0;
  uint8_t* row = nullptr;  // packed output
  int bits = 0;
  Step step;
  int width = 0;
  int channels = 0;

  DFS_DEVICE uint8_t* output_pixel(const RunPlace& place) const {
    const int64_t pixel = static_cast<int64_t>(place.y) * width + place.x;
    return to_global(row) + pixel * packed_bytes(channels, bits);
  }

  template <int kRun>
  DFS_DEVICE void load_residual(const RunPlace& place, float (&r)[kRun]) const {
    if (residual.row == nullptr) {
      const float* from = residual.address(place.y, place.x, place.first);
      DFS_UNROLL for (int i = 0; i < kRun; ++i) {
        r[i] = i < place.count ? from[i * residual.stride_c] : 0.0f;
      }
    } else if (residual.bits == 0 || !residual.known) {
      const float value = residual.bits == 0 ? 0.0f : not_a_number();
      DFS_UNROLL for (int i = 0; i < kRun; ++i) r[i] = value;
    } else if (residual.bits == 32) {
      const uint8_t* from = residual.pixel(place.y, place.x) + 4 * place.first;
      DFS_UNROLL for (int i = 0; i < kRun; ++i) {
        r[i] = i < place.count ? load_float(from + 4 * i) : 0.0f;
      }
    } else {
      int codes[kRun];
      load_codes<kRun>(residual.pixel(place.y, place.x), residual.bits, place, codes);
      DFS_UNROLL for (int i = 0; i < kRun; ++i) r[i] = residual.step.dequantize(codes[i]);
    }
  }

  template <int kRun>
  DFS_DEVICE void store(const RunPlace& place, const float (&y)[kRun]) const {
    if (row == nullptr) {
      float* to =
          to_global(values) + place.first * stride_c + place.y * stride_h + place.x * stride_w;
      DFS_UNROLL for (int i = 0; i < kRun; ++i) {
        if (i < place.count) to[i * stride_c] = y[i];
      }
      return;
    }
    if (bits == 0) return;
    uint8_t* pixel = output_pixel(place);
    if (bits == 32) {
      DFS_UNROLL for (int i = 0; i < kRun; ++i) {
        if (i < place.count) store_float(pixel + 4 * (place.first + i), y[i]);
      }
      return;
    }
    uint32_t codes[kRun];
    DFS_UNROLL for (int i = 0; i < kRun; ++i) codes[i] = step.round(y[i]);
    if (step.odd != 0) {
      DFS_UNROLL for (int i = 0; i < kRun; ++i)++ codes[i];
    }
    store_codes<kRun>(pixel, bits, place, codes);
  }

  // y: sums with multiplier and offset applied.
  template <int kRun>
  DFS_DEVICE void finish(const RunPlace& place, float (&y)[kRun]) const {
    if (has_residual) {
      float r[kRun];
      load_residual<kRun>(place, r);
      DFS_UNROLL for (int i = 0; i < kRun; ++i) y[i] = add(y[i], r[i]);
    }
    if (relu) {
      DFS_UNROLL for (int i = 0; i < kRun; ++i) y[i] = y[i] < 0.0f ? 0.0f : y[i];
    }
    store<kRun>(place, y);
  }
};

DFS_DEVICE Epilogue epilogue_of(const ConvParams& p, int64_t n) {
  Epilogue e;
  e.has_residual = p.has_residual;
  if (p.has_residual) e.residual = reader_of(p.residual, n);
  e.relu = p.relu;
  e.width = p.output.width;
  e.channels = p.output.channels;
  if (!p.output.packed()) {
    e.values = p.output.values + n * p.output.stride_n;
    e.stride_c = p.output.stride_c;
    e.stride_h = p.output.stride_h;
    e.stride_w = p.output.stride_w;
    return e;
  }
  e.row = p.output.codes + n * p.output.row_bytes;
  e.bits = to_global(p.output.bits)[n];
  // A width that is no option of the output's leaves the row alone: nothing says what it would
  // mean.
  if (!offers(p.output.quantizer, e.bits)) e.bits = 0;
  e.step = step_of(p.output.quantizer, e.bits);
  // Codes from 0 on cut off what ReLU does, NaN too.
  if (e.bits != 0 && e.bits != 32 && e.step.zero_point == 0) e.relu = false;
  return e;
}

// Whether a skipped sample's codes mean the same in the residual and in the output.
DFS_DEVICE bool means_the_same(const Epilogue& e) {
  if (e.residual.row == nullptr || e.row == nullptr) return false;
  if (e.bits == 0 || e.residual.bits != e.bits) return false;
  return e.bits == 32 ||
         (e.residual.step.scale == e.step.scale && e.residual.step.zero_point == e.step.zero_point);
}

// 0 bits: y is the residual, untouched, or 0. One of a sample's `parts` blocks does its part.
DFS_DEVICE void skip_sample(const ConvParams& p, const BlockTask& task) {
  if (p.in_place) return;
  const Epilogue e = epilogue_of(p, task.sample);
  const bool same = e.has_residual && means_the_same(e);
  const int runs = divide_up(e.channels, 4);
  const int items = p.output.pixels() * runs;
  const int step = p.tiles_per_sample * block_threads();
  for (int i = task.part * block_threads() + thread_index(); i < items; i += step) {
    const int pixel = i / runs;
    const int first = i % runs * 4;
    const RunPlace place{pixel / e.width, pixel % e.width, first, least(4, e.channels - first)};
    if (same && e.bits != 32) {
      int codes[4];
      uint32_t raised[4];
      load_codes<4>(e.residual.pixel(place.y, place.x), e.bits, place, codes);
      for (int j = 0; j < 4; ++j) raised[j] = kRounderBits + static_cast<uint32_t>(codes[j]);
      store_codes<4>(e.output_pixel(place), e.bits, place, raised);
      continue;
    }
    float y[4] = {};
    if (e.has_residual) e.load_residual<4>(place, y);
    e.store<4>(place, y);
  }
}

// A width that is no option: nothing can be raised without waiting for the GPU.
DFS_DEVICE void fill_sample(const ConvParams& p, const BlockTask& task) {
  const Map& out = p.output;
  const int step = p.tiles_per_sample * block_threads();
  const int start = task.part * block_threads() + thread_index();
  if (out.packed()) {
    uint8_t* row = to_global(out.codes) + task.sample * out.row_bytes;
    for (int64_t i = start; i < out.row_bytes; i += step) row[i] = 0xff;
    return;
  }
  float* values = to_global(out.values) + task.sample * out.stride_n;
  const int items = out.channels * out.pixels();
  for (int i = start; i < items; i += step) {
    const int channel = i / out.pixels();
    const int pixel = i % out.pixels();
    values[channel * out.stride_c + pixel / out.width * out.stride_h +
           pixel % out.width * out.stride_w] = not_a_number();
  }
}

// Whether the block's sample is none that this launch multiplies; what it needs is done then.
DFS_DEVICE bool is_rest(const ConvParams& p, const BlockTask& task) {
  if (task.slot >= 0) return !p.serves[task.slot];
  if (p.serves_rest) {
    if (task.bits == 0) {
      skip_sample(p, task);
    } else {
      fill_sample(p, task);
    }
  }
  return true;
}

}  // namespace dfs::cuda
