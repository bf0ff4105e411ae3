// Codes of a byte each to packed bytes and back.
#include "codes.h"
#include "conv_layout.h"
#include "cuda_operations.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 256;
// What a thread takes where rows are whole bytes, and so one long row.
constexpr int kCodes = 16;

struct PackParams {
  const uint8_t* from;
  uint8_t* to;
  int64_t rows;
  int64_t channels;
  int64_t row_bytes;
  int64_t items;
  int bits;
  bool is_signed;
  bool in_words;
};

// 16 codes, a byte each, at once.
DFS_DEVICE void pack_words(const PackParams& p, int64_t item) {
  const Words4 codes = *reinterpret_cast<const Words4*>(p.from + kCodes * item);
  uint32_t words[4] = {};
  const uint32_t mask = (1u << p.bits) - 1u;
  const int per_word = 32 / p.bits;
  DFS_UNROLL for (int i = 0; i < kCodes; ++i) {
    const uint32_t code = (codes.word[i / 4] >> (8 * (i % 4))) & mask;
    if (p.bits == 2) {
      words[0] |= code << (2 * i);
    } else if (p.bits == 4) {
      words[i / 8] |= code << (4 * (i % 8));
    } else {
      words[i / 4] |= code << (8 * (i % 4));
    }
  }
  auto* to = reinterpret_cast<uint32_t*>(p.to) + item * (kCodes / per_word);
  if (p.bits == 8) {
    *reinterpret_cast<Words4*>(to) = Words4{{words[0], words[1], words[2], words[3]}};
  } else if (p.bits == 4) {
    *reinterpret_cast<Words2*>(to) = Words2{{words[0], words[1]}};
  } else {
    *to = words[0];
  }
}

DFS_DEVICE uint32_t unpacked(uint32_t code, int bits, bool is_signed) {
  const uint32_t sign = 1u << (bits - 1);
  return is_signed ? ((code ^ sign) - sign) & 0xffu : code;
}

DFS_DEVICE void unpack_words(const PackParams& p, int64_t item) {
  uint32_t words[4] = {};
  const auto* from = reinterpret_cast<const uint32_t*>(p.from) + item * (kCodes * p.bits / 32);
  if (p.bits == 8) {
    const Words4 all = *reinterpret_cast<const Words4*>(from);
    DFS_UNROLL for (int i = 0; i < 4; ++i) words[i] = all.word[i];
  } else if (p.bits == 4) {
    const Words2 all = *reinterpret_cast<const Words2*>(from);
    words[0] = all.word[0];
    words[1] = all.word[1];
  } else {
    words[0] = *from;
  }
  Words4 codes = {};
  const uint32_t mask = (1u << p.bits) - 1u;
  DFS_UNROLL for (int i = 0; i < kCodes; ++i) {
    const uint32_t shifted = p.bits == 2   ? words[0] >> (2 * i)
                             : p.bits == 4 ? words[i / 8] >> (4 * (i % 8))
                                           : words[i / 4] >> (8 * (i % 4));
    codes.word[i / 4] |= unpacked(shifted & mask, p.bits, p.is_signed) << (8 * (i % 4));
  }
  *reinterpret_cast<Words4*>(p.to + kCodes * item) = codes;
}

DFS_KERNEL(kThreads, 4)
pack_bits_kernel(DFS_PARAMS(PackParams) p) {
  const int64_t item = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (item >= p.items) return;
  if (p.in_words) {
    pack_words(p, item);
    return;
  }
  const int per_byte = 8 / p.bits;
  const int64_t first = item % p.row_bytes * per_byte;
  const uint8_t* codes = p.from + item / p.row_bytes * p.channels;
  uint32_t byte = 0;
  for (int i = 0; i < per_byte && first + i < p.channels; ++i) {
    byte |= (codes[first + i] & ((1u << p.bits) - 1u)) << (i * p.bits);
  }
  p.to[item] = static_cast<uint8_t>(byte);
}

DFS_KERNEL(kThreads, 4)
unpack_bits_kernel(DFS_PARAMS(PackParams) p) {
  const int64_t item = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (item >= p.items) return;
  if (p.in_words) {
    unpack_words(p, item);
    return;
  }
  const int64_t bit = item % p.channels * p.bits;
  const uint32_t byte = p.from[item / p.channels * p.row_bytes + bit / 8];
  const uint32_t code = (byte >> (bit % 8)) & ((1u << p.bits) - 1u);
  p.to[item] = static_cast<uint8_t>(unpacked(code, p.bits, p.is_signed));
}

PackParams pack_params(const uint8_t* from, int64_t rows, int64_t channels, int32_t bits,
                       uint8_t* to) {
  PackParams p = {};
  p.from = from;
  p.to = to;
  p.rows = rows;
  p.channels = channels;
  p.row_bytes = ceil_div(channels * bits, 8);
  p.bits = bits;
  p.in_words = channels * bits % 8 == 0 && rows * channels % kCodes == 0 && is_aligned(from, 16) &&
               is_aligned(to, 16);
  return p;
}

}  // namespace

void pack_bits(const uint8_t* codes, int64_t rows, int64_t channels, int32_t bits, uint8_t* packed,
               Stream stream) {
  PackParams p = pack_params(codes, rows, channels, bits, packed);
  p.items = p.in_words ? rows * channels / kCodes : rows * p.row_bytes;
  launch("pack_bits", &pack_bits_kernel, {ceil_div(p.items, kThreads), kThreads, 0}, p, stream);
}

void unpack_bits(const uint8_t* packed, int64_t rows, int64_t channels, int32_t bits,
                 bool is_signed, uint8_t* codes, Stream stream) {
  PackParams p = pack_params(packed, rows, channels, bits, codes);
  p.is_signed = is_signed;
  p.items = rows * channels / (p.in_words ? kCodes : 1);
  launch("unpack_bits", &unpack_bits_kernel, {ceil_div(p.items, kThreads), kThreads, 0}, p, stream);
}

}  // namespace dfs::cuda
