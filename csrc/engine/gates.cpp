#include "gates.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "checks.h"

namespace dfs {
namespace {

// Keeps a gradient finite in training, so it belongs to the value.
constexpr double kLeastVariance = 1e-10;

// Channel deviations of one sample, those of integer codes from exact sums.
void spread_sample(const FeatureMap& map, const double* means, double* deviations) {
  const int64_t pixels = map.height * map.width;
  for (int64_t c = 0; c < map.channels; ++c) {
    double variance = 0.0;
    if (is_packed(map)) {
      int64_t sum = 0;
      int64_t squares = 0;
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t code = map.codes[i * map.channels + c];
        sum += code;
        squares += code * code;
      }
      const double step = static_cast<double>(map.quantizer.scale[0]) / static_cast<double>(pixels);
      variance = static_cast<double>(pixels * squares - sum * sum) * (step * step);
    } else {
      for (int64_t y = 0; y < map.height; ++y) {
        for (int64_t x = 0; x < map.width; ++x) {
          const float value = map.values[y * map.stride_h + x * map.stride_w + c * map.stride_c];
          const double difference = static_cast<double>(value) - means[c];
          variance += difference * difference;
        }
      }
      variance /= static_cast<double>(pixels);
    }
    deviations[c] = std::sqrt(variance + kLeastVariance);
  }
}

}  // namespace

Gates::Gates(const NetworkSpec& spec) : hidden_(spec.hidden), choices_(spec.choices) {
  if (spec.gates.empty()) return;
  const int64_t count = choice_count();
  if (count < 1 || count > kMaxChoices) reject("network: it has gates, but no choices");
  choice_bias_.assign(spec.choice_bias, spec.choice_bias + count);
  if (spec.gates[0].kind == GateKind::kRecurrent) {
    input_ = LinearMap(spec.weight_ih, spec.bias_ih, 4 * hidden_, hidden_);
    recurrent_ = LinearMap(spec.weight_hh, spec.bias_hh, 4 * hidden_, hidden_);
    project_ = LinearMap(spec.proj_weight, spec.proj_bias, count, hidden_);
  }
  size_t index = 0;
  for (const BlockSpec& block : spec.blocks) {
    if (block.fixed_bits >= 0) continue;
    if (index == spec.gates.size()) reject("network: fewer gates than gated blocks");
    if (block.layers.empty()) reject("network: a block without convolutions");
    const GateSpec& from = spec.gates[index++];
    if (from.kind != spec.gates[0].kind) reject("network: gates of different kinds");
    Gate gate;
    gate.kind = from.kind;
    gate.deviation = from.deviation;
    if (from.kind != GateKind::kConstant) {
      const int64_t channels = block.layers[0].geometry.in_channels;
      gate.embed = LinearMap(from.embed_weight, from.embed_bias, hidden_,
                             channels * (from.deviation ? 2 : 1));
    }
    if (from.kind == GateKind::kFeedForward) {
      gate.project = LinearMap(from.proj_weight, from.proj_bias, count, hidden_);
    }
    if (from.kind == GateKind::kConstant) {
      gate.logits.assign(from.proj_bias, from.proj_bias + count);
    }
    gates_.push_back(std::move(gate));
  }
  if (gates_.size() != spec.gates.size()) reject("network: more gates than gated blocks");
}

size_t Gates::scratch_bytes(const FeatureMap& features) const {
  if (gates_.empty()) return 0;
  const Gate& gate = gates_[0];
  if (gate.kind == GateKind::kRecurrent) {
    return gate_scratch_bytes(maps_of(gate), features);
  }
  // Means, deviations and hidden units.
  const int64_t doubles = 2 * features.channels + gate_room(hidden_);
  return static_cast<size_t>(doubles) * sizeof(double) + pool_scratch_bytes(features);
}

int32_t Gates::decide(int64_t index, const GateStep& step, const KernelTable& table,
                      void* scratch) const {
  const Gate& gate = gates_[static_cast<size_t>(index)];
  int64_t choice = 0;
  if (gate.kind == GateKind::kRecurrent) {
    choice = gate_step(step, maps_of(gate), table, scratch);
  } else if (gate.kind == GateKind::kFeedForward) {
    choice = decide_feed_forward(gate, step, table, scratch);
  } else {
    for (size_t k = 0; k < choices_.size(); ++k) {
      step.logits[k] = gate.logits[k] + step.choice_bias[k];
    }
    choice = cheapest_argmax(step.logits, choice_count());
  }
  return choices_[static_cast<size_t>(choice)];
}

int64_t Gates::decide_feed_forward(const Gate& gate, const GateStep& step, const KernelTable& table,
                                   void* scratch) const {
  const int64_t channels = step.features->channels;
  auto* features = static_cast<double*>(scratch);
  double* units = features + 2 * channels;
  pool_sample(*step.features, step.sample, table, units + gate_room(hidden_), features);
  if (gate.deviation) spread_sample(*step.features, features, features + channels);
  gate.embed.apply(table, features, units);
  for (int64_t i = 0; i < hidden_; ++i) units[i] = units[i] <= 0.0 ? 0.0 : units[i];  // keeps NaN
  gate.project.apply(table, units, step.logits);
  for (int64_t k = 0; k < choice_count(); ++k) step.logits[k] += step.choice_bias[k];
  return cheapest_argmax(step.logits, choice_count());
}

}  // namespace dfs
