// The CUDA gradients in the emulator against their definition, on memory that notices every byte
// read or written beside its own when AddressSanitizer is there.
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cuda_operations.h"
#include "guarded_buffer.h"
#include "mixed_conv2d_backward_case.h"
#include "random.h"

namespace dfs_test {
namespace {

// Of factors that are rounded to TF32, 11 bits each.
constexpr double kTf32Error = 1.0 / 1024 + 1e-5;

// With scratch memory that holds `fill`, aligned as allocations on a GPU are.
void run(const dfs::MixedConv2dBackwardArgs& args, bool tf32, uint8_t fill = kSentinel) {
  const size_t bytes = static_cast<size_t>(dfs::cuda::backward_scratch_bytes(args));
  GuardedBuffer<uint8_t> scratch(bytes + 16);
  std::memset(scratch.data(), fill, scratch.size());
  const size_t start = (16 - reinterpret_cast<uintptr_t>(scratch.data()) % 16) % 16;
  dfs::cuda::mixed_conv2d_backward(args, scratch.data() + start, tf32, nullptr);
  for (size_t i = 0; i < 16; ++i) {
    const size_t beside = i < start ? i : bytes + i;
    CHECK(scratch[beside] == fill, "scratch memory was written beside its end");
  }
  scratch.check_guards("scratch");
}

void check_on_cuda(BackwardCase& c, bool tf32) {
  Gradients first(c);
  run(backward_args(c, first), tf32);
  check_gradients(c, first, expected_gradients(c), tf32 ? kTf32Error : 1e-5);
  Gradients again(c);
  run(backward_args(c, again), tf32, 0x5a);
  CHECK(again.same(first), describe(c.sizes), " differs from one run to the next");
}

struct Layer {
  int64_t channels;
  int64_t outputs;
  int64_t groups;
  int64_t height;
  int64_t width;
  int64_t kernel;
  int64_t stride;
};

BackwardCase make_case(Random& random, const Layer& layer) {
  BackwardCase c;
  set_layer(c.sizes, layer.channels, layer.outputs, layer.height, layer.width, layer.kernel,
            layer.stride);
  c.sizes.geometry.groups = layer.groups;
  c.bits = {8, 0, 4, 32, 2};
  c.batch = 5;
  while (c.widths() < 4) c.input_quantizer = draw_quantizer(random, 0.015f);
  draw_backward_tensors(random, c);
  return c;
}

// Contiguous maps, in planes or with the channels of a pixel next to each other.
void make_dense(Random& random, TestMap& map, bool planes) {
  map.stride_c = planes ? map.height * map.width : 1;
  map.stride_w = planes ? 1 : map.channels;
  map.stride_h = map.width * map.stride_w;
  map.stride_n = map.channels * map.height * map.width;
  map.values = GuardedBuffer<float>(static_cast<size_t>(map.batch * map.stride_n));
  fill(random, map, false);
}

// The weight of a case as canonical codes.
std::vector<std::vector<uint8_t>> pack_weight(const BackwardCase& c) {
  const dfs::ConvGeometry& g = c.sizes.geometry;
  const int64_t channels = c.sizes.group_channels();
  std::vector<std::vector<uint8_t>> packed;
  for (size_t i = 0; i < c.widths(); ++i) {
    const int bits = c.input_quantizer.widths[i];
    const int64_t row = naive_pixel_bytes(channels, bits);
    std::vector<uint8_t> codes(static_cast<size_t>(g.out_channels * c.sizes.taps() * row));
    for (int64_t o = 0; o < g.out_channels; ++o) {
      for (int64_t ch = 0; ch < channels; ++ch) {
        for (int64_t tap = 0; tap < c.sizes.taps(); ++tap) {
          const float w = c.weight[static_cast<size_t>((o * channels + ch) * c.sizes.taps() + tap)];
          uint8_t* run = codes.data() + (o * c.sizes.taps() + tap) * row;
          if (bits == 32) {
            std::memcpy(run + 4 * ch, &w, 4);
          } else {
            const float scale = c.weight_scale[i * c.outputs() + static_cast<size_t>(o)];
            naive_insert(run, ch, bits, naive_weight_code(w, scale, bits, c.centred[i]));
          }
        }
      }
    }
    packed.push_back(codes);
  }
  return packed;
}

}  // namespace

DFS_TEST(cuda_backward_matches_the_definition) {
  Random random(seed());
  for (int i = 0; i < case_count(60); ++i) {
    BackwardCase c = draw_backward_case(random);
    check_on_cuda(c, i % 3 == 0);
  }
}

// All shapes of tiles, with maps that are read four values at a time.
DFS_TEST(cuda_backward_of_known_layers) {
  Random random(seed());
  for (const Layer& layer : {
           Layer{16, 16, 1, 16, 16, 3, 1},
           Layer{16, 32, 1, 12, 8, 3, 2},
           Layer{32, 32, 1, 8, 8, 3, 1},
           Layer{64, 72, 1, 6, 6, 3, 1},
           Layer{72, 64, 1, 8, 8, 1, 1},
           Layer{32, 64, 1, 8, 8, 1, 2},
           Layer{3, 16, 1, 12, 12, 3, 1},
           Layer{16, 24, 1, 9, 9, 5, 1},
           Layer{16, 32, 2, 8, 8, 3, 1},
           Layer{8, 8, 8, 8, 8, 3, 1},
       }) {
    for (const bool planes : {true, false}) {
      BackwardCase c = make_case(random, layer);
      make_dense(random, c.input, planes);
      make_dense(random, c.grad_output, planes);
      check_on_cuda(c, false);
      check_on_cuda(c, true);
    }
  }
}

// Several parts of a sample's pixels, and more than one block to share them.
DFS_TEST(cuda_backward_of_many_pixels) {
  Random random(seed());
  BackwardCase c = make_case(random, {4, 8, 1, 40, 33, 3, 1});
  check_on_cuda(c, false);
}

DFS_TEST(cuda_backward_of_values_that_are_not_finite) {
  Random random(seed());
  const float specials[] = {std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity()};
  for (const int64_t groups : {1, 8}) {
    BackwardCase c = make_case(random, {8, 8, groups, 5, 4, 3, 1});
    for (int32_t& b : c.bits) b = 4;
    for (int64_t n = 0; n < c.batch; ++n) {
      c.input.values[c.input.value_index(n, 0, 0, 0)] = specials[n % 3];
    }
    check_on_cuda(c, false);
  }
}

DFS_TEST(cuda_backward_computes_only_what_is_wanted) {
  Random random(seed());
  for (const int64_t groups : {1, 8}) {
    BackwardCase c = make_case(random, {8, 8, groups, 5, 4, 3, 1});
    Gradients all(c);
    run(backward_args(c, all), false);
    for (int kept = -1; kept < 6; ++kept) {
      Gradients one(c);
      const Gradients untouched(c);
      dfs::MixedConv2dBackwardArgs args = backward_args(c, one);
      float** const outputs[] = {&args.grad_input,        &args.grad_weight, &args.grad_input_scale,
                                 &args.grad_weight_scale, &args.grad_mul,    &args.grad_add};
      const auto buffers = [](const Gradients& g) {
        return std::vector<const GuardedBuffer<float>*>{&g.input,        &g.weight, &g.input_scale,
                                                        &g.weight_scale, &g.mul,    &g.add};
      };
      for (int j = 0; j < 6; ++j) {
        if (j != kept) *outputs[j] = nullptr;
      }
      run(args, false);
      for (size_t j = 0; j < 6; ++j) {
        const Gradients& expected = static_cast<int>(j) == kept ? all : untouched;
        CHECK(buffers(one)[j]->same_bytes(*buffers(expected)[j]), "output ", j, " when only ", kept,
              " is wanted");
      }
    }
  }
}

DFS_TEST(cuda_backward_through_a_packed_weight) {
  Random random(seed());
  for (int i = 0; i < case_count(20); ++i) {
    BackwardCase c = draw_backward_case(random);
    Gradients expected(c);
    run(backward_args(c, expected), false);
    const std::vector<std::vector<uint8_t>> packed = pack_weight(c);
    Gradients got(c);
    dfs::MixedConv2dBackwardArgs args = backward_args(c, got);
    args.weight = nullptr;
    args.grad_weight = args.grad_weight_scale = nullptr;
    for (size_t j = 0; j < packed.size(); ++j) args.packed_weight[j] = packed[j].data();
    run(args, false);
    CHECK(got.input.same_bytes(expected.input), describe(c.sizes), ": grad_input");
    CHECK(got.input_scale.same_bytes(expected.input_scale), describe(c.sizes),
          ": grad_input_scale");
    CHECK(got.mul.same_bytes(expected.mul), describe(c.sizes), ": grad_mul");
    CHECK(got.add.same_bytes(expected.add), describe(c.sizes), ": grad_add");
  }
}

// Nothing can be raised on a GPU without waiting for it.
DFS_TEST(cuda_backward_takes_an_unknown_width_for_a_skipped_sample) {
  Random random(seed());
  for (const int64_t groups : {1, 8}) {
    BackwardCase c = make_case(random, {8, 8, groups, 5, 4, 3, 1});
    Gradients expected(c);
    run(backward_args(c, expected), false);
    c.bits[1] = 5;
    Gradients got(c);
    run(backward_args(c, got), false);
    CHECK(got.same(expected), groups, " groups");
  }
}

DFS_TEST(cuda_backward_gives_a_sample_the_same_gradient_in_any_batch) {
  Random random(seed());
  BackwardCase c = make_case(random, {16, 16, 1, 9, 8, 3, 1});
  c.bits = {8, 4, 8, 32, 2};
  Gradients whole(c);
  run(backward_args(c, whole), false);
  const size_t values = whole.input.size() / static_cast<size_t>(c.batch);
  for (int64_t n = 0; n < c.batch; ++n) {
    Gradients alone(c);
    dfs::MixedConv2dBackwardArgs args = backward_args(c, alone);
    args.batch = 1;
    args.bits += n;
    args.input.values += n * args.input.stride_n;
    args.grad_output.values += n * args.grad_output.stride_n;
    run(args, false);
    CHECK(std::memcmp(alone.input.data(), whole.input.data() + static_cast<size_t>(n) * values,
                      values * sizeof(float)) == 0,
          "sample ", n);
  }
}

DFS_TEST(cuda_backward_rejects_what_it_can_not_run) {
  Random random(seed());
  BackwardCase c = make_case(random, {8, 8, 1, 5, 4, 3, 1});
  Gradients out(c);
  const dfs::MixedConv2dBackwardArgs good = backward_args(c, out);
  dfs::MixedConv2dBackwardArgs bad = good;
  bad.widths.bits[1] = 5;
  std::string message = rejection_of([&] { dfs::cuda::backward_scratch_bytes(bad); });
  CHECK(message.find("5 bits") != std::string::npos, message);
  bad = good;
  bad.input.height = 1 << 28;
  message = rejection_of([&] { dfs::cuda::backward_scratch_bytes(bad); });
  CHECK(message.find("input has") != std::string::npos, message);
  auto* odd = reinterpret_cast<void*>(uintptr_t{8});
  message = rejection_of([&] { dfs::cuda::mixed_conv2d_backward(good, odd, false, nullptr); });
  CHECK(message.find("aligned") != std::string::npos, message);
}

}  // namespace dfs_test
