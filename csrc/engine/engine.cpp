#include "engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "checks.h"
#include "dispatch.h"
#include "float_environment.h"
#include "gate_step.h"
#include "thread_pool.h"
#include "thread_team.h"

namespace dfs {
namespace {

constexpr int32_t kStreamBits = 8;
constexpr WidthTable kStreamWidths = {1, {kStreamBits}};
constexpr int32_t kStreamZero = 0;

// A layer is shared out within a team from this part of min_thread_cost() on: helpers are awake.
constexpr double kTeamShare = 0.2;

using Clock = std::chrono::steady_clock;

int64_t pixel_bytes(int64_t channels, int32_t bits) { return (channels * bits + 7) / 8; }

int32_t widest(const WidthTable& widths) { return widths.bits[widths.count - 1]; }

// A sample of the residual stream at some address.
FeatureMap stream_map(const StreamSpec& stream, uint8_t* memory, int64_t channels, int64_t height,
                      int64_t width) {
  FeatureMap map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  if (!stream.is_packed) {
    map.values = reinterpret_cast<float*>(memory);
    map.stride_c = 1;
    map.stride_h = width * channels;
    map.stride_w = channels;
    return map;
  }
  map.codes = memory;
  map.row_bytes = height * width * channels;
  map.bits = &kStreamBits;
  map.quantizer.widths = kStreamWidths;
  map.quantizer.scale = &stream.scale;
  map.quantizer.zero_point = &kStreamZero;
  return map;
}

size_t stream_bytes(const StreamSpec& stream, int64_t channels, int64_t height, int64_t width) {
  const size_t element = stream.is_packed ? 1 : sizeof(float);
  return static_cast<size_t>(channels * height * width) * element;
}

FeatureMap float_map(float* values, int64_t channels, int64_t height, int64_t width) {
  return stream_map({false, 1.0f}, reinterpret_cast<uint8_t*>(values), channels, height, width);
}

void check_chain(const char* what, int64_t got, int64_t expected) {
  if (got != expected) {
    reject(std::string(what) + " takes " + std::to_string(got) + " channels, but gets " +
           std::to_string(expected));
  }
}

int64_t out_size(int64_t size, int64_t pad, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t span = dilation * (kernel - 1) + 1;
  if (size + pad < span) reject("network: the image is smaller than a convolution's window");
  return (size + pad - span) / stride + 1;
}

void set_output_size(const ConvGeometry& g, int64_t& height, int64_t& width) {
  height = out_size(height, g.pad_top + g.pad_bottom, g.kernel_h, g.stride_h, g.dilation_h);
  width = out_size(width, g.pad_left + g.pad_right, g.kernel_w, g.stride_w, g.dilation_w);
}

bool is_finite(const FeatureMap& map, int64_t sample) {
  const float* image = map.values + sample * map.stride_n;
  for (int64_t c = 0; c < map.channels; ++c) {
    for (int64_t y = 0; y < map.height; ++y) {
      // A sum of zeros and of NaN from what is not finite.
      float sum = 0.0f;
      const float* row = image + c * map.stride_c + y * map.stride_h;
      for (int64_t x = 0; x < map.width; ++x) sum += row[x * map.stride_w] * 0.0f;
      if (sum != 0.0f) return false;
    }
  }
  return true;
}

// Mean of (b / 32)^2.
double mean_cost(const int32_t* bits, int64_t count) {
  int64_t squares = 0;
  for (int64_t i = 0; i < count; ++i) squares += int64_t{bits[i]} * bits[i];
  return static_cast<double>(squares) / static_cast<double>(count) / (32.0 * 32.0);
}

}  // namespace

// The two streams take turns at the blocks that change resolution.
struct Engine::Workspace {
  AlignedBytes pixels;
  AlignedBytes streams[2];
  AlignedBytes hidden[2];
  AlignedBytes shortcut;
  std::vector<AlignedBytes> scratch;  // of each thread
  AlignedBytes gate_scratch;
  std::vector<double> states[2];  // before and after a gate
  std::vector<double> gate_logits;
  std::vector<float> pooled;
  std::vector<double> means;
  int stream = 0;
  FeatureMap map;  // the stream as it is now
};

// A workspace for the duration of a task.
class Engine::Lease {
 public:
  explicit Lease(const Engine& engine) : engine_(engine) {
    {
      const std::lock_guard<std::mutex> lock(engine_.mutex_);
      if (!engine_.idle_.empty()) {
        space_ = std::move(engine_.idle_.back());
        engine_.idle_.pop_back();
      }
    }
    if (!space_) space_ = engine_.make_workspace();
  }
  ~Lease() {
    const std::lock_guard<std::mutex> lock(engine_.mutex_);
    engine_.idle_.push_back(std::move(space_));
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;

  Workspace& operator*() const { return *space_; }

 private:
  const Engine& engine_;
  std::unique_ptr<Workspace> space_;
};

Engine::Engine(const NetworkSpec& spec)
    : in_channels_(spec.in_channels),
      in_height_(spec.height),
      in_width_(spec.width),
      stem_(spec.stem, kernels()),
      stem_stream_(spec.stem_stream),
      pool_size_(spec.pool_size),
      pool_stride_(spec.pool_stride),
      pool_padding_(spec.pool_padding),
      gates_(spec),
      classifier_(spec.classifier, kernels()) {
  if (spec.pixel_values != nullptr) {
    pixel_table_ = PixelTable(spec.pixel_values, in_channels_, stem_.input_quantizer());
  }
  int64_t gate_index = 0;
  for (const BlockSpec& from : spec.blocks) {
    Block block;
    for (const LayerSpec& layer : from.layers) block.layers.emplace_back(layer, kernels());
    for (const LayerSpec& layer : from.shortcut) block.shortcut.emplace_back(layer, kernels());
    for (size_t i = 0; i + 1 < block.layers.size(); ++i) {
      block.layers[i].expect_output(block.layers[i + 1].input_quantizer());
    }
    block.stream = from.stream;
    block.fixed_bits = from.fixed_bits;
    if (from.fixed_bits < 0) block.gate = gate_index++;
    blocks_.push_back(std::move(block));
  }
  plan();
}

Engine::~Engine() = default;

size_t Engine::weight_bytes() const {
  size_t bytes = stem_.weight_bytes() + classifier_.weight_bytes();
  for (const Block& block : blocks_) {
    for (const Layer& layer : block.layers) bytes += layer.weight_bytes();
    for (const Layer& layer : block.shortcut) bytes += layer.weight_bytes();
  }
  return bytes;
}

// Checks that the parts fit together, and finds how much memory a sample takes.
void Engine::plan() {
  check_chain("the stem", stem_.geometry().in_channels, in_channels_);
  int64_t channels = stem_.geometry().out_channels;
  int64_t height = in_height_;
  int64_t width = in_width_;
  const auto plan_layer = [&](Layer& layer, FeatureMap input, bool reads_codes,
                              const FeatureMap* residual, FeatureMap output) {
    for (int i = 0; i <= layer.widths().count; ++i) {
      LayerCall call{0, input, reads_codes, residual, true, output};
      if (i < layer.widths().count) call.bits = layer.widths().bits[i];
      // Maps of one sample at the width in question; nothing is read.
      if (is_packed(call.input) && reads_codes) call.input.bits = &call.bits;
      if (is_packed(call.output) && index_of(call.output.quantizer.widths, kStreamBits) < 0) {
        call.output.bits = &call.bits;
      }
      scratch_bytes_ = std::max(scratch_bytes_, layer.scratch_bytes(call));
      if (call.bits != 0) layer.keep_form_for(call);
    }
  };
  const auto plan_stream = [&](const StreamSpec& stream) {
    stream_bytes_ = std::max(stream_bytes_, stream_bytes(stream, channels, height, width));
  };

  FeatureMap image = float_map(nullptr, in_channels_, in_height_, in_width_);
  set_output_size(stem_.geometry(), height, width);
  stem_height_ = height;
  stem_width_ = width;
  plan_layer(stem_, image, false, nullptr,
             stream_map(stem_stream_, nullptr, channels, height, width));
  if (takes_pixels()) {
    pixel_bytes_ = pixel_table_.bytes(in_height_, in_width_);
    plan_layer(stem_, pixel_table_.map(nullptr, in_height_, in_width_), pixel_table_.gives_codes(),
               nullptr, stream_map(stem_stream_, nullptr, channels, height, width));
  }
  plan_stream(stem_stream_);
  if (pool_size_ > 0) {
    height = out_size(height, 2 * pool_padding_, pool_size_, pool_stride_, 1);
    width = out_size(width, 2 * pool_padding_, pool_size_, pool_stride_, 1);
  }

  StreamSpec stream = stem_stream_;
  for (Block& block : blocks_) {
    if (block.layers.empty()) reject("network: a block without convolutions");
    const FeatureMap input = stream_map(stream, nullptr, channels, height, width);
    gate_scratch_bytes_ = std::max(gate_scratch_bytes_, gates_.scratch_bytes(input));
    const int64_t in_channels = channels;
    const int64_t last_index = static_cast<int64_t>(block.layers.size()) - 1;
    FeatureMap from = input;
    for (int64_t i = 0; i <= last_index; ++i) {
      Layer& layer = block.layers[static_cast<size_t>(i)];
      check_chain("a block's convolution", layer.geometry().in_channels, channels);
      channels = layer.geometry().out_channels;
      set_output_size(layer.geometry(), height, width);
      FeatureMap to = stream_map(block.stream, nullptr, channels, height, width);
      if (i < last_index) {
        const Layer& next = block.layers[static_cast<size_t>(i + 1)];
        to = stream_map({true, 1.0f}, nullptr, channels, height, width);
        to.quantizer = next.input_quantizer();
        to.row_bytes = height * width * pixel_bytes(channels, widest(next.widths()));
        hidden_bytes_ = std::max(hidden_bytes_, static_cast<size_t>(to.row_bytes));
      }
      const FeatureMap residual = block.shortcut.empty()
                                      ? stream_map(block.stream, nullptr, channels, height, width)
                                      : float_map(nullptr, channels, height, width);
      plan_layer(layer, from, i > 0, i == last_index ? &residual : nullptr, to);
      from = to;
    }
    if (block.shortcut.empty()) {
      if (in_channels != channels || input.height != height || input.width != width) {
        reject("network: a block without a shortcut changes the size of the stream");
      }
    } else {
      Layer& shortcut = block.shortcut[0];
      check_chain("a shortcut", shortcut.geometry().in_channels, in_channels);
      int64_t shortcut_height = input.height;
      int64_t shortcut_width = input.width;
      set_output_size(shortcut.geometry(), shortcut_height, shortcut_width);
      if (shortcut.geometry().out_channels != channels || shortcut_height != height ||
          shortcut_width != width) {
        reject("network: a shortcut gives another size than its block");
      }
      plan_layer(shortcut, input, false, nullptr, float_map(nullptr, channels, height, width));
      shortcut_values_ = std::max(shortcut_values_, static_cast<size_t>(channels * height * width));
    }
    block.channels = channels;
    block.height = height;
    block.width = width;
    stream = block.stream;
    plan_stream(stream);
  }
  check_chain("the classifier", classifier_.geometry().in_channels, channels);
  plan_layer(classifier_, float_map(nullptr, channels, 1, 1), false, nullptr,
             float_map(nullptr, classes(), 1, 1));
  gate_scratch_bytes_ =
      std::max(gate_scratch_bytes_,
               pool_scratch_bytes(stream_map(stream, nullptr, channels, height, width)));
}

std::unique_ptr<Engine::Workspace> Engine::make_workspace() const {
  auto space = std::make_unique<Workspace>();
  space->pixels = AlignedBytes(pixel_bytes_);
  for (AlignedBytes& stream : space->streams) stream = AlignedBytes(stream_bytes_);
  for (AlignedBytes& hidden : space->hidden) hidden = AlignedBytes(hidden_bytes_);
  space->shortcut = AlignedBytes(shortcut_values_ * sizeof(float));
  space->scratch.emplace_back(scratch_bytes_);
  space->gate_scratch = AlignedBytes(gate_scratch_bytes_);
  for (std::vector<double>& state : space->states) {
    state.resize(static_cast<size_t>(2 * gate_room(gates_.hidden())));
  }
  space->gate_logits.resize(static_cast<size_t>(gate_room(choices())));
  const auto channels = static_cast<size_t>(classifier_.geometry().in_channels);
  space->pooled.resize(channels);
  space->means.resize(channels);
  return space;
}

void Engine::run(const EngineCall& call, const EngineOutput& output) const {
  if (call.batch == 0) return;
  if (call.pixels.data != nullptr && !takes_pixels()) reject("the network takes no uint8 images");
  const int threads = std::max(call.threads, 1);
  if (threads > 1 && call.batch >= threads) {
    // A sample is far more work than what a second thread costs.
    const double cost = min_thread_cost();
    parallel_for(call.batch, cost, threads, [&](int64_t sample, int) {
      const Lease lease(*this);
      run_sample(call, output, sample, *lease, nullptr);
    });
    return;
  }
  const DefaultFloatEnvironment environment;
  const Lease lease(*this);
  while (static_cast<int>((*lease).scratch.size()) < threads) {
    (*lease).scratch.emplace_back(scratch_bytes_);
  }
  const auto run_all = [&](ThreadTeam* team) {
    for (int64_t sample = 0; sample < call.batch; ++sample) {
      run_sample(call, output, sample, *lease, team);
    }
  };
  if (threads == 1) return run_all(nullptr);
  with_team(threads, [&](ThreadTeam& team) { run_all(&team); });
}

FeatureMap Engine::stem_input(const EngineCall& call, int64_t sample, Workspace& space) const {
  if (call.pixels.data != nullptr) {
    const FeatureMap map = pixel_table_.map(space.pixels.data(), in_height_, in_width_);
    pixel_table_.load(call.pixels, sample, map);
    return map;
  }
  FeatureMap image = call.images;
  image.values += sample * image.stride_n;
  return image;
}

void Engine::run_sample(const EngineCall& call, const EngineOutput& output, int64_t sample,
                        Workspace& space, ThreadTeam* team) const {
  if (call.pixels.data == nullptr && !is_finite(call.images, sample)) {
    std::fill_n(output.logits + sample * classes(), classes(),
                std::numeric_limits<float>::quiet_NaN());
    std::fill_n(output.bits + sample * gates(), gates(), 0);
    output.cost[sample] = mean_cost(output.bits + sample * gates(), gates());
    return;
  }
  int32_t* decisions = output.bits + sample * gates();
  double* times = output.block_times;
  Clock::time_point start = Clock::now();
  const auto lap = [&](double* into, size_t index) {
    if (into == nullptr) return;
    const Clock::time_point now = Clock::now();
    into[index] += std::chrono::duration<double, std::nano>(now - start).count();
    start = now;
  };

  space.stream = 0;
  std::fill(space.states[0].begin(), space.states[0].end(), 0.0);
  const FeatureMap image = stem_input(call, sample, space);
  space.map = stream_map(stem_stream_, space.streams[0].data(), stem_.geometry().out_channels,
                         stem_height_, stem_width_);
  run_layer(stem_, {stem_.widths().bits[0], image, is_packed(image), nullptr, true, space.map},
            space, team);
  if (pool_size_ > 0) pool_stem(space);
  lap(times, 0);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const Block& block = blocks_[i];
    int32_t bits = block.fixed_bits;
    if (block.gate >= 0) {
      bits = decide(block, call, sample, space);
      lap(output.gate_times, static_cast<size_t>(block.gate));
      decisions[block.gate] = bits;
    }
    run_block(block, bits, space, team);
    lap(times, 1 + i);
  }

  output.cost[sample] = mean_cost(decisions, gates());

  pool_sample(space.map, 0, kernels(), space.gate_scratch.data(), space.means.data());
  std::transform(space.means.begin(), space.means.end(), space.pooled.begin(),
                 [](double mean) { return static_cast<float>(mean); });
  const FeatureMap pooled = float_map(space.pooled.data(), space.map.channels, 1, 1);
  const FeatureMap logits = float_map(output.logits + sample * classes(), classes(), 1, 1);
  run_layer(classifier_, {classifier_.widths().bits[0], pooled, false, nullptr, false, logits},
            space, nullptr);
  lap(times, 1 + blocks_.size());
}

int32_t Engine::decide(const Block& block, const EngineCall& call, int64_t sample,
                       Workspace& space) const {
  if (call.policy != nullptr) return call.policy[sample * gates() + block.gate];
  GateStep step;
  step.features = &space.map;
  step.state_before = space.states[0].data();
  step.state_after = space.states[1].data();
  step.choice_bias = call.choice_bias == nullptr ? gates_.choice_bias().data() : call.choice_bias;
  step.logits = space.gate_logits.data();
  const int32_t bits = gates_.decide(block.gate, step, kernels(), space.gate_scratch.data());
  std::swap(space.states[0], space.states[1]);
  return bits;
}

void Engine::run_block(const Block& block, int32_t bits, Workspace& space, ThreadTeam* team) const {
  if (bits == 0 && block.shortcut.empty()) return;
  const FeatureMap input = space.map;
  FeatureMap output = input;
  FeatureMap residual = input;
  if (!block.shortcut.empty()) {
    space.stream = 1 - space.stream;
    output = stream_map(block.stream, space.streams[space.stream].data(), block.channels,
                        block.height, block.width);
    residual = float_map(reinterpret_cast<float*>(space.shortcut.data()), block.channels,
                         block.height, block.width);
    const Layer& shortcut = block.shortcut[0];
    run_layer(shortcut, {shortcut.widths().bits[0], input, false, nullptr, false, residual}, space,
              team);
  }
  space.map = output;
  const Layer& last = block.layers.back();
  if (bits == 0) {
    run_layer(last, {0, input, true, &residual, true, output}, space, team);
    if (!is_packed(output)) {
      // A skipped sample gets no activation, but what the next block reads is never negative.
      // (Codes with zero point 0 can hold nothing else.)
      float* values = output.values;
      const int64_t count = output.channels * output.height * output.width;
      for (int64_t i = 0; i < count; ++i) values[i] = values[i] <= 0.0f ? 0.0f : values[i];
    }
    return;
  }
  FeatureMap from = input;
  for (size_t i = 0; i + 1 < block.layers.size(); ++i) {
    const Layer& layer = block.layers[i];
    const Layer& next = block.layers[i + 1];
    FeatureMap to;
    to.channels = layer.geometry().out_channels;
    to.height = from.height;
    to.width = from.width;
    set_output_size(layer.geometry(), to.height, to.width);
    to.codes = space.hidden[i % 2].data();
    to.row_bytes = to.height * to.width * pixel_bytes(to.channels, widest(next.widths()));
    to.bits = &bits;
    to.quantizer = next.input_quantizer();
    run_layer(layer, {bits, from, i > 0, nullptr, true, to}, space, team);
    from = to;
  }
  run_layer(last, {bits, from, block.layers.size() > 1, &residual, true, output}, space, team);
}

void Engine::run_layer(const Layer& layer, const LayerCall& call, Workspace& space,
                       ThreadTeam* team) const {
  const int64_t rows = call.output.height;
  const double cost = layer.nanoseconds(call.bits, rows * call.output.width);
  if (team == nullptr || cost < kTeamShare * min_thread_cost()) {
    layer.run_rows(call, 0, rows, space.scratch[0].data());
    return;
  }
  const int64_t parts = std::min<int64_t>(team->threads(), rows);
  team->run(parts, [&](int64_t part, int worker) {
    layer.run_rows(call, rows * part / parts, rows * (part + 1) / parts,
                   space.scratch[static_cast<size_t>(worker)].data());
  });
}

void Engine::pool_stem(Workspace& space) const {
  const FeatureMap from = space.map;
  const int64_t height = out_size(from.height, 2 * pool_padding_, pool_size_, pool_stride_, 1);
  const int64_t width = out_size(from.width, 2 * pool_padding_, pool_size_, pool_stride_, 1);
  space.stream = 1 - space.stream;
  const FeatureMap to =
      stream_map(stem_stream_, space.streams[space.stream].data(), from.channels, height, width);
  const auto pool = [&](const auto* source, auto* target) {
    for (int64_t y = 0; y < height; ++y) {
      const int64_t first_y = std::max<int64_t>(y * pool_stride_ - pool_padding_, 0);
      const int64_t last_y = std::min(y * pool_stride_ - pool_padding_ + pool_size_, from.height);
      for (int64_t x = 0; x < width; ++x) {
        const int64_t first_x = std::max<int64_t>(x * pool_stride_ - pool_padding_, 0);
        const int64_t last_x = std::min(x * pool_stride_ - pool_padding_ + pool_size_, from.width);
        auto* pixel = target + (y * width + x) * from.channels;
        // The stream is never negative.
        std::fill_n(pixel, from.channels, 0);
        for (int64_t sy = first_y; sy < last_y; ++sy) {
          for (int64_t sx = first_x; sx < last_x; ++sx) {
            const auto* value = source + (sy * from.width + sx) * from.channels;
            for (int64_t c = 0; c < from.channels; ++c) pixel[c] = std::max(pixel[c], value[c]);
          }
        }
      }
    }
  };
  if (is_packed(from)) {
    pool(from.codes, to.codes);
  } else {
    pool(from.values, to.values);
  }
  space.map = to;
}

}  // namespace dfs
