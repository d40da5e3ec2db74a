// The inner loops of Gumbel-softmax quantisation on the CPU, on tiles of 16 positions: lane i of every vector is
// position i, as in attention_tiles.h, and a block is 128 codes, those that share 32 counters of the generator.
//
//   noise       g[c][i] = -ln(-ln u), u from Philox-4x32-10: docs/gumbel.md
//   load_block  logits as floats, [code][position], whichever way they lie in memory
//   dot_codes   y[c][i] = sum_d C[c][d] x[d][i], C packed as [d][code]
#pragma once

#include <cstdint>
#include <cstring>

#include "attention_rows.h"
#include "attention_tiles.h"

namespace dalle_fast {

inline constexpr int64_t kBlockCodes = 128;
inline constexpr int kBlockCounters = 32;  // of four words each

inline constexpr uint32_t kPhiloxLeft = 0xd2511f53u, kPhiloxRight = 0xcd9e8d57u;
inline constexpr uint32_t kPhiloxLowStep = 0x9e3779b9u, kPhiloxHighStep = 0xbb67ae85u;

struct PhiloxKey {
  uint32_t low, high;
};

// What the first two rounds make of 16 rows of the noise, with a group of 0: in them, no product depends on both row and
// group. [0] are the even lanes, [1] the odd ones; the upper halves of c1 may hold anything.
struct PhiloxRows {
  uint32_t high;  // the rows' upper halves: 16 rows from a multiple of 16 on share it
  uint64_t c0[2][kTileQueries / 2], c1[2][kTileQueries / 2], c2[2][kTileQueries / 2];

  DALLE_FAST_INLINE PhiloxRows(const uint64_t (&rows)[2][kTileQueries / 2], PhiloxKey key)
      : high(static_cast<uint32_t>(rows[0][0] >> 32)) {
    for (int odd = 0; odd < 2; ++odd) {
      for (int i = 0; i < kTileQueries / 2; ++i) {
        const uint64_t left = (rows[odd][i] & 0xffffffffu) * kPhiloxLeft;
        const uint64_t right = ((left >> 32) ^ key.high) * kPhiloxRight;
        c0[odd][i] = (right >> 32) ^ static_cast<uint32_t>(key.low + kPhiloxLowStep);
        c1[odd][i] = right;
        c2[odd][i] = left & 0xffffffffu;
      }
    }
  }
};

// Philox-4x32-10 (Salmon et al. 2011) for 16 positions at once. Lanes are kept as two vectors of 64-bit numbers, even
// and odd ones, whose low halves count: then a product's low half is the product itself.
template <CpuLevel kLevel>
struct PhiloxLanes {
  using I = Isa<kLevel>;
  using Int = typename I::Int;
  static constexpr int kVectors = I::kVectors;
  using Wide = typename I::Wide;

  static DALLE_FAST_INLINE Wide multiply(Wide a, Wide b) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kLevel != CpuLevel::kScalar) {
      Wide product;
      asm("vpmuludq %1, %2, %0" : "=v"(product) : "v"(a), "v"(b));
      return product;
    }
#endif
    return (a & 0xffffffffu) * b;
  }

  // The four words of counter (row, group): to[w][v] is a vector of 32-bit numbers.
  static DALLE_FAST_INLINE void words(const PhiloxRows& rows, uint32_t group, PhiloxKey key, Int (&to)[4][kVectors]) {
    // What the first two rounds make of the group; c0 after the first, and c1, c0 and c2 after the second.
    const uint64_t right = group * uint64_t{kPhiloxRight};
    const uint64_t first = static_cast<uint32_t>(right >> 32) ^ rows.high ^ key.low;
    const uint64_t left = first * kPhiloxLeft;
    const uint64_t second = static_cast<uint32_t>(right);
    const uint64_t third = (left >> 32) ^ static_cast<uint32_t>(key.high + kPhiloxHighStep);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Wide half[2][4] = {};
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const auto load = [&](const uint64_t(&from)[2][kTileQueries / 2]) __attribute__((always_inline)) {
          return reinterpret_cast<Wide>(I::load(reinterpret_cast<const float*>(from[odd] + v * I::kLanes / 2)));
        };
        Wide c0 = load(rows.c0) ^ (Wide{} + second), c1 = load(rows.c1), c2 = load(rows.c2) ^ (Wide{} + third);
        Wide c3 = Wide{} + left;
        uint32_t low = key.low + 2 * kPhiloxLowStep, high = key.high + 2 * kPhiloxHighStep;
#pragma GCC unroll 8
        for (int round = 2; round < 10; ++round) {
          const Wide left_product = multiply(c0, Wide{} + kPhiloxLeft);
          const Wide right_product = multiply(c2, Wide{} + kPhiloxRight);
          c0 = (right_product >> 32) ^ c1 ^ (Wide{} + low);
          c2 = (left_product >> 32) ^ c3 ^ (Wide{} + high);
          c1 = right_product;
          c3 = left_product;
          low += kPhiloxLowStep;
          high += kPhiloxHighStep;
        }
        half[odd][0] = c0;
        half[odd][1] = c1;
        half[odd][2] = c2;
        half[odd][3] = c3;
      }
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) {
        to[w][v] = reinterpret_cast<Int>((half[0][w] & 0xffffffffu) | (half[1][w] << 32));
      }
    }
  }

  static DALLE_FAST_INLINE typename I::Float gumbel(Int word) {
    const Int bits = reinterpret_cast<Int>(reinterpret_cast<typename I::Unsigned>(word) >> 9);
    const auto u = (__builtin_convertvector(bits, typename I::Float) + 0.5f) * 0x1p-23f;
    return -I::log(-I::log(u));
  }
};

// Logits (B, K, P): strides in bytes. Row b * P + p of the noise is position p of sample b.
struct LogitsView {
  char* data = nullptr;
  StorageType type = StorageType::kFloat;
  int64_t batch = 0, codes = 0, positions = 0;
  int64_t batch_stride = 0, code_stride = 0, position_stride = 0;

  int64_t rows() const { return batch * positions; }
  int64_t item_size() const { return type == StorageType::kFloat ? 4 : 2; }
};

// 16 rows of the logits; those past the end repeat the last one, and are not written.
struct RowsOfTile {
  enum class Layout { kPositionsFirst, kCodesFirst, kOther };
  int64_t first;
  int count;
  int64_t offset[kTileQueries];  // of code 0, in bytes
  uint64_t rows[2][kTileQueries / 2];  // of the noise: even lanes, odd lanes
  Layout layout;

  RowsOfTile(const LogitsView& logits, int64_t tile) : first(tile * kTileQueries) {
    count = static_cast<int>(std::min<int64_t>(kTileQueries, logits.rows() - first));
    bool consecutive = count == kTileQueries;
    for (int i = 0; i < kTileQueries; ++i) {
      const int64_t flat = std::min(first + i, logits.rows() - 1);
      rows[i % 2][i / 2] = static_cast<uint64_t>(flat);
      offset[i] =
          flat / logits.positions * logits.batch_stride + flat % logits.positions * logits.position_stride;
      consecutive = consecutive && offset[i] == offset[0] + i * logits.item_size();
    }
    layout = consecutive ? Layout::kPositionsFirst
                         : logits.code_stride == logits.item_size() ? Layout::kCodesFirst : Layout::kOther;
  }
};

// Codes first..first+count-1 of a tile: to[c][i]; `rows` is scratch for 16 x kBlockCodes floats.
DALLE_FAST_INLINE void load_block(const LogitsView& logits, const RowsOfTile& tile, int64_t first, int64_t count,
                                  float* rows, float* to) {
  using Layout = RowsOfTile::Layout;
  const char* base = logits.data + first * logits.code_stride;
  if (tile.layout == Layout::kPositionsFirst) {
    for (int64_t c = 0; c < count; ++c) {
      load_row(base + c * logits.code_stride + tile.offset[0], logits.type, kTileQueries, to + c * kTileQueries);
    }
    return;
  }
  for (int i = 0; i < kTileQueries; ++i) {
    load_strided_row(base + tile.offset[i], logits.type, logits.code_stride, count, rows + i * kBlockCodes);
  }
  transpose_rows(rows, kBlockCodes, count, to);
}

// The reverse: from[c][i] to the memory that `logits` describes.
DALLE_FAST_INLINE void store_block(const LogitsView& logits, const RowsOfTile& tile, int64_t first, int64_t count,
                                   const float* from, float* rows) {
  using Layout = RowsOfTile::Layout;
  char* base = logits.data + first * logits.code_stride;
  if (tile.layout == Layout::kPositionsFirst) {
    for (int64_t c = 0; c < count; ++c) {
      store_row(from + c * kTileQueries, kTileQueries, 1.0f, logits.type,
                base + c * logits.code_stride + tile.offset[0]);
    }
    return;
  }
  transpose_columns(from, count, rows, kBlockCodes);
  for (int i = 0; i < tile.count; ++i) {
    if (tile.layout == Layout::kCodesFirst) {
      store_row(rows + i * kBlockCodes, count, 1.0f, logits.type, base + tile.offset[i]);
    } else {
      for (int64_t c = 0; c < count; ++c) {
        store_row(rows + i * kBlockCodes + c, 1, 1.0f, logits.type, base + tile.offset[i] + c * logits.code_stride);
      }
    }
  }
}

// products[c][i] = sum_d packed[d][c] columns[d][i] for a block's codes.
template <CpuLevel kLevel, int kCodes = Isa<kLevel>::kBlock>
DALLE_FAST_INLINE void dot_codes(const float* packed, const float* columns, int64_t dim, int64_t count,
                                 float* products) {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  int64_t c = 0;
  for (; c + kCodes <= count; c += kCodes) {
    Float sums[kCodes][I::kVectors];
#pragma GCC unroll 16
    for (int r = 0; r < kCodes; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) sums[r][v] = Float{};
    }
    const float* at = packed + c;
    for (int64_t d = 0; d < dim; ++d) {
      Float column[I::kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) column[v] = I::load(columns + d * kTileQueries + v * I::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kCodes; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < I::kVectors; ++v) sums[r][v] += at[r] * column[v];
      }
      at += kBlockCodes;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCodes; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) I::store(products + (c + r) * kTileQueries + v * I::kLanes, sums[r][v]);
    }
  }
  if constexpr (kCodes > 1) {
    if (c < count) {
      dot_codes<kLevel, kCodes / 2>(packed + c, columns, dim, count - c, products + c * kTileQueries);
    }
  }
}

}  // namespace dalle_fast
