// A gate's decision for one sample, without allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "dfs/types.h"
#include "kernel_table.h"

namespace dfs {

// Bytes of scratch that pooling a sample of such a map takes.
size_t pool_scratch_bytes(const FeatureMap& map);

// Channel means of a sample in double; of integer codes from exact sums. A sample stored at 0 bits
// gives zeros.
void pool_sample(const FeatureMap& map, int64_t sample, const KernelTable& table, void* scratch,
                 double* means);

// A linear map in double, its weights as KernelTable::map_columns takes them.
class LinearMap {
 public:
  LinearMap() = default;
  // From a weight (rows, columns) and a bias (rows).
  LinearMap(const float* weight, const float* bias, int64_t rows, int64_t columns);

  // `result` has gate_room(rows()) values.
  void apply(const KernelTable& table, const double* x, double* result) const {
    table.map_columns(weight_.data(), bias_.data(), static_cast<int64_t>(bias_.size()), columns_, x,
                      result);
  }

  int64_t rows() const { return rows_; }

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  std::vector<double> weight_;
  std::vector<double> bias_;  // padded
};

// Index of the largest logit, the lowest among equals; the last one where a NaN leaves no largest.
int64_t cheapest_argmax(const double* logits, int64_t count);

// What a recurrent gate computes with; those but `embed` are shared by the gates of a network.
struct RnnGateMaps {
  const LinearMap* embed;
  const LinearMap* input;
  const LinearMap* recurrent;
  const LinearMap* project;
};

// One step for one sample. States hold outputs, then cells, each padded to gate_room(H).
struct GateStep {
  const FeatureMap* features = nullptr;
  int64_t sample = 0;
  const double* state_before = nullptr;
  const double* choice_bias = nullptr;  // (K)
  double* state_after = nullptr;
  double* logits = nullptr;  // gate_room(K)
};

size_t gate_scratch_bytes(const RnnGateMaps& maps, const FeatureMap& features);

// The index of the choice.
int64_t gate_step(const GateStep& step, const RnnGateMaps& maps, const KernelTable& table,
                  void* scratch);

}  // namespace dfs
