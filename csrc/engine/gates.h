// The gates of a frozen network: from a sample's stream to the width of the next block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gate_step.h"
#include "kernel_table.h"
#include "network.h"

namespace dfs {

class Gates {
 public:
  explicit Gates(const NetworkSpec& spec);

  int64_t count() const { return static_cast<int64_t>(gates_.size()); }
  int64_t choice_count() const { return static_cast<int64_t>(choices_.size()); }
  int64_t hidden() const { return hidden_; }

  size_t scratch_bytes(const FeatureMap& features) const;
  const std::vector<double>& choice_bias() const { return choice_bias_; }
  // The width that gate `index` chooses. States are those of recurrent gates.
  int32_t decide(int64_t index, const GateStep& step, const KernelTable& table,
                 void* scratch) const;

 private:
  struct Gate {
    GateKind kind;
    bool deviation;
    LinearMap embed;
    LinearMap project;           // of a feed-forward gate
    std::vector<double> logits;  // of a constant one
  };

  RnnGateMaps maps_of(const Gate& gate) const {
    return {&gate.embed, &input_, &recurrent_, &project_};
  }
  int64_t decide_feed_forward(const Gate& gate, const GateStep& step, const KernelTable& table,
                              void* scratch) const;

  std::vector<Gate> gates_;
  int64_t hidden_;
  std::vector<int32_t> choices_;
  std::vector<double> choice_bias_;
  LinearMap input_, recurrent_, project_;  // of recurrent gates
};

}  // namespace dfs
