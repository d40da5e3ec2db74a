// bfloat16 as the kernels use it; a NaN becomes the instruction's.
#pragma once

#include "../../csrc/cpu/storage_types.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 pair) { return pair.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 pair) { return pair.y; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  dalle_fast::Bfloat16 word;
  dalle_fast::from_float(value, word);
  return {value == value ? word.bits : uint16_t{0x7fff}};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float low, float high) {
  return {__float2bfloat16_rn(low), __float2bfloat16_rn(high)};
}
