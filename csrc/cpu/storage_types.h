// The types that the CPU ops read and write elements in, and their conversions; arithmetic is float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../common/macros.h"
#include "../common/torch_stable.h"

namespace dalle_fast {

// Elements of the 16-bit types are also read and written in memory for floats.
enum class StorageType { kFloat, kHalf, kBfloat16 };
struct __attribute__((may_alias)) Half {
  uint16_t bits;
};
struct __attribute__((may_alias)) Bfloat16 {
  uint16_t bits;
};

DALLE_FAST_INLINE float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
DALLE_FAST_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

DALLE_FAST_INLINE float to_float(float value) { return value; }
DALLE_FAST_INLINE float to_float(Bfloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }
// Normal numbers get their exponent shifted; denormals are an integer times 2^-24; infinity and NaN keep all ones.
DALLE_FAST_INLINE float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16, magnitude = value.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t denormal = bits_of_float(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? denormal : normal;
  return float_of_bits(sign | (magnitude >= 0x7c00u ? special : finite));
}

DALLE_FAST_INLINE void from_float(float value, float& to) { to = value; }
// To nearest, ties to even.
DALLE_FAST_INLINE void from_float(float value, Bfloat16& to) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  to.bits = static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}
DALLE_FAST_INLINE void from_float(float value, Half& to) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 leaves the value, rounded to multiples of 2^-24, in the low bits.
  const uint32_t denormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  if (magnitude >= 0x477ff000u) half = 0x7c00u;  // rounds to 65536 or more
  if (magnitude > 0x7f800000u) half = 0x7e00u;
  to.bits = static_cast<uint16_t>(sign | half);
}

inline int64_t storage_bytes(StorageType type) { return type == StorageType::kFloat ? 4 : 2; }

inline StorageType storage_type(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return StorageType::kFloat;
    case ScalarType::Half:
      return StorageType::kHalf;
    case ScalarType::BFloat16:
      return StorageType::kBfloat16;
    default:
      throw std::runtime_error(std::string(name) + " must be float32, float16 or bfloat16, got " +
                               torch::headeronly::toString(tensor.scalar_type()));
  }
}

}  // namespace dalle_fast
