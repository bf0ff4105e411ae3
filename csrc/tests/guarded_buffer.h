// Memory that notices writes outside of it: filled with a sentinel, with guard bands around it.
// Under AddressSanitizer the bands are left out, since its own red zones see reads too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "check.h"

namespace dfs_test {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;
#else
constexpr size_t kGuard = 256;
#endif

// As float32 this is a NaN.
constexpr uint8_t kSentinel = 0xff;

template <typename T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(size_t count = 0)
      : count_(count), memory_(new uint8_t[kGuard * 2 + count * sizeof(T)]) {
    std::memset(memory_, kSentinel, kGuard * 2 + count * sizeof(T));
  }
  GuardedBuffer(const GuardedBuffer& other) : GuardedBuffer(other.count_) {
    std::memcpy(memory_, other.memory_, bytes());
  }
  GuardedBuffer(GuardedBuffer&& other) noexcept : count_(other.count_), memory_(other.memory_) {
    other.memory_ = nullptr;
  }
  GuardedBuffer& operator=(GuardedBuffer other) noexcept {
    std::swap(count_, other.count_);
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~GuardedBuffer() { delete[] memory_; }

  T* data() { return reinterpret_cast<T*>(memory_ + kGuard); }
  const T* data() const { return reinterpret_cast<const T*>(memory_ + kGuard); }
  size_t size() const { return count_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }

  bool same_bytes(const GuardedBuffer& other) const {
    return bytes() == other.bytes() && std::memcmp(memory_, other.memory_, bytes()) == 0;
  }

  void check_guards(const char* name) const {
    for (size_t i = 0; i < kGuard; ++i) {
      CHECK(memory_[i] == kSentinel, name, " was written ", kGuard - i, " bytes before its start");
      CHECK(memory_[bytes() - 1 - i] == kSentinel, name, " was written past its end");
    }
  }

  void check_untouched(size_t i, const char* name) const {
    const uint8_t* element = reinterpret_cast<const uint8_t*>(data() + i);
    for (size_t b = 0; b < sizeof(T); ++b) {
      CHECK(element[b] == kSentinel, name, "[", i, "] was written but belongs to nothing");
    }
  }

 private:
  size_t bytes() const { return kGuard * 2 + count_ * sizeof(T); }

  size_t count_;
  uint8_t* memory_;
};

}  // namespace dfs_test
