// The gates of a frozen network: from a sample's stream to the width of the next block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gate_step.h"
#include "kernel_table.h"
#include "network.h"

namespace dfs {

// What a gate works with besides its parameters.
struct GateTask {
  FeatureMap features;  // of one sample
  bool has_state = false;
  const double* state_before = nullptr;  // (2, H), of recurrent gates
  double* state_after = nullptr;
  const double* choice_bias = nullptr;  // (K), or null for the network's own
  double* logits = nullptr;             // (K), written
  void* scratch = nullptr;
};

class Gates {
 public:
  explicit Gates(const NetworkSpec& spec);

  int64_t count() const { return static_cast<int64_t>(gates_.size()); }
  int64_t choice_count() const { return static_cast<int64_t>(choices_.size()); }
  int64_t hidden() const { return hidden_; }

  size_t scratch_bytes(const FeatureMap& features) const;
  // The width that gate `index` chooses.
  int32_t decide(int64_t index, const GateTask& task, const KernelTable& table) const;

 private:
  struct Gate {
    GateKind kind;
    bool deviation;
    LinearMap embed;
    LinearMap project;           // of a feed-forward gate
    std::vector<double> logits;  // of a constant one
  };

  int64_t decide_recurrent(const Gate& gate, const GateTask& task, const KernelTable& table) const;
  int64_t decide_feed_forward(const Gate& gate, const GateTask& task,
                              const KernelTable& table) const;

  std::vector<Gate> gates_;
  int64_t hidden_;
  std::vector<int32_t> choices_;
  std::vector<double> choice_bias_;
  LinearMap input_, recurrent_, project_;  // of recurrent gates
};

}  // namespace dfs
