// Vectors of floats in and out of elements of every storage type, for loops along memory.
//
// The results are those of to_float and from_float, NaN excepted, which comes out as some NaN. Where the compiler has
// no operator for an instruction, or takes a vector in halves, it is inline assembly: intrinsics refuse functions that
// get their target from their caller.
#pragma once

#include "../common/dispatch.h"
#include "storage_types.h"

#if defined(__x86_64__) && !defined(__clang__)
#define DALLE_FAST_LANES_ASM
#endif

namespace dalle_fast {

template <int kCount>
struct LaneTypes;

#define DALLE_FAST_LANE_TYPES(count)                                                               \
  template <>                                                                                      \
  struct LaneTypes<count> {                                                                        \
    typedef float Float __attribute__((vector_size(4 * count)));                                   \
    typedef int32_t Int __attribute__((vector_size(4 * count)));                                   \
    typedef uint32_t Unsigned __attribute__((vector_size(4 * count)));                             \
    typedef uint16_t Short __attribute__((vector_size(2 * count)));                                \
    typedef float HalfFloat __attribute__((vector_size(2 * count)));                               \
    typedef double HalfDouble __attribute__((vector_size(4 * count)));                             \
    typedef float FloatInMemory __attribute__((vector_size(4 * count), aligned(4), may_alias));    \
    typedef uint16_t ShortInMemory __attribute__((vector_size(2 * count), aligned(2), may_alias)); \
  };
DALLE_FAST_LANE_TYPES(4)
DALLE_FAST_LANE_TYPES(8)
DALLE_FAST_LANE_TYPES(16)
#undef DALLE_FAST_LANE_TYPES

template <CpuLevel kLevel>
struct Lanes {
#if defined(DALLE_FAST_LANES_ASM)
  static constexpr bool kAsm = kLevel != CpuLevel::kScalar;
#else
  static constexpr bool kAsm = false;
#endif
  static constexpr int kCount = kLevel == CpuLevel::kScalar ? 4 : kLevel == CpuLevel::kAvx2 ? 8 : 16;

  using Types = LaneTypes<kCount>;
  using Float = typename Types::Float;
  using Int = typename Types::Int;
  using Unsigned = typename Types::Unsigned;
  using Short = typename Types::Short;
  using HalfDouble = typename Types::HalfDouble;  // of half as many lanes
  using FloatInMemory = typename Types::FloatInMemory;
  using ShortInMemory = typename Types::ShortInMemory;  // auto would forget the alignment

  static DALLE_FAST_INLINE Float load(const float* from) { return *reinterpret_cast<const FloatInMemory*>(from); }
  static DALLE_FAST_INLINE Float load(const Bfloat16* from) {
    const ShortInMemory& words = *reinterpret_cast<const ShortInMemory*>(from);
    Unsigned bits;
#if defined(DALLE_FAST_LANES_ASM)
    if constexpr (kAsm) {
      asm("vpmovzxwd %1, %0" : "=v"(bits) : "m"(words));
      return reinterpret_cast<Float>(bits << 16);
    }
#endif
    bits = __builtin_convertvector(static_cast<Short>(words), Unsigned);
    return reinterpret_cast<Float>(bits << 16);
  }
  static DALLE_FAST_INLINE Float load(const Half* from) {
    Float values;
#if defined(DALLE_FAST_LANES_ASM)
    if constexpr (kAsm) {
      asm("vcvtph2ps %1, %0" : "=v"(values) : "m"(*reinterpret_cast<const ShortInMemory*>(from)));
      return values;
    }
#endif
    for (int i = 0; i < kCount; ++i) values[i] = to_float(from[i]);
    return values;
  }

  static DALLE_FAST_INLINE void store(float* to, Float values) { *reinterpret_cast<FloatInMemory*>(to) = values; }
  static DALLE_FAST_INLINE void store(Bfloat16* to, Float values) {
    const auto bits = reinterpret_cast<Unsigned>(values);
    const auto is_nan = reinterpret_cast<Unsigned>(values != values);
    const Unsigned words = ((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) | is_nan;
    ShortInMemory& target = *reinterpret_cast<ShortInMemory*>(to);
#if defined(DALLE_FAST_LANES_ASM)
    if constexpr (kAsm && kCount == 16) {
      asm("vpmovdw %1, %0" : "=m"(target) : "v"(words));
      return;
    }
#endif
    target = __builtin_convertvector(words, Short);
  }
  static DALLE_FAST_INLINE void store(Half* to, Float values) {
#if defined(DALLE_FAST_LANES_ASM)
    if constexpr (kAsm) {
      asm("vcvtps2ph $0, %1, %0" : "=m"(*reinterpret_cast<ShortInMemory*>(to)) : "v"(values));  // ties to even
      return;
    }
#endif
    for (int i = 0; i < kCount; ++i) from_float(values[i], to[i]);
  }

  // The lower and the upper half as float64.
  static DALLE_FAST_INLINE void widen(Float values, HalfDouble& lower, HalfDouble& upper) {
#if defined(DALLE_FAST_LANES_ASM)
    if constexpr (kAsm) {
      typename Types::HalfFloat half;
      if constexpr (kCount == 16) {
        asm("vcvtps2pd %t1, %0" : "=v"(lower) : "v"(values));
        asm("vextractf64x4 $1, %1, %0" : "=v"(half) : "v"(values));
      } else {
        asm("vcvtps2pd %x1, %0" : "=v"(lower) : "v"(values));
        asm("vextractf128 $1, %1, %0" : "=v"(half) : "v"(values));
      }
      asm("vcvtps2pd %1, %0" : "=v"(upper) : "v"(half));
      return;
    }
#endif
    for (int i = 0; i < kCount / 2; ++i) {
      lower[i] = values[i];
      upper[i] = values[i + kCount / 2];
    }
  }

  // All ones where the magnitude is `largest` at most, which a NaN's is not.
  static DALLE_FAST_INLINE Int at_most(Float values, float largest) {
    const auto magnitudes = reinterpret_cast<Float>(reinterpret_cast<Int>(values) & 0x7fffffff);
    return magnitudes <= Float{} + largest;
  }
  // The values where the mask is set, 0 elsewhere.
  static DALLE_FAST_INLINE Float keep(Float values, Int mask) {
    return reinterpret_cast<Float>(reinterpret_cast<Int>(values) & mask);
  }
};

}  // namespace dalle_fast
