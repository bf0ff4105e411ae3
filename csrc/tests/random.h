// Random numbers that are the same with every standard library.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dfs_test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  // Decodes a fuzzer's bytes, a few for each draw; when they are used up, the draws that follow
  // depend on all of them. The bytes are borrowed.
  Random(const uint8_t* bytes, size_t count)
      : state_(0xcbf29ce484222325u), next_(bytes), left_(count) {
    for (size_t i = 0; i < count; ++i) state_ = (state_ ^ bytes[i]) * 0x100000001b3u;
  }

  // At least the lowest 8 * `bytes` bits are random.
  uint64_t bits(int bytes = 8) {
    if (left_ > 0) {
      uint64_t value = 0;
      for (; bytes > 0 && left_ > 0; --bytes, --left_) value = value << 8 | *next_++;
      return value;
    }
    // splitmix64
    uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }

  // In [low, high], both included.
  int64_t integer(int64_t low, int64_t high) {
    const uint64_t span = static_cast<uint64_t>(high - low + 1);
    return low + static_cast<int64_t>(bits(span <= 256 ? 1 : 8) % span);
  }

  bool chance(double probability) {
    return static_cast<double>(bits(1) & 0xff) < 256.0 * probability;
  }

  float uniform(float low, float high) {
    return low + (high - low) * (static_cast<float>(bits(3) & 0xffffff) * 0x1p-24f);
  }

 private:
  uint64_t state_;
  const uint8_t* next_ = nullptr;
  size_t left_ = 0;
};

}  // namespace dfs_test
