// Weights: floats to canonical codes, and these to the fragments of the tensor-core kernel.
#include "bit_planes.h"
#include "codes.h"
#include "conv_layout.h"
#include "conv_mma.h"
#include "cuda_operations.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 128;

struct QuantizeWeightParams {
  const float* weight;
  const float* scale;
  uint8_t* packed;
  int64_t bytes;
  int group_channels;
  int taps;
  int bits;
  bool centred;
};

DFS_DEVICE uint32_t weight_code(float value, float reciprocal, int bits, bool centred) {
  const float low = to_float(-(1 << (bits - 1)));
  const float high = to_float((1 << (bits - 1)) - 1);
  const float t = multiply(value, reciprocal);
  // Clamped integers either way, so that rounding them again changes nothing.
  const float kept = smaller(larger(centred ? floorf(t) : t, low), high);
  return float_to_bits(add(kept, kRounder)) & ((1u << bits) - 1u);
}

DFS_KERNEL(kThreads, 4)
quantize_weight_kernel(DFS_PARAMS(QuantizeWeightParams) p) {
  const int64_t item = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (item >= p.bytes) return;
  const int row_bytes = packed_bytes(p.group_channels, p.bits);
  const int per_byte = 8 / p.bits;
  const int first = static_cast<int>(item % row_bytes) * per_byte;
  const int64_t run = item / row_bytes;
  const int64_t o = run / p.taps;
  const int tap = static_cast<int>(run % p.taps);
  const float reciprocal = divide(1.0f, p.scale[o]);
  const float* filter = p.weight + o * p.group_channels * p.taps + tap;
  uint32_t byte = 0;
  for (int i = 0; i < per_byte && first + i < p.group_channels; ++i) {
    byte |= weight_code(filter[(first + i) * p.taps], reciprocal, p.bits, p.centred)
            << (i * p.bits);
  }
  p.packed[item] = static_cast<uint8_t>(byte);
}

struct RetileParams {
  const uint8_t* canonical;
  uint32_t* tile;
  WeightTiles tiles;
  bool centred;
};

// The codes of one unit's word: zero for outputs, taps and channels that there are not.
DFS_DEVICE uint32_t fragment_word(const RetileParams& p, int o, int slice, int unit, int word) {
  const WeightTiles& t = p.tiles;
  const int units = t.units_of(slice);
  const int tap = unit / units;
  if (o >= t.outputs || tap >= t.taps) return 0;
  const int row_bytes = packed_bytes(t.channels, t.bits);
  const int start = slice * t.slice_bytes + unit % units * unit_bytes(t.bits) + 4 * word;
  const uint8_t* row = p.canonical + (static_cast<int64_t>(o) * t.taps + tap) * row_bytes;
  return start < row_bytes ? load_bytes(row + start, least(4, row_bytes - start)) : 0u;
}

// The bits of one unit's word that there are channels for.
DFS_DEVICE uint32_t channel_mask(const RetileParams& p, int slice, int unit) {
  const WeightTiles& t = p.tiles;
  const int units = t.units_of(slice);
  if (unit / units >= t.taps) return 0;
  const int used = 2 * (t.channels_of(slice) - unit % units * unit_codes(2));
  return used >= 32 ? ~0u : (1u << used) - 1u;
}

// The codes of a unit, raised from -2..1 to 0..3.
DFS_DEVICE uint32_t raised_word(const RetileParams& p, int o, int slice, int unit) {
  const uint32_t sign_bits = ~kEvenBits;
  return (fragment_word(p, o, slice, unit, 0) ^ sign_bits) & channel_mask(p, slice, unit);
}

// One plane of two units' weights, or their ones.
DFS_DEVICE uint32_t plane_word(const RetileParams& p, int block, int slice, int step, int place) {
  const WeightTiles& t = p.tiles;
  if (place >= 32 * t.lane_words()) {
    const int lane = place % 4;
    return bit_plane(channel_mask(p, slice, plane_unit(step, lane, 0)),
                     channel_mask(p, slice, plane_unit(step, lane, 1)), 0);
  }
  const int lane = place / t.load_words() % 32;
  const int lane_word = place / (32 * t.load_words()) * t.load_words() + place % t.load_words();
  const PlaneWord word = PlaneWord::of(t.steps_of(slice), step, lane_word);
  const int o = block * t.block_outputs() + 8 * word.column_tile + lane / 4;
  return bit_plane(raised_word(p, o, slice, plane_unit(word.step, lane % 4, 0)),
                   raised_word(p, o, slice, plane_unit(word.step, lane % 4, 1)), word.plane);
}

DFS_KERNEL(kThreads, 4)
retile_weight_kernel(DFS_PARAMS(RetileParams) p) {
  const WeightTiles& t = p.tiles;
  const int64_t item = static_cast<int64_t>(block_index()) * kThreads + thread_index();
  if (item >= t.blocks() * t.block_words()) return;
  const int block = static_cast<int>(item / t.block_words());
  int64_t rest = item % t.block_words();
  const int slice = least(static_cast<int>(rest / t.slice_words(0)), t.slices() - 1);
  rest -= static_cast<int64_t>(slice) * t.slice_words(0);
  const int step = static_cast<int>(rest / t.step_words());
  const int place = static_cast<int>(rest % t.step_words());
  if (t.planes) {
    p.tile[t.sum_words() + item] = plane_word(p, block, slice, step, place);
    return;
  }
  // [load][lane][word of the load]
  const int lane = place / t.load_words() % 32;
  const int lane_word = place / (32 * t.load_words()) * t.load_words() + place % t.load_words();
  const int column_tile = lane_word / unit_words(t.bits);
  const int o = block * t.block_outputs() + 8 * column_tile + lane / 4;
  const int units = t.units_of(slice) * t.taps;
  const Unit unit = unit_of(t.bits, units, step, lane % 4);
  p.tile[t.sum_words() + item] =
      fragment_word(p, o, slice, unit.index, lane_word % unit_words(t.bits));
}

// A warp for each output channel.
DFS_KERNEL(32, 1)
sum_levels_kernel(DFS_PARAMS(RetileParams) p) {
  const WeightTiles& t = p.tiles;
  const int o = block_index();
  const int row_bytes = packed_bytes(t.channels, t.bits);
  int32_t sum = 0;
  if (o < t.outputs) {
    const uint8_t* filter = p.canonical + static_cast<int64_t>(o) * t.taps * row_bytes;
    for (int i = thread_index(); i < t.taps * t.channels; i += 32) {
      const int bit = i % t.channels * t.bits;
      const int sign = 1 << (t.bits - 1);
      const int low = (filter[i / t.channels * row_bytes + bit / 8] >> (bit % 8)) & (2 * sign - 1);
      const int code = (low ^ sign) - sign;
      sum += p.centred ? 2 * code + 1 : code;
    }
  }
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  if (thread_index() == 0) p.tile[o] = static_cast<uint32_t>(sum);
}

}  // namespace

void quantize_weight(const float* weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                     int64_t group_channels, const float* scale, int32_t bits, bool centred,
                     uint8_t* packed, Stream stream) {
  QuantizeWeightParams p = {};
  p.weight = weight;
  p.scale = scale;
  p.packed = packed;
  p.group_channels = static_cast<int>(group_channels);
  p.taps = static_cast<int>(kernel_h * kernel_w);
  p.bits = bits;
  p.centred = centred;
  p.bytes = out_channels * p.taps * packed_bytes(p.group_channels, bits);
  launch("quantize_weight", &quantize_weight_kernel, {ceil_div(p.bytes, kThreads), kThreads, 0}, p,
         stream);
}

size_t tile_bytes(const ConvGeometry& geometry, int32_t bits, bool centred, bool planes) {
  if (!takes_mma(geometry, bits, centred)) return 0;
  return static_cast<size_t>(weight_tiles(geometry, bits, centred, planes).words()) * 4;
}

void retile_weight(const ConvGeometry& geometry, const void* canonical, int32_t bits, bool centred,
                   void* tile, Stream stream, bool planes) {
  if (!takes_mma(geometry, bits, centred)) return;
  const RetileParams p{static_cast<const uint8_t*>(canonical), static_cast<uint32_t*>(tile),
                       weight_tiles(geometry, bits, centred, planes), centred};
  launch("sum_levels", &sum_levels_kernel, {p.tiles.sum_words(), 32, 0}, p, stream);
  const int64_t words = p.tiles.blocks() * p.tiles.block_words();
  launch("retile_weight", &retile_weight_kernel, {ceil_div(words, kThreads), kThreads, 0}, p,
         stream);
}

}  // namespace dfs::cuda
