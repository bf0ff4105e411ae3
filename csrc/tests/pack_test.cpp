#include <vector>

#include "check.h"
#include "guarded_buffer.h"
#include "naive.h"
#include "operations.h"
#include "random.h"

namespace dfs_test {
namespace {

void check_round_trip(Random& random, int64_t rows, int64_t channels, int bits, bool is_signed) {
  const int64_t bytes = naive_pixel_bytes(channels, bits);
  GuardedBuffer<uint8_t> codes(static_cast<size_t>(rows * channels));
  for (size_t i = 0; i < codes.size(); ++i) {
    // Every code in turn; the bits above it must not matter.
    const int code = static_cast<int>(i) & ((1 << bits) - 1);
    codes[i] = static_cast<uint8_t>(code | (random.integer(0, 255) << bits));
  }
  for (int threads = 1; threads <= 3; ++threads) {
    GuardedBuffer<uint8_t> packed(static_cast<size_t>(rows * bytes));
    dfs::pack_bits(codes.data(), rows, channels, bits, packed.data(), threads);
    packed.check_guards("packed");
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<uint8_t> expected(static_cast<size_t>(bytes), 0);
      for (int64_t c = 0; c < channels; ++c) {
        naive_insert(expected.data(), c, bits, codes[static_cast<size_t>(row * channels + c)]);
      }
      for (int64_t i = 0; i < bytes; ++i) {
        CHECK(packed[static_cast<size_t>(row * bytes + i)] == expected[static_cast<size_t>(i)],
              "bits ", bits, " channels ", channels, " byte ", i);
      }
    }
    GuardedBuffer<uint8_t> unpacked(codes.size());
    dfs::unpack_bits(packed.data(), rows, channels, bits, is_signed, unpacked.data(), threads);
    unpacked.check_guards("unpacked");
    for (size_t i = 0; i < codes.size(); ++i) {
      int expected = codes[i] & ((1 << bits) - 1);
      if (is_signed && expected >= 1 << (bits - 1)) expected -= 1 << bits;
      CHECK(unpacked[i] == static_cast<uint8_t>(expected), "bits ", bits, " code ", i);
    }
  }
}

}  // namespace

DFS_TEST(packing_round_trips_every_code) {
  for_each_isa([] {
    Random random(seed());
    for (const int bits : {1, 2, 4, 8}) {
      for (const int64_t channels : {1, 2, 3, 4, 5, 7, 8, 9, 16, 31, 64, 257}) {
        for (const bool is_signed : {false, true}) {
          check_round_trip(random, 11, channels, bits, is_signed);
        }
      }
      check_round_trip(random, 5000, 33, bits, true);
    }
  });
}

DFS_TEST(packing_literal_example) {
  const uint8_t codes[] = {1, 2, 3, 0, 2};
  uint8_t packed[2] = {0xff, 0xff};
  dfs::pack_bits(codes, 1, 5, 2, packed, 1);
  CHECK(packed[0] == 0x39 && packed[1] == 0x02, "got ", int{packed[0]}, " ", int{packed[1]});
}

DFS_TEST(packing_rejects_other_widths) {
  uint8_t byte = 0;
  for (const int bits : {0, 3, 5, 16, 32, -1}) {
    const std::string message = rejection_of([&] { dfs::pack_bits(&byte, 1, 1, bits, &byte, 1); });
    CHECK(message.find(std::to_string(bits)) != std::string::npos, message);
    rejection_of([&] { dfs::unpack_bits(&byte, 1, 1, bits, false, &byte, 1); });
  }
}

DFS_TEST(packing_nothing) { dfs::pack_bits(nullptr, 0, 5, 2, nullptr, 2); }

}  // namespace dfs_test
