// Decodes the input into a mixed convolution, its geometry, widths and forms first and its contents
// with what is left, and checks it on every instruction set. The sanitizers watch the memory.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "mixed_conv2d_case.h"
#include "mixed_conv2d_check.h"
#include "random.h"
#include "split_small_work.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const dfs_test::SplitSmallWork split;
  try {
    dfs_test::Random random(data, size);
    dfs_test::ConvCase c = dfs_test::draw_case(random);
    dfs_test::check_case(c);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    std::abort();
  }
  return 0;
}
