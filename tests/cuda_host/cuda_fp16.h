// float16 as the kernels use it; a NaN becomes the instruction's.
#pragma once

#include "../../csrc/cpu/storage_types.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half __low2half(__half2 pair) { return pair.x; }
inline __half __high2half(__half2 pair) { return pair.y; }
inline float2 __half22float2(__half2 pair) {
  return {dalle_fast::to_float(dalle_fast::Half{pair.x.bits}), dalle_fast::to_float(dalle_fast::Half{pair.y.bits})};
}
inline __half __float2half_rn(float value) {
  dalle_fast::Half half;
  dalle_fast::from_float(value, half);
  return {value == value ? half.bits : uint16_t{0x7fff}};
}
inline __half2 __floats2half2_rn(float low, float high) { return {__float2half_rn(low), __float2half_rn(high)}; }
