// The 16-bit storage formats of the Adam moments: 1-6-9 (sign, exponent, mantissa) and 0-6-10 (unsigned).
//
// A word with exponent field e and mantissa field f stands for (-1)^sign * 2^(e - 60) * (1 + f / 2^m), m
// being the number of mantissa bits. There are no denormals, infinities or NaNs. The word 0 stands for 0, so
// the smallest positive value is 2^-60 * (1 + 2^-m); the largest is 2^3 * (2 - 2^-m), just below 16. The sign
// bit alone (0x8000 of 1-6-9) is no zero: it stands for -2^-60, and no value encodes to it.
//
// Encoding, in this order: NaN gives 0; a value below the smallest positive one gives 0, also where it lies
// nearer to that one than to 0; a value above the largest, infinity included, gives the largest; all others
// are rounded to nearest, ties away from zero, by adding half a unit in the last place to the bit pattern and
// truncating. Negative values give 0 in the unsigned format. NaN gives 0 because a moment of 0 is what a
// parameter starts from: the next gradients repair it, while a saturated one would stay wrong for many steps.
//
// Bit layout and flush order: openai/blocksparse, mhalf and vhalf, where NaN saturates instead.
// dalle_fast.reference has the same functions in PyTorch; all agree bit for bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "macros.h"

namespace dalle_fast {

template <int kMantissaBits, bool kSigned>
struct Format16 {
  static constexpr int kShift = 23 - kMantissaBits;      // fp32 mantissa bits that are dropped
  static constexpr uint32_t kHalfUlp = 1u << (kShift - 1);
  static constexpr uint32_t kExponentOffset = 127 - 60;  // fp32 exponent field minus ours
  static constexpr uint32_t kSmallest = (kExponentOffset << 23) | (1u << kShift);
  static constexpr uint32_t kLargest = ((kExponentOffset + 64) << 23) - (1u << kShift);
  static constexpr uint32_t kInfinity = 0x7f800000u;
  static constexpr uint32_t kMagnitudeMask = kSigned ? 0x7fffu : 0xffffu;

  // Branch-free on integers, so that every instruction set vectorises it and gives the same bits.
  static DALLE_FAST_INLINE uint16_t encode(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // Without a sign the bits of a negative value stay above infinity, and fall under the rule for NaN.
    const uint32_t magnitude = kSigned ? bits & 0x7fffffffu : bits;
    const uint32_t saturated = magnitude < kLargest ? magnitude : kLargest;
    uint32_t word = ((saturated + kHalfUlp) >> kShift) - (kExponentOffset << kMantissaBits);
    if constexpr (kSigned) {
      word |= (bits >> 31) << 15;
    }
    const bool is_zero = (magnitude < kSmallest) | (magnitude > kInfinity);
    return static_cast<uint16_t>(is_zero ? 0u : word);
  }

  static DALLE_FAST_INLINE float decode(uint16_t word) {
    const uint32_t magnitude = word & kMagnitudeMask;
    uint32_t bits = (magnitude << kShift) + (kExponentOffset << 23);
    if constexpr (kSigned) {
      bits |= static_cast<uint32_t>(word >> 15) << 31;
    }
    bits = word == 0 ? 0u : bits;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

using Format169 = Format16<9, true>;
using Format0610 = Format16<10, false>;

}  // namespace dalle_fast
