// Checks that cost nothing next to the work and keep a bad width from reading past a table.
#pragma once

#include <cstdint>
#include <string>

#include "dfs/types.h"

namespace dfs {

// Throws std::invalid_argument.
[[noreturn]] void reject(const std::string& message);

void check_geometry(const ConvGeometry& geometry);

// 2, 4 or 8 (and 32 where it is allowed).
void check_weight_bits(int32_t bits, bool allow_float);

// All widths that samples of a packed map are stored at are 0, 32 or in its quantizer.
void check_stored_widths(const FeatureMap& map, int64_t batch, const char* name);

// The widths of a table are among 2, 4, 8 and 32.
void check_widths(const WidthTable& widths, const char* name);

// "2, 4, 8"
std::string width_list(const WidthTable& widths);

}  // namespace dfs
