#include <algorithm>
#include <chrono>

#include "dispatch.h"
#include "operations.h"

namespace dfs {
namespace {

double best_rate(int64_t (*multiply)(int64_t)) {
  if (multiply == nullptr) return 0.0;
  constexpr int64_t kRounds = 100000;
  constexpr int kTries = 12;
  double best = 0.0;
  for (int i = 0; i < kTries; ++i) {
    const auto start = std::chrono::steady_clock::now();
    const double products = static_cast<double>(multiply(kRounds));
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, products / seconds.count());
  }
  return best;
}

}  // namespace

PeakRates peak_rates() {
  const KernelTable& table = kernels();
  return {best_rate(table.multiply_floats), best_rate(table.multiply_codes)};
}

}  // namespace dfs
