// Splits work into tasks for the pool and gives each its scratch memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "scratch.h"
#include "thread_pool.h"

namespace dfs {

// A guess, good enough to tell work that is worth a second thread from work that is not.
constexpr double kNanosecondsPerValue = 0.2;

// Rows [row_begin, row_end) of a sample.
struct RowRange {
  int64_t sample;
  int64_t row_begin;
  int64_t row_end;
};

// Splits the samples, cost_of(sample) nanoseconds each, into tasks that several threads can share
// evenly: by samples and, if these are too few, by rows.
template <typename CostOf>
std::vector<RowRange> split_rows(const std::vector<int64_t>& samples, int64_t height, int threads,
                                 CostOf cost_of) {
  double total = 0.0;
  for (const int64_t sample : samples) total += cost_of(sample);
  // Several tasks per thread even out what the costs get wrong.
  const double most = std::max(total / (4.0 * std::max(threads, 1)), 0.5 * min_thread_cost());
  std::vector<RowRange> ranges;
  ranges.reserve(samples.size());
  for (const int64_t sample : samples) {
    int64_t parts = 1;
    if (threads > 1 && cost_of(sample) > most) {
      const double wanted = std::ceil(cost_of(sample) / most);
      parts = wanted < static_cast<double>(height) ? static_cast<int64_t>(wanted) : height;
    }
    for (int64_t part = 0; part < parts; ++part) {
      ranges.push_back({sample, height * part / parts, height * (part + 1) / parts});
    }
  }
  return ranges;
}

// parallel_for over tasks that each need `scratch_bytes` of memory: fn(task, memory).
template <typename Fn>
void parallel_for_scratch(int64_t count, double cost, int threads, size_t scratch_bytes, Fn fn) {
  parallel_for(count, cost, threads, [&](int64_t task, int) {
    const Scratch scratch(scratch_bytes);
    fn(task, scratch.data());
  });
}

}  // namespace dfs
