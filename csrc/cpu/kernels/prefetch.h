// Fetches the next sample while this one is computed: one phase of a convolution waits for memory
// and the other doesn't touch it, so that hardware alone overlaps little.
#pragma once

#include "bit_packing.h"
#include "isa.h"
#include "kernel_table.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// The memory of one sample, if it lies in one piece; else none.
struct SampleMemory {
  const uint8_t* begin = nullptr;
  int64_t bytes = 0;
};

inline SampleMemory sample_memory(const FeatureMap& map, int64_t sample) {
  const int64_t pixels = map.height * map.width;
  if (map.bits != nullptr) {
    return {map.codes + sample * map.row_bytes,
            pixels * packed_bytes(map.channels, map.bits[sample])};
  }
  if (map.stride_n != pixels * map.channels) return {};
  return {reinterpret_cast<const uint8_t*>(map.values + sample * map.stride_n),
          map.stride_n * static_cast<int64_t>(sizeof(float))};
}

// Reads ahead what the sample after a task's own needs, bit by bit.
class NextSample {
 public:
  explicit NextSample(const ConvTask& task) {
    const MixedConv2dArgs& args = *task.args;
    const int64_t next = task.sample + 1;
    // Rows of one sample are only split where there are few samples.
    const bool whole = task.row_begin == 0 && task.row_end == args.output.height;
    if (!whole || next >= args.batch || args.bits[next] == 0) return;
    input_ = sample_memory(args.input, next);
    output_ = sample_memory(args.output, next);
  }

  // To be called for every part of the task's own output.
  void fetch(int64_t part, int64_t parts) const {
    fetch_lines(input_, part, parts);
    fetch_lines(output_, part, parts);
  }

 private:
  static void fetch_lines(const SampleMemory& memory, int64_t part, int64_t parts) {
    constexpr int64_t kLine = 64;
    const int64_t lines = memory.bytes / kLine;
    const int64_t end = lines * (part + 1) / parts;
    for (int64_t line = lines * part / parts; line < end; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(memory.begin + line * kLine), _MM_HINT_T1);
    }
  }

  SampleMemory input_;
  SampleMemory output_;
};

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
