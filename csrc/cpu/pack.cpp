#include "checks.h"
#include "dispatch.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

void check_code_bits(int32_t bits) {
  if (bits == 1 || bits == 2 || bits == 4 || bits == 8) return;
  reject("bits = " + std::to_string(bits) + " is not one of 1, 2, 4, 8");
}

// Calls fn(first, count) for runs of rows.
template <typename Fn>
void for_row_runs(int64_t rows, int64_t channels, int threads, Fn fn) {
  constexpr int64_t kRunCodes = 16 << 10;
  const int64_t run = std::max<int64_t>(kRunCodes / std::max<int64_t>(channels, 1), 1);
  const int64_t runs = (rows + run - 1) / run;
  const double cost = static_cast<double>(run * channels) * kNanosecondsPerValue;
  parallel_for(runs, cost, threads, [&](int64_t task, int) {
    const int64_t first = task * run;
    fn(first, std::min(run, rows - first));
  });
}

}  // namespace

void pack_bits(const uint8_t* codes, int64_t rows, int64_t channels, int32_t bits, uint8_t* packed,
               int threads) {
  check_code_bits(bits);
  const KernelTable& table = kernels();
  const int64_t bytes = (channels * bits + 7) / 8;
  for_row_runs(rows, channels, threads, [&](int64_t first, int64_t count) {
    table.pack_pixels(codes + first * channels, count, channels, bits, packed + first * bytes);
  });
}

void unpack_bits(const uint8_t* packed, int64_t rows, int64_t channels, int32_t bits,
                 bool is_signed, uint8_t* codes, int threads) {
  check_code_bits(bits);
  const KernelTable& table = kernels();
  const int64_t bytes = (channels * bits + 7) / 8;
  for_row_runs(rows, channels, threads, [&](int64_t first, int64_t count) {
    table.unpack_pixels(packed + first * bytes, count, channels, bits, is_signed,
                        codes + first * channels);
  });
}

}  // namespace dfs
