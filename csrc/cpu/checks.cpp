#include "checks.h"

#include <stdexcept>

namespace dfs {

void reject(const std::string& message) { throw std::invalid_argument(message); }

void check_geometry(const ConvGeometry& g) {
  const bool positive = g.in_channels > 0 && g.out_channels > 0 && g.kernel_h > 0 &&
                        g.kernel_w > 0 && g.stride_h > 0 && g.stride_w > 0 && g.dilation_h > 0 &&
                        g.dilation_w > 0 && g.groups > 0;
  if (!positive) reject("geometry: channels, kernel, stride, dilation and groups must be positive");
  if (g.pad_left < 0 || g.pad_right < 0 || g.pad_top < 0 || g.pad_bottom < 0) {
    reject("geometry: padding must not be negative");
  }
  if (g.in_channels % g.groups != 0 || g.out_channels % g.groups != 0) {
    reject("geometry: groups = " + std::to_string(g.groups) + " must divide in_channels = " +
           std::to_string(g.in_channels) + " and out_channels = " + std::to_string(g.out_channels));
  }
}

void check_weight_bits(int32_t bits, bool allow_float) {
  if (bits == 2 || bits == 4 || bits == 8 || (allow_float && bits == 32)) return;
  reject("bits = " + std::to_string(bits) + " is not one of 2, 4, 8" + (allow_float ? ", 32" : ""));
}

std::string width_list(const WidthTable& widths) {
  std::string list;
  for (int i = 0; i < widths.count; ++i) {
    list += (i > 0 ? ", " : "") + std::to_string(widths.bits[i]);
  }
  return list;
}

void check_widths(const WidthTable& widths, const char* name) {
  for (int i = 0; i < widths.count; ++i) {
    const int32_t bits = widths.bits[i];
    if (bits != 2 && bits != 4 && bits != 8 && bits != 32) {
      reject(std::string(name) + " lists " + std::to_string(bits) +
             " bits; allowed are 2, 4, 8 and 32");
    }
  }
}

void check_stored_widths(const FeatureMap& map, int64_t batch, const char* name) {
  if (!is_packed(map)) return;
  const WidthTable& widths = map.quantizer.widths;
  check_widths(widths, name);
  const bool has_scales = map.quantizer.scale != nullptr && map.quantizer.zero_point != nullptr;
  for (int64_t n = 0; n < batch; ++n) {
    const int32_t bits = map.bits[n];
    if (bits == 0) continue;
    const auto sample = [&] { return std::string(name) + ".bits[" + std::to_string(n) + "] is "; };
    if (bits != 32 && (index_of(widths, bits) < 0 || !has_scales)) {
      reject(sample() + std::to_string(bits) +
             ", but its quantizer has only: " + width_list(widths) + " (and 0 and 32)");
    }
    const int64_t needed = map.height * map.width * ((map.channels * bits + 7) / 8);
    if (map.row_bytes < needed) {
      reject(sample() + std::to_string(bits) + ", which takes rows of " + std::to_string(needed) +
             " bytes, but they have " + std::to_string(map.row_bytes));
    }
  }
}

}  // namespace dfs
