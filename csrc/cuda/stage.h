// Bringing a patch of the input into shared memory, packed at the sample's width, the padding as
// the zero point's code.
#pragma once

#include <cstdint>

#include "conv_params.h"
#include "epilogue.h"

namespace dfs::cuda {

constexpr int kLookupBytes = 256;

// Codes of channels first and so on, as many as a word holds, quantized from values.
template <int kBits>
DFS_DEVICE uint32_t quantize_word(const SampleReader& reader, const Step& step, int y, int x,
                                  int first, int count) {
  uint32_t word = 0;
  if (reader.row != nullptr) {
    // Float32 of a packed row, which is rare.
    DFS_NO_UNROLL
    for (int i = 0; i < count; ++i) {
      word |= static_cast<uint32_t>(step.quantize(reader.value(y, x, first + i))) << (i * kBits);
    }
    return word;
  }
  const float* from = reader.address(y, x, first);
  WordPacker<kBits> packer;
  DFS_UNROLL for (int i = 0; i < 32 / kBits; ++i) {
    packer.put(i, i < count ? step.quantize_raised(from[i * reader.stride_c]) : kRounderBits);
  }
  return packer.packed();
}

// `words` of them, a multiple of 4, both sides aligned to 16 bytes.
DFS_DEVICE void copy_words(const uint32_t* from, int words, uint32_t* to) {
  for (int i = 4 * thread_index(); i < words; i += 4 * block_threads())
    copy_async<16>(to + i, from + i);
}

struct PatchSource {
  const ConvParams& p;
  SampleReader reader;
  Step step;
  int bits;
  int origin_y = 0;  // of the patch in the input
  int origin_x = 0;

  DFS_DEVICE PatchSource(const ConvParams& params, int64_t sample, const Step& input_step,
                         int sample_bits)
      : p(params), reader(reader_of(params.input, sample)), step(input_step), bits(sample_bits) {}

  // Whether stored codes are quantized again: a table has what becomes of each.
  DFS_DEVICE bool looks_up() const {
    return p.quantizes && reader.row != nullptr && reader.known && reader.bits != 32;
  }

  DFS_DEVICE void fill_lookup(uint8_t* lookup) const {
    for (int code = thread_index(); code < 1 << reader.bits; code += block_threads()) {
      lookup[code] = static_cast<uint8_t>(step.quantize(reader.step.dequantize(code)));
    }
  }

  DFS_DEVICE void stage(uint8_t* patch, const uint8_t* lookup, const WeightTiles& tiles, int slice,
                        int stride) const {
    if (p.quantizes) {
      stage_words(patch, lookup, tiles, slice, stride);
      return;
    }
    if (has_even_rows(tiles, stride)) {
      stage_rows(patch);
      return;
    }
    const int first_byte = slice * p.slice_bytes;
    const int bytes = least(p.slice_bytes, reader.pixel_bytes - first_byte);
    const uint8_t* row = reader.row + first_byte;
    const int padded = tiles.units_of(slice) * unit_bytes(bits);
    // Every address of both sides is a multiple of what all of these are.
    const auto common = reinterpret_cast<uintptr_t>(row) |
                        static_cast<uintptr_t>(reader.pixel_bytes) | static_cast<uintptr_t>(bytes) |
                        static_cast<uintptr_t>(stride);
    if (common % 16 == 0) {
      stage_codes<16>(patch, row, bytes, padded, tiles, slice, stride);
    } else if (common % 8 == 0) {
      stage_codes<8>(patch, row, bytes, padded, tiles, slice, stride);
    } else if (common % 4 == 0) {
      stage_codes<4>(patch, row, bytes, padded, tiles, slice, stride);
    } else {
      stage_codes<1>(patch, row, bytes, padded, tiles, slice, stride);
    }
  }

 private:
  DFS_DEVICE bool is_inside(int y, int x) const {
    return y >= 0 && y < p.input.height && x >= 0 && x < p.input.width;
  }

  // Whether 16 bytes of a row, two or four pixels, are 16 bytes of the patch too, all inside the
  // input or all outside: the patch begins at a multiple of four pixels then.
  DFS_DEVICE bool has_even_rows(const WeightTiles& tiles, int stride) const {
    const int bytes = reader.pixel_bytes;
    return p.has_even_patch && tiles.slices() == 1 && (bytes == 4 || bytes == 8) &&
           stride == bytes && is_aligned(reader.row, 16);
  }

  DFS_DEVICE void stage_rows(uint8_t* patch) const {
    const int bytes = reader.pixel_bytes;
    const int group = 16 / bytes;
    const int items = p.patch_w / group;
    for (int i = thread_index(); i < p.patch_h * items; i += block_threads()) {
      const int row = i / items;
      const int y = origin_y + row * p.patch_step_h;
      const int x = origin_x + (i - row * items) * group;
      if (is_inside(y, x)) {
        copy_async<16>(patch + 16 * i, reader.pixel(y, x));
        continue;
      }
      const uint32_t low = padding_word(0);
      const uint32_t high = bytes == 8 ? padding_word(32 / bits) : low;
      *reinterpret_cast<Words4*>(patch + 16 * i) = Words4{{low, high, low, high}};
    }
  }

  // A word of padding: the zero point for each channel, 0 beyond the last.
  DFS_DEVICE uint32_t padding_word(int first_channel) const {
    const int used = (p.input.channels - first_channel) * bits;
    const uint32_t spread = bits == 8 ? 0x01010101u : bits == 4 ? 0x11111111u : 0x55555555u;
    const uint32_t word = spread * static_cast<uint32_t>(step.zero_point);
    return used >= 32 ? word : used <= 0 ? 0u : word & ((1u << used) - 1u);
  }

  // Rows of the patch over the warps, what is in a row over the lanes: fn(row, column, item).
  template <typename Fn>
  DFS_DEVICE void for_each_item(int items, bool pixels_first, Fn fn) const {
    const int count = p.patch_w * items;
    for (int row = thread_index() / 32; row < p.patch_h; row += block_threads() / 32) {
      for (int i = thread_index() % 32; i < count; i += 32) {
        if (items == 1) {
          fn(row, i, 0);
        } else if (pixels_first) {
          fn(row, i % p.patch_w, i / p.patch_w);
        } else {
          fn(row, i / items, i % items);
        }
      }
    }
  }

  // Codes as they are, kBytes at a time; the words up to `padded` bytes are filled up with zeros.
  template <int kBytes>
  DFS_DEVICE void stage_codes(uint8_t* patch, const uint8_t* row, int bytes, int padded,
                              const WeightTiles& tiles, int slice, int stride) const {
    constexpr int kPiece = kBytes == 1 ? 4 : kBytes;
    const int first_channel = slice * tiles.slice_channels();
    for_each_item(divide_up(padded, kPiece), false, [&](int py, int px, int item) {
      const int y = origin_y + py * p.patch_step_h;
      const int x = origin_x + px * p.patch_step_w;
      const int start = item * kPiece;
      uint8_t* to = patch + (py * p.patch_w + px) * stride + start;
      const bool inside = is_inside(y, x);
      const int64_t pixel = static_cast<int64_t>(y) * p.input.width + x;
      const uint8_t* from = to_global(row) + pixel * reader.pixel_bytes + start;
      if constexpr (kBytes > 1) {
        if (inside && start < bytes) {
          copy_async<kBytes>(to, from);
          return;
        }
      } else if (inside) {
        *reinterpret_cast<uint32_t*>(to) =
            start < bytes ? load_bytes(from, least(4, bytes - start)) : 0;
        return;
      }
      DFS_UNROLL for (int i = 0; i < kPiece / 4; ++i) {
        const int channel = first_channel + (start / 4 + i) * (32 / bits);
        reinterpret_cast<uint32_t*>(to)[i] = inside ? 0u : padding_word(channel);
      }
    });
  }

  DFS_DEVICE void stage_words(uint8_t* patch, const uint8_t* lookup, const WeightTiles& tiles,
                              int slice, int stride) const {
    if (bits == 8) {
      stage_words_at<8>(patch, lookup, tiles, slice, stride);
    } else if (bits == 4) {
      stage_words_at<4>(patch, lookup, tiles, slice, stride);
    } else {
      stage_words_at<2>(patch, lookup, tiles, slice, stride);
    }
  }

  template <int kBits>
  DFS_DEVICE void stage_words_at(uint8_t* patch, const uint8_t* lookup, const WeightTiles& tiles,
                                 int slice, int stride) const {
    constexpr int kWordCodes = 32 / kBits;
    const int words = tiles.units_of(slice) * unit_words(kBits);
    const bool pixels_first = reader.row == nullptr && reader.stride_c != 1;
    const bool has_table = looks_up();
    for_each_item(words, pixels_first, [&](int py, int px, int item) {
      const int y = origin_y + py * p.patch_step_h;
      const int x = origin_x + px * p.patch_step_w;
      const int channel = slice * tiles.slice_channels() + item * kWordCodes;
      const int count = least(kWordCodes, p.input.channels - channel);
      uint32_t word = 0;
      if (!is_inside(y, x)) {
        word = padding_word(channel);
      } else if (count > 0) {
        word = has_table ? look_up_word<kBits>(lookup, y, x, channel, count)
                         : quantize_word<kBits>(reader, step, y, x, channel, count);
      }
      *reinterpret_cast<uint32_t*>(patch + (py * p.patch_w + px) * stride + 4 * item) = word;
    });
  }

  template <int kBits>
  DFS_DEVICE uint32_t look_up_word(const uint8_t* lookup, int y, int x, int channel,
                                   int count) const {
    constexpr int kWordCodes = 32 / kBits;
    const RunPlace place{y, x, channel, count};
    int codes[kWordCodes];
    load_codes<kWordCodes>(reader.pixel(y, x), reader.bits, place, codes);
    uint32_t word = 0;
    DFS_UNROLL for (int i = 0; i < kWordCodes; ++i) {
      if (i < count) word |= static_cast<uint32_t>(lookup[codes[i]]) << (i * kBits);
    }
    return word;
  }
};

}  // namespace dfs::cuda
