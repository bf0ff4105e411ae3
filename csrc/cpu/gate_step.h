// A gate's decision for one sample, without allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dfs/types.h"
#include "kernel_table.h"

namespace dfs {

// Bytes of scratch that pooling a sample of such a map takes.
size_t pool_scratch_bytes(const FeatureMap& map);

// Channel means of a sample in double; of integer codes from exact sums. A sample stored at 0 bits
// gives zeros.
void pool_sample(const FeatureMap& map, int64_t sample, const KernelTable& table, void* scratch,
                 double* means);

// A row of weight (rows, columns) times x, plus its bias.
double map_row(const float* weight, int64_t row, int64_t columns, const double* x,
               const float* bias);

// Index of the largest logit, the lowest among equals; the last one where a NaN leaves no largest.
int64_t cheapest_argmax(const double* logits, int64_t count);

size_t gate_scratch_bytes(const RnnGateArgs& args);

// Writes `sample`'s part of the results.
void gate_step(const RnnGateArgs& args, int64_t sample, const KernelTable& table, void* scratch);

}  // namespace dfs
