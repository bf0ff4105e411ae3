// The emulator itself: what it computes, and that it notices what a GPU would not.
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "device.h"
#include "random.h"

namespace dfs_test {
namespace {

using dfs::cuda::LaunchShape;

struct TileParams {
  const uint8_t* a;  // [16][32]
  const int8_t* b;   // [32][8]
  int32_t* c;        // [16][8]
};

uint32_t load_word(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
}

// Puts operands where the PTX ISA says that a lane has them.
void multiply_kernel(const TileParams p) {
  const int lane = dfs::cuda::thread_index() % 32;
  const int group = lane / 4;
  const int in_group = lane % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = load_word(p.a + (group + 8 * (i % 2)) * 32 + 4 * in_group + 16 * (i / 2));
  }
  uint32_t b[2] = {};
  for (int i = 0; i < 8; ++i) {
    const int row = 4 * in_group + i % 4 + 16 * (i / 4);
    b[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(p.b[row * 8 + group])) << (8 * (i % 4));
  }
  int32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = p.c[(group + 8 * (i / 2)) * 8 + 2 * in_group + i % 2];
  dfs::cuda::multiply_tile(c, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) p.c[(group + 8 * (i / 2)) * 8 + 2 * in_group + i % 2] = c[i];
}

struct CountParams {
  const uint32_t* a;  // [16][8]: 256 bits of each row
  const uint32_t* b;  // [8][8]: of each column
  int32_t* c;         // [16][8]
  bool half;          // the first 128 bits only
};

void count_kernel(const CountParams p) {
  const int lane = dfs::cuda::thread_index() % 32;
  const int group = lane / 4;
  const int in_group = lane % 4;
  uint32_t a[4];
  for (int i = 0; i < 4; ++i) a[i] = p.a[(group + 8 * (i % 2)) * 8 + in_group + 4 * (i / 2)];
  const uint32_t* b = p.b + group * 8 + in_group;
  int32_t c[4];
  for (int i = 0; i < 4; ++i) c[i] = p.c[(group + 8 * (i / 2)) * 8 + 2 * in_group + i % 2];
  if (p.half) {
    dfs::cuda::count_half_tile(c, {a[0], a[1]}, b[0]);
  } else {
    dfs::cuda::count_tile(c, a, b[0], b[4]);
  }
  for (int i = 0; i < 4; ++i) p.c[(group + 8 * (i / 2)) * 8 + 2 * in_group + i % 2] = c[i];
}

struct Nothing {};

// What a kernel fails with.
std::string failure_of(void (*kernel)(Nothing), int shared_bytes) {
  try {
    dfs::cuda::launch("test", kernel, {1, 64, shared_bytes}, Nothing{}, nullptr);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void expect_failure(void (*kernel)(Nothing), const char* part) {
  const std::string message = failure_of(kernel, 256);
  CHECK(message.find(part) != std::string::npos, "instead of ", part, ": ", message);
  CHECK(message.find("emulated kernel test") == 0, message);
}

}  // namespace

DFS_TEST(emulator_multiplies_tiles) {
  Random random(seed());
  for (int i = 0; i < 50; ++i) {
    std::vector<uint8_t> a(16 * 32);
    std::vector<int8_t> b(32 * 8);
    std::vector<int32_t> c(16 * 8);
    for (uint8_t& value : a) {
      value = static_cast<uint8_t>(i == 0 ? 255 : random.integer(0, 255));
    }
    for (int8_t& value : b) {
      value = static_cast<int8_t>(i == 0 ? -128 : random.integer(-128, 127));
    }
    for (int32_t& value : c) value = static_cast<int32_t>(random.integer(-1000000, 1000000));
    std::vector<int32_t> expected = c;
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        for (int k = 0; k < 32; ++k) {
          expected[static_cast<size_t>(row * 8 + column)] +=
              a[static_cast<size_t>(row * 32 + k)] * b[static_cast<size_t>(k * 8 + column)];
        }
      }
    }
    const TileParams params{a.data(), b.data(), c.data()};
    dfs::cuda::launch("multiply", &multiply_kernel, {1, 32, 0}, params, nullptr);
    CHECK(c == expected, "a product differs");
  }
}

DFS_TEST(emulator_counts_bits_of_tiles) {
  Random random(seed());
  for (int i = 0; i < 50; ++i) {
    const bool half = i % 2 == 1;
    std::vector<uint32_t> a(16 * 8);
    std::vector<uint32_t> b(8 * 8);
    std::vector<int32_t> c(16 * 8);
    for (std::vector<uint32_t>* side : {&a, &b}) {
      for (uint32_t& word : *side) {
        word = i < 2 ? ~0u : static_cast<uint32_t>(random.integer(0, 0xffffffff));
      }
    }
    for (int32_t& value : c) value = static_cast<int32_t>(random.integer(-1000000, 1000000));
    std::vector<int32_t> expected = c;
    for (size_t row = 0; row < 16; ++row) {
      for (size_t column = 0; column < 8; ++column) {
        for (size_t k = 0; k < (half ? 128 : 256); ++k) {
          const uint32_t both = a[row * 8 + k / 32] & b[column * 8 + k / 32];
          expected[row * 8 + column] += static_cast<int32_t>((both >> (k % 32)) & 1u);
        }
      }
    }
    const CountParams params{a.data(), b.data(), c.data(), half};
    dfs::cuda::launch("count", &count_kernel, {1, 32, 0}, params, nullptr);
    CHECK(c == expected, half ? "half: " : "whole: ", "a count differs");
  }
}

DFS_TEST(emulator_runs_barriers_and_shuffles) {
  struct Params {
    int32_t* out;
  };
  const auto kernel = +[](const Params p) {
    auto* shared = reinterpret_cast<int32_t*>(dfs::cuda::shared_memory());
    const int thread = dfs::cuda::thread_index();
    const int threads = dfs::cuda::block_threads();
    shared[thread] = thread + 1000 * dfs::cuda::block_index();
    dfs::cuda::sync_block();
    int32_t sum = shared[threads - 1 - thread];
    for (int mask = 16; mask > 0; mask /= 2) sum += dfs::cuda::shuffle_xor(sum, mask);
    p.out[dfs::cuda::block_index() * threads + thread] = sum;
  };
  std::vector<int32_t> out(3 * 96);
  dfs::cuda::launch("sums", kernel, {3, 96, 96 * 4}, Params{out.data()}, nullptr);
  for (int i = 0; i < 3 * 96; ++i) {
    const int last = 95 - i % 96 / 32 * 32;  // of the warp's mirrored threads
    const int expected = 32 * (i / 96 * 1000) + (last + last - 31) * 16;
    CHECK(out[static_cast<size_t>(i)] == expected, i, ": ", out[static_cast<size_t>(i)]);
  }
}

DFS_TEST(emulator_notices_a_barrier_that_a_warp_operation_waits_for) {
  expect_failure(
      +[](Nothing) {
        if (dfs::cuda::thread_index() == 3) {
          dfs::cuda::sync_block();
        } else {
          dfs::cuda::shuffle_xor(1, 1);
        }
      },
      "waits for others");
}

DFS_TEST(emulator_notices_writes_past_shared_memory) {
  // On the heap, where AddressSanitizer would stop the process rather than let it go on.
#if !defined(__SANITIZE_ADDRESS__)
  expect_failure(
      +[](Nothing) {
        if (dfs::cuda::thread_index() == 0) dfs::cuda::shared_memory()[256] = 1;
      },
      "outside of its shared memory");
#endif
  expect_failure(
      +[](Nothing) {
        static const uint8_t source[16] = {};
        dfs::cuda::copy_async<16>(dfs::cuda::shared_memory() + 256, source);
      },
      "leads outside of shared memory");
}

DFS_TEST(emulator_notices_reads_past_shared_memory) {
  expect_failure(
      +[](Nothing) { dfs::cuda::in_shared<uint32_t>(dfs::cuda::shared_memory() + 254); },
      "reads outside of its shared memory");
  expect_failure(
      +[](Nothing) { dfs::cuda::in_shared<uint8_t>(dfs::cuda::shared_memory() - 1); },
      "reads outside of its shared memory");
  CHECK(failure_of(
            +[](Nothing) { dfs::cuda::in_shared<uint32_t>(dfs::cuda::shared_memory() + 252); },
            256) == "",
        "a read of the last bytes fails");
}

DFS_TEST(emulator_runs_past_the_barrier_that_is_named) {
  struct Params {
    int* seen;
  };
  // Whether the first thread sees what the last one has written, in a block that begins with its
  // first threads and in one that begins with its last ones.
  const auto kernel = +[](const Params p) {
    auto* shared = reinterpret_cast<int*>(dfs::cuda::shared_memory());
    for (int round = 0; round < 2; ++round) {
      if (dfs::cuda::thread_index() == 63) shared[round] = 7;
      dfs::cuda::sync_block();
      if (dfs::cuda::thread_index() == 0) p.seen[round] += shared[round] == 7;
    }
  };
  for (int skipped = -1; skipped < 2; ++skipped) {
    int seen[2] = {};
    dfs::cuda::emulator::skip_barrier(skipped);
    dfs::cuda::launch("barriers", kernel, {2, 64, 8}, Params{seen}, nullptr);
    dfs::cuda::emulator::skip_barrier(-1);
    CHECK(dfs::cuda::emulator::barriers_met() == 2, dfs::cuda::emulator::barriers_met());
    for (int round = 0; round < 2; ++round) {
      const int expected = round == skipped ? 1 : 2;
      CHECK(seen[round] == expected, skipped, " ", round, ": ", seen[round]);
    }
  }
}

DFS_TEST(emulator_notices_copies_that_are_misaligned_or_not_waited_for) {
  alignas(16) static const uint8_t source[32] = {};
  expect_failure(
      +[](Nothing) { dfs::cuda::copy_async<8>(dfs::cuda::shared_memory(), source + 4); },
      "not aligned");
  expect_failure(
      +[](Nothing) { dfs::cuda::copy_async<16>(dfs::cuda::shared_memory(), source); },
      "copies under way");
}

DFS_TEST(emulator_delivers_copies_when_they_are_waited_for) {
  struct Params {
    const uint8_t* from;
    int* early;
    int* late;
  };
  const auto kernel = +[](const Params p) {
    uint8_t* shared = dfs::cuda::shared_memory();
    if (dfs::cuda::thread_index() == 0) {
      dfs::cuda::copy_async<4>(shared, p.from);
      *p.early = shared[0];
      dfs::cuda::wait_for_copies();
      *p.late = shared[0];
    }
  };
  alignas(16) static const uint8_t source[4] = {7, 7, 7, 7};
  int early = 0;
  int late = 0;
  dfs::cuda::launch("copy", kernel, {1, 32, 16}, Params{source, &early, &late}, nullptr);
  CHECK(early != 7, "a copy arrived before it was waited for");
  CHECK(late == 7, "a copy did not arrive");
}

}  // namespace dfs_test
