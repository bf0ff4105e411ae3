// One step of a recurrent gate, in float64: a sample's features are pooled, embedded, run through
// an LSTM cell and mapped to one logit a choice.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "checks.h"
#include "dispatch.h"
#include "gate_step.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

// About what the LSTM step of a gate of ten units takes.
constexpr double kStepNanoseconds = 400.0;

void pool_values(const FeatureMap& map, int64_t sample, double* means) {
  const double pixels = static_cast<double>(map.height * map.width);
  for (int64_t c = 0; c < map.channels; ++c) {
    const float* plane = map.values + sample * map.stride_n + c * map.stride_c;
    double sum = 0.0;
    for (int64_t y = 0; y < map.height; ++y) {
      for (int64_t x = 0; x < map.width; ++x) sum += plane[y * map.stride_h + x * map.stride_w];
    }
    means[c] = sum / pixels;
  }
}

// A packed sample at 32 bits as a float map of one sample.
FeatureMap float_view(const FeatureMap& map, const float* row) {
  FeatureMap view;
  view.channels = map.channels;
  view.height = map.height;
  view.width = map.width;
  view.values = const_cast<float*>(row);  // never written through
  view.stride_c = 1;
  view.stride_h = map.channels * map.width;
  view.stride_w = map.channels;
  return view;
}

void pool_codes(const FeatureMap& map, int64_t sample, const KernelTable& table, void* scratch,
                double* means) {
  const int32_t bits = map.bits[sample];
  const uint8_t* row = map.codes + sample * map.row_bytes;
  const int64_t pixels = map.height * map.width;
  if (bits == 0) {
    std::fill(means, means + map.channels, 0.0);
    return;
  }
  if (bits == 32) {
    // Rows may begin at any byte.
    std::memcpy(scratch, row, static_cast<size_t>(pixels * map.channels) * sizeof(float));
    pool_values(float_view(map, static_cast<const float*>(scratch)), 0, means);
    return;
  }
  auto* sums = static_cast<int32_t*>(scratch);
  if (bits != 8) {
    auto* unpacked = reinterpret_cast<uint8_t*>(sums + map.channels);
    table.unpack_pixels(row, pixels, map.channels, bits, false, unpacked);
    row = unpacked;
  }
  table.sum_pixels(row, pixels, map.channels, sums);
  const int index = index_of(map.quantizer.widths, bits);
  const int64_t zero = pixels * map.quantizer.zero_point[index];
  const double step = static_cast<double>(map.quantizer.scale[index]) / static_cast<double>(pixels);
  for (int64_t c = 0; c < map.channels; ++c) means[c] = static_cast<double>(sums[c] - zero) * step;
}

}  // namespace

size_t pool_scratch_bytes(const FeatureMap& map) {
  if (!is_packed(map)) return 0;
  const int64_t values = map.channels * map.height * map.width;
  const WidthTable& widths = map.quantizer.widths;
  const int64_t unpacked = index_of(widths, 2) >= 0 || index_of(widths, 4) >= 0 ? values : 0;
  const int64_t sums = map.channels * static_cast<int64_t>(sizeof(int32_t)) + unpacked;
  const int64_t floats =
      index_of(widths, 32) >= 0 ? values * static_cast<int64_t>(sizeof(float)) : 0;
  return static_cast<size_t>(std::max(sums, floats));
}

void pool_sample(const FeatureMap& map, int64_t sample, const KernelTable& table, void* scratch,
                 double* means) {
  if (is_packed(map)) {
    pool_codes(map, sample, table, scratch, means);
  } else {
    pool_values(map, sample, means);
  }
}

LinearMap::LinearMap(const float* weight, const float* bias, int64_t rows, int64_t columns)
    : rows_(rows), columns_(columns) {
  const auto step = static_cast<size_t>(gate_room(rows));
  bias_.resize(step);
  std::copy_n(bias, rows, bias_.begin());
  weight_.resize(step * static_cast<size_t>(columns));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      weight_[static_cast<size_t>(column) * step + static_cast<size_t>(row)] =
          weight[row * columns + column];
    }
  }
}

int64_t cheapest_argmax(const double* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (std::isnan(logits[k])) return count - 1;
    if (logits[k] > logits[best]) best = k;
  }
  return best;
}

size_t gate_scratch_bytes(const RnnGateMaps& maps, const FeatureMap& features) {
  const int64_t hidden = maps.embed->rows();
  const int64_t doubles =
      gate_room(features.channels) + gate_room(hidden) + 2 * gate_room(4 * hidden) + kGateRows;
  return static_cast<size_t>(doubles) * sizeof(double) + pool_scratch_bytes(features);
}

int64_t gate_step(const GateStep& step, const RnnGateMaps& maps, const KernelTable& table,
                  void* scratch) {
  const int64_t hidden = maps.embed->rows();
  const int64_t cells = gate_room(hidden);
  auto* means = static_cast<double*>(scratch);
  double* x = means + gate_room(step.features->channels);
  double* recurrent = x + gate_room(hidden);
  double* gates = recurrent + gate_room(4 * hidden);
  pool_sample(*step.features, step.sample, table, gates + gate_room(4 * hidden) + kGateRows, means);
  maps.embed->apply(table, means, x);
  maps.input->apply(table, x, gates);
  maps.recurrent->apply(table, step.state_before, recurrent);
  for (int64_t i = 0; i < 4 * hidden; ++i) gates[i] += recurrent[i];
  table.lstm_units(gates, hidden, step.state_before + cells, step.state_after + cells,
                   step.state_after);
  maps.project->apply(table, step.state_after, step.logits);
  const int64_t count = maps.project->rows();
  for (int64_t k = 0; k < count; ++k) step.logits[k] += step.choice_bias[k];
  return cheapest_argmax(step.logits, count);
}

namespace {

// Bytes for a sample of the op: its step, two padded states and its logits.
size_t rnn_gate_scratch_bytes(const RnnGateArgs& args, const RnnGateMaps& maps) {
  const int64_t doubles = 4 * gate_room(args.hidden) + gate_room(args.choice_count);
  return static_cast<size_t>(doubles) * sizeof(double) + gate_scratch_bytes(maps, args.input);
}

void rnn_gate_sample(const RnnGateArgs& args, const RnnGateMaps& maps, int64_t sample,
                     const KernelTable& table, void* scratch) {
  const int64_t hidden = args.hidden;
  const int64_t room = gate_room(hidden);
  auto* before = static_cast<double*>(scratch);
  double* after = before + 2 * room;
  double* logits = after + 2 * room;
  const int64_t outputs = sample * hidden;
  const int64_t cells = (args.batch + sample) * hidden;
  std::fill_n(before, 2 * room, 0.0);
  if (args.state != nullptr) {
    std::copy_n(args.state + outputs, hidden, before);
    std::copy_n(args.state + cells, hidden, before + room);
  }
  const GateStep step = {&args.input, sample, before, args.choice_bias, after, logits};
  const int64_t choice = gate_step(step, maps, table, logits + gate_room(args.choice_count));
  args.out_bits[sample] = args.choices[choice];
  std::copy_n(logits, args.choice_count, args.out_logits + sample * args.choice_count);
  std::copy_n(after, hidden, args.out_state + outputs);
  std::copy_n(after + room, hidden, args.out_state + cells);
}

}  // namespace

void rnn_gate(const RnnGateArgs& args, int threads) {
  const FeatureMap& map = args.input;
  check_stored_widths(map, args.batch, "input");
  if (map.height * map.width > std::numeric_limits<int32_t>::max() / 255) {
    reject("input: more pixels than an int32 sum of their codes can hold");
  }
  const KernelTable& table = kernels();
  const int64_t values = map.channels * map.height * map.width;
  const double cost = static_cast<double>(values) * kNanosecondsPerValue + kStepNanoseconds;
  const int64_t hidden = args.hidden;
  const LinearMap embed(args.embed_weight, args.embed_bias, hidden, map.channels);
  const LinearMap input(args.weight_ih, args.bias_ih, 4 * hidden, hidden);
  const LinearMap recurrent(args.weight_hh, args.bias_hh, 4 * hidden, hidden);
  const LinearMap project(args.proj_weight, args.proj_bias, args.choice_count, hidden);
  const RnnGateMaps maps = {&embed, &input, &recurrent, &project};
  parallel_for_scratch(
      args.batch, cost, threads, rnn_gate_scratch_bytes(args, maps),
      [&](int64_t sample, void* memory) { rnn_gate_sample(args, maps, sample, table, memory); });
}

}  // namespace dfs
