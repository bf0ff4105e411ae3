// Codes of 1, 2, 4 or 8 bits to and from bytes. The lowest bits of a byte hold the lowest channel;
// unused high bits of the last byte are zero.
#pragma once

#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

inline int64_t packed_bytes(int64_t channels, int32_t bits) { return ceil_div(channels * bits, 8); }

template <int kBits>
inline void pack_run(const uint8_t* codes, int64_t channels, uint8_t* packed) {
  constexpr int kPerByte = 8 / kBits;
  constexpr unsigned kMask = (1u << kBits) - 1;
  const int64_t whole = channels / kPerByte;
  for (int64_t i = 0; i < whole; ++i) {
    unsigned byte = 0;
    for (int j = 0; j < kPerByte; ++j) byte |= (codes[i * kPerByte + j] & kMask) << (j * kBits);
    packed[i] = static_cast<uint8_t>(byte);
  }
  if (whole * kPerByte < channels) {
    unsigned byte = 0;
    for (int64_t c = whole * kPerByte; c < channels; ++c) {
      byte |= (codes[c] & kMask) << ((c - whole * kPerByte) * kBits);
    }
    packed[whole] = static_cast<uint8_t>(byte);
  }
}

template <int kBits, bool kSigned>
inline uint8_t extract_code(unsigned byte, int index) {
  constexpr unsigned kMask = (1u << kBits) - 1;
  constexpr unsigned kSign = kSigned ? 1u << (kBits - 1) : 0;
  const unsigned code = (byte >> (index * kBits)) & kMask;
  return static_cast<uint8_t>((code ^ kSign) - kSign);
}

template <int kBits, bool kSigned>
inline void unpack_run(const uint8_t* packed, int64_t channels, uint8_t* codes) {
  constexpr int kPerByte = 8 / kBits;
  const int64_t whole = channels / kPerByte;
  for (int64_t i = 0; i < whole; ++i) {
    const unsigned byte = packed[i];
    for (int j = 0; j < kPerByte; ++j) {
      codes[i * kPerByte + j] = extract_code<kBits, kSigned>(byte, j);
    }
  }
  for (int64_t c = whole * kPerByte; c < channels; ++c) {
    codes[c] = extract_code<kBits, kSigned>(packed[whole], static_cast<int>(c % kPerByte));
  }
}

inline void pack_codes(const uint8_t* codes, int64_t channels, int32_t bits, uint8_t* packed) {
  switch (bits) {
    case 1:
      return pack_run<1>(codes, channels, packed);
    case 2:
      return pack_run<2>(codes, channels, packed);
    case 4:
      return pack_run<4>(codes, channels, packed);
    default:
      std::memcpy(packed, codes, static_cast<size_t>(channels));
  }
}

template <bool kSigned>
inline void unpack_codes(const uint8_t* packed, int64_t channels, int32_t bits, uint8_t* codes) {
  switch (bits) {
    case 1:
      return unpack_run<1, kSigned>(packed, channels, codes);
    case 2:
      return unpack_run<2, kSigned>(packed, channels, codes);
    case 4:
      return unpack_run<4, kSigned>(packed, channels, codes);
    default:
      std::memcpy(codes, packed, static_cast<size_t>(channels));
  }
}

inline void pack_pixels(const uint8_t* codes, int64_t pixels, int64_t channels, int32_t bits,
                        uint8_t* packed) {
  const int64_t bytes = packed_bytes(channels, bits);
  if (bytes * 8 == channels * bits) return pack_codes(codes, pixels * channels, bits, packed);
  for (int64_t i = 0; i < pixels; ++i) {
    pack_codes(codes + i * channels, channels, bits, packed + i * bytes);
  }
}

inline void unpack_pixels(const uint8_t* packed, int64_t pixels, int64_t channels, int32_t bits,
                          bool is_signed, uint8_t* codes) {
  const int64_t bytes = packed_bytes(channels, bits);
  const bool dense = bytes * 8 == channels * bits;
  const int64_t runs = dense ? 1 : pixels;
  const int64_t run = dense ? pixels * channels : channels;
  for (int64_t i = 0; i < runs; ++i) {
    if (is_signed) {
      unpack_codes<true>(packed + i * bytes, run, bits, codes + i * run);
    } else {
      unpack_codes<false>(packed + i * bytes, run, bits, codes + i * run);
    }
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
