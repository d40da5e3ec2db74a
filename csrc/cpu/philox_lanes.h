// Philox-4x32-10 in vectors on the CPU, as Gumbel noise takes it: the four words of a counter for 16 rows of the noise
// at once, or those of 16 counters of one row.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "attention_tiles.h"

namespace dalle_fast {

inline constexpr int64_t kBlockCodes = 128;
inline constexpr int kBlockCounters = 32;  // of four words each

// What the first two rounds make of 16 rows of the noise, with a group of 0: in them, no product depends on both row and
// group. [0] are the even lanes, [1] the odd ones; the upper halves of c1 may hold anything.
struct PhiloxRows {
  uint32_t high;  // the rows' upper halves: 16 rows from a multiple of 16 on share it
  uint64_t c0[2][kTileQueries / 2], c1[2][kTileQueries / 2], c2[2][kTileQueries / 2];

  DALLE_FAST_INLINE PhiloxRows(const uint64_t (&rows)[2][kTileQueries / 2], const PhiloxKeys& keys)
      : high(static_cast<uint32_t>(rows[0][0] >> 32)) {
    for (int odd = 0; odd < 2; ++odd) {
      for (int i = 0; i < kTileQueries / 2; ++i) {
        const uint64_t left = (rows[odd][i] & 0xffffffffu) * kPhiloxLeft;
        const uint64_t right = ((left >> 32) ^ keys.high[0]) * kPhiloxRight;
        c0[odd][i] = (right >> 32) ^ keys.low[1];
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

  // Of the low halves of a; b has no others.
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

  // The low halves of even and of odd lanes, side by side.
  static DALLE_FAST_INLINE Int join(Wide even, Wide odd) {
    return reinterpret_cast<Int>((even & 0xffffffffu) | (odd << 32));
  }

  // The rounds from number kFirst on.
  template <int kFirst>
  static DALLE_FAST_INLINE void last_rounds(Wide c0, Wide c1, Wide c2, Wide c3, const PhiloxKeys& keys, Wide (&to)[4]) {
#pragma GCC unroll 9
    for (int round = kFirst; round < PhiloxKeys::kRounds; ++round) {
      const Wide left_product = multiply(c0, Wide{} + kPhiloxLeft);
      const Wide right_product = multiply(c2, Wide{} + kPhiloxRight);
      c0 = (right_product >> 32) ^ c1 ^ (Wide{} + keys.low[round]);
      c2 = (left_product >> 32) ^ c3 ^ (Wide{} + keys.high[round]);
      c1 = right_product;
      c3 = left_product;
    }
    to[0] = c0;
    to[1] = c1;
    to[2] = c2;
    to[3] = c3;
  }

  // The four words of counter (row, group): to[w][v] is a vector of 32-bit numbers.
  static DALLE_FAST_INLINE void words(const PhiloxRows& rows, uint32_t group, const PhiloxKeys& keys,
                                      Int (&to)[4][kVectors]) {
    // What the first two rounds make of the group; c0 after the first, and c1, c0 and c2 after the second.
    const uint64_t right = group * uint64_t{kPhiloxRight};
    const uint64_t first = (right >> 32) ^ rows.high ^ keys.low[0];
    const uint64_t left = first * kPhiloxLeft;
    const uint64_t second = static_cast<uint32_t>(right);
    const uint64_t third = (left >> 32) ^ keys.high[1];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Wide half[2][4] = {};
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        const auto load = [&](const uint64_t(&from)[2][kTileQueries / 2]) __attribute__((always_inline)) {
          return reinterpret_cast<Wide>(I::load(reinterpret_cast<const float*>(from[odd] + v * I::kLanes / 2)));
        };
        const Wide c0 = load(rows.c0) ^ (Wide{} + second), c1 = load(rows.c1), c2 = load(rows.c2) ^ (Wide{} + third);
        const Wide c3 = Wide{} + left;
        last_rounds<2>(c0, c1, c2, c3, keys, half[odd]);
      }
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) to[w][v] = join(half[0][w], half[1][w]);
    }
  }

  // Of one row, the four words of the counters with 16 groups from `group` on: lane i of a vector is group + i.
  static DALLE_FAST_INLINE void words_of_row(uint64_t row, uint32_t group, const PhiloxKeys& keys,
                                             Int (&to)[4][kVectors]) {
    const uint64_t left = (row & 0xffffffffu) * kPhiloxLeft;
    const uint64_t first = (row >> 32) ^ keys.low[0], third = (left >> 32) ^ keys.high[0];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Wide half[2][4] = {};
#pragma GCC unroll 2
      for (int odd = 0; odd < 2; ++odd) {
        Wide groups;
#pragma GCC unroll 8
        for (int i = 0; i < I::kLanes / 2; ++i) groups[i] = static_cast<uint64_t>(v * I::kLanes + 2 * i + odd);
        const Wide right = multiply(groups + group, Wide{} + kPhiloxRight);
        last_rounds<1>((right >> 32) ^ (Wide{} + first), right, Wide{} + third, Wide{} + left, keys, half[odd]);
      }
#pragma GCC unroll 4
      for (int w = 0; w < 4; ++w) to[w][v] = join(half[0][w], half[1][w]);
    }
  }

  // Words become noise.
  template <int kCount>
  static DALLE_FAST_INLINE void gumbel(typename I::Float (&x)[kCount]) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Int bits = reinterpret_cast<Int>(reinterpret_cast<typename I::Unsigned>(x[i]) >> 9);
      x[i] = __builtin_convertvector(bits, typename I::Float) * 0x1p-23f + 0x1p-24f;  // exact
    }
    I::log(x);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) x[i] = -x[i];
    I::log(x);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) x[i] = -x[i];
  }
};

}  // namespace dalle_fast
