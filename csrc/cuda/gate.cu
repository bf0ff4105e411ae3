// One step of a recurrent gate, in float64: a block pools a sample's features, embeds them, runs
// the LSTM cell and chooses. What is summed is summed in an order of the sample's own.
#include <cmath>
#include <stdexcept>
#include <string>

#include "codes.h"
#include "conv_layout.h"
#include "cuda_operations.h"

namespace dfs::cuda {
namespace {

constexpr int kThreads = 128;

struct GateParams {
  int64_t batch;
  Map input;
  int hidden;
  int choice_count;
  int32_t choices[kMaxChoices];
  const double* state;
  const float* embed_weight;
  const float* embed_bias;
  const float* weight_ih;
  const float* weight_hh;
  const float* bias_ih;
  const float* bias_hh;
  const float* proj_weight;
  const float* proj_bias;
  const double* choice_bias;
  int32_t* out_bits;
  double* out_logits;
  double* out_state;
};

// Shared memory of a block.
struct GateMemory {
  double* means;     // (C)
  double* embedded;  // (H)
  double* gates;     // (4H)
  double* output;    // (H)
  double* logits;    // (K)
  int32_t* sums;     // (C)
};

DFS_DEVICE GateMemory gate_memory(const GateParams& p) {
  GateMemory memory;
  memory.means = reinterpret_cast<double*>(shared_memory());
  memory.embedded = memory.means + p.input.channels;
  memory.gates = memory.embedded + p.hidden;
  memory.output = memory.gates + 4 * p.hidden;
  memory.logits = memory.output + p.hidden;
  memory.sums = reinterpret_cast<int32_t*>(memory.logits + p.choice_count);
  return memory;
}

int gate_memory_bytes(int channels, int hidden, int choices) {
  return 8 * (channels + 6 * hidden + choices) + 4 * channels;
}

DFS_DEVICE double sum_over_warp(double value) {
  for (int mask = 16; mask > 0; mask /= 2) value = add(value, shuffle_xor(value, mask));
  return value;
}

// Four channels of 8 bits at a time, one word of every few pixels for each thread. Two 16-bit sums
// share a register, which 257 codes can't overflow.
DFS_DEVICE void sum_words(const GateParams& p, const SampleReader& reader, int32_t* sums) {
  const int words = p.input.channels / 4;
  const auto* row = reinterpret_cast<const uint32_t*>(to_global(reader.row));
  const int streams = kThreads > words ? kThreads / words : 1;
  for (int i = thread_index(); i < words * streams; i += kThreads) {
    const int word = i % words;
    int pixel = i / words;
    while (pixel < p.input.pixels()) {
      uint32_t even = 0;
      uint32_t odd = 0;
      for (int k = 0; k < 256 && pixel < p.input.pixels(); ++k, pixel += streams) {
        const uint32_t codes = row[static_cast<int64_t>(pixel) * words + word];
        even += codes & 0x00ff00ffu;
        odd += (codes >> 8) & 0x00ff00ffu;
      }
      atomic_add(sums + 4 * word, static_cast<int32_t>(even & 0xffffu));
      atomic_add(sums + 4 * word + 1, static_cast<int32_t>(odd & 0xffffu));
      atomic_add(sums + 4 * word + 2, static_cast<int32_t>(even >> 16));
      atomic_add(sums + 4 * word + 3, static_cast<int32_t>(odd >> 16));
    }
  }
}

DFS_DEVICE void sum_codes(const GateParams& p, const SampleReader& reader, int32_t* sums) {
  const int items = p.input.channels * p.input.pixels();
  for (int i = thread_index(); i < items; i += kThreads) {
    const int channel = i % p.input.channels;
    atomic_add(sums + channel, reader.code(0, i / p.input.channels, channel));
  }
}

// Exact, whatever the order.
DFS_DEVICE void pool_codes(const GateParams& p, const SampleReader& reader,
                           const GateMemory& memory) {
  const int channels = p.input.channels;
  for (int c = thread_index(); c < channels; c += kThreads) memory.sums[c] = 0;
  sync_block();
  if (reader.bits == 8 && channels % 4 == 0 && is_aligned(reader.row, 4)) {
    sum_words(p, reader, memory.sums);
  } else {
    sum_codes(p, reader, memory.sums);
  }
  sync_block();
  const double step = static_cast<double>(reader.step.scale) / p.input.pixels();
  const int32_t zero = p.input.pixels() * reader.step.zero_point;
  for (int c = thread_index(); c < channels; c += kThreads) {
    memory.means[c] = multiply(static_cast<double>(memory.sums[c] - zero), step);
  }
}

// A warp for each channel.
DFS_DEVICE void pool_values(const GateParams& p, const SampleReader& reader, double* means) {
  for (int c = thread_index() / 32; c < p.input.channels; c += kThreads / 32) {
    double sum = 0.0;
    for (int i = thread_index() % 32; i < p.input.pixels(); i += 32) {
      const float value = reader.value(i / p.input.width, i % p.input.width, c);
      sum = add(sum, static_cast<double>(value));
    }
    sum = sum_over_warp(sum);
    if (thread_index() % 32 == 0) means[c] = sum / p.input.pixels();
  }
}

// Row `row` of weight (rows, columns) times x, plus bias, by one thread.
DFS_DEVICE double dot(const float* weight, int row, int columns, const double* x,
                      const float* bias) {
  double sum = 0.0;
  for (int i = 0; i < columns; ++i) {
    sum = add(sum, multiply(static_cast<double>(weight[row * columns + i]), x[i]));
  }
  return add(sum, static_cast<double>(bias[row]));
}

DFS_DEVICE void embed(const GateParams& p, const GateMemory& memory) {
  const int lane = thread_index() % 32;
  for (int row = thread_index() / 32; row < p.hidden; row += kThreads / 32) {
    double sum = 0.0;
    for (int c = lane; c < p.input.channels; c += 32) {
      const float weight = p.embed_weight[row * p.input.channels + c];
      sum = add(sum, multiply(static_cast<double>(weight), memory.means[c]));
    }
    sum = sum_over_warp(sum);
    if (lane == 0) memory.embedded[row] = add(sum, static_cast<double>(p.embed_bias[row]));
  }
}

DFS_DEVICE double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

DFS_DEVICE void step_cell(const GateParams& p, int64_t n, const GateMemory& memory) {
  const int hidden = p.hidden;
  const int64_t cells = p.batch * hidden;
  const double* before = p.state == nullptr ? nullptr : p.state + n * hidden;
  for (int row = thread_index(); row < 4 * hidden; row += kThreads) {
    const double input = dot(p.weight_ih, row, hidden, memory.embedded, p.bias_ih);
    const double kept = before == nullptr ? static_cast<double>(p.bias_hh[row])
                                          : dot(p.weight_hh, row, hidden, before, p.bias_hh);
    memory.gates[row] = add(input, kept);
  }
  sync_block();
  double* out = p.out_state + n * hidden;
  for (int i = thread_index(); i < hidden; i += kThreads) {
    const double old = before == nullptr ? 0.0 : before[cells + i];
    const double* gates = memory.gates;
    const double cell = add(multiply(sigmoid(gates[hidden + i]), old),
                            multiply(sigmoid(gates[i]), tanh(gates[2 * hidden + i])));
    const double output = multiply(sigmoid(gates[3 * hidden + i]), tanh(cell));
    memory.output[i] = output;
    out[i] = output;
    out[cells + i] = cell;
  }
}

// Index of the largest logit, the lowest among equals; the last one where a NaN leaves no largest.
DFS_DEVICE int cheapest_argmax(const double* logits, int count) {
  int best = 0;
  for (int k = 0; k < count; ++k) {
    if (logits[k] != logits[k]) return count - 1;
    if (logits[k] > logits[best]) best = k;
  }
  return best;
}

DFS_KERNEL(kThreads, 4)
rnn_gate_kernel(DFS_PARAMS(GateParams) p) {
  const int64_t n = block_index();
  const GateMemory memory = gate_memory(p);
  const SampleReader reader = reader_of(p.input, n);
  if (reader.row != nullptr && reader.known && reader.bits != 32) {
    pool_codes(p, reader, memory);
  } else {
    pool_values(p, reader, memory.means);
  }
  sync_block();
  embed(p, memory);
  sync_block();
  step_cell(p, n, memory);
  sync_block();
  for (int k = thread_index(); k < p.choice_count; k += kThreads) {
    const double logit = dot(p.proj_weight, k, p.hidden, memory.output, p.proj_bias);
    memory.logits[k] = add(logit, p.choice_bias[k]);
    p.out_logits[n * p.choice_count + k] = memory.logits[k];
  }
  sync_block();
  if (thread_index() == 0) {
    p.out_bits[n] = p.choices[cheapest_argmax(memory.logits, p.choice_count)];
  }
}

}  // namespace

void rnn_gate(const RnnGateArgs& args, Stream stream) {
  GateParams p = {};
  p.batch = args.batch;
  p.input = to_map(args.input);
  p.hidden = static_cast<int>(args.hidden);
  p.choice_count = static_cast<int>(args.choice_count);
  std::memcpy(p.choices, args.choices, sizeof(p.choices));
  p.state = args.state;
  p.embed_weight = args.embed_weight;
  p.embed_bias = args.embed_bias;
  p.weight_ih = args.weight_ih;
  p.weight_hh = args.weight_hh;
  p.bias_ih = args.bias_ih;
  p.bias_hh = args.bias_hh;
  p.proj_weight = args.proj_weight;
  p.proj_bias = args.proj_bias;
  p.choice_bias = args.choice_bias;
  p.out_bits = args.out_bits;
  p.out_logits = args.out_logits;
  p.out_state = args.out_state;
  if (args.input.height * args.input.width > 0x7fffffff / 255) {
    throw std::invalid_argument("input: more pixels than an int32 sum of their codes can hold");
  }
  const int shared = gate_memory_bytes(p.input.channels, p.hidden, p.choice_count);
  if (shared > kMaxSharedBytes) {
    throw std::invalid_argument("input: a gate of " + std::to_string(p.input.channels) +
                                " channels and " + std::to_string(p.hidden) +
                                " hidden units does not fit into the memory of a block");
  }
  launch("rnn_gate", &rnn_gate_kernel, {args.batch, kThreads, shared}, p, stream);
}

}  // namespace dfs::cuda
