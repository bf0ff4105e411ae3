// A block's product of two matrices, rows x columns, from shared memory: kDepth products of each
// sum at a time, on tensor cores or by multiply-adds.
//
// The columns' operand lies there as [depth][column], the rows' as [depth][row] or, where
// kDepthInner, as [row][depth]: as 16 bytes of an arranged map arrive. Reads meet different banks:
// - [depth][...]: rows of it are 8 banks apart modulo 32, and the lanes of a warp take 4 depths x 8
//   neighbours (tensor cores), or 16 bytes each that lie next to each other.
// - [row][depth]: 20 banks apart, so that 8 rows begin at the 8 multiples of 4 banks, and a lane
//   takes one of four words from there, or all four.
#pragma once

#include <cstdint>

#include "device.h"

namespace dfs::cuda {

constexpr int kProductThreads = 128;
constexpr int kDepth = 16;
constexpr int kDepthStride = kDepth + 4;

// 4096 sums by 4 warps: a warp has 1024 of them, kWarpRows x kWarpColumns.
template <int kWarpRows_, int kWarpsDown, int kWarpsAcross>
struct ProductTile {
  static_assert(kWarpsDown * kWarpsAcross == 4 && (kWarpRows_ == 32 || kWarpRows_ == 64));
  static constexpr int kWarpRows = kWarpRows_;
  static constexpr int kWarpColumns = 1024 / kWarpRows;
  static constexpr int kRows = kWarpRows * kWarpsDown;
  static constexpr int kColumns = kWarpColumns * kWarpsAcross;
  static constexpr int kRowStride = kRows + 8;
  static constexpr int kColumnStride = kColumns + 8;

  DFS_DEVICE static int warp_row() { return thread_index() / 32 / kWarpsAcross * kWarpRows; }
  DFS_DEVICE static int warp_column() { return thread_index() / 32 % kWarpsAcross * kWarpColumns; }

  // Where a sum stands in the finished tile, [column][row] with the quads of a column exchanged so
  // that neither those who write single columns nor those who read quads wait for each other.
  DFS_DEVICE static int place(int column, int row) {
    const int mask = column / 4 * (32 / kWarpColumns) & 7;
    return column * kRows + ((row / 4 ^ mask) * 4 + row % 4);
  }
};

using SquareTile = ProductTile<32, 2, 2>;  // 64 x 64
using TallTile = ProductTile<32, 4, 1>;    // 128 x 32
using NarrowTile = ProductTile<64, 4, 1>;  // 256 x 16

// A thread's sums: 8 rows x 4 columns.
template <typename Tile, bool kDepthInner>
struct FloatSums {
  static constexpr int kColumnLanes = Tile::kWarpColumns / 4;
  static constexpr int kRowLanes = 32 / kColumnLanes;

  float sums[8][4] = {};

  DFS_DEVICE static int first_column() {
    return Tile::warp_column() + thread_index() % kColumnLanes * 4;
  }
  // Neighbouring lanes have neighbouring rows, or quads of rows.
  DFS_DEVICE static int row(int i) {
    const int lane = thread_index() % 32 / kColumnLanes;
    if constexpr (kDepthInner) return Tile::warp_row() + lane + kRowLanes * i;
    return Tile::warp_row() + 4 * (lane + kRowLanes * (i / 4)) + i % 4;
  }

  DFS_DEVICE void add(const float* rows, const float* columns) {
    if constexpr (kDepthInner) {
      DFS_UNROLL for (int k = 0; k < kDepth; k += 4) add_quad(rows + k, columns, k);
    } else {
      DFS_UNROLL for (int k = 0; k < kDepth; ++k) {
        const float* row_values = rows + k * Tile::kRowStride;
        const Words4 column_words = load(columns + k * Tile::kColumnStride + first_column());
        DFS_UNROLL for (int half = 0; half < 2; ++half) {
          const Words4 words = load(row_values + row(4 * half));
          DFS_UNROLL for (int i = 0; i < 4; ++i) add_row(4 * half + i, words.word[i], column_words);
        }
      }
    }
  }

  DFS_DEVICE void store(float* tile) const {
    DFS_UNROLL for (int j = 0; j < 4; ++j) {
      const int column = first_column() + j;
      if constexpr (kDepthInner) {
        DFS_UNROLL for (int i = 0; i < 8; ++i) tile[Tile::place(column, row(i))] = sums[i][j];
      } else {
        DFS_UNROLL for (int half = 0; half < 2; ++half) {
          Words4 words;
          DFS_UNROLL for (int i = 0; i < 4; ++i) words.word[i] =
              float_to_bits(sums[4 * half + i][j]);
          *reinterpret_cast<Words4*>(tile + Tile::place(column, row(4 * half))) = words;
        }
      }
    }
  }

 private:
  DFS_DEVICE static Words4 load(const float* from) {
    return *reinterpret_cast<const Words4*>(from);
  }

  DFS_DEVICE void add_quad(const float* rows, const float* columns, int k) {
    Words4 column_words[4];
    DFS_UNROLL for (int i = 0; i < 4; ++i) {
      column_words[i] = load(columns + (k + i) * Tile::kColumnStride + first_column());
    }
    DFS_UNROLL for (int i = 0; i < 8; ++i) {
      const Words4 words = load(rows + row(i) * kDepthStride);
      DFS_UNROLL for (int j = 0; j < 4; ++j) add_row(i, words.word[j], column_words[j]);
    }
  }

  DFS_DEVICE void add_row(int i, uint32_t factor, const Words4& column_words) {
    DFS_UNROLL for (int j = 0; j < 4; ++j) {
      sums[i][j] =
          multiply_add(bits_to_float(factor), bits_to_float(column_words.word[j]), sums[i][j]);
    }
  }
};

// The same on tensor cores, of operands that are rounded to TF32.
template <typename Tile, bool kDepthInner>
struct Tf32Sums {
  static constexpr int kRowTiles = Tile::kWarpRows / 16;
  static constexpr int kColumnTiles = Tile::kWarpColumns / 8;

  float sums[kRowTiles][kColumnTiles][4] = {};

  DFS_DEVICE void add(const float* rows, const float* columns) {
    const int lane = thread_index() % 32;
    DFS_UNROLL for (int first = 0; first < kDepth; first += 8) {
      const int k = first + lane % 4;
      uint32_t b[kColumnTiles][2];
      DFS_UNROLL for (int j = 0; j < kColumnTiles; ++j) {
        const int column = Tile::warp_column() + 8 * j + lane / 4;
        DFS_UNROLL for (int half = 0; half < 2; ++half) {
          b[j][half] = float_to_bits(columns[(k + 4 * half) * Tile::kColumnStride + column]);
        }
      }
      DFS_UNROLL for (int i = 0; i < kRowTiles; ++i) {
        uint32_t a[4];
        DFS_UNROLL for (int part = 0; part < 4; ++part) {
          const int row = Tile::warp_row() + 16 * i + lane / 4 + part % 2 * 8;
          a[part] = float_to_bits(rows[place_in_rows(k + part / 2 * 4, row)]);
        }
        DFS_UNROLL for (int j = 0; j < kColumnTiles; ++j) {
          multiply_tile(sums[i][j], a, b[j][0], b[j][1]);
        }
      }
    }
  }

  DFS_DEVICE void store(float* tile) const {
    const int lane = thread_index() % 32;
    DFS_UNROLL for (int i = 0; i < kRowTiles; ++i) {
      DFS_UNROLL for (int j = 0; j < kColumnTiles; ++j) {
        DFS_UNROLL for (int part = 0; part < 4; ++part) {
          const int row = Tile::warp_row() + 16 * i + lane / 4 + part / 2 * 8;
          const int column = Tile::warp_column() + 8 * j + 2 * (lane % 4) + part % 2;
          tile[Tile::place(column, row)] = sums[i][j][part];
        }
      }
    }
  }

 private:
  DFS_DEVICE static int place_in_rows(int k, int row) {
    return kDepthInner ? row * kDepthStride + k : k * Tile::kRowStride + row;
  }
};

template <typename Tile, bool kDepthInner, bool kTf32>
struct SumsOf {
  using Type = FloatSums<Tile, kDepthInner>;
};
template <typename Tile, bool kDepthInner>
struct SumsOf<Tile, kDepthInner, true> {
  using Type = Tf32Sums<Tile, kDepthInner>;
};

// Shared memory: two steps' operands, one being multiplied while the next one arrives, and later
// the finished tile in their place.
template <typename Tile, bool kDepthInner>
struct ProductMemory {
  static constexpr int kRowFloats =
      kDepthInner ? Tile::kRows * kDepthStride : kDepth * Tile::kRowStride;
  static constexpr int kStepFloats = kRowFloats + kDepth * Tile::kColumnStride;
  static constexpr int kTileFloats = Tile::kRows * Tile::kColumns;
  static constexpr int kFloats = 2 * kStepFloats > kTileFloats ? 2 * kStepFloats : kTileFloats;
  static constexpr int kBytes = 4 * kFloats;

  DFS_DEVICE static float* rows(int step) {
    return reinterpret_cast<float*>(shared_memory()) + step % 2 * kStepFloats;
  }
  DFS_DEVICE static float* columns(int step) { return rows(step) + kRowFloats; }
  DFS_DEVICE static float* tile() { return reinterpret_cast<float*>(shared_memory()); }
};

// Sums all that `source` has: stage(rows, columns) starts copying the next step, and says whether
// there was one.
template <typename Memory, typename Sums, typename Source>
DFS_DEVICE void multiply_all(Source& source, Sums& sums) {
  bool more = source.stage(Memory::rows(0), Memory::columns(0));
  for (int step = 0; more; ++step) {
    wait_for_copies();
    // And nobody reads what is written next.
    sync_block();
    more = source.stage(Memory::rows(step + 1), Memory::columns(step + 1));
    sums.add(Memory::rows(step), Memory::columns(step));
  }
  wait_for_copies();
  sync_block();
}

// Each thread's shares of `kItems` pieces: fn(piece).
template <int kItems, typename Fn>
DFS_DEVICE void for_each_piece(Fn fn) {
  DFS_UNROLL for (int first = 0; first < kItems; first += kProductThreads) {
    const int i = first + thread_index();
    if (first + kProductThreads <= kItems || i < kItems) fn(i);
  }
}

// A walk over the pixels of an image, some at a time.
struct PixelWalk {
  int y = 0;
  int x = 0;
  int width = 1;
  int step_y = 0;
  int step_x = 0;

  DFS_DEVICE void begin(int pixel) {
    y = pixel / width;
    x = pixel % width;
  }
  DFS_DEVICE void next() {
    x += step_x;
    y += step_y;
    if (x >= width) {
      x -= width;
      ++y;
    }
  }
};

DFS_DEVICE PixelWalk walk_of(int width, int step) {
  PixelWalk walk;
  walk.width = width;
  walk.step_y = step / width;
  walk.step_x = step % width;
  return walk;
}

// The tile that leaves the fewest of its sums unused, a square one among equals.
enum class TileKind { kSquare, kTall, kNarrow };

template <typename Tile>
int64_t tile_count(int64_t rows, int64_t columns) {
  return ceil_div(rows, Tile::kRows) * ceil_div(columns, Tile::kColumns);
}

inline TileKind choose_tile_kind(int64_t rows, int64_t columns) {
  const int64_t square = tile_count<SquareTile>(rows, columns);
  const int64_t tall = tile_count<TallTile>(rows, columns);
  const int64_t narrow = tile_count<NarrowTile>(rows, columns);
  if (square <= tall && square <= narrow) return TileKind::kSquare;
  return tall <= narrow ? TileKind::kTall : TileKind::kNarrow;
}

// fn(a tile's type) for a kind.
template <typename Fn>
void with_tile(TileKind kind, Fn fn) {
  if (kind == TileKind::kSquare) {
    fn(SquareTile());
  } else if (kind == TileKind::kTall) {
    fn(TallTile());
  } else {
    fn(NarrowTile());
  }
}

}  // namespace dfs::cuda
