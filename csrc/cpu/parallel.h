// Splits work into tasks for the pool and gives each its scratch memory.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "scratch.h"
#include "thread_pool.h"

namespace dfs {

// Guesses, good enough to tell work that is worth a second thread from work that is not.
constexpr double kNanosecondsPerMac = 0.1;
constexpr double kNanosecondsPerValue = 1.0;

// Rows [row_begin, row_end) of a sample.
struct RowRange {
  int64_t sample;
  int64_t row_begin;
  int64_t row_end;
};

// Splits `samples` evenly by samples and, if these are too few to keep all threads busy, by rows.
inline std::vector<RowRange> split_rows(const std::vector<int64_t>& samples, int64_t height,
                                        double sample_cost, int threads) {
  const int64_t count = static_cast<int64_t>(samples.size());
  // Several tasks per thread even out samples of different widths.
  const int64_t wanted = threads > 1 ? int64_t{4} * threads : 1;
  int64_t parts = 1;
  if (count > 0 && count < wanted) {
    parts = (wanted + count - 1) / count;
    parts = std::min(parts, static_cast<int64_t>(sample_cost / min_thread_cost()) + 1);
    parts = std::max<int64_t>(std::min(parts, height), 1);
  }
  std::vector<RowRange> ranges;
  ranges.reserve(static_cast<size_t>(count * parts));
  for (int64_t sample : samples) {
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
