// Sums over the lanes of as many vectors as a vector has lanes, all at once: lane i of the result is the sum of vector i.
//
// Halves are added to halves, two vectors at a time, so a vector's lanes are added in the same order whichever of the
// vectors it is: lane i and i + lanes / 2 first, then these sums in the same way.
#pragma once

#include "attention_tiles.h"

namespace dalle_fast {

template <CpuLevel kLevel>
struct LaneSums {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  using Int = typename I::Int;
  static constexpr int kLanes = I::kLanes;

  // In place: vectors[0] has the sums.
  static DALLE_FAST_INLINE Float of(Float (&vectors)[kLanes]) {
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) vectors[i] = add_halves(vectors[i], vectors[i + half], half);
    }
    return vectors[0];
  }

 private:
  // Of each run of 2 * half lanes: in the first half a's two halves added, in the second b's.
  static DALLE_FAST_INLINE Float add_halves(Float a, Float b, int half) {
#if defined(__clang__)
    Float low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      low[i] = (i & half) != 0 ? b[i - half] : a[i];
      high[i] = (i & half) != 0 ? b[i] : a[i + half];
    }
    return low + high;
#else
    Int low, high;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      low[i] = (i & half) != 0 ? kLanes + i - half : i;
      high[i] = (i & half) != 0 ? kLanes + i : i + half;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
  }
};

}  // namespace dalle_fast
