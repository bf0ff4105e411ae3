// Included by every header here. Each ISA file compiles its own copy of these headers with its own
// flags, in its own namespace and with internal linkage, so that the linker cannot merge them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "dfs/types.h"

#ifndef DFS_ISA
#error "define DFS_ISA to the name of the instruction set"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// fn(0), fn(1) ... fn(kCount - 1) with arguments that are constants: arrays indexed by them are
// kept in registers, which compilers don't always manage for loops.
template <typename Fn, int... kIndex>
inline void unroll_over(Fn fn, std::integer_sequence<int, kIndex...>) {
  (fn(std::integral_constant<int, kIndex>{}), ...);
}
template <int kCount, typename Fn>
inline void unroll(Fn fn) {
  unroll_over(fn, std::make_integer_sequence<int, kCount>{});
}

// Hands out pieces of a task's scratch memory. Run over a null base it measures their sum.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }

  size_t used() const { return used_; }

 private:
  uint8_t* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
