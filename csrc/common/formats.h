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

// One number, as a float or as its bits. Vectors of the compiler may take its place, with the same functions.
struct OneNumber {
  using Float = float;
  using Unsigned = uint32_t;

  static DALLE_FAST_INLINE float value(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  static DALLE_FAST_INLINE uint32_t bits(float value) {
    uint32_t x;
    std::memcpy(&x, &value, sizeof(x));
    return x;
  }
  static DALLE_FAST_INLINE float splat(const float& x) { return x; }
  static DALLE_FAST_INLINE uint32_t constant(uint32_t x) { return x; }
  static DALLE_FAST_INLINE uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }
};

template <int kMantissaBits, bool kSigned>
struct Format16 {
  static constexpr int kShift = 23 - kMantissaBits;      // fp32 mantissa bits that are dropped
  static constexpr uint32_t kHalfUlp = 1u << (kShift - 1);
  static constexpr uint32_t kExponentOffset = 127 - 60;  // fp32 exponent field minus ours
  static constexpr uint32_t kSmallest = (kExponentOffset << 23) | (1u << kShift);
  static constexpr uint32_t kLargest = ((kExponentOffset + 64) << 23) - (1u << kShift);

  // Branch-free, so that every instruction set vectorises it and gives the same bits. Words are in the low 16 bits; to
  // decode they come with copies of their sign above them, and in the unsigned format with zeros.
  template <class N>
  static DALLE_FAST_INLINE typename N::Unsigned encode(typename N::Float value) {
    using Unsigned = typename N::Unsigned;
    const Unsigned bits = N::bits(value);
    const Unsigned magnitude = kSigned ? bits & N::constant(0x7fffffffu) : bits;
    // Neither NaN nor, in the unsigned format, what is negative.
    const auto is_kept = N::value(magnitude) >= N::value(N::constant(kSmallest));
    const Unsigned saturated = N::least(magnitude, N::constant(kLargest));
    Unsigned word = (saturated + N::constant(kHalfUlp - (kExponentOffset << 23))) >> kShift;
    word = is_kept ? word : Unsigned{};
    if constexpr (kSigned) {
      word |= (is_kept ? bits >> 16 : Unsigned{}) & N::constant(0x8000u);
    }
    return word;
  }

  template <class N>
  static DALLE_FAST_INLINE typename N::Float decode(typename N::Unsigned word) {
    using Unsigned = typename N::Unsigned;
    Unsigned bits = word << kShift;
    if constexpr (kSigned) {
      bits &= N::constant(0x80000000u | ((1u << (kShift + 15)) - 1u));  // of the sign's copies the highest is left
    }
    bits += N::constant(kExponentOffset << 23);
    return N::value(word == 0 ? Unsigned{} : bits);
  }

  static DALLE_FAST_INLINE uint16_t encode(float value) { return static_cast<uint16_t>(encode<OneNumber>(value)); }

  static DALLE_FAST_INLINE float decode(uint16_t word) {
    const auto above = kSigned ? static_cast<int32_t>(static_cast<int16_t>(word)) : static_cast<int32_t>(word);
    return decode<OneNumber>(static_cast<uint32_t>(above));
  }
};

using Format169 = Format16<9, true>;
using Format0610 = Format16<10, false>;

}  // namespace dalle_fast
