// The engine beside the same network put together from single calls.
#include "engine.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "check.h"
#include "conv_case.h"
#include "guarded_buffer.h"
#include "mixed_conv2d_case.h"
#include "operations.h"
#include "random.h"

namespace dfs_test {
namespace {

constexpr int64_t kBatch = 5;
constexpr int64_t kHidden = 3;
const std::vector<int32_t> kChoices = {0, 2, 4, 8};

// One convolution with all that belongs to it.
struct TestLayer {
  ConvSizes sizes;
  TestWeight weight;  // at 2, 4, 8 and 32 bits
  dfs::WidthTable widths;
  std::vector<float> input_scale, bias, mul, add;
  std::vector<int32_t> zero_point;

  TestLayer(Random& random, int64_t in, int64_t out, int64_t kernel, int64_t stride,
            std::vector<int32_t> offered) {
    dfs::ConvGeometry& g = sizes.geometry;
    g.in_channels = in;
    g.out_channels = out;
    g.kernel_h = g.kernel_w = kernel;
    g.stride_h = g.stride_w = stride;
    g.pad_left = g.pad_right = g.pad_top = g.pad_bottom = kernel / 2;
    weight = draw_weight(random, sizes, false);
    for (const int32_t bits : offered) {
      widths.bits[widths.count++] = bits;
      input_scale.push_back(bits == 32 ? 1.0f : random.uniform(0.5f, 2.0f) / (1 << bits));
      zero_point.push_back(0);
      for (int64_t o = 0; o < out; ++o) {
        mul.push_back(random.uniform(0.1f, 0.4f));
        add.push_back(random.uniform(-0.5f, 0.5f));
      }
    }
    for (int64_t o = 0; o < out; ++o) bias.push_back(random.uniform(-0.5f, 0.5f));
    retile(weight, g);
  }

  // Steps of the widths on offer, (count, O).
  std::vector<float> steps() const {
    std::vector<float> result;
    const int64_t outputs = sizes.geometry.out_channels;
    for (int i = 0; i < widths.count; ++i) {
      const auto first =
          weight.scale.begin() + static_cast<int64_t>(weight.index(widths.bits[i])) * outputs;
      result.insert(result.end(), first, first + outputs);
    }
    return result;
  }

  dfs::Quantizer quantizer() const {
    dfs::Quantizer result;
    result.widths = widths;
    result.scale = input_scale.data();
    result.zero_point = zero_point.data();
    return result;
  }

  dfs::LayerSpec spec(const std::vector<float>& own_steps) const {
    dfs::LayerSpec result;
    result.geometry = sizes.geometry;
    result.widths = widths;
    for (int i = 0; i < widths.count; ++i) {
      const size_t index = weight.index(widths.bits[i]);
      result.codes[i] = weight.packed[index].data();
      result.centred[i] = weight.centred[index];
    }
    result.weight_scale = own_steps.data();
    result.input_scale = input_scale.data();
    result.input_zero_point = zero_point.data();
    result.bias = bias.data();
    result.mul = mul.data();
    result.add = add.data();
    return result;
  }

  // All samples at once, through the operation on whole tensors.
  void run(const std::vector<int32_t>& bits, const dfs::FeatureMap& input, bool reads_codes,
           const dfs::FeatureMap* residual, bool relu, const dfs::FeatureMap& output) const {
    const std::vector<float> own_steps = steps();
    dfs::MixedConv2dArgs args;
    args.batch = kBatch;
    args.bits = bits.data();
    args.geometry = sizes.geometry;
    args.weight.widths = widths;
    for (int i = 0; i < widths.count; ++i) {
      const size_t index = weight.index(widths.bits[i]);
      args.weight.tiles[i] = weight.tiles[index].data();
      args.weight.centred[i] = weight.centred[index];
    }
    args.weight.scale = own_steps.data();
    args.input = input;
    if (!reads_codes) args.input_quantizer = quantizer();
    args.bias = bias.data();
    args.mul = mul.data();
    args.add = add.data();
    if (residual != nullptr) {
      args.has_residual = true;
      args.residual = *residual;
    }
    args.relu = relu;
    args.output = output;
    dfs::mixed_conv2d(args, 1);
  }
};

// A batch of feature maps and its memory.
struct Maps {
  std::vector<float> values;
  std::vector<uint8_t> codes;
  std::vector<int32_t> bits;
  float scale = 0.0f;
  int32_t zero_point = 0;
  dfs::FeatureMap map;

  static std::unique_ptr<Maps> floats(int64_t channels, int64_t height, int64_t width) {
    auto result = std::make_unique<Maps>();
    result->set_size(channels, height, width);
    result->values.resize(static_cast<size_t>(kBatch * channels * height * width));
    result->map.values = result->values.data();
    result->map.stride_n = channels * height * width;
    result->map.stride_c = 1;
    result->map.stride_h = width * channels;
    result->map.stride_w = channels;
    return result;
  }

  static std::unique_ptr<Maps> stream(float step, int64_t channels, int64_t height, int64_t width) {
    auto result = std::make_unique<Maps>();
    result->scale = step;
    result->bits.assign(kBatch, 8);
    dfs::Quantizer quantizer;
    quantizer.widths = {1, {8}};
    quantizer.scale = &result->scale;
    quantizer.zero_point = &result->zero_point;
    result->set_codes(quantizer, channels, height, width);
    return result;
  }

  static std::unique_ptr<Maps> hidden(const std::vector<int32_t>& widths, const TestLayer& next,
                                      int64_t channels, int64_t height, int64_t width) {
    auto result = std::make_unique<Maps>();
    result->bits = widths;
    result->set_codes(next.quantizer(), channels, height, width);
    return result;
  }

 private:
  void set_size(int64_t channels, int64_t height, int64_t width) {
    map.channels = channels;
    map.height = height;
    map.width = width;
  }
  void set_codes(const dfs::Quantizer& quantizer, int64_t channels, int64_t height, int64_t width) {
    set_size(channels, height, width);
    const int32_t widest = quantizer.widths.bits[quantizer.widths.count - 1];
    map.row_bytes = height * width * naive_pixel_bytes(channels, widest);
    codes.resize(static_cast<size_t>(kBatch * map.row_bytes));
    map.codes = codes.data();
    map.bits = bits.data();
    map.quantizer = quantizer;
  }
};

int64_t down(int64_t size, int64_t stride) { return (size + stride - 1) / stride; }

struct TestBlock {
  std::vector<TestLayer> layers;
  std::vector<TestLayer> shortcut;
  float step = 0.05f;
};

// A small network with a bottleneck and two blocks that change resolution.
struct Network {
  static constexpr int64_t kHeight = 9;
  static constexpr int64_t kWidth = 11;

  explicit Network(Random& random)
      : stem(random, 3, 8, 3, 1, {8}), classifier(random, 16, 6, 1, 1, {8}) {
    const std::vector<int32_t> offered = {2, 4, 8};
    add_block(random, {{8, 8, 3, 1}, {8, 8, 3, 1}}, {8});
    add_block(random, {{8, 8, 3, 1}, {8, 8, 3, 1}}, offered);
    add_block(random, {{8, 16, 3, 2}, {16, 16, 3, 1}}, offered);
    add_block(random, {{16, 4, 1, 1}, {4, 4, 3, 1}, {4, 16, 1, 1}}, offered);
    add_block(random, {{16, 16, 3, 2}, {16, 16, 3, 1}}, offered);
    for (size_t i = 1; i < blocks.size(); ++i) {
      const int64_t seen = blocks[i].layers[0].sizes.geometry.in_channels;
      embed_weight.push_back(draw(random, kHidden * seen, 4.0f));
      embed_bias.push_back(draw(random, kHidden, 1.0f));
    }
    const auto count = static_cast<int64_t>(kChoices.size());
    weight_ih = draw(random, 4 * kHidden * kHidden, 2.0f);
    weight_hh = draw(random, 4 * kHidden * kHidden, 2.0f);
    bias_ih = draw(random, 4 * kHidden, 1.0f);
    bias_hh = draw(random, 4 * kHidden, 1.0f);
    proj_weight = draw(random, count * kHidden, 4.0f);
    proj_bias = draw(random, count, 0.5f);
    choice_bias.assign(kChoices.size(), 0.125);
    images.resize(static_cast<size_t>(kBatch * 3 * kHeight * kWidth));
    for (float& value : images) value = random.uniform(-2.0f, 2.0f);
  }

  static std::vector<float> draw(Random& random, int64_t size, float scale) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = random.uniform(-scale, scale);
    return values;
  }

  struct Shape {
    int64_t in, out, kernel, stride;
  };

  void add_block(Random& random, const std::vector<Shape>& shapes,
                 const std::vector<int32_t>& offered) {
    TestBlock block;
    for (const Shape& s : shapes) {
      block.layers.emplace_back(random, s.in, s.out, s.kernel, s.stride, offered);
    }
    if (shapes[0].stride != 1 || shapes[0].in != shapes.back().out) {
      block.shortcut.emplace_back(random, shapes[0].in, shapes.back().out, 1, shapes[0].stride,
                                  std::vector<int32_t>{8});
    }
    block.step = blocks.empty() || !block.shortcut.empty() ? random.uniform(0.02f, 0.1f)
                                                           : blocks.back().step;
    blocks.push_back(std::move(block));
  }

  dfs::FeatureMap image_map() {
    dfs::FeatureMap map;
    map.channels = 3;
    map.height = kHeight;
    map.width = kWidth;
    map.values = images.data();
    map.stride_n = 3 * kHeight * kWidth;
    map.stride_c = kHeight * kWidth;
    map.stride_h = kWidth;
    map.stride_w = 1;
    return map;
  }

  dfs::NetworkSpec spec() {
    steps.clear();
    const auto layer_spec = [&](const TestLayer& layer) {
      steps.push_back(std::make_unique<std::vector<float>>(layer.steps()));
      return layer.spec(*steps.back());
    };
    dfs::NetworkSpec spec;
    spec.in_channels = 3;
    spec.height = kHeight;
    spec.width = kWidth;
    spec.stem = layer_spec(stem);
    spec.stem_stream = {true, blocks[0].step};
    for (size_t i = 0; i < blocks.size(); ++i) {
      dfs::BlockSpec block;
      for (const TestLayer& layer : blocks[i].layers) block.layers.push_back(layer_spec(layer));
      for (const TestLayer& layer : blocks[i].shortcut) {
        block.shortcut.push_back(layer_spec(layer));
      }
      block.stream = {true, blocks[i].step};
      block.fixed_bits = i == 0 ? 8 : -1;
      spec.blocks.push_back(block);
      if (i == 0) continue;
      dfs::GateSpec gate;
      gate.embed_weight = embed_weight[i - 1].data();
      gate.embed_bias = embed_bias[i - 1].data();
      spec.gates.push_back(gate);
    }
    spec.hidden = kHidden;
    spec.choices = kChoices;
    spec.choice_bias = choice_bias.data();
    spec.weight_ih = weight_ih.data();
    spec.weight_hh = weight_hh.data();
    spec.bias_ih = bias_ih.data();
    spec.bias_hh = bias_hh.data();
    spec.proj_weight = proj_weight.data();
    spec.proj_bias = proj_bias.data();
    spec.classifier = layer_spec(classifier);
    return spec;
  }

  int64_t gates() const { return static_cast<int64_t>(blocks.size()) - 1; }

  // Decisions (N, gates) and logits (N, 6) from single calls; `policy` in place of the gates'.
  void run_apart(const int32_t* policy, std::vector<int32_t>& decided, std::vector<float>& logits) {
    decided.assign(static_cast<size_t>(kBatch * gates()), -1);
    const std::vector<int32_t> eight(kBatch, 8);
    int64_t height = kHeight;
    int64_t width = kWidth;
    auto stream = Maps::stream(blocks[0].step, 8, height, width);
    stem.run(eight, image_map(), false, nullptr, true, stream->map);
    std::vector<double> state(static_cast<size_t>(2 * kBatch * kHidden)), next(state);
    for (size_t i = 0; i < blocks.size(); ++i) {
      const TestBlock& block = blocks[i];
      std::vector<int32_t> bits = eight;
      if (i > 0) {
        if (policy == nullptr) {
          choose(i, stream->map, i > 1 ? state.data() : nullptr, bits.data(), next.data());
          std::swap(state, next);
        } else {
          for (int64_t n = 0; n < kBatch; ++n) {
            bits[static_cast<size_t>(n)] = policy[n * gates() + static_cast<int64_t>(i) - 1];
          }
        }
        for (int64_t n = 0; n < kBatch; ++n) {
          decided[static_cast<size_t>(n * gates() + static_cast<int64_t>(i) - 1)] =
              bits[static_cast<size_t>(n)];
        }
      }
      stream = run_block_apart(block, bits, std::move(stream), height, width);
    }
    auto pooled = Maps::floats(16, 1, 1);
    for (int64_t n = 0; n < kBatch; ++n) {
      for (int64_t c = 0; c < 16; ++c) {
        int64_t sum = 0;
        for (int64_t p = 0; p < height * width; ++p) {
          sum += stream->codes[static_cast<size_t>(n * stream->map.row_bytes + p * 16 + c)];
        }
        const double step =
            static_cast<double>(stream->scale) / static_cast<double>(height * width);
        pooled->values[static_cast<size_t>(n * 16 + c)] =
            static_cast<float>(static_cast<double>(sum) * step);
      }
    }
    auto result = Maps::floats(6, 1, 1);
    classifier.run(eight, pooled->map, false, nullptr, false, result->map);
    logits = result->values;
  }

  TestLayer stem;
  std::vector<TestBlock> blocks;
  TestLayer classifier;
  std::vector<std::vector<float>> embed_weight, embed_bias;
  std::vector<float> weight_ih, weight_hh, bias_ih, bias_hh, proj_weight, proj_bias;
  std::vector<double> choice_bias;
  std::vector<float> images;

 private:
  void choose(size_t index, const dfs::FeatureMap& features, const double* state, int32_t* bits,
              double* next) {
    std::vector<double> gate_logits(static_cast<size_t>(kBatch) * kChoices.size());
    dfs::RnnGateArgs args;
    args.batch = kBatch;
    args.input = features;
    args.hidden = kHidden;
    args.choice_count = static_cast<int64_t>(kChoices.size());
    std::copy(kChoices.begin(), kChoices.end(), args.choices);
    args.state = state;
    args.embed_weight = embed_weight[index - 1].data();
    args.embed_bias = embed_bias[index - 1].data();
    args.weight_ih = weight_ih.data();
    args.weight_hh = weight_hh.data();
    args.bias_ih = bias_ih.data();
    args.bias_hh = bias_hh.data();
    args.proj_weight = proj_weight.data();
    args.proj_bias = proj_bias.data();
    args.choice_bias = choice_bias.data();
    args.out_bits = bits;
    args.out_logits = gate_logits.data();
    args.out_state = next;
    dfs::rnn_gate(args, 1);
  }

  static std::unique_ptr<Maps> run_block_apart(const TestBlock& block,
                                               const std::vector<int32_t>& bits,
                                               std::unique_ptr<Maps> stream, int64_t& height,
                                               int64_t& width) {
    std::unique_ptr<Maps> before;
    const dfs::FeatureMap* from = &stream->map;
    int64_t h = height;
    int64_t w = width;
    for (size_t i = 0; i + 1 < block.layers.size(); ++i) {
      const dfs::ConvGeometry& g = block.layers[i].sizes.geometry;
      h = down(h, g.stride_h);
      w = down(w, g.stride_w);
      auto to = Maps::hidden(bits, block.layers[i + 1], g.out_channels, h, w);
      block.layers[i].run(bits, *from, i > 0, nullptr, true, to->map);
      before = std::move(to);
      from = &before->map;
    }
    const TestLayer& last = block.layers.back();
    if (block.shortcut.empty()) {
      last.run(bits, *from, true, &stream->map, true, stream->map);
      return stream;
    }
    const int64_t channels = last.sizes.geometry.out_channels;
    auto residual = Maps::floats(channels, h, w);
    block.shortcut[0].run(std::vector<int32_t>(kBatch, 8), stream->map, false, nullptr, false,
                          residual->map);
    auto result = Maps::stream(block.step, channels, h, w);
    last.run(bits, *from, true, &residual->map, true, result->map);
    height = h;
    width = w;
    return result;
  }

  std::vector<std::unique_ptr<std::vector<float>>> steps;  // of the last spec()
};

void check_run(Network& network, const dfs::Engine& engine, const int32_t* policy, int threads,
               const std::vector<int32_t>& bits, const std::vector<float>& logits) {
  GuardedBuffer<float> got_logits(logits.size());
  GuardedBuffer<int32_t> got_bits(bits.size());
  GuardedBuffer<double> got_cost(static_cast<size_t>(kBatch));
  dfs::EngineCall call;
  call.images = network.image_map();
  call.batch = kBatch;
  call.policy = policy;
  call.threads = threads;
  dfs::EngineOutput output;
  output.logits = got_logits.data();
  output.bits = got_bits.data();
  output.cost = got_cost.data();
  engine.run(call, output);
  got_logits.check_guards("logits");
  got_bits.check_guards("bits");
  got_cost.check_guards("cost");
  for (size_t n = 0; n < got_cost.size(); ++n) {
    const size_t gates = bits.size() / got_cost.size();
    double sum = 0.0;
    for (size_t i = 0; i < gates; ++i) {
      const double share = bits[n * gates + i] / 32.0;
      sum += share * share;
    }
    const double mean = sum / static_cast<double>(gates);
    CHECK(got_cost[n] == mean, "cost of sample ", n, ": ", got_cost[n], " instead of ", mean);
  }
  for (size_t i = 0; i < bits.size(); ++i) {
    CHECK(got_bits[i] == bits[i], "decision ", i, ", threads ", threads);
  }
  for (size_t i = 0; i < logits.size(); ++i) {
    CHECK(got_logits[i] == logits[i], "logit ", i, ", threads ", threads, ": ", got_logits[i],
          " instead of ", logits[i]);
  }
}

}  // namespace

DFS_TEST(engine_equals_single_calls) {
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < case_count(6); ++i) {
      Network network(random);
      const dfs::Engine engine(network.spec());
      std::vector<int32_t> bits;
      std::vector<float> logits;
      network.run_apart(nullptr, bits, logits);
      for (int threads = 1; threads <= 7; threads += 2) {
        check_run(network, engine, nullptr, threads, bits, logits);
      }
      std::vector<int32_t> policy(bits.size());
      for (int32_t& width : policy) width = kChoices[static_cast<size_t>(random.integer(0, 3))];
      network.run_apart(policy.data(), bits, logits);
      check_run(network, engine, policy.data(), 2, bits, logits);
    }
  });
}

DFS_TEST(engine_serves_several_callers) {
  Random random(seed());
  Network network(random);
  const dfs::Engine engine(network.spec());
  std::vector<int32_t> bits;
  std::vector<float> logits;
  network.run_apart(nullptr, bits, logits);
  std::vector<std::thread> callers;
  std::vector<char> failed(4, 0);
  for (size_t i = 0; i < failed.size(); ++i) {
    callers.emplace_back([&, i] {
      try {
        for (int round = 0; round < 5; ++round) {
          check_run(network, engine, nullptr, 1 + round % 3, bits, logits);
        }
      } catch (const std::exception&) {
        failed[i] = 1;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const char result : failed) CHECK(result == 0, "a caller got another result");
}

DFS_TEST(engine_spoils_only_the_image_that_is_not_finite) {
  Random random(seed());
  Network network(random);
  const dfs::Engine engine(network.spec());
  std::vector<int32_t> bits;
  std::vector<float> logits;
  network.run_apart(nullptr, bits, logits);
  network.images[3 * Network::kHeight * Network::kWidth + 5] = std::nanf("");
  std::vector<float> got(logits.size());
  std::vector<int32_t> got_bits(bits.size());
  std::vector<double> cost(static_cast<size_t>(kBatch));
  dfs::EngineCall call;
  call.images = network.image_map();
  call.batch = kBatch;
  dfs::EngineOutput output;
  output.logits = got.data();
  output.bits = got_bits.data();
  output.cost = cost.data();
  engine.run(call, output);
  for (size_t i = 0; i < got.size(); ++i) {
    if (i / 6 == 1) {
      CHECK(std::isnan(got[i]), "logit ", i, " of the spoilt image is ", got[i]);
    } else {
      CHECK(got[i] == logits[i], "logit ", i);
    }
  }
}

DFS_TEST(engine_looks_pixels_up) {
  for_each_isa([] {
    Random random(seed());
    // A stem that multiplies codes, and one that multiplies floats.
    for (const int32_t stem_bits : {8, 32}) {
      Network network(random);
      network.stem = TestLayer(random, 3, 8, 3, 1, {stem_bits});
      const std::vector<float> values = Network::draw(random, 3 * 256, 2.0f);
      constexpr int64_t kArea = Network::kHeight * Network::kWidth;
      // Channels innermost, and a gap behind every pixel that no one may read for one.
      GuardedBuffer<uint8_t> pixels(static_cast<size_t>(kBatch * kArea * 4));
      for (int64_t i = 0; i < kBatch * kArea * 4; ++i) {
        pixels[static_cast<size_t>(i)] = static_cast<uint8_t>(random.integer(0, 255));
      }
      for (int64_t n = 0; n < kBatch; ++n) {
        for (int64_t c = 0; c < 3; ++c) {
          for (int64_t p = 0; p < kArea; ++p) {
            const uint8_t pixel = pixels[static_cast<size_t>((n * kArea + p) * 4 + c)];
            network.images[static_cast<size_t>((n * 3 + c) * kArea + p)] =
                values[static_cast<size_t>(c * 256 + pixel)];
          }
        }
      }
      dfs::NetworkSpec spec = network.spec();
      spec.pixel_values = values.data();
      const dfs::Engine engine(spec);
      std::vector<float> logits(static_cast<size_t>(kBatch * engine.classes())), got(logits);
      dfs::EngineCall call;
      call.images = network.image_map();
      call.batch = kBatch;
      std::vector<int32_t> bits(static_cast<size_t>(kBatch * engine.gates()));
      std::vector<double> cost(static_cast<size_t>(kBatch));
      dfs::EngineOutput output;
      output.logits = logits.data();
      output.bits = bits.data();
      output.cost = cost.data();
      engine.run(call, output);
      call.images.values = nullptr;
      call.pixels = {pixels.data(), kArea * 4, 1, Network::kWidth * 4, 4};
      output.logits = got.data();
      for (int threads = 1; threads <= 3; ++threads) {
        call.threads = threads;
        std::fill(got.begin(), got.end(), std::nanf(""));
        engine.run(call, output);
        for (size_t i = 0; i < got.size(); ++i) {
          CHECK(got[i] == logits[i], "logit ", i, ", stem at ", stem_bits, " bits, threads ",
                threads, ": ", got[i], " instead of ", logits[i]);
        }
      }
    }
  });
}

DFS_TEST(engine_refuses_parts_that_do_not_fit) {
  Random random(seed());
  Network network(random);
  const auto rejection = [&](auto change) {
    dfs::NetworkSpec spec = network.spec();
    change(spec);
    return rejection_of([&] { const dfs::Engine engine(spec); });
  };
  const auto contains = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  std::string text = rejection([](dfs::NetworkSpec& spec) { spec.in_channels = 4; });
  CHECK(contains(text, "the stem takes 3 channels"), text);
  text = rejection([](dfs::NetworkSpec& spec) { spec.gates.pop_back(); });
  CHECK(contains(text, "fewer gates"), text);
  text = rejection([](dfs::NetworkSpec& spec) { spec.gates.push_back(spec.gates[0]); });
  CHECK(contains(text, "more gates"), text);
  text = rejection([](dfs::NetworkSpec& spec) { spec.blocks[2].shortcut.clear(); });
  CHECK(contains(text, "without a shortcut"), text);
  text = rejection([](dfs::NetworkSpec& spec) {
    spec.blocks.erase(spec.blocks.begin() + 2);
    spec.gates.erase(spec.gates.begin() + 1);
  });
  CHECK(contains(text, "takes 16 channels, but gets 8"), text);
  text = rejection([](dfs::NetworkSpec& spec) { spec.choices.clear(); });
  CHECK(contains(text, "no choices"), text);
  const dfs::Engine engine(network.spec());
  dfs::EngineCall call;
  call.batch = 1;
  const uint8_t pixel = 0;
  call.pixels.data = &pixel;
  text = rejection_of([&] { engine.run(call, {}); });
  CHECK(contains(text, "takes no uint8 images"), text);
}

}  // namespace dfs_test
