#include <algorithm>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

// Elements of a task. Sums are carried from task to task, so it must not depend on the threads.
constexpr int64_t kBlock = 1 << 14;

void check_quantizer(const FakeQuantizer& quantizer) {
  if (quantizer.bits < 1 || quantizer.bits > 16) {
    reject("bits must lie in [1, 16], got " + std::to_string(quantizer.bits));
  }
}

// fn(block, first element, elements) for each block.
template <typename Fn>
void for_each_block(int64_t count, int threads, Fn fn) {
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  parallel_for(blocks, static_cast<double>(std::min(count, kBlock)) * kNanosecondsPerValue, threads,
               [&](int64_t block, int) {
                 const int64_t first = block * kBlock;
                 fn(block, first, std::min(kBlock, count - first));
               });
}

}  // namespace

void fake_quantize(const float* values, int64_t count, const FakeQuantizer& quantizer,
                   float* result, int threads) {
  check_quantizer(quantizer);
  const KernelTable& table = kernels();
  for_each_block(count, threads, [&](int64_t, int64_t first, int64_t elements) {
    table.fake_quantize(values + first, elements, quantizer, result + first);
  });
}

double fake_quantize_backward(const float* grads, const float* values, int64_t count,
                              const FakeQuantizer& quantizer, float* result, int threads) {
  check_quantizer(quantizer);
  const KernelTable& table = kernels();
  std::vector<double> sums(static_cast<size_t>((count + kBlock - 1) / kBlock));
  for_each_block(count, threads, [&](int64_t block, int64_t first, int64_t elements) {
    sums[static_cast<size_t>(block)] = table.fake_quantize_backward(
        grads + first, values + first, elements, quantizer, result + first);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace dfs
