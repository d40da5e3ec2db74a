// Philox-4x32, the counter-based generator of every random number that a kernel draws: four words of 32 bits and a seed
// of 64 give four words. dalle_fast/reference/philox.py is the same in PyTorch.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011: seven rounds are the fewest that pass all
// of TestU01, ten leave a margin.
#pragma once

#include <cstdint>

#include "macros.h"

namespace dalle_fast {

inline constexpr uint32_t kPhiloxLeft = 0xd2511f53u, kPhiloxRight = 0xcd9e8d57u;
inline constexpr uint32_t kPhiloxLowStep = 0x9e3779b9u, kPhiloxHighStep = 0xbb67ae85u;
inline constexpr int kPhiloxRounds = 10;
inline constexpr int kRoundingNoiseRounds = 7;  // of stochastic rounding, which is bound by its arithmetic

struct PhiloxWords {
  uint32_t words[4];
};

DALLE_FAST_INLINE uint64_t philox_product(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // Of the product of two 64-bit numbers, nvcc keeps additions of the upper halves' zeros.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return static_cast<uint64_t>(a) * b;
#endif
}

template <int kRounds>
DALLE_FAST_INLINE PhiloxWords philox(PhiloxWords counter, uint64_t seed) {
  uint32_t c0 = counter.words[0], c1 = counter.words[1], c2 = counter.words[2], c3 = counter.words[3];
  auto low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t left = philox_product(c0, kPhiloxLeft), right = philox_product(c2, kPhiloxRight);
    c0 = static_cast<uint32_t>(right >> 32) ^ c1 ^ low;
    c1 = static_cast<uint32_t>(right);
    c2 = static_cast<uint32_t>(left >> 32) ^ c3 ^ high;
    c3 = static_cast<uint32_t>(left);
    low += kPhiloxLowStep;
    high += kPhiloxHighStep;
  }
  return {{c0, c1, c2, c3}};
}

// The keys of the rounds, each in a number of 64 bits as the lanes of the CPU's kernels are.
struct PhiloxKeys {
  static constexpr int kRounds = kPhiloxRounds;
  uint64_t low[kRounds], high[kRounds];

  PhiloxKeys() = default;
  explicit PhiloxKeys(uint64_t seed) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      low[round] = static_cast<uint32_t>(static_cast<uint32_t>(seed) + round * kPhiloxLowStep);
      high[round] = static_cast<uint32_t>(static_cast<uint32_t>(seed >> 32) + round * kPhiloxHighStep);
    }
  }
};

}  // namespace dalle_fast
