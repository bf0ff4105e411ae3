// Weights as they are held: codes in the order in which a kernel wants them, but of `bits` bits
// each, so that nothing is held twice and nothing is padded. A kernel's levels are made of them
// right before they are multiplied.
//
// Codes are cut into chunks of kDenseBytes bytes, the last one shorter. Code k * bytes + j of a
// chunk is field k of its byte j, field 0 being the lowest: a whole vector of bytes is shifted and
// masked at once, and neighbouring codes come out side by side.
#pragma once

#include "isa.h"

namespace dfs {
namespace DFS_ISA {
namespace {

constexpr int64_t kDenseBytes = 64;

inline int64_t dense_bytes(int64_t count, int32_t bits) { return (count * bits + 7) / 8; }

// Bytes of the chunk that begins at code `first` of `count`.
template <int kBits>
inline int64_t dense_chunk_bytes(int64_t first, int64_t count) {
  return min_of(ceil_div(count - first, 8 / kBits), kDenseBytes);
}

// Sets one of `count` codes where all bits are zero.
template <int kBits>
inline void insert_dense(uint8_t* dense, int64_t index, int64_t count, int32_t code) {
  constexpr int64_t kChunk = kDenseBytes * 8 / kBits;
  const int64_t first = index / kChunk * kChunk;
  const int64_t bytes = dense_chunk_bytes<kBits>(first, count);
  const int64_t place = index - first;
  uint8_t& byte = dense[first * kBits / 8 + place % bytes];
  const unsigned field = static_cast<unsigned>(code) & ((1u << kBits) - 1);
  byte = static_cast<uint8_t>(byte | field << (place / bytes * kBits));
}

// Field kField of `count` bytes as levels: factor * code + offset.
template <int kBits, int kField, bool kCentred, typename Level>
inline void dense_field(const uint8_t* __restrict dense, int64_t count, Level* __restrict levels) {
  constexpr int kSign = 1 << (kBits - 1);
  constexpr int kMask = (1 << kBits) - 1;
  for (int64_t j = 0; j < count; ++j) {
    const int code = ((dense[j] >> (kField * kBits) & kMask) ^ kSign) - kSign;
    levels[j] = static_cast<Level>(kCentred ? 2 * code + 1 : code);
  }
}

template <int kBits, bool kCentred, typename Level>
inline void read_dense(const uint8_t* dense, int64_t count, Level* levels) {
  constexpr int kFields = 8 / kBits;
  constexpr int64_t kChunk = kDenseBytes * kFields;
  int64_t first = 0;
  for (; first + kChunk <= count; first += kChunk) {
    // A count that the compiler knows leaves no loop.
    unroll<kFields>([&](auto k) {
      dense_field<kBits, k, kCentred>(dense, kDenseBytes, levels + first + k * kDenseBytes);
    });
    dense += kDenseBytes;
  }
  const int64_t bytes = dense_chunk_bytes<kBits>(first, count);
  unroll<kFields>([&](auto k) {
    const int64_t begin = first + k * bytes;
    dense_field<kBits, k, kCentred>(dense, min_of(count - begin, bytes), levels + begin);
  });
}

// Reads `count` codes as levels: codes, or 2 code + 1 where levels are centred.
template <typename Level>
inline void read_dense_levels(const uint8_t* dense, int64_t count, int32_t bits, bool centred,
                              Level* levels) {
  if (bits == 2) {
    centred ? read_dense<2, true>(dense, count, levels)
            : read_dense<2, false>(dense, count, levels);
  } else if (bits == 4) {
    centred ? read_dense<4, true>(dense, count, levels)
            : read_dense<4, false>(dense, count, levels);
  } else {
    centred ? read_dense<8, true>(dense, count, levels)
            : read_dense<8, false>(dense, count, levels);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
