#include <limits>
#include <string>

#include "check.h"
#include "conv_case.h"
#include "guarded_buffer.h"
#include "mixed_conv2d_backward_case.h"
#include "operations.h"
#include "random.h"
#include "split_small_work.h"

namespace dfs_test {
namespace {

void check_backward_case(BackwardCase& c) {
  Gradients first(c);
  dfs::mixed_conv2d_backward(backward_args(c, first), 1);
  check_gradients(c, first, expected_gradients(c));
  for (int threads = 2; threads <= 3; ++threads) {
    Gradients again(c);
    dfs::mixed_conv2d_backward(backward_args(c, again), threads);
    CHECK(again.same(first), describe(c.sizes), " differs with ", threads, " threads");
  }
}

}  // namespace

DFS_TEST(backward_matches_the_definition) {
  const SplitSmallWork split;
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < case_count(500); ++i) {
      BackwardCase c = draw_backward_case(random);
      check_backward_case(c);
    }
  });
}

DFS_TEST(backward_of_values_that_are_not_finite) {
  for_each_isa([] {
    Random random(seed());
    BackwardCase c;
    do {
      c = draw_backward_case(random);
    } while (c.batch == 0);
    for (int32_t& b : c.bits) b = 4;
    const float specials[] = {std::numeric_limits<float>::quiet_NaN(),
                              std::numeric_limits<float>::infinity(),
                              -std::numeric_limits<float>::infinity()};
    int i = 0;
    for (int64_t n = 0; n < c.batch; ++n) {
      c.input.values[c.input.value_index(n, 0, 0, 0)] = specials[i++ % 3];
    }
    check_backward_case(c);
  });
}

DFS_TEST(backward_computes_only_what_is_wanted) {
  for_each_isa([] {
    Random random(seed());
    for (int i = 0; i < 20; ++i) {
      BackwardCase c = draw_backward_case(random);
      Gradients all(c);
      dfs::mixed_conv2d_backward(backward_args(c, all), 1);
      for (int kept = -1; kept < 6; ++kept) {
        Gradients one(c);
        Gradients untouched(c);
        dfs::MixedConv2dBackwardArgs args = backward_args(c, one);
        float** const outputs[] = {&args.grad_input,       &args.grad_weight,
                                   &args.grad_input_scale, &args.grad_weight_scale,
                                   &args.grad_mul,         &args.grad_add};
        GuardedBuffer<float>* const buffers[] = {&one.input,        &one.weight, &one.input_scale,
                                                 &one.weight_scale, &one.mul,    &one.add};
        GuardedBuffer<float>* const wanted[] = {&all.input,        &all.weight, &all.input_scale,
                                                &all.weight_scale, &all.mul,    &all.add};
        GuardedBuffer<float>* const poison[] = {&untouched.input,       &untouched.weight,
                                                &untouched.input_scale, &untouched.weight_scale,
                                                &untouched.mul,         &untouched.add};
        for (int j = 0; j < 6; ++j) {
          if (j != kept) *outputs[j] = nullptr;
        }
        dfs::mixed_conv2d_backward(args, 2);
        for (int j = 0; j < 6; ++j) {
          const GuardedBuffer<float>* expected = j == kept ? wanted[j] : poison[j];
          CHECK(buffers[j]->same_bytes(*expected), "output ", j, " when only ", kept, " is wanted");
        }
      }
    }
  });
}

DFS_TEST(backward_rejects_widths_without_a_scale) {
  Random random(seed());
  BackwardCase c;
  do {
    c = draw_backward_case(random);
  } while (c.batch < 2);
  c.bits[1] = 5;
  Gradients out(c);
  const std::string message =
      rejection_of([&] { dfs::mixed_conv2d_backward(backward_args(c, out), 1); });
  CHECK(message.find("bits[1] is 5") != std::string::npos, message);
}

}  // namespace dfs_test
