// The float64 arithmetic of gates, in an order that does not depend on the instruction set: sums
// run over even and odd columns, vectors hold rows.
#pragma once

#include "isa.h"
#include "kernel_table.h"

namespace dfs {
namespace DFS_ISA {
namespace {

// kRows entries of the result below.
template <int kRows>
inline void map_some(const double* weight, const double* bias, int64_t step, int64_t columns,
                     const double* x, int64_t wanted, double* result) {
  double even[kRows] = {};
  double odd[kRows] = {};
  const auto add_column = [&](int64_t column, double* sums) {
    const double* entries = weight + column * step;
    for (int i = 0; i < kRows; ++i) sums[i] += entries[i] * x[column];
  };
  int64_t column = 0;
  for (; column + 2 <= columns; column += 2) {
    add_column(column, even);
    add_column(column + 1, odd);
  }
  if (column < columns) add_column(column, even);
  for (int64_t i = 0; i < wanted; ++i) result[i] = (even[i] + odd[i]) + bias[i];
}

// result (rows) = weight times x, plus bias; weight is (columns, rows), padded to a multiple of
// kGateRows rows.
inline void map_columns(const double* weight, const double* bias, int64_t rows, int64_t columns,
                        const double* x, double* result) {
  // A sum is two chains of additions: several vectors of them hide their latency.
  constexpr int kMost = 5 * kGateRows;
  const int64_t step = round_up(rows, kGateRows);
  int64_t first = 0;
  for (; first + kMost <= step; first += kMost) {
    map_some<kMost>(weight + first, bias + first, step, columns, x, min_of(rows - first, kMost),
                    result + first);
  }
  for (; first + 2 * kGateRows <= step; first += 2 * kGateRows) {
    map_some<2 * kGateRows>(weight + first, bias + first, step, columns, x,
                            min_of(rows - first, 2 * kGateRows), result + first);
  }
  if (first < step) {
    map_some<kGateRows>(weight + first, bias + first, step, columns, x, rows - first,
                        result + first);
  }
}

// e^x to about an ulp, NaN for NaN; beyond 700 either way, e^700 or e^-700.
inline double exponential(double exponent) {
  // Both comparisons are instructions, so that loops over this become vectors; NaN turns into a
  // limit, and is put back in the end.
  constexpr double kLimit = 700.0;
  double x = exponent > -kLimit ? exponent : -kLimit;
  x = x < kLimit ? x : kLimit;
  // x = n ln 2 + r with |r| <= ln 2 / 2. Adding the shift rounds to a whole number, which stands in
  // the last bits of the sum; n times the high part of ln 2 is exact.
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kLn2High = 6.93147180369123816490e-01;
  constexpr double kLn2Low = 1.90821492927058770002e-10;
  const double shifted = x * kLog2E + kShift;
  const double n = shifted - kShift;
  const double r = (x - n * kLn2High) - n * kLn2Low;
  // Taylor's series, whose rest is below 2^-57, in pairs: a chain of half the length.
  const double s = r * r;
  double sum = 1.0 / 479001600.0 + r * (1.0 / 6227020800.0);
  sum = sum * s + (1.0 / 3628800.0 + r * (1.0 / 39916800.0));
  sum = sum * s + (1.0 / 40320.0 + r * (1.0 / 362880.0));
  sum = sum * s + (1.0 / 720.0 + r * (1.0 / 5040.0));
  sum = sum * s + (1.0 / 24.0 + r * (1.0 / 120.0));
  sum = sum * s + (0.5 + r * (1.0 / 6.0));
  sum = sum * s + (1.0 + r);
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits + 1023) << 52;
  double power;
  std::memcpy(&power, &bits, sizeof(power));
  const double result = sum * power;
  return exponent == exponent ? result : exponent;
}

inline double logistic(double x) { return 1.0 / (1.0 + exponential(-x)); }

// To about an ulp of 1.
inline double hyperbolic_tangent(double x) { return 1.0 - 2.0 / (1.0 + exponential(2.0 * x)); }

// An LSTM cell of `hidden` units: gates (4, hidden) hold input, forget, cell and output. `kept` is
// the cell before, null for zeros.
inline void lstm_units(const double* gates, int64_t hidden, const double* kept, double* cell,
                       double* output) {
  if (kept == nullptr) {
    for (int64_t i = 0; i < hidden; ++i) {
      cell[i] = logistic(gates[i]) * hyperbolic_tangent(gates[2 * hidden + i]);
    }
  } else {
    for (int64_t i = 0; i < hidden; ++i) {
      cell[i] = logistic(gates[hidden + i]) * kept[i] +
                logistic(gates[i]) * hyperbolic_tangent(gates[2 * hidden + i]);
    }
  }
  for (int64_t i = 0; i < hidden; ++i) {
    output[i] = logistic(gates[3 * hidden + i]) * hyperbolic_tangent(cell[i]);
  }
}

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
