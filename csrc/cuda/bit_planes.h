// Two-bit products as bit planes: c = a & b counted, for a plane of each side.
//
// With codes a = a0 + 2 a1, and weights that are raised to u = q + 2 = u0 + 2 u1,
//   sum a u = #(a0 & u0) + 2 (#(a1 & u0) + #(a0 & u1)) + 4 #(a1 & u1)
// takes four multiplications of 256 products and three counts, the middle two sharing one. The sum
// of the codes, for sum a q = sum a u - 2 sum a and sum a (2q + 1) = 2 sum a u - 3 sum a, comes
// from one more column tile, of ones, that all column tiles share. Its even columns count a0, its
// odd ones a1. All of this is exact.
//
// Both operands take planes out of the same two units, so that the order of the bits is free: the
// even bits of a plane are those of the first unit, the odd ones of the second. Four instructions
// make two registers of activations; weights are stored as planes. Where there is no unit, weights
// and ones are zero, and activations may be anything.
//
// The instruction is one of the hardware's on 8.0 to 9.0: nvcc 13.0 makes BMMA.168256.AND.POPC of
// it for sm_80, sm_86, sm_89, sm_90 and sm_90a. For sm_100a and sm_120a it makes calls of a
// function that multiplies the bits as bytes, so GPUs that run the PTX for compute_90 should not
// use this. The compiled loops have 3.0 to 6.3 instructions a multiplication, itself included
// (tests/packaging/test_cuda_code.py). How fast the instruction is on each of these GPUs, nothing
// here says: nothing is measured.
#pragma once

#include <cstdint>

#include "conv_layout.h"
#include "device.h"

namespace dfs::cuda {

constexpr uint32_t kEvenBits = 0x55555555u;

// Plane 0 or 1 of the 2-bit codes of two units.
DFS_HOST_DEVICE uint32_t bit_plane(uint32_t first, uint32_t second, int plane) {
  return plane == 0 ? (first & kEvenBits) | ((second << 1) & ~kEvenBits)
                    : ((first >> 1) & kEvenBits) | (second & ~kEvenBits);
}

// What a word of a lane's weights is. A load of four words has both planes of two column tiles; of
// two steps that are multiplied at once, those of the first step's place have the even column tiles
// of both steps, and those of the second's the odd ones: what an instruction takes together is
// loaded together.
struct PlaneWord {
  int step;
  int column_tile;
  int plane;

  DFS_HOST_DEVICE static PlaneWord of(int steps, int step, int lane_word) {
    const int first = lane_word / 4 * 2;
    const int word = lane_word % 4;
    const int even_step = step - step % 2;
    if (even_step + 1 == steps) return {step, first + word / 2, word % 2};
    return {even_step + word % 2, first + step % 2, word / 2};
  }
};

template <int kC, int kR>
struct BitSums {
  int32_t by_weight[3][kR][kC][4] = {};  // counts that weigh 1, 2 and 4
  int32_t codes[kR][4] = {};

  // Only the first count is needed from then on: the others take no registers between slices.
  DFS_DEVICE void gather() {
    DFS_UNROLL for (int r = 0; r < kR; ++r) {
      DFS_UNROLL for (int c = 0; c < kC; ++c) {
        DFS_UNROLL for (int i = 0; i < 4; ++i) {
          by_weight[0][r][c][i] += 2 * by_weight[1][r][c][i] + 4 * by_weight[2][r][c][i];
          by_weight[1][r][c][i] = by_weight[2][r][c][i] = 0;
        }
      }
    }
  }
};

// A lane's ones and offsets of one step.
template <int kC>
struct BitStep {
  uint32_t ones;
  int offsets[2];

  DFS_DEVICE BitStep(const uint32_t* step, const int32_t* step_offsets) {
    const int lane = thread_index() % 32;
    ones = step[64 * kC + lane];
    const Words2 both = *reinterpret_cast<const Words2*>(step_offsets + lane % 4 * 2);
    DFS_UNROLL for (int i = 0; i < 2; ++i) offsets[i] = static_cast<int>(both.word[i]);
  }

  // Those in the columns that count an activation's plane.
  DFS_DEVICE uint32_t ones_of(int plane) const {
    return thread_index() / 4 % 2 == plane ? ones : 0u;
  }
};

// What a lane has of a step's weights, in the order of PlaneWord.
template <int kC>
struct BitWeights {
  Words4 load[kC / 2];

  DFS_DEVICE explicit BitWeights(const uint32_t* step) {
    const int lane = thread_index() % 32;
    DFS_UNROLL for (int i = 0; i < kC / 2; ++i) {
      load[i] = *reinterpret_cast<const Words4*>(step + (i * 32 + lane) * 4);
    }
  }
};

// Both planes of the activations of one step, of a pixel in row g and of one in row g + 8.
struct BitCodes {
  uint32_t plane[2][2];

  DFS_DEVICE BitCodes(const uint8_t* patch, const int (&pixels)[2], const int (&offsets)[2]) {
    DFS_UNROLL for (int i = 0; i < 2; ++i) {
      const uint32_t first = *in_shared<uint32_t>(patch + pixels[i] + offsets[0]);
      const uint32_t second = *in_shared<uint32_t>(patch + pixels[i] + offsets[1]);
      DFS_UNROLL for (int j = 0; j < 2; ++j) plane[j][i] = bit_plane(first, second, j);
    }
  }
};

// A step and the next at once.
template <int kC, int kR>
DFS_DEVICE void multiply_two_steps(BitSums<kC, kR>& sums, const uint32_t* words,
                                   const uint8_t* patch, const int32_t* offsets,
                                   const int (&pixels)[kR][2]) {
  constexpr int kStepWords = 32 * (2 * kC + 1);
  const BitStep<kC> low(words, offsets);
  const BitStep<kC> high(words + kStepWords, offsets + kPlaneUnits);
  const BitWeights<kC> weights[2] = {BitWeights<kC>(words), BitWeights<kC>(words + kStepWords)};
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    const BitCodes x(patch, pixels[r], low.offsets);
    const BitCodes y(patch, pixels[r], high.offsets);
    DFS_UNROLL for (int i = 0; i < 2; ++i) {
      const uint32_t a[4] = {x.plane[i][0], x.plane[i][1], y.plane[i][0], y.plane[i][1]};
      DFS_UNROLL for (int c = 0; c < kC; ++c) {
        const Words4& w = weights[c % 2].load[c / 2];
        DFS_UNROLL for (int j = 0; j < 2; ++j) {
          count_tile(sums.by_weight[i + j][r][c], a, w.word[2 * j], w.word[2 * j + 1]);
        }
      }
      count_tile(sums.codes[r], a, low.ones_of(i), high.ones_of(i));
    }
  }
}

template <int kC, int kR>
DFS_DEVICE void multiply_one_step(BitSums<kC, kR>& sums, const uint32_t* words,
                                  const uint8_t* patch, const int32_t* offsets,
                                  const int (&pixels)[kR][2]) {
  const BitStep<kC> step(words, offsets);
  const BitWeights<kC> weights(words);
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    const BitCodes x(patch, pixels[r], step.offsets);
    DFS_UNROLL for (int i = 0; i < 2; ++i) {
      DFS_UNROLL for (int c = 0; c < kC; ++c) {
        const Words4& w = weights.load[c / 2];
        DFS_UNROLL for (int j = 0; j < 2; ++j) {
          count_half_tile(sums.by_weight[i + j][r][c], x.plane[i], w.word[c % 2 * 2 + j]);
        }
      }
      count_half_tile(sums.codes[r], x.plane[i], step.ones_of(i));
    }
  }
}

template <int kC, int kR>
DFS_DEVICE void multiply_planes(BitSums<kC, kR>& sums, const uint32_t* fragments,
                                const uint8_t* patch, const int32_t* offsets,
                                const int (&pixels)[kR][2], int steps) {
  constexpr int kStepWords = 32 * (2 * kC + 1);
  int step = 0;
  DFS_NO_UNROLL
  for (; step + 1 < steps; step += 2) {
    multiply_two_steps<kC, kR>(sums, fragments + step * kStepWords, patch,
                               offsets + step * kPlaneUnits, pixels);
  }
  if (step < steps) {
    multiply_one_step<kC, kR>(sums, fragments + step * kStepWords, patch,
                              offsets + step * kPlaneUnits, pixels);
  }
  sums.gather();
}

// Adds sum a (2q + 1) or sum a q of gathered counts to what is there.
template <int kC, int kR>
DFS_DEVICE void add_levels(const BitSums<kC, kR>& sums, bool centred, int32_t (&to)[kR][kC][4]) {
  DFS_UNROLL for (int r = 0; r < kR; ++r) {
    DFS_UNROLL for (int i = 0; i < 4; ++i) {
      const int32_t* pair = sums.codes[r] + i / 2 * 2;
      const int32_t codes = pair[0] + 2 * pair[1];
      DFS_UNROLL for (int c = 0; c < kC; ++c) {
        const int32_t raised = sums.by_weight[0][r][c][i];
        to[r][c][i] += centred ? 2 * raised - 3 * codes : raised - 2 * codes;
      }
    }
  }
}

}  // namespace dfs::cuda
