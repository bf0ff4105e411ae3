// The names of csrc/cuda/device.h for the emulator.
#pragma once

#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define DFS_KERNEL(threads, blocks) void
#define DFS_PARAMS(type) const type
#define DFS_DEVICE inline
#define DFS_HOST_DEVICE inline
#define DFS_UNROLL
#define DFS_NO_UNROLL

namespace dfs::cuda {

inline int thread_index() { return emulator::thread_index(); }
inline int block_index() { return emulator::block_index(); }
inline int block_threads() { return emulator::block_threads(); }
inline void sync_block() { emulator::sync_block(); }
inline uint8_t* shared_memory() { return emulator::shared_memory(); }

template <typename T>
T* to_global(T* pointer) {
  return pointer;
}

template <typename T>
const T* in_shared(const void* pointer) {
  emulator::check_shared(pointer, sizeof(T));
  return static_cast<const T*>(pointer);
}

template <int kBytes>
void copy_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::copy_async(shared, global, kBytes);
}
inline void copy_or_clear_async(void* shared, const void* global, bool exists) {
  alignas(16) static const uint8_t kZeros[16] = {};
  emulator::copy_async(shared, exists ? global : kZeros, 16);
}
inline void wait_for_copies() { emulator::wait_for_copies(); }

inline void multiply_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_tile(c, a, b0, b1);
}

inline void count_tile(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::count_tile(c, a, b0, b1);
}
inline void count_half_tile(int32_t (&c)[4], const uint32_t (&a)[2], uint32_t b) {
  emulator::count_half_tile(c, a, b);
}

inline void multiply_tile(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::multiply_tile(c, a, b0, b1);
}

template <typename T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = emulator::shuffle_xor(bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline void atomic_add(int32_t* target, int32_t value) { *target += value; }

// Compiled with -ffp-contract=off.
inline float multiply(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float divide(float a, float b) { return a / b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float larger(float a, float b) { return std::fmax(a, b); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float to_float(int32_t x) { return static_cast<float>(x); }
inline double multiply(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }
inline float to_float(double x) { return static_cast<float>(x); }

inline float bits_to_float(uint32_t x) {
  float value;
  std::memcpy(&value, &x, sizeof(value));
  return value;
}
inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

template <typename Params>
void launch(const char* name, void (*kernel)(Params), const LaunchShape& shape,
            const Params& params, Stream) {
  emulator::run(name, shape, [&] { kernel(params); });
}

}  // namespace dfs::cuda
