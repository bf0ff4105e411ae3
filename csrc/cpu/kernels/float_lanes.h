// A register of float32 values for the blocks of products. Compilers do not keep a block of sums in
// registers when they have to find the vectors themselves (GCC 12: 4.7 GMAC/s against 14 with these
// on a Zen 4 core and SSE).
#pragma once

#include "isa.h"
#if defined(__AVX2__)
#include "vectors.h"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

#if defined(__AVX2__)
using FloatLanes = Floats;
constexpr int64_t kFloatLanes = kLanes;
// Rows of a block of sums: two registers each, beside three for what is multiplied.
constexpr int kFloatRows = kLanes == 16 ? 12 : 6;

inline void add_product(FloatLanes* sum, float left, FloatLanes right) {
  *sum = multiply_add(splat(left), right, *sum);
}
#else
constexpr int64_t kFloatLanes = 4;
constexpr int kFloatRows = 4;

#if defined(__GNUC__)
typedef float FloatLanes __attribute__((vector_size(16)));

inline void add_product(FloatLanes* sum, float left, const FloatLanes& right) {
  *sum += left * right;
}
#else
struct FloatLanes {
  float values[4];
};

inline void add_product(FloatLanes* sum, float left, const FloatLanes& right) {
  for (int i = 0; i < 4; ++i) sum->values[i] += left * right.values[i];
}
#endif
#endif

inline FloatLanes load_lanes(const float* values) {
  FloatLanes result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

inline void store_lanes(float* values, const FloatLanes& source) {
  std::memcpy(values, &source, sizeof(source));
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
