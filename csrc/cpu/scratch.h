// Scratch memory for one task, kept per thread between calls: fresh pages cost more than the
// kernels that would touch them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

// Builds with a sanitizer fill the memory with NaN and -1 and do not keep it, so that reads of what
// was not written and accesses past the end show.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define DFS_POISON_SCRATCH 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define DFS_POISON_SCRATCH 1
#endif
#endif

namespace dfs {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : cached_(!in_use_) {
    if (cached_) {
      if (cache_.bytes < bytes) {
        cache_.memory.reset();
        cache_.bytes = 0;
        cache_.memory = allocate(bytes);
        cache_.bytes = bytes;
      }
      in_use_ = true;
      data_ = cache_.memory.get();
    } else {
      own_ = allocate(bytes);
      data_ = own_.get();
    }
#ifdef DFS_POISON_SCRATCH
    if (bytes > 0) std::memset(data_, 0xff, bytes);
#endif
  }

  ~Scratch() {
    if (!cached_) return;
    in_use_ = false;
    if (cache_.bytes > kMaxCachedBytes) {
      cache_.memory.reset();
      cache_.bytes = 0;
    }
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  void* data() const { return data_; }

 private:
  static constexpr size_t kAlignment = 64;
#ifdef DFS_POISON_SCRATCH
  static constexpr size_t kMaxCachedBytes = 0;
#else
  static constexpr size_t kMaxCachedBytes = size_t{64} << 20;
#endif

  struct Free {
    void operator()(uint8_t* memory) const {
      ::operator delete(memory, std::align_val_t{kAlignment});
    }
  };
  using Memory = std::unique_ptr<uint8_t, Free>;
  struct Cache {
    Memory memory;
    size_t bytes;
  };

  static Memory allocate(size_t bytes) {
    return Memory(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{kAlignment})));
  }

  static inline thread_local Cache cache_{nullptr, 0};
  static inline thread_local bool in_use_ = false;

  bool cached_;
  Memory own_;
  void* data_ = nullptr;
};

}  // namespace dfs
