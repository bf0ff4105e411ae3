// Float feature maps to packed rows and back. A block takes some pixels of one sample with all
// their channels: a piece of the row without gaps, put together in shared memory and copied 16
// bytes at a time, while planes of floats are read and written along their rows.
#include "codes.h"
#include "conv_layout.h"
#include "cuda_operations.h"
#include "stage.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostPixels = 128;
constexpr int kPieceBytes = 16 * 1024;

struct QuantizeParams {
  Map values;
  Map codes;
  int block_pixels;
  int blocks_per_sample;
  bool in_shared;  // whether a block's piece fits
};

struct Piece {
  int64_t sample;
  int first;  // pixel
  int pixels;
  int bits;
};

DFS_DEVICE Piece piece_of(const QuantizeParams& p) {
  Piece piece;
  piece.sample = block_index() / p.blocks_per_sample;
  piece.first = block_index() % p.blocks_per_sample * p.block_pixels;
  piece.pixels = least(p.block_pixels, p.codes.pixels() - piece.first);
  piece.bits = to_global(p.codes.bits)[piece.sample];
  return piece;
}

// Both ways; 16 bytes at a time where both sides allow it.
DFS_DEVICE void copy_bytes(const uint8_t* from, int bytes, uint8_t* to) {
  int done = 0;
  if (is_aligned(from, 16) && is_aligned(to, 16)) {
    done = bytes / 16 * 16;
    for (int i = 16 * thread_index(); i < done; i += 16 * kThreads) {
      *reinterpret_cast<Words4*>(to + i) = *reinterpret_cast<const Words4*>(from + i);
    }
  }
  for (int i = done + thread_index(); i < bytes; i += kThreads) to[i] = from[i];
}

template <int kBits>
DFS_DEVICE void pack_piece(const QuantizeParams& p, const Piece& piece, uint8_t* to) {
  constexpr int kWordCodes = 32 / kBits;
  const Map& codes = p.codes;
  const Step step = step_of(codes.quantizer, kBits);
  const SampleReader reader = reader_of(p.values, piece.sample);
  const int pixel_bytes = packed_bytes(codes.channels, kBits);
  const int words = divide_up(pixel_bytes, 4);
  const bool pixels_first = p.values.stride_c != 1;
  for (int i = thread_index(); i < words * piece.pixels; i += kThreads) {
    const int j = pixels_first ? i % piece.pixels : i / words;
    const int item = pixels_first ? i / piece.pixels : i % words;
    const int pixel = piece.first + j;
    const int channel = item * kWordCodes;
    const uint32_t word =
        quantize_word<kBits>(reader, step, pixel / codes.width, pixel % codes.width, channel,
                             least(kWordCodes, codes.channels - channel));
    uint8_t* target = to + static_cast<int64_t>(j) * pixel_bytes + 4 * item;
    store_run_bytes<4>(target, least(4, pixel_bytes - 4 * item), &word);
  }
}

DFS_DEVICE void copy_floats(const QuantizeParams& p, const Piece& piece, uint8_t* to) {
  const SampleReader reader = reader_of(p.values, piece.sample);
  const bool pixels_first = p.values.stride_c != 1;
  const int channels = p.codes.channels;
  for (int i = thread_index(); i < channels * piece.pixels; i += kThreads) {
    const int j = pixels_first ? i % piece.pixels : i / channels;
    const int channel = pixels_first ? i / piece.pixels : i % channels;
    const int pixel = piece.first + j;
    const float value = reader.value(pixel / p.codes.width, pixel % p.codes.width, channel);
    store_float(to + 4 * (static_cast<int64_t>(j) * channels + channel), value);
  }
}

DFS_DEVICE void write_piece(const QuantizeParams& p, const Piece& piece, uint8_t* to) {
  if (piece.bits == 8) {
    pack_piece<8>(p, piece, to);
  } else if (piece.bits == 4) {
    pack_piece<4>(p, piece, to);
  } else if (piece.bits == 2) {
    pack_piece<2>(p, piece, to);
  } else {
    copy_floats(p, piece, to);
  }
}

DFS_KERNEL(kThreads, 4)
quantize_pack_kernel(DFS_PARAMS(QuantizeParams) p) {
  const Piece piece = piece_of(p);
  if (piece.bits == 0) return;
  uint8_t* row = to_global(p.codes.codes) + piece.sample * p.codes.row_bytes;
  if (!offers(p.codes.quantizer, piece.bits)) {
    const int step = p.blocks_per_sample * kThreads;
    int64_t i = block_index() % p.blocks_per_sample * kThreads + thread_index();
    for (; i < p.codes.row_bytes; i += step) row[i] = 0xff;
    return;
  }
  const int pixel_bytes = packed_bytes(p.codes.channels, piece.bits);
  uint8_t* target = to_global(row) + static_cast<int64_t>(piece.first) * pixel_bytes;
  if (!p.in_shared) {
    write_piece(p, piece, target);
    return;
  }
  write_piece(p, piece, shared_memory());
  sync_block();
  copy_bytes(shared_memory(), piece.pixels * pixel_bytes, target);
}

// `bytes`: where the piece begins.
DFS_DEVICE void read_piece(const QuantizeParams& p, const Piece& piece, const SampleReader& reader,
                           const uint8_t* bytes) {
  const Map& values = p.values;
  float* to = to_global(values.values) + piece.sample * values.stride_n;
  for (int i = thread_index(); i < values.channels * piece.pixels; i += kThreads) {
    const int channel = i / piece.pixels;
    const int j = i % piece.pixels;
    const int pixel = piece.first + j;
    to[channel * values.stride_c + pixel / values.width * values.stride_h +
       pixel % values.width * values.stride_w] =
        reader.value_of(bytes + static_cast<int64_t>(j) * reader.pixel_bytes, channel);
  }
}

DFS_KERNEL(kThreads, 4)
unpack_dequantize_kernel(DFS_PARAMS(QuantizeParams) p) {
  const Piece piece = piece_of(p);
  const SampleReader reader = reader_of(p.codes, piece.sample);
  const uint8_t* from = reader.pixel(0, piece.first);
  if (!p.in_shared || !reader.known) {
    read_piece(p, piece, reader, from);
    return;
  }
  copy_bytes(from, piece.pixels * reader.pixel_bytes, shared_memory());
  sync_block();
  read_piece(p, piece, reader, shared_memory());
}

QuantizeParams quantize_params(const FeatureMap& values, const FeatureMap& codes) {
  QuantizeParams p;
  p.values = to_map(values);
  p.codes = to_map(codes);
  const WidthTable& widths = codes.quantizer.widths;
  const int widest = packed_bytes(p.codes.channels, widths.bits[widths.count - 1]);
  p.in_shared = widest <= kPieceBytes;
  // 32 pixels at a time, so that pieces begin at addresses as even as the row's.
  const int most = widest <= kPieceBytes / 32 ? kPieceBytes / widest / 32 * 32 : 1;
  p.block_pixels = least(kMostPixels, most);
  p.blocks_per_sample = divide_up(p.codes.pixels(), p.block_pixels);
  return p;
}

LaunchShape quantize_shape(const QuantizeParams& p, int64_t batch) {
  return {batch * p.blocks_per_sample, kThreads, p.in_shared ? kPieceBytes : 0};
}

}  // namespace

void quantize_pack(const FeatureMap& src, const FeatureMap& dst, int64_t batch, Stream stream) {
  const QuantizeParams p = quantize_params(src, dst);
  launch("quantize_pack", &quantize_pack_kernel, quantize_shape(p, batch), p, stream);
}

void unpack_dequantize(const FeatureMap& src, const FeatureMap& dst, int64_t batch, Stream stream) {
  const QuantizeParams p = quantize_params(dst, src);
  launch("unpack_dequantize", &unpack_dequantize_kernel, quantize_shape(p, batch), p, stream);
}

}  // namespace dfs::cuda
