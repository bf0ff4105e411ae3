#include "checks.h"
#include "dispatch.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

using ConvertRows = void (*)(const FeatureMap&, const FeatureMap&, int64_t, int64_t, int64_t,
                             void*);

void convert(const FeatureMap& src, const FeatureMap& dst, int64_t batch, int threads,
             const KernelTable& table, ConvertRows convert_rows) {
  if (src.channels * src.height * src.width == 0) return;
  std::vector<int64_t> samples;
  for (int64_t n = 0; n < batch; ++n) {
    if (!is_packed(dst) || dst.bits[n] != 0) samples.push_back(n);
  }
  const double sample_cost =
      static_cast<double>(src.channels * src.height * src.width) * kNanosecondsPerValue;
  const std::vector<RowRange> ranges =
      split_rows(samples, src.height, threads, [=](int64_t) { return sample_cost; });
  const int64_t count = static_cast<int64_t>(ranges.size());
  const double cost = sample_cost * static_cast<double>(samples.size()) /
                      static_cast<double>(std::max<int64_t>(count, 1));
  parallel_for_scratch(count, cost, threads, table.convert_scratch_bytes(src.channels, src.width),
                       [&](int64_t task, void* memory) {
                         const RowRange& range = ranges[static_cast<size_t>(task)];
                         convert_rows(src, dst, range.sample, range.row_begin, range.row_end,
                                      memory);
                       });
}

}  // namespace

void quantize_pack(const FeatureMap& src, const FeatureMap& dst, int64_t batch, int threads) {
  check_stored_widths(dst, batch, "output");
  const KernelTable& table = kernels();
  convert(src, dst, batch, threads, table, table.quantize_rows);
}

void unpack_dequantize(const FeatureMap& src, const FeatureMap& dst, int64_t batch, int threads) {
  check_stored_widths(src, batch, "input");
  const KernelTable& table = kernels();
  convert(src, dst, batch, threads, table, table.dequantize_rows);
}

void quantize_weight(const float* weight, int64_t out_channels, int64_t kernel_h, int64_t kernel_w,
                     int64_t group_channels, const float* scale, int32_t bits, bool centred,
                     uint8_t* packed, int threads) {
  check_weight_bits(bits, false);
  const KernelTable& table = kernels();
  const int64_t taps = kernel_h * kernel_w;
  const int64_t filter_bytes = taps * ((group_channels * bits + 7) / 8);
  const double cost = static_cast<double>(taps * group_channels) * 2 * kNanosecondsPerValue;
  parallel_for(out_channels, cost, threads, [&](int64_t o, int) {
    table.quantize_filter(weight + o * taps * group_channels, group_channels, taps, scale[o], bits,
                          centred, packed + o * filter_bytes);
  });
}

}  // namespace dfs
