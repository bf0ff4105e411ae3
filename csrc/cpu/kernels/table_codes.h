// Activations of 2 bits as the table kernel wants them: three to a byte, 64 pixels to a vector.
//
// The values of a window row, channel by channel and within a channel tap by tap, are cut into
// threes; each three becomes a plane of 6-bit codes, one byte per output column, in which the
// neighbouring columns of the input are already side by side. So the planes have no gaps between
// their rows, and 64 lanes stay full however narrow the image is.
#pragma once

#include "bit_packing.h"
#include "dword_band.h"
#include "isa.h"
#include "kernel_table.h"
#include "window.h"

namespace dfs {
namespace DFS_ISA {
namespace {

constexpr int64_t kTableLanes = 64;

// Sizes for a band of output rows.
struct TableShape {
  WindowShape window;
  int64_t bytes_per_pixel;  // of 2-bit codes
  int64_t triples;          // code planes
  int64_t in_rows;          // input rows of the band, also those outside the image
  int64_t phase_rows;       // rows r, r + stride_h, r + 2 * stride_h ... lie together
  int64_t raster;           // bytes of a plane: (stride_h, phase_rows, out_width)
  int64_t plane_step;
  bool aligned_columns;  // output columns are input columns shifted, rows follow each other
  int64_t input_plane_step;
};

inline TableShape table_shape(const WindowShape& window, int64_t out_rows) {
  const ConvGeometry& g = window.geometry;
  TableShape shape;
  shape.window = window;
  shape.window.used_width = window.in_width;
  shape.bytes_per_pixel = packed_bytes(g.in_channels, 2);
  shape.triples = ceil_div(g.in_channels * g.kernel_w, 3);
  shape.in_rows = band_height(window, out_rows);
  shape.phase_rows = ceil_div(shape.in_rows, g.stride_h);
  shape.raster = g.stride_h * shape.phase_rows * window.out_width;
  shape.plane_step = round_up(shape.raster, kTableLanes);
  // Planes a multiple of 4 KiB apart would share a few lines of the first-level cache.
  if (shape.plane_step % 4096 == 0) shape.plane_step += kTableLanes;
  shape.aligned_columns = g.stride_h == 1 && g.stride_w == 1 && window.out_width == window.in_width;
  // Shifted reads may begin before a plane and end behind it.
  const int64_t guard = round_up(max_of(window.band_width, 2 * kTableLanes), kTableLanes);
  shape.input_plane_step = round_up(shape.in_rows * window.in_width, kTableLanes) + 2 * guard;
  return shape;
}

struct TableCodesScratch {
  RowScratch row;
  uint8_t* pixels;   // 2-bit pixels of all rows
  uint8_t* halves;   // while they are taken apart
  uint8_t* planes;   // (bytes_per_pixel, input_plane_step)
  uint8_t* columns;  // (kernel_w, bytes_per_pixel, raster), unless the columns are aligned
  uint64_t* inside;  // (kernel_w, blocks of 64), if they are: which pixels lie inside the image
  uint8_t* codes;    // (triples, plane_step)
};

inline TableCodesScratch table_codes_scratch(const TableShape& shape, Arena* arena) {
  TableCodesScratch scratch;
  const ConvGeometry& g = shape.window.geometry;
  const int64_t pixel_bytes =
      shape.in_rows * shape.window.in_width * shape.bytes_per_pixel + kTableLanes;
  scratch.row = row_scratch(shape.window, arena);
  scratch.pixels = arena->take<uint8_t>(pixel_bytes);
  scratch.halves = arena->take<uint8_t>(2 * pixel_bytes + 16 * kTableLanes);
  scratch.planes = arena->take<uint8_t>(shape.bytes_per_pixel * shape.input_plane_step);
  const int64_t columns = shape.bytes_per_pixel * g.kernel_w * shape.plane_step;
  scratch.columns = arena->take<uint8_t>(shape.aligned_columns ? 0 : columns + 2 * kTableLanes);
  scratch.inside = arena->take<uint64_t>(g.kernel_w * (shape.plane_step / kTableLanes));
  // Tiles read whole vectors from any offset.
  scratch.codes = arena->take<uint8_t>(shape.triples * shape.plane_step + 4 * kTableLanes);
  return scratch;
}

inline __m512i load_tail(const uint8_t* src, int64_t bytes) {
  if (bytes >= kTableLanes) return _mm512_loadu_si512(src);
  return _mm512_maskz_loadu_epi8(bytes <= 0 ? 0 : (uint64_t{1} << bytes) - 1, src);
}

// Four vectors of four 128-bit lanes: lane j of vector i becomes lane i of vector j.
inline void transpose_lanes(__m512i* v) {
  constexpr int kEven = 0x88;
  constexpr int kOdd = 0xdd;
  const __m512i even_a = _mm512_shuffle_i32x4(v[0], v[1], kEven);
  const __m512i even_b = _mm512_shuffle_i32x4(v[2], v[3], kEven);
  const __m512i odd_a = _mm512_shuffle_i32x4(v[0], v[1], kOdd);
  const __m512i odd_b = _mm512_shuffle_i32x4(v[2], v[3], kOdd);
  v[0] = _mm512_shuffle_i32x4(even_a, even_b, kEven);
  v[2] = _mm512_shuffle_i32x4(even_a, even_b, kOdd);
  v[1] = _mm512_shuffle_i32x4(odd_a, odd_b, kEven);
  v[3] = _mm512_shuffle_i32x4(odd_a, odd_b, kOdd);
}

// 16 vectors of 16 dwords, likewise.
inline void transpose_dwords(__m512i* v) {
  unroll<4>([&](auto q) {
    // Within 128-bit lanes: four rows of four dwords.
    __m512i* four = v + 4 * q;
    const __m512i low_a = _mm512_unpacklo_epi32(four[0], four[1]);
    const __m512i low_b = _mm512_unpacklo_epi32(four[2], four[3]);
    const __m512i high_a = _mm512_unpackhi_epi32(four[0], four[1]);
    const __m512i high_b = _mm512_unpackhi_epi32(four[2], four[3]);
    four[0] = _mm512_unpacklo_epi64(low_a, low_b);
    four[1] = _mm512_unpackhi_epi64(low_a, low_b);
    four[2] = _mm512_unpacklo_epi64(high_a, high_b);
    four[3] = _mm512_unpackhi_epi64(high_a, high_b);
  });
  unroll<4>([&](auto k) {
    __m512i lanes[4];
    unroll<4>([&](auto i) { lanes[i] = v[4 * i + k]; });
    transpose_lanes(lanes);
    unroll<4>([&](auto i) { v[4 * i + k] = lanes[i]; });
  });
}

// Order of bytes that transposes a matrix of 64 / kColumns by kColumns of them.
template <int kColumns>
struct TurnOrder {
  alignas(64) uint8_t bytes[kTableLanes];

  constexpr TurnOrder() : bytes() {
    constexpr int kRows = kTableLanes / kColumns;
    for (int i = 0; i < kTableLanes; ++i) {
      bytes[i] = static_cast<uint8_t>(i % kRows * kColumns + i / kRows);
    }
  }
};
template <int kColumns>
inline __m512i turn_order() {
  static constexpr TurnOrder<kColumns> kOrder;
  return _mm512_load_si512(kOrder.bytes);
}

// The vectors of 64 pixels of kBytes bytes and those of their planes are each other's transposes.
template <int kBytes>
inline void transpose_vectors(__m512i* v) {
  if constexpr (kBytes == 16) {
    transpose_dwords(v);
  } else {
    transpose_lanes(v);
  }
}

// 64 pixels of kBytes bytes, 4 or 16, to planes.
template <int kBytes>
inline void split_in_registers(const uint8_t* pixels, uint8_t* planes, int64_t plane_step) {
  const __m512i order = turn_order<kBytes>();
  __m512i v[kBytes];
  unroll<kBytes>([&](auto i) {
    v[i] = _mm512_permutexvar_epi8(order, _mm512_loadu_si512(pixels + i * kTableLanes));
  });
  transpose_vectors<kBytes>(v);
  unroll<kBytes>([&](auto j) { _mm512_storeu_si512(planes + j * plane_step, v[j]); });
}

// And back.
template <int kBytes>
inline void join_in_registers(const uint8_t* planes, int64_t plane_step, uint8_t* pixels) {
  const __m512i order = turn_order<kTableLanes / kBytes>();
  __m512i v[kBytes];
  unroll<kBytes>([&](auto j) { v[j] = _mm512_loadu_si512(planes + j * plane_step); });
  transpose_vectors<kBytes>(v);
  unroll<kBytes>([&](auto i) {
    _mm512_storeu_si512(pixels + i * kTableLanes, _mm512_permutexvar_epi8(order, v[i]));
  });
}

// Splits pixels of `bytes` bytes into planes: byte j of all pixels to planes + j * plane_step.
// `halves` holds twice as many bytes as the pixels, and some more for whole vectors.
inline void split_bytes(const uint8_t* pixels, int64_t count, int64_t bytes, uint8_t* halves,
                        uint8_t* planes, int64_t plane_step) {
  if (bytes == 1) {
    std::memcpy(planes, pixels, static_cast<size_t>(count));
    return;
  }
  if ((bytes == 4 || bytes == 16) && count % kTableLanes == 0) {
    const auto split = bytes == 4 ? split_in_registers<4> : split_in_registers<16>;
    for (int64_t i = 0; i < count; i += kTableLanes) {
      split(pixels + i * bytes, planes + i, plane_step);
    }
    return;
  }
  if (bytes % 2 != 0) {
    for (int64_t j = 0; j < bytes; ++j) {
      for (int64_t i = 0; i < count; ++i) planes[j * plane_step + i] = pixels[i * bytes + j];
    }
    return;
  }
  alignas(64) uint8_t order[2][kTableLanes];
  for (int i = 0; i < kTableLanes; ++i) {
    order[0][i] = static_cast<uint8_t>(2 * i);
    order[1][i] = static_cast<uint8_t>(2 * i + 1);
  }
  const __m512i even = _mm512_load_si512(order[0]);
  const __m512i odd = _mm512_load_si512(order[1]);
  const int64_t half = count * bytes / 2;
  const int64_t half_step = round_up(half, kTableLanes);
  for (int64_t i = 0; i < half; i += kTableLanes) {
    const int64_t left = 2 * (half - i);
    const __m512i a = load_tail(pixels + 2 * i, left);
    const __m512i b = load_tail(pixels + 2 * i + kTableLanes, left - kTableLanes);
    _mm512_storeu_si512(halves + i, _mm512_permutex2var_epi8(a, even, b));
    _mm512_storeu_si512(halves + half_step + i, _mm512_permutex2var_epi8(a, odd, b));
  }
  // The even bytes are those of planes 0, 2, 4 ...
  uint8_t* rest = halves + 2 * half_step;
  split_bytes(halves, count, bytes / 2, rest, planes, 2 * plane_step);
  split_bytes(halves + half_step, count, bytes / 2, rest, planes + plane_step, 2 * plane_step);
}

// 2-bit pixels of input rows [begin, end), where they are stored or made here.
inline const uint8_t* two_bit_pixels(const TableShape& shape, const RowSource& source,
                                     int64_t begin, int64_t end, uint8_t* memory) {
  if (source.as_stored) return pixel_codes(source.input, begin, 0);
  const int64_t width = shape.window.in_width;
  const int64_t channels = source.input.channels;
  for (int64_t y = begin; y < end; ++y) {
    pack_pixels(read_codes(source, y, width), width, channels, 2,
                memory + (y - begin) * width * shape.bytes_per_pixel);
  }
  return memory;
}

// Bits [begin, end) of 64.
inline uint64_t bit_range(int64_t begin, int64_t end) {
  if (begin >= end) return 0;
  return (~uint64_t{0} >> (kTableLanes - (end - begin))) << begin;
}

// Bits of the pixels of a raster of `width` columns, from `first` on, whose column shifted by
// `shift` lies inside the image.
inline uint64_t inside_mask(int64_t first, int64_t width, int64_t shift) {
  const int64_t low = max_of(-shift, 0);
  const int64_t high = width - max_of(shift, 0);
  uint64_t mask = 0;
  for (int64_t row = first - first % width; row < first + kTableLanes; row += width) {
    mask |= bit_range(max_of(row + low - first, 0), min_of(row + high - first, kTableLanes));
  }
  return mask;
}

// Bytes of four neighbouring channels, one per position of the code planes' raster.
struct ColumnPlane {
  const uint8_t* bytes;
  const uint64_t* inside;  // or null: all

  __m512i load(int64_t position, __m512i outside) const {
    const __m512i value = _mm512_loadu_si512(bytes + position);
    if (inside == nullptr) return value;
    return _mm512_mask_mov_epi8(outside, inside[position / kTableLanes], value);
  }
};

// Output columns [x, x + 64) of a row: every kStride-th byte of src, from src + x * kStride on, for
// strides 1 and 2. For others (0) bytes one by one, those with a bit in `wanted`.
template <int kStride>
inline __m512i gather_bytes(const uint8_t* src, int64_t x, int64_t stride, uint64_t wanted,
                            __m512i every_second) {
  if constexpr (kStride == 1) return _mm512_loadu_si512(src + x);
  if constexpr (kStride == 2) {
    const __m512i low = _mm512_loadu_si512(src + 2 * x);
    return _mm512_permutex2var_epi8(low, every_second,
                                    _mm512_loadu_si512(src + 2 * x + kTableLanes));
  }
  alignas(64) uint8_t bytes[kTableLanes] = {};
  for (int64_t i = 0; i < kTableLanes; ++i) {
    if (wanted >> i & 1) bytes[i] = src[(x + i) * stride];
  }
  return _mm512_load_si512(bytes);
}

// The columns of one kernel column of one byte, all rows. Rows are written in the order of their
// addresses, since vectors reach past their ends.
template <int kStride>
inline void gather_column(const TableShape& shape, const uint8_t* plane, const uint64_t* inside,
                          __m512i outside, uint8_t* column) {
  const ConvGeometry& g = shape.window.geometry;
  const int64_t out_width = shape.window.out_width;
  const int64_t in_width = shape.window.in_width;
  alignas(64) uint8_t order[kTableLanes];
  for (int i = 0; i < kTableLanes; ++i) order[i] = static_cast<uint8_t>(2 * i);
  const __m512i every_second = _mm512_load_si512(order);
  for (int64_t phase = 0; phase < g.stride_h; ++phase) {
    uint8_t* dst = column + phase * shape.phase_rows * out_width;
    for (int64_t row = phase; row < shape.in_rows; row += g.stride_h) {
      const uint8_t* src = plane + row * in_width;
      for (int64_t x = 0; x < out_width; x += kTableLanes) {
        const uint64_t wanted = inside[x / kTableLanes];
        const __m512i inner = gather_bytes<kStride>(src, x, g.stride_w, wanted, every_second);
        _mm512_storeu_si512(dst + x, _mm512_mask_mov_epi8(outside, wanted, inner));
      }
      dst += out_width;
    }
  }
}

// Fills the column planes where output columns are not simply shifted input columns, in the order
// of their addresses too.
inline void gather_columns(const TableShape& shape, const uint8_t* planes, __m512i outside,
                           uint64_t* inside, uint8_t* columns) {
  const ConvGeometry& g = shape.window.geometry;
  for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
    const int64_t shift = kw * g.dilation_w - g.pad_left;
    // Columns x with 0 <= x * stride_w + shift < in_width.
    const int64_t low = ceil_div(max_of(-shift, 0), g.stride_w);
    const int64_t high = ceil_div(max_of(shape.window.in_width - shift, 0), g.stride_w);
    for (int64_t x = 0; x < shape.window.out_width; x += kTableLanes) {
      inside[x / kTableLanes] = bit_range(min_of(max_of(low - x, 0), kTableLanes),
                                          min_of(max_of(high - x, 0), kTableLanes));
    }
    const auto gather = g.stride_w == 1   ? gather_column<1>
                        : g.stride_w == 2 ? gather_column<2>
                                          : gather_column<0>;
    for (int64_t j = 0; j < shape.bytes_per_pixel; ++j) {
      gather(shape, planes + j * shape.input_plane_step + shift, inside, outside,
             columns + (kw * shape.bytes_per_pixel + j) * shape.plane_step);
    }
  }
}

// Three fields of two bits, each at its own place of a byte and wanted in bits 0-1, 2-3 and 4-5;
// the table ignores bits 6 and 7.
inline __m512i merge_fields(__m512i first, __m512i second, __m512i third) {
  const __m512i low = _mm512_set1_epi8(0x03);
  const __m512i middle = _mm512_set1_epi8(0x0f);
  constexpr int kSelect = 0xca;  // a ? b : c
  const __m512i pair = _mm512_ternarylogic_epi64(low, first, second, kSelect);
  return _mm512_ternarylogic_epi64(middle, pair, third, kSelect);
}

// Three taps of one channel: the usual kernel of width 3.
template <int kField>
inline __m512i three_taps(__m512i left, __m512i centre, __m512i right) {
  // Rotations of 64 bits: what crosses a byte is masked away.
  return merge_fields(_mm512_ror_epi64(left, kField), _mm512_ror_epi64(centre, (kField + 62) % 64),
                      _mm512_ror_epi64(right, (kField + 60) % 64));
}

// Code planes of a kernel of width 3, from the three column planes of each byte.
template <typename PlaneOf>
inline void merge_three_taps(const TableShape& shape, __m512i outside, PlaneOf plane_of,
                             uint8_t* codes) {
  const int64_t channels = shape.window.geometry.in_channels;
  for (int64_t j = 0; j < shape.bytes_per_pixel; ++j) {
    const ColumnPlane planes[3] = {plane_of(j, 0), plane_of(j, 1), plane_of(j, 2)};
    uint8_t* dst = codes + 4 * j * shape.plane_step;
    const int64_t count = min_of(channels - 4 * j, 4);
    for (int64_t i = 0; i < shape.raster; i += kTableLanes) {
      const __m512i left = planes[0].load(i, outside);
      const __m512i centre = planes[1].load(i, outside);
      const __m512i right = planes[2].load(i, outside);
      const auto put = [&](int64_t c, __m512i code) {
        _mm512_storeu_si512(dst + c * shape.plane_step + i, code);
      };
      put(0, three_taps<0>(left, centre, right));
      if (count > 1) put(1, three_taps<2>(left, centre, right));
      if (count > 2) put(2, three_taps<4>(left, centre, right));
      if (count > 3) put(3, three_taps<6>(left, centre, right));
    }
  }
}

// Code planes of any other kernel.
template <typename PlaneOf>
inline void merge_any_taps(const TableShape& shape, __m512i outside, PlaneOf plane_of,
                           uint8_t* codes) {
  const ConvGeometry& g = shape.window.geometry;
  const int64_t elements = g.in_channels * g.kernel_w;
  for (int64_t t = 0; t < shape.triples; ++t) {
    ColumnPlane planes[3] = {};
    __m512i turns[3] = {};
    for (int64_t i = 0; i < 3; ++i) {
      const int64_t element = 3 * t + i;
      if (element >= elements) continue;
      const int64_t channel = element / g.kernel_w;
      planes[i] = plane_of(channel / 4, element % g.kernel_w);
      turns[i] = _mm512_set1_epi64((2 * (channel % 4) - 2 * i) & 63);
    }
    for (int64_t position = 0; position < shape.raster; position += kTableLanes) {
      __m512i fields[3];
      for (int i = 0; i < 3; ++i) {
        fields[i] = planes[i].bytes == nullptr
                        ? _mm512_setzero_si512()
                        : _mm512_rorv_epi64(planes[i].load(position, outside), turns[i]);
      }
      _mm512_storeu_si512(codes + t * shape.plane_step + position,
                          merge_fields(fields[0], fields[1], fields[2]));
    }
  }
}

// The code planes for output rows [row_begin, row_begin + the band's rows).
inline void load_table_codes(const TableShape& shape, const RowSource& source, int64_t row_begin,
                             const TableCodesScratch& scratch) {
  const WindowShape& window = shape.window;
  const ConvGeometry& g = window.geometry;
  const int64_t width = window.in_width;
  const int64_t first = row_begin * g.stride_h - g.pad_top;
  const int64_t begin = min_of(max_of(first, 0), window.in_height);
  const int64_t end = max_of(min_of(first + shape.in_rows, window.in_height), begin);
  const uint8_t outside = static_cast<uint8_t>(source.range.zero_point * 0x55);
  const int64_t guard = (shape.input_plane_step - round_up(shape.in_rows * width, kTableLanes)) / 2;
  uint8_t* planes = scratch.planes + guard;
  const int64_t above = end > begin ? begin - first : shape.in_rows;
  const int64_t below = end > begin ? first + shape.in_rows - end : 0;
  for (int64_t j = 0; j < shape.bytes_per_pixel; ++j) {
    uint8_t* plane = planes + j * shape.input_plane_step;
    std::memset(plane, outside, static_cast<size_t>(above * width));
    std::memset(plane + (shape.in_rows - below) * width, outside,
                static_cast<size_t>(below * width));
  }
  if (end > begin) {
    const uint8_t* pixels = two_bit_pixels(shape, source, begin, end, scratch.pixels);
    split_bytes(pixels, (end - begin) * width, shape.bytes_per_pixel, scratch.halves,
                planes + (begin - first) * width, shape.input_plane_step);
  }

  const __m512i outside_bytes = _mm512_set1_epi8(static_cast<char>(outside));
  const int64_t blocks = shape.plane_step / kTableLanes;
  if (shape.aligned_columns) {
    for (int64_t kw = 0; kw < g.kernel_w; ++kw) {
      for (int64_t block = 0; block * kTableLanes < shape.raster; ++block) {
        scratch.inside[kw * blocks + block] =
            inside_mask(block * kTableLanes, width, kw * g.dilation_w - g.pad_left);
      }
    }
  } else {
    gather_columns(shape, planes, outside_bytes, scratch.inside, scratch.columns);
  }
  const auto plane_of = [&](int64_t j, int64_t kw) -> ColumnPlane {
    if (!shape.aligned_columns) {
      return {scratch.columns + (kw * shape.bytes_per_pixel + j) * shape.plane_step, nullptr};
    }
    return {planes + j * shape.input_plane_step + kw * g.dilation_w - g.pad_left,
            scratch.inside + kw * blocks};
  };
  if (g.kernel_w == 3) {
    merge_three_taps(shape, outside_bytes, plane_of, scratch.codes);
  } else {
    merge_any_taps(shape, outside_bytes, plane_of, scratch.codes);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
