// Codes of one quantizer to codes of another, a row at a time.
#pragma once

#include "isa.h"
#include "quantizer.h"
#include "vectors.h"

namespace dfs {
namespace DFS_ISA {
namespace {

#if defined(__AVX512VBMI__)

// There are no more than 256 codes: what becomes of each is worked out once and looked up.
class Requantizer {
 public:
  void set(const ActivationRange& from, const ActivationRange& to) {
    uint8_t codes[256];
    for (int i = 0; i < 256; ++i) codes[i] = static_cast<uint8_t>(i);
    requantize_codes(codes, 256, from, to, table_);
  }

  void run(const uint8_t* codes, int64_t count, uint8_t* result) const {
    Ints quarters[4];
    unroll<4>([&](auto i) { quarters[i] = _mm512_load_si512(table_ + 64 * i); });
    const auto look_up = [&](Ints code) {
      const Ints low = _mm512_permutex2var_epi8(quarters[0], code, quarters[1]);
      const Ints high = _mm512_permutex2var_epi8(quarters[2], code, quarters[3]);
      return _mm512_mask_mov_epi8(low, _mm512_movepi8_mask(code), high);
    };
    int64_t i = 0;
    for (; i + 64 <= count; i += 64) {
      _mm512_storeu_si512(result + i, look_up(_mm512_loadu_si512(codes + i)));
    }
    if (i == count) return;
    const uint64_t rest = (uint64_t{1} << (count - i)) - 1;
    const Ints code = _mm512_maskz_loadu_epi8(rest, codes + i);
    _mm512_mask_storeu_epi8(result + i, rest, look_up(code));
  }

 private:
  alignas(64) uint8_t table_[256];
};

#else

class Requantizer {
 public:
  void set(const ActivationRange& from, const ActivationRange& to) {
    from_ = from;
    to_ = to;
  }

  void run(const uint8_t* codes, int64_t count, uint8_t* result) const {
    requantize_codes(codes, count, from_, to_, result);
  }

 private:
  ActivationRange from_;
  ActivationRange to_;
};

#endif

}  // namespace
}  // namespace DFS_ISA
}  // namespace dfs
