// The float64 arithmetic of gates, in an order that does not depend on the instruction set: sums
// run over even and odd columns, vectors hold rows.
#pragma once

#include "isa.h"
#include "kernel_table.h"

#if defined(__GNUC__) && !defined(__clang__)
// It warns that such vectors are passed in other ways with other flags; all is inlined here.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace dfs {
namespace DFS_ISA {
namespace {

// Vectors of the compiler's own, which every instruction set has in as many registers as it takes:
// left to find these loops by itself, it shuffles scalars instead.
typedef double GateVector __attribute__((vector_size(kGateRows * sizeof(double))));
typedef int64_t GateWords __attribute__((vector_size(kGateRows * sizeof(int64_t))));

inline GateVector load_gates(const double* source) {
  GateVector value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}
inline void store_gates(double* target, const GateVector& value) {
  std::memcpy(target, &value, sizeof(value));
}

// kVectors vectors of the result below.
template <int kVectors>
inline void map_some(const double* weight, const double* bias, int64_t step, int64_t columns,
                     const double* x, double* result) {
  GateVector even[kVectors];
  GateVector odd[kVectors];
  unroll<kVectors>([&](auto i) { even[i] = odd[i] = GateVector{}; });
  const auto add_column = [&](int64_t column, GateVector* sums) {
    const double* entries = weight + column * step;
    const double value = x[column];
    unroll<kVectors>([&](auto i) { sums[i] += load_gates(entries + i * kGateRows) * value; });
  };
  int64_t column = 0;
  for (; column + 2 <= columns; column += 2) {
    add_column(column, even);
    add_column(column + 1, odd);
  }
  if (column < columns) add_column(column, even);
  unroll<kVectors>([&](auto i) {
    const int64_t row = i * kGateRows;
    store_gates(result + row, (even[i] + odd[i]) + load_gates(bias + row));
  });
}

// result = weight times x, plus bias; weight is (columns, rows), rows a multiple of kGateRows.
inline void map_columns(const double* weight, const double* bias, int64_t rows, int64_t columns,
                        const double* x, double* result) {
  // A sum is two chains of additions: several vectors of them hide their latency.
  constexpr int kMost = 5;
  int64_t first = 0;
  const auto take = [&](auto vectors) {
    for (; first + vectors * kGateRows <= rows; first += vectors * kGateRows) {
      map_some<vectors>(weight + first, bias + first, rows, columns, x, result + first);
    }
  };
  take(std::integral_constant<int, kMost>{});
  take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

// e^x to about an ulp, NaN for NaN; beyond 700 either way, e^700 or e^-700.
inline GateVector exponential(const GateVector& exponent) {
  const GateVector zero = {};
  const GateVector limit = zero + 700.0;
  // NaN turns into a limit, and is put back in the end.
  GateVector x = exponent > -limit ? exponent : -limit;
  x = x < limit ? x : limit;
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding the shift rounds to a whole number, which stands in
  // the last bits of the sum; n times the high part of ln 2 is exact.
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 6.93147180369123816490e-01;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  const GateVector shifted = x * kLog2E + kShift;
  const GateVector n = shifted - kShift;
  const GateVector r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor's series, whose rest is below 2^-57, in pairs: a chain of half the length.
  const GateVector s = r * r;
  GateVector sum = 1.0 / 479001600.0 + r * (1.0 / 6227020800.0);
  sum = sum * s + (1.0 / 3628800.0 + r * (1.0 / 39916800.0));
  sum = sum * s + (1.0 / 40320.0 + r * (1.0 / 362880.0));
  sum = sum * s + (1.0 / 720.0 + r * (1.0 / 5040.0));
  sum = sum * s + (1.0 / 24.0 + r * (1.0 / 120.0));
  sum = sum * s + (0.5 + r * (1.0 / 6.0));
  sum = sum * s + (1.0 + r);
  GateWords bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  GateVector power;
  std::memcpy(&power, &bits, sizeof(power));
  return exponent == exponent ? sum * power : exponent;
}

// 1 / (1 + e^x): the logistic function of -x, and half of 1 - tanh(x / 2), to about an ulp of 1.
inline GateVector falling_logistic(const GateVector& x) { return 1.0 / (1.0 + exponential(x)); }

// An LSTM cell of `hidden` units: gates (4, hidden) hold input, forget, cell and output, and are
// overwritten; vectors reach beyond the ends of all four arrays.
inline void lstm_units(double* gates, int64_t hidden, const double* kept, double* cell,
                       double* output) {
  double* candidates = gates + 2 * hidden;
  for (int64_t i = 0; i < 2 * hidden; ++i) gates[i] = -gates[i];
  for (int64_t i = 0; i < hidden; ++i) candidates[i] *= 2.0;
  for (int64_t i = 3 * hidden; i < 4 * hidden; ++i) gates[i] = -gates[i];
  for (int64_t i = 0; i < 4 * hidden; i += kGateRows) {
    store_gates(gates + i, falling_logistic(load_gates(gates + i)));
  }
  for (int64_t i = 0; i < hidden; i += kGateRows) {
    const GateVector candidate = 1.0 - 2.0 * load_gates(candidates + i);
    const GateVector sum =
        load_gates(gates + hidden + i) * load_gates(kept + i) + load_gates(gates + i) * candidate;
    store_gates(cell + i, sum);
    const GateVector tanh = 1.0 - 2.0 * falling_logistic(2.0 * sum);
    store_gates(output + i, load_gates(gates + 3 * hidden + i) * tanh);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
