#include <cmath>
#include <vector>

#include "check.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "operations.h"
#include "random.h"

namespace dfs_test {
namespace {

constexpr int32_t kChoices[] = {0, 2, 4, 8};
constexpr int64_t kChoiceCount = 4;

// The parameters and results of a gate, each in memory of its own.
struct Gate {
  Gate(Random& random, int64_t batch, int64_t channels, int64_t hidden)
      : embed_weight(count(hidden * channels)),
        embed_bias(count(hidden)),
        weight_ih(count(4 * hidden * hidden)),
        weight_hh(count(4 * hidden * hidden)),
        bias_ih(count(4 * hidden)),
        bias_hh(count(4 * hidden)),
        proj_weight(count(kChoiceCount * hidden)),
        proj_bias(count(kChoiceCount)),
        choice_bias(count(kChoiceCount)),
        state(count(2 * batch * hidden)),
        out_bits(count(batch)),
        out_logits(count(batch * kChoiceCount)),
        out_state(count(2 * batch * hidden)) {
    for (auto* values : {&embed_weight, &embed_bias, &weight_ih, &weight_hh, &bias_ih, &bias_hh,
                         &proj_weight, &proj_bias}) {
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] = random.uniform(-1.0f, 1.0f);
    }
    for (auto* values : {&choice_bias, &state}) {
      for (size_t i = 0; i < values->size(); ++i) (*values)[i] = random.uniform(-1.0f, 1.0f);
    }
  }

  static size_t count(int64_t value) { return static_cast<size_t>(value); }

  dfs::RnnGateArgs args(const dfs::FeatureMap& input, int64_t batch, int64_t hidden,
                        bool with_state) {
    dfs::RnnGateArgs result;
    result.batch = batch;
    result.input = input;
    result.hidden = hidden;
    result.choice_count = kChoiceCount;
    for (int64_t k = 0; k < kChoiceCount; ++k) result.choices[k] = kChoices[k];
    result.state = with_state ? state.data() : nullptr;
    result.embed_weight = embed_weight.data();
    result.embed_bias = embed_bias.data();
    result.weight_ih = weight_ih.data();
    result.weight_hh = weight_hh.data();
    result.bias_ih = bias_ih.data();
    result.bias_hh = bias_hh.data();
    result.proj_weight = proj_weight.data();
    result.proj_bias = proj_bias.data();
    result.choice_bias = choice_bias.data();
    result.out_bits = out_bits.data();
    result.out_logits = out_logits.data();
    result.out_state = out_state.data();
    return result;
  }

  void check_guards() const {
    out_bits.check_guards("bits");
    out_logits.check_guards("logits");
    out_state.check_guards("state");
  }

  GuardedBuffer<float> embed_weight, embed_bias, weight_ih, weight_hh, bias_ih, bias_hh;
  GuardedBuffer<float> proj_weight, proj_bias;
  GuardedBuffer<double> choice_bias, state;
  GuardedBuffer<int32_t> out_bits;
  GuardedBuffer<double> out_logits, out_state;
};

double naive_sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

std::vector<double> naive_map(const GuardedBuffer<float>& weight, const GuardedBuffer<float>& bias,
                              const std::vector<double>& x) {
  std::vector<double> y(bias.size());
  for (size_t row = 0; row < y.size(); ++row) {
    y[row] = bias[row];
    for (size_t i = 0; i < x.size(); ++i) y[row] += double{weight[row * x.size() + i]} * x[i];
  }
  return y;
}

std::vector<double> naive_logits(const Gate& gate, const std::vector<double>& means,
                                 std::vector<double> output, std::vector<double> cell) {
  const std::vector<double> x = naive_map(gate.embed_weight, gate.embed_bias, means);
  const std::vector<double> from_input = naive_map(gate.weight_ih, gate.bias_ih, x);
  const std::vector<double> from_state = naive_map(gate.weight_hh, gate.bias_hh, output);
  const size_t hidden = x.size();
  for (size_t i = 0; i < hidden; ++i) {
    const auto part = [&](size_t g) {
      return from_input[g * hidden + i] + from_state[g * hidden + i];
    };
    cell[i] = naive_sigmoid(part(1)) * cell[i] + naive_sigmoid(part(0)) * std::tanh(part(2));
    output[i] = naive_sigmoid(part(3)) * std::tanh(cell[i]);
  }
  std::vector<double> logits = naive_map(gate.proj_weight, gate.proj_bias, output);
  for (size_t k = 0; k < logits.size(); ++k) logits[k] += gate.choice_bias[k];
  return logits;
}

// Packed features at widths that take turns, 0 among them.
void check_packed(Random& random, int64_t batch, int64_t channels, int64_t height, int64_t width,
                  bool with_state) {
  const int64_t hidden = 5;
  const int32_t widths[] = {8, 2, 0, 4};
  const float scale[] = {0.5f, 0.25f, 0.0625f};
  const int32_t zero_point[] = {1, 3, 100};
  GuardedBuffer<int32_t> bits(static_cast<size_t>(batch));
  dfs::FeatureMap map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.row_bytes = height * width * channels;
  map.bits = bits.data();
  map.quantizer.widths = {3, {2, 4, 8}};
  map.quantizer.scale = scale;
  map.quantizer.zero_point = zero_point;
  GuardedBuffer<uint8_t> codes(static_cast<size_t>(batch * map.row_bytes));
  map.codes = codes.data();

  std::vector<std::vector<double>> means(static_cast<size_t>(batch));
  for (int64_t n = 0; n < batch; ++n) {
    const int32_t b = bits[static_cast<size_t>(n)] = widths[n % 4];
    means[static_cast<size_t>(n)].assign(static_cast<size_t>(channels), 0.0);
    if (b == 0) continue;
    const int64_t pixel_bytes = naive_pixel_bytes(channels, b);
    uint8_t* row = codes.data() + n * map.row_bytes;
    std::fill_n(row, height * width * pixel_bytes, uint8_t{0});
    const int index = dfs::index_of(map.quantizer.widths, b);
    for (int64_t c = 0; c < channels; ++c) {
      int64_t sum = 0;
      for (int64_t p = 0; p < height * width; ++p) {
        // Mostly the top code: sums of bytes overflow first there.
        const int code =
            random.chance(0.8) ? (1 << b) - 1 : static_cast<int>(random.integer(0, (1 << b) - 1));
        naive_insert(row + p * pixel_bytes, c, b, static_cast<uint8_t>(code));
        sum += code - zero_point[index];
      }
      means[static_cast<size_t>(n)][static_cast<size_t>(c)] =
          static_cast<double>(sum) * scale[index] / static_cast<double>(height * width);
    }
  }

  Gate gate(random, batch, channels, hidden);
  for (int threads = 1; threads <= 3; ++threads) {
    dfs::rnn_gate(gate.args(map, batch, hidden, with_state), threads);
    gate.check_guards();
    for (int64_t n = 0; n < batch; ++n) {
      std::vector<double> output(static_cast<size_t>(hidden)), cell(output);
      for (int64_t i = 0; with_state && i < hidden; ++i) {
        output[static_cast<size_t>(i)] = gate.state[static_cast<size_t>(n * hidden + i)];
        cell[static_cast<size_t>(i)] = gate.state[static_cast<size_t>((batch + n) * hidden + i)];
      }
      const auto expected = naive_logits(gate, means[static_cast<size_t>(n)], output, cell);
      size_t best = 0;
      for (size_t k = 0; k < expected.size(); ++k) {
        const double got = gate.out_logits[static_cast<size_t>(n * kChoiceCount) + k];
        CHECK(std::fabs(got - expected[k]) < 1e-11, "sample ", n, " logit ", k, ": ", got,
              " instead of ", expected[k]);
        if (expected[k] > expected[best]) best = k;
      }
      CHECK(gate.out_bits[static_cast<size_t>(n)] == kChoices[best], "sample ", n);
    }
  }
}

}  // namespace

DFS_TEST(gate_pools_exactly_and_chooses_the_largest_logit) {
  for_each_isa([] {
    Random random(seed());
    for (const int64_t channels : {1, 3, 16, 32, 64, 70, 130}) {
      check_packed(random, 5, channels, 3, 5, channels % 2 == 0);
    }
    check_packed(random, 4, 16, 40, 33, true);  // more pixels than 16-bit sums hold
    check_packed(random, 4, 65, 20, 31, false);
  });
}

DFS_TEST(gate_gives_ties_to_the_first_choice_and_nan_to_the_last) {
  Random random(seed());
  const int64_t hidden = 2;
  GuardedBuffer<float> values(12);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0f;
  values[7] = std::nanf("");
  dfs::FeatureMap map;
  map.channels = 3;
  map.height = 2;
  map.width = 1;
  map.values = values.data();
  map.stride_n = 6;
  map.stride_c = 1;
  map.stride_h = 3;
  map.stride_w = 3;
  Gate gate(random, 2, 3, hidden);
  for (size_t i = 0; i < gate.proj_weight.size(); ++i) gate.proj_weight[i] = 0.0f;
  for (size_t k = 0; k < gate.choice_bias.size(); ++k) {
    gate.proj_bias[k] = k > 0 ? 1.0f : 0.0f;
    gate.choice_bias[k] = 0.0;
  }
  dfs::rnn_gate(gate.args(map, 2, hidden, false), 1);
  CHECK(gate.out_bits[0] == 2, "got ", gate.out_bits[0]);
  CHECK(gate.out_bits[1] == 8, "got ", gate.out_bits[1]);
}

}  // namespace dfs_test
