// One step of a recurrent gate, in float64: a sample's features are pooled, embedded, run through
// an LSTM cell and mapped to one logit a choice.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "checks.h"
#include "dispatch.h"
#include "operations.h"
#include "parallel.h"

namespace dfs {
namespace {

// About what the LSTM step of a gate of ten units takes.
constexpr double kStepNanoseconds = 1500.0;

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

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
FeatureMap float_view(const FeatureMap& map, const uint8_t* row) {
  FeatureMap view;
  view.channels = map.channels;
  view.height = map.height;
  view.width = map.width;
  view.values = const_cast<float*>(reinterpret_cast<const float*>(row));
  view.stride_c = 1;
  view.stride_h = map.channels * map.width;
  view.stride_w = map.channels;
  return view;
}

void pool_codes(const FeatureMap& map, int64_t sample, const KernelTable& table, uint8_t* unpacked,
                int32_t* sums, double* means) {
  const int32_t bits = map.bits[sample];
  const uint8_t* row = map.codes + sample * map.row_bytes;
  if (bits == 0) {
    std::fill(means, means + map.channels, 0.0);
    return;
  }
  const int64_t pixels = map.height * map.width;
  if (bits == 32) {
    // Rows may begin at any byte.
    const size_t bytes = static_cast<size_t>(pixels * map.channels) * sizeof(float);
    std::vector<float> aligned(static_cast<size_t>(pixels * map.channels));
    std::memcpy(aligned.data(), row, bytes);
    pool_values(float_view(map, reinterpret_cast<const uint8_t*>(aligned.data())), 0, means);
    return;
  }
  if (bits != 8) {
    table.unpack_pixels(row, pixels, map.channels, bits, false, unpacked);
    row = unpacked;
  }
  table.sum_pixels(row, pixels, map.channels, sums);
  const int index = index_of(map.quantizer.widths, bits);
  const int64_t zero = pixels * map.quantizer.zero_point[index];
  const double step = static_cast<double>(map.quantizer.scale[index]) / static_cast<double>(pixels);
  for (int64_t c = 0; c < map.channels; ++c) means[c] = static_cast<double>(sums[c] - zero) * step;
}

// weight (rows, columns) times x, plus bias.
double dot(const float* weight, int64_t row, int64_t columns, const double* x, const float* bias) {
  double sum = 0.0;
  for (int64_t i = 0; i < columns; ++i) sum += weight[row * columns + i] * x[i];
  return sum + bias[row];
}

// Index of the largest logit, the lowest among equals; the last one where a NaN leaves no largest.
int64_t cheapest_argmax(const double* logits, int64_t count) {
  int64_t best = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (std::isnan(logits[k])) return count - 1;
    if (logits[k] > logits[best]) best = k;
  }
  return best;
}

void decide(const RnnGateArgs& args, int64_t sample, const double* means) {
  const int64_t hidden = args.hidden;
  std::vector<double> memory(static_cast<size_t>(6 * hidden), 0.0);
  double* x = memory.data();
  double* gates = x + hidden;
  double* before = gates + 4 * hidden;
  if (args.state != nullptr) {
    std::copy_n(args.state + sample * hidden, hidden, before);
  }
  for (int64_t i = 0; i < hidden; ++i) {
    x[i] = dot(args.embed_weight, i, args.input.channels, means, args.embed_bias);
  }
  for (int64_t i = 0; i < 4 * hidden; ++i) {
    gates[i] = dot(args.weight_ih, i, hidden, x, args.bias_ih) +
               dot(args.weight_hh, i, hidden, before, args.bias_hh);
  }
  const int64_t cells = (args.batch + sample) * hidden;
  double* output = args.out_state + sample * hidden;
  double* cell = args.out_state + cells;
  for (int64_t i = 0; i < hidden; ++i) {
    const double kept = args.state == nullptr ? 0.0 : args.state[cells + i];
    cell[i] =
        sigmoid(gates[hidden + i]) * kept + sigmoid(gates[i]) * std::tanh(gates[2 * hidden + i]);
    output[i] = sigmoid(gates[3 * hidden + i]) * std::tanh(cell[i]);
  }
  const int64_t count = args.choice_count;
  double* logits = args.out_logits + sample * count;
  for (int64_t k = 0; k < count; ++k) {
    logits[k] = dot(args.proj_weight, k, hidden, output, args.proj_bias) + args.choice_bias[k];
  }
  args.out_bits[sample] = args.choices[cheapest_argmax(logits, count)];
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
  parallel_for(args.batch, cost, threads, [&](int64_t sample, int) {
    std::vector<double> means(static_cast<size_t>(map.channels));
    if (is_packed(map)) {
      const int32_t bits = map.bits[sample];
      std::vector<uint8_t> unpacked(bits == 2 || bits == 4 ? static_cast<size_t>(values) : 0);
      std::vector<int32_t> sums(static_cast<size_t>(map.channels));
      pool_codes(map, sample, table, unpacked.data(), sums.data(), means.data());
    } else {
      pool_values(map, sample, means.data());
    }
    decide(args, sample, means.data());
  });
}

}  // namespace dfs
