// Runs a frozen network on a CPU: gates, decisions and blocks in one call.
//
// Samples are worked on one after the other by each thread, so that a sample's activations stay in
// its core's cache; where there are fewer samples than threads, rows of each layer are shared out.
// Everything a call needs is planned ahead: it allocates nothing once as many calls have run at the
// same time before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "gates.h"
#include "layer.h"
#include "network.h"
#include "pixels.h"

namespace dfs {

// What a call writes.
struct EngineOutput {
  float* logits = nullptr;  // (N, classes)
  int32_t* bits = nullptr;  // (N, gates)
  double* cost = nullptr;   // (N), the mean over gates of (bits / 32)^2
  // Nanoseconds: (blocks + 2), the stem first, the classifier last; then those of the gates alone.
  // Added to; null where they are not wanted. Only for calls on one thread.
  double* block_times = nullptr;
  double* gate_times = nullptr;
};

struct EngineCall {
  FeatureMap images;   // float32, (in_channels, height, width)
  PixelImages pixels;  // uint8, instead of `images`
  int64_t batch = 0;
  // Widths for every gated block, (N, gates), instead of the gates' decisions; or null.
  const int32_t* policy = nullptr;
  const double* choice_bias = nullptr;  // (choices), instead of the network's own; or null
  int threads = 1;
};

class ThreadTeam;

class Engine {
 public:
  // Throws std::invalid_argument for a network whose parts do not fit together.
  explicit Engine(const NetworkSpec& spec);
  ~Engine();

  bool takes_pixels() const { return !pixel_table_.empty(); }
  int64_t classes() const { return classifier_.geometry().out_channels; }
  int64_t gates() const { return gates_.count(); }
  int64_t choices() const { return gates_.choice_count(); }
  size_t weight_bytes() const;

  // May be called from several threads at once. A sample with a value that is not finite gets NaN
  // logits and 0 for every decision.
  void run(const EngineCall& call, const EngineOutput& output) const;

 private:
  struct Block {
    std::vector<Layer> layers;
    std::vector<Layer> shortcut;
    StreamSpec stream;
    int32_t fixed_bits = -1;
    int64_t gate = -1;
    int64_t channels = 0;  // of the stream it writes
    int64_t height = 0;
    int64_t width = 0;
  };
  // Memory of one sample at work, and of the threads that share it.
  struct Workspace;
  class Lease;

  void plan();
  FeatureMap stem_input(const EngineCall& call, int64_t sample, Workspace& space) const;
  void run_sample(const EngineCall& call, const EngineOutput& output, int64_t sample,
                  Workspace& space, ThreadTeam* team) const;
  void run_block(const Block& block, int32_t bits, Workspace& space, ThreadTeam* team) const;
  void run_layer(const Layer& layer, const LayerCall& call, Workspace& space,
                 ThreadTeam* team) const;
  int32_t decide(const Block& block, const EngineCall& call, int64_t sample,
                 Workspace& space) const;
  void pool_stem(Workspace& space) const;
  std::unique_ptr<Workspace> make_workspace() const;

  int64_t in_channels_;
  int64_t in_height_;
  int64_t in_width_;
  Layer stem_;
  PixelTable pixel_table_;
  StreamSpec stem_stream_;
  int64_t stem_height_ = 0;
  int64_t stem_width_ = 0;
  int64_t pool_size_;
  int64_t pool_stride_;
  int64_t pool_padding_;
  std::vector<Block> blocks_;
  Gates gates_;
  Layer classifier_;

  // Found by plan().
  size_t pixel_bytes_ = 0;
  size_t stream_bytes_ = 0;
  size_t hidden_bytes_ = 0;
  size_t shortcut_values_ = 0;
  size_t scratch_bytes_ = 0;
  size_t gate_scratch_bytes_ = 0;

  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;
};

}  // namespace dfs
