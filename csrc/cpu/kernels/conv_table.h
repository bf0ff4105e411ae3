// The convolution at 2 bits by table: three activations make a 6-bit code, three weights choose one
// of 64 rows of 64 bytes, and one vpermb gives 64 pixels their sums of three products. On a Zen 4
// core 523 GMAC/s were measured in this loop, against 233 GMAC/s at most from vpdpbusd.
#pragma once

#include "conv_direct.h"
#include "isa.h"
#include "kernel_table.h"
#include "prefetch.h"
#include "table_codes.h"
#include "table_epilogue.h"
#include "vector_epilogue.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// Sums of so many table entries, each at most 27, fit a byte.
constexpr int64_t kByteSteps = 8;
// Output channels multiplied together, and vectors of pixels.
constexpr int64_t kTableOutputs = 4;
constexpr int64_t kTableVectors = 2;
constexpr int64_t kTablePixels = kTableVectors * kTableLanes;
// Output channels whose sums are kept between blocks of the code planes.
constexpr int64_t kTableSpan = 64;
// Code planes in a block: two vectors of three kernel rows of these fit the first-level cache.
constexpr int64_t kTableBlock = 64;

// row(u)[a] = a0 u0 + a1 u1 + a2 u2, where a and u hold three fields of two bits. A weight u stands
// for the code u - 2, that is the level u - 2, or 2 u - 3 if levels are centred.
struct ProductTable {
  alignas(64) uint8_t rows[64][64];

  constexpr ProductTable() : rows() {
    for (int u = 0; u < 64; ++u) {
      for (int a = 0; a < 64; ++a) {
        rows[u][a] = static_cast<uint8_t>((a & 3) * (u & 3) + (a >> 2 & 3) * (u >> 2 & 3) +
                                          (a >> 4 & 3) * (u >> 4 & 3));
      }
    }
  }
};
constexpr ProductTable kProducts;
// Three weights of 1: the row of sums of activations.
constexpr int kOnes = 1 | 1 << 2 | 1 << 4;

constexpr int64_t kMaxTableRows = 16;

// Whether a layer's 2-bit weights are kept in this form too. Sums have to fit 16 bits.
inline bool table_takes(const ConvGeometry& g, int32_t bits) {
  const int64_t depth = g.in_channels * g.kernel_h * g.kernel_w;
  return bits == 2 && g.groups == 1 && g.kernel_h <= kMaxTableRows && depth >= 16 &&
         depth * 9 <= 0xffff;
}

// Its weights: numbers of table rows [block][outputs / 4][kernel_h][plane of the block][4], bytes
// as they are multiplied and held one after the other in six bits each.
struct TableLayout {
  int64_t triples;
  int64_t outputs;  // rounded up
  int64_t numbers;
};

inline TableLayout table_layout(const ConvGeometry& g) {
  const int64_t triples = ceil_div(g.in_channels * g.kernel_w, 3);
  const int64_t outputs = round_up(g.out_channels, kLanes);
  return {triples, outputs, outputs * g.kernel_h * triples};
}

inline size_t table_tile_bytes(const ConvGeometry& g) {
  return static_cast<size_t>(table_layout(g).numbers * 6 / 8);
}

inline void retile_table(const ConvGeometry& g, const uint8_t* canonical, void* tile) {
  const TableLayout layout = table_layout(g);
  std::memset(tile, 0, table_tile_bytes(g));
  uint8_t* numbers = static_cast<uint8_t*>(tile);
  const int64_t run_bytes = packed_bytes(g.in_channels, 2);
  for_each_channel_run(g, [&](int64_t, int64_t o, int64_t tap, int64_t run) {
    const int64_t kh = tap / g.kernel_w;
    const int64_t kw = tap % g.kernel_w;
    const uint8_t* packed = canonical + run * run_bytes;
    for (int64_t c = 0; c < g.in_channels; ++c) {
      const int32_t code =
          static_cast<int8_t>(extract_code<2, true>(packed[c / 4], static_cast<int>(c % 4)));
      const int64_t element = c * g.kernel_w + kw;
      const int64_t triple = element / 3;
      const int64_t first = triple / kTableBlock * kTableBlock;
      const int64_t planes = min_of(layout.triples - first, kTableBlock);
      const int64_t row = (o / kTableOutputs * g.kernel_h + kh) * planes + (triple - first);
      const int64_t number =
          layout.outputs * g.kernel_h * first + row * kTableOutputs + o % kTableOutputs;
      const int64_t bit = 6 * number + 2 * (element % 3);
      numbers[bit / 8] = static_cast<uint8_t>(numbers[bit / 8] | (code + 2) << (bit % 8));
    }
  });
}

// Memory for the weights as they are multiplied.
struct TableWeightScratch {
  uint8_t* numbers;
  int32_t* level_sums;  // (O rounded up)
  size_t bytes;
};

inline TableWeightScratch table_weight_scratch(const ConvGeometry& g, void* memory) {
  Arena arena(memory);
  const TableLayout layout = table_layout(g);
  TableWeightScratch scratch;
  scratch.numbers = arena.take<uint8_t>(round_up(layout.numbers, kTableLanes));
  scratch.level_sums = arena.take<int32_t>(layout.outputs);
  scratch.bytes = arena.used();
  return scratch;
}

// Order of bytes that gives each eight the six that matter to them.
struct SixesOrder {
  alignas(64) uint8_t bytes[kTableLanes];

  constexpr SixesOrder() : bytes() {
    for (int i = 0; i < kTableLanes; ++i) bytes[i] = static_cast<uint8_t>(i / 8 * 6 + i % 8);
  }
};

// 64 numbers at a time, from 48 bytes.
inline void read_numbers(const uint8_t* held, int64_t count, uint8_t* numbers) {
  static constexpr SixesOrder kSixes;
  const __m512i sixes = _mm512_load_si512(kSixes.bytes);
  const __m512i shifts = _mm512_set1_epi64(0x2a241e18120c0600);
  const __m512i mask = _mm512_set1_epi8(0x3f);
  for (int64_t i = 0; i < count; i += kTableLanes) {
    const __m512i bits = load_tail(held + i * 6 / 8, min_of((count - i) * 6 / 8, 48));
    const __m512i fields =
        _mm512_multishift_epi64_epi8(shifts, _mm512_permutexvar_epi8(sixes, bits));
    _mm512_storeu_si512(numbers + i, _mm512_and_si512(fields, mask));
  }
}

// Sums of the levels of each output channel.
inline void sum_table_levels(const ConvGeometry& g, const TableLayout& layout,
                             const uint8_t* numbers, bool centred, int32_t* sums) {
  // Three weights are at most 9.
  constexpr int64_t kSteps = 28;
  const __m512i ones = _mm512_load_si512(kProducts.rows[kOnes]);
  const int32_t depth = static_cast<int32_t>(g.in_channels * g.kernel_h * g.kernel_w);
  const __m512i low = _mm512_set1_epi32(0xff);
  for (int64_t o = 0; o < layout.outputs; ++o) sums[o] = centred ? -3 * depth : -2 * depth;
  for (int64_t block = 0; block < layout.triples; block += kTableBlock) {
    const int64_t planes = min_of(layout.triples - block, kTableBlock);
    const int64_t bytes = kTableOutputs * g.kernel_h * planes;
    for (int64_t o = 0; o < layout.outputs; o += kTableOutputs) {
      __m512i totals[kTableOutputs];
      for (__m512i& total : totals) total = _mm512_setzero_si512();
      for (int64_t i = 0; i < bytes;) {
        __m512i bytes_sum = _mm512_setzero_si512();
        for (const int64_t end = min_of(i + kSteps * kTableLanes, bytes); i < end;
             i += kTableLanes) {
          const __m512i weights = load_tail(numbers + i, bytes - i);
          bytes_sum = _mm512_add_epi8(bytes_sum, _mm512_permutexvar_epi8(weights, ones));
        }
        unroll<kTableOutputs>([&](auto k) {
          totals[k] = _mm512_add_epi32(totals[k],
                                       _mm512_and_si512(_mm512_srli_epi32(bytes_sum, 8 * k), low));
        });
      }
      for (int64_t k = 0; k < kTableOutputs; ++k) {
        const int32_t total = _mm512_reduce_add_epi32(totals[k]);
        sums[o + k] += centred ? 2 * total : total;
      }
      numbers += bytes;
    }
  }
}

// Keeps the compiler from turning a chain of sums into a tree, whose leaves it would have to spill.
inline void pin(__m512i* value) { asm("" : "+v"(*value)); }

// sums[output][vector] (+)= the products of kVectors * 64 pixels with kOutputs output channels over
// a block of code planes. The weights of four channels lie together, those of the next four
// `weight_step` further on.
template <int kVectors, int kOutputs>
inline void table_tile(const uint8_t* codes, int64_t plane_step, const int64_t* row_offsets,
                       int64_t kernel_h, int64_t planes, const uint8_t* weights,
                       int64_t weight_step, bool first, PixelSums* result) {
  constexpr int kSums = kVectors * kOutputs;
  const uint8_t* table = kProducts.rows[0];
  __m512i even[kSums];
  __m512i odd[kSums];
  __m512i bytes[kSums];
  unroll<kSums>([&](auto i) { even[i] = odd[i] = _mm512_setzero_si512(); });
  for (int64_t kh = 0; kh < kernel_h; ++kh) {
    const uint8_t* code = codes + row_offsets[kh];
    // One code plane times four output channels, the first of a sum or one more.
    const auto step = [&](auto is_first) {
      __m512i activations[kVectors];
      unroll<kVectors>(
          [&](auto v) { activations[v] = _mm512_loadu_si512(code + v * kTableLanes); });
      // Four numbers to a load: loads are what this loop has most of.
      constexpr int kGroups = kOutputs / static_cast<int>(kTableOutputs);
      uint64_t offsets[kGroups];
      unroll<kGroups>([&](auto g) {
        uint32_t numbers;
        std::memcpy(&numbers, weights + g * weight_step, sizeof(numbers));
        offsets[g] = uint64_t{numbers} * sizeof(kProducts.rows[0]);
      });
      unroll<kOutputs>([&](auto o) {
        constexpr int kGroup = o / static_cast<int>(kTableOutputs);
        constexpr int kShift = 8 * (o % static_cast<int>(kTableOutputs));
        const __m512i row = _mm512_load_si512(table + (offsets[kGroup] >> kShift & 0x3fc0));
        unroll<kVectors>([&](auto v) {
          __m512i& sum = bytes[o * kVectors + v];
          const __m512i products = _mm512_permutexvar_epi8(activations[v], row);
          sum = is_first ? products : _mm512_add_epi8(sum, products);
          pin(&sum);
        });
      });
      weights += kTableOutputs;
      code += plane_step;
    };
    const auto widen = [&] {
      unroll<kSums>([&](auto i) {
        even[i] = _mm512_add_epi16(even[i], bytes[i]);
        odd[i] = _mm512_add_epi16(odd[i], _mm512_srli_epi16(bytes[i], 8));
      });
    };
    int64_t plane = 0;
    for (; plane + kByteSteps <= planes; plane += kByteSteps) {
      unroll<static_cast<int>(kByteSteps)>(
          [&](auto i) { step(std::integral_constant<bool, i == 0>{}); });
      widen();
    }
    if (plane < planes) {
      step(std::true_type{});
      for (++plane; plane < planes; ++plane) step(std::false_type{});
      widen();
    }
  }
  unroll<kSums>([&](auto i) {
    PixelSums& target = result[i / kVectors * kTableVectors + i % kVectors];
    PixelSums sums = {even[i], odd[i]};
    sums.finish();
    if (!first) {
      sums.even = _mm512_add_epi16(sums.even, target.even);
      sums.odd = _mm512_add_epi16(sums.odd, target.odd);
    }
    target = sums;
  });
}

// Per position of the raster, the sum of all activations: uint16.
inline void sum_codes(const TableShape& shape, const uint8_t* codes, uint16_t* sums) {
  // Three activations are at most 9.
  constexpr int64_t kSteps = 28;
  const __m512i ones = _mm512_load_si512(kProducts.rows[kOnes]);
  alignas(64) uint16_t order[2][32];
  for (int i = 0; i < 32; ++i) {
    order[0][i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    order[1][i] = static_cast<uint16_t>(16 + i / 2 + i % 2 * 32);
  }
  for (int64_t position = 0; position < shape.raster; position += kTableLanes) {
    PixelSums total = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t t = 0; t < shape.triples;) {
      __m512i bytes = _mm512_setzero_si512();
      for (const int64_t end = min_of(t + kSteps, shape.triples); t < end; ++t) {
        const __m512i code = _mm512_loadu_si512(codes + t * shape.plane_step + position);
        bytes = _mm512_add_epi8(bytes, _mm512_permutexvar_epi8(code, ones));
      }
      total.add_bytes(bytes);
    }
    total.finish();
    for (int half = 0; half < 2; ++half) {
      const __m512i index = _mm512_load_si512(order[half]);
      _mm512_storeu_si512(sums + position + 32 * half,
                          _mm512_permutex2var_epi16(total.even, index, total.odd));
    }
  }
}

// Pixels whose residuals are read at a time if vectors cannot do it.
constexpr int64_t kFinishPixels = 16;

// Where transpose_sums puts pixel p of its 64.
inline int64_t sums_row(int64_t p) {
  const int64_t i = p / 2;  // among the even or odd ones: lane i / 8, place i % 8 of that
  return p % 2 * 32 + i % 8 * 4 + i / 8;
}

// 16 output channels of 64 pixels, sums[o * step], to rows of 16 uint16 per pixel; see sums_row.
inline void transpose_sums(const PixelSums* sums, int64_t step, uint16_t* rows) {
  const __m512i order[2] = {_mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                            _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15)};
  for (int parity = 0; parity < 2; ++parity) {
    __m512i eights[2][8];  // [outputs 0-7 and 8-15][pixel within its 128-bit lane]
    for (int half = 0; half < 2; ++half) {
      __m512i pairs[8];
      for (int i = 0; i < 4; ++i) {
        const PixelSums& a = sums[(8 * half + 2 * i) * step];
        const PixelSums& b = sums[(8 * half + 2 * i + 1) * step];
        const __m512i left = parity == 0 ? a.even : a.odd;
        const __m512i right = parity == 0 ? b.even : b.odd;
        pairs[i] = _mm512_unpacklo_epi16(left, right);
        pairs[4 + i] = _mm512_unpackhi_epi16(left, right);
      }
      for (int i = 0; i < 2; ++i) {
        const __m512i* four = pairs + 4 * i;
        const __m512i low_a = _mm512_unpacklo_epi32(four[0], four[1]);
        const __m512i low_b = _mm512_unpacklo_epi32(four[2], four[3]);
        const __m512i high_a = _mm512_unpackhi_epi32(four[0], four[1]);
        const __m512i high_b = _mm512_unpackhi_epi32(four[2], four[3]);
        eights[half][4 * i] = _mm512_unpacklo_epi64(low_a, low_b);
        eights[half][4 * i + 1] = _mm512_unpackhi_epi64(low_a, low_b);
        eights[half][4 * i + 2] = _mm512_unpacklo_epi64(high_a, high_b);
        eights[half][4 * i + 3] = _mm512_unpackhi_epi64(high_a, high_b);
      }
    }
    for (int i = 0; i < 8; ++i) {
      for (int half = 0; half < 2; ++half) {
        _mm512_storeu_si512(rows + (parity * 32 + i * 4 + half * 2) * kLanes,
                            _mm512_permutex2var_epi64(eights[0][i], order[half], eights[1][i]));
      }
    }
  }
}

struct TableScratch {
  TableCodesScratch codes;
  uint16_t* code_sums;  // (raster)
  int32_t* base;        // (kTablePixels): what the sums of a pixel are corrected by
  PixelSums* sums;      // (kTableSpan, kTableVectors)
  PixelSums* bases;     // (kTableVectors): the same in 16 bits
  PlaneScratch planes;
  uint16_t* rows;       // (kTableVectors, 64, kLanes)
  float* block;         // (kTablePixels, O), if vectors cannot write the output
  float* block_values;  // (kFinishPixels, O)
  uint8_t* block_codes;
  size_t bytes;
};

inline TableScratch table_scratch(const TableShape& shape, void* memory) {
  Arena arena(memory);
  TableScratch scratch;
  scratch.codes = table_codes_scratch(shape, &arena);
  scratch.code_sums = arena.take<uint16_t>(shape.plane_step + kTablePixels);
  scratch.base = arena.take<int32_t>(kTablePixels);
  scratch.sums = arena.take<PixelSums>(kTableSpan * kTableVectors);
  scratch.rows = arena.take<uint16_t>(kTablePixels * kLanes);
  const int64_t channels = shape.window.geometry.out_channels;
  scratch.bases = arena.take<PixelSums>(kTableVectors);
  scratch.planes = plane_scratch(channels, kTablePixels, &arena);
  scratch.block = arena.take<float>(kTablePixels * channels);
  scratch.block_values = arena.take<float>(kFinishPixels * channels);
  scratch.block_codes = arena.take<uint8_t>(kFinishPixels * channels);
  scratch.bytes = arena.used();
  return scratch;
}

// As many rows as leave room in the second-level cache, and at least one.
inline int64_t table_band_rows(const WindowShape& window, int64_t out_rows) {
  constexpr size_t kCodesBytes = 512 << 10;
  const auto codes_bytes = [&](int64_t rows) {
    Arena arena(nullptr);
    table_codes_scratch(table_shape(window, rows), &arena);
    return arena.used();
  };
  int64_t rows = out_rows;
  while (rows > 1 && codes_bytes(rows) > kCodesBytes) rows = ceil_div(rows, 2);
  return rows;
}

// Whether it pays: lanes that hold no pixel cost as much as the others (the table takes about 0.45
// of the time of vpdpbusd per lane), and the memory has to stay small.
inline bool table_pays(const WindowShape& window, int64_t out_rows) {
  const int64_t pixels = out_rows * window.out_width;
  if (9 * round_up(pixels, kTableLanes) > 20 * pixels) return false;
  constexpr size_t kMostBytes = 896 << 10;
  return table_scratch(table_shape(window, 1), nullptr).bytes <= kMostBytes;
}

// Output pixels [first, first + pixels) of a band, pixels <= kTablePixels, and output channels
// [channel, channel + kTableSpan) of them.
struct TableMultiply {
  const TableShape* shape;
  const TableScratch* scratch;
  const int32_t* level_sums;
  const uint8_t* weights;
  TableLayout layout;
  const int64_t* row_offsets;  // (kernel_h): into the raster
  int32_t zero_point;
  bool centred;

  void sum(int64_t first, int64_t pixels, int64_t channel, int64_t channels) const {
    const int64_t kernel_h = shape->window.geometry.kernel_h;
    for (int64_t block = 0; block < layout.triples; block += kTableBlock) {
      const int64_t planes = min_of(layout.triples - block, kTableBlock);
      const uint8_t* codes = scratch->codes.codes + block * shape->plane_step + first;
      const uint8_t* block_weights = weights + layout.outputs * kernel_h * block;
      const int64_t weight_step = kTableOutputs * kernel_h * planes;
      // Eight sums and what they are made from fill the registers.
      const bool wide = pixels > kTableLanes;
      const auto tile = wide ? table_tile<2, 4> : table_tile<1, 8>;
      for (int64_t o = 0; o < channels; o += wide ? 4 : 8) {
        tile(codes, shape->plane_step, row_offsets, kernel_h, planes,
             block_weights + (channel + o) * kernel_h * planes, weight_step, block == 0,
             scratch->sums + o * kTableVectors);
      }
    }
  }

  // What every sum of a pixel lacks: with a = activations and u = code + 2,
  // sum a (u - 2) = sum a u - 2 sum a, and sum a (2 u - 3) = 2 sum a u - 3 sum a.
  void correct_pixels(int64_t first, int64_t pixels) const {
    const int64_t kernel_h = shape->window.geometry.kernel_h;
    const int32_t factor = centred ? -3 : -2;
    for (int64_t p = 0; p < pixels; ++p) scratch->base[p] = 0;
    for (int64_t kh = 0; kh < kernel_h; ++kh) {
      const uint16_t* sums = scratch->code_sums + row_offsets[kh] + first;
      for (int64_t p = 0; p < pixels; ++p) scratch->base[p] += factor * sums[p];
    }
  }

  // Codes of output channels [channel, channel + channels) as planes, by ConvTask::code_steps.
  void step_planes(const int16_t* steps, int64_t pixels, int64_t channel, int64_t channels) const {
    const int64_t outputs = shape->window.geometry.out_channels;
    const __m128i doubling = _mm_cvtsi32_si128(centred ? 1 : 0);
    const __m512i one = _mm512_set1_epi16(1);
    for (int64_t o = channel; o < channel + channels; ++o) {
      const __m512i correction =
          _mm512_set1_epi16(static_cast<int16_t>(-zero_point * level_sums[o]));
      __m512i limits[kCodeSteps];
      unroll<kCodeSteps>([&](auto k) { limits[k] = _mm512_set1_epi16(steps[k * outputs + o]); });
      const __m512i flip = _mm512_set1_epi16(steps[kCodeSteps * outputs + o]);
      const auto codes_of = [&](__m512i sum, __m512i pixel_base) {
        const __m512i shifted = _mm512_add_epi16(pixel_base, correction);
        const __m512i value =
            _mm512_xor_si512(_mm512_add_epi16(_mm512_sll_epi16(sum, doubling), shifted), flip);
        __m512i code = _mm512_setzero_si512();
        unroll<kCodeSteps>([&](auto k) {
          code = _mm512_mask_add_epi16(code, _mm512_cmpge_epi16_mask(value, limits[k]), code, one);
        });
        return code;
      };
      for (int64_t v = 0; v * kTableLanes < pixels; ++v) {
        const PixelSums& base = scratch->bases[v];
        const PixelSums& products = scratch->sums[(o - channel) * kTableVectors + v];
        const __m512i even = codes_of(products.even, base.even);
        const __m512i odd = codes_of(products.odd, base.odd);
        _mm512_storeu_si512(scratch->planes.planes + o * kTablePixels + v * kTableLanes,
                            _mm512_or_si512(even, _mm512_slli_epi16(odd, 8)));
      }
    }
  }

  // The same by floats, at any width and with a residual.
  void finish_planes(const VectorEpilogue& epilogue, int64_t pixels, int64_t channel,
                     int64_t channels) const {
    const __m128i doubling = _mm_cvtsi32_si128(centred ? 1 : 0);
    for (int64_t v = 0; v * kTableLanes < pixels; ++v) {
      const PixelSums& base = scratch->bases[v];
      for (int64_t o = channel; o < channel + channels; ++o) {
        const __m512i correction =
            _mm512_set1_epi16(static_cast<int16_t>(-zero_point * level_sums[o]));
        const PixelSums& products = scratch->sums[(o - channel) * kTableVectors + v];
        const auto correct = [&](__m512i sum, __m512i pixel_base) {
          return _mm512_add_epi16(_mm512_add_epi16(_mm512_sll_epi16(sum, doubling), pixel_base),
                                  correction);
        };
        const PixelSums sums = {correct(products.even, base.even), correct(products.odd, base.odd)};
        const int64_t position = o * kTablePixels + v * kTableLanes;
        const __m512i codes =
            epilogue.residual_form == ResidualForm::kNone
                ? plane_codes<false>(epilogue, o, sums, _mm512_setzero_si512())
                : plane_codes<true>(epilogue, o, sums,
                                    _mm512_loadu_si512(scratch->planes.residuals + position));
        _mm512_storeu_si512(scratch->planes.planes + position, codes);
      }
    }
  }

  // The corrections of correct_pixels() for finish_planes().
  void correct_planes(int64_t first, int64_t pixels) const {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
      order[0][i] = static_cast<uint16_t>(2 * i);
      order[1][i] = static_cast<uint16_t>(2 * i + 1);
    }
    const __m512i factor = _mm512_set1_epi16(centred ? -3 : -2);
    const int64_t kernel_h = shape->window.geometry.kernel_h;
    for (int64_t v = 0; v * kTableLanes < pixels; ++v) {
      __m512i low = _mm512_setzero_si512();
      __m512i high = _mm512_setzero_si512();
      for (int64_t kh = 0; kh < kernel_h; ++kh) {
        const uint16_t* sums = scratch->code_sums + row_offsets[kh] + first + v * kTableLanes;
        low = _mm512_add_epi16(low, _mm512_loadu_si512(sums));
        high = _mm512_add_epi16(high, _mm512_loadu_si512(sums + 32));
      }
      const auto positions = [&](const uint16_t* index) {
        const __m512i sums = _mm512_permutex2var_epi16(low, _mm512_load_si512(index), high);
        return _mm512_mullo_epi16(sums, factor);
      };
      scratch->bases[v] = {positions(order[0]), positions(order[1])};
    }
  }

  void finish(const VectorEpilogue& epilogue, int64_t y, int64_t x, int64_t pixels, int64_t offset,
              int64_t channel) const {
    alignas(64) int32_t lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = -zero_point * level_sums[channel + i];
    const Ints correction = load_ints(lanes);
    const int64_t count = min_of(shape->window.geometry.out_channels - channel, kLanes);
    const __m128i doubling = _mm_cvtsi32_si128(centred ? 1 : 0);
    finish_vector(epilogue, y, x, pixels, channel, count, [&](int64_t p) {
      const int64_t pixel = offset + p;
      const uint16_t* row =
          scratch->rows +
          (pixel / kTableLanes * kTableLanes + sums_row(pixel % kTableLanes)) * kLanes;
      const Ints sums =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      const Ints products = _mm512_sll_epi32(sums, doubling);
      return to_floats(add(add(products, splat(scratch->base[pixel])), correction));
    });
  }
};

inline void conv_table(const ConvTask& task, void* memory) {
  const MixedConv2dArgs& args = *task.args;
  const ConvGeometry& g = args.geometry;
  const WindowShape window = window_shape(g, args.input, args.output.width);
  const int64_t most_rows = table_band_rows(window, args.output.height);
  const TableScratch scratch = table_scratch(table_shape(window, most_rows), memory);
  const RowSource source = row_source(task, scratch.codes.row);
  const bool as_planes = fits_plane_epilogue(task);
  const bool in_place = fits_vector_epilogue(task, g.out_channels / g.groups);
  const VectorEpilogue epilogue =
      in_place ? vector_epilogue(task) : scaling_epilogue(task, scratch.block, g.out_channels);
  const Epilogue rest = block_epilogue(task, scratch.block_values, scratch.block_codes);

  TableMultiply multiply;
  multiply.scratch = &scratch;
  multiply.layout = table_layout(g);
  multiply.zero_point = source.range.zero_point;
  multiply.centred = args.weight.centred[index_of(args.weight.widths, task.bits)];
  const TableWeightScratch weights =
      table_weight_scratch(g, static_cast<uint8_t*>(memory) + scratch.bytes);
  read_numbers(static_cast<const uint8_t*>(task.tile), multiply.layout.numbers, weights.numbers);
  if (multiply.zero_point != 0) {
    sum_table_levels(g, multiply.layout, weights.numbers, multiply.centred, weights.level_sums);
  } else {
    std::memset(weights.level_sums, 0,
                static_cast<size_t>(multiply.layout.outputs) * sizeof(int32_t));
  }
  multiply.weights = weights.numbers;
  multiply.level_sums = weights.level_sums;

  const NextSample next(task);
  for (int64_t begin = task.row_begin; begin < task.row_end; begin += most_rows) {
    const int64_t rows = min_of(most_rows, task.row_end - begin);
    const TableShape shape = table_shape(window, rows);
    multiply.shape = &shape;
    load_table_codes(shape, source, begin, scratch.codes);
    sum_codes(shape, scratch.codes.codes, scratch.code_sums);
    int64_t row_offsets[kMaxTableRows];
    for (int64_t kh = 0; kh < g.kernel_h; ++kh) {
      const int64_t row = kh * g.dilation_h;
      row_offsets[kh] = (row % g.stride_h * shape.phase_rows + row / g.stride_h) * window.out_width;
    }
    multiply.row_offsets = row_offsets;
    const int64_t pixels = rows * window.out_width;
    for (int64_t first = 0; first < pixels; first += kTablePixels) {
      const int64_t count = min_of(pixels - first, kTablePixels);
      const int64_t position = begin * window.out_width + first;
      next.fetch(position / kTablePixels,
                 ceil_div(args.output.height * window.out_width, kTablePixels));
      if (as_planes) {
        multiply.correct_planes(first, count);
        if (epilogue.residual_form != ResidualForm::kNone) {
          split_bytes(epilogue.residual.base + position * g.out_channels, count, g.out_channels,
                      scratch.planes.halves, scratch.planes.residuals, kTablePixels);
        }
      } else {
        multiply.correct_pixels(first, count);
      }
      for (int64_t channel = 0; channel < g.out_channels; channel += kTableSpan) {
        const int64_t channels = round_up(min_of(g.out_channels - channel, kTableSpan), kLanes);
        multiply.sum(first, count, channel, channels);
        if (as_planes) {
          const int64_t used = min_of(g.out_channels - channel, kTableSpan);
          if (task.code_steps != nullptr) {
            multiply.step_planes(task.code_steps, count, channel, used);
          } else {
            multiply.finish_planes(epilogue, count, channel, used);
          }
          continue;
        }
        for (int64_t o = 0; o < channels; o += kLanes) {
          for (int64_t v = 0; v * kTableLanes < count; ++v) {
            transpose_sums(scratch.sums + o * kTableVectors + v, kTableVectors,
                           scratch.rows + v * kTableLanes * kLanes);
          }
          if (!in_place) {
            multiply.finish(epilogue, 0, 0, count, 0, channel + o);
            continue;
          }
          for_each_run(first, count, window.out_width,
                       [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                         multiply.finish(epilogue, begin + y, x, run, offset, channel + o);
                       });
        }
      }
      if (as_planes) {
        store_planes(scratch.planes, epilogue.bits, g.out_channels, kTablePixels, count,
                     epilogue.output.base + position * epilogue.output.pixel_step);
        continue;
      }
      if (in_place) continue;
      for_each_run(first, count, window.out_width,
                   [&](int64_t y, int64_t x, int64_t run, int64_t offset) {
                     for (int64_t i = 0; i < run; i += kFinishPixels) {
                       finish_run(rest, begin + y, x + i, min_of(run - i, kFinishPixels),
                                  scratch.block + (offset + i) * g.out_channels);
                     }
                   });
    }
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
