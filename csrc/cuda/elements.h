// Packs of neighbouring elements: moved 16 bytes at a time, or one element alone; widened to float32, and narrowed from
// it to nearest.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "chunks.h"

namespace dalle_fast {

__device__ __forceinline__ bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// An address out of a table, known to be one of global memory: generic accesses take longer.
__device__ __forceinline__ char* global_pointer(int64_t address) {
  auto* pointer = reinterpret_cast<char*>(address);
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// What find_chunk_by_warp counts lanes with.
struct CountLanes {
  template <class Holds>
  __device__ __forceinline__ int operator()(Holds holds) const {
    return __popc(__ballot_sync(0xffffffffu, holds(static_cast<int>(threadIdx.x) % kLanes)));
  }
};

// Elements as they lie in memory, two to a word where they have 16 bits; a pack that is loaded need not be there yet.
template <int kBytes, int kLen>
struct Pack {
  static constexpr int kWords = kLen == 1 ? 1 : kLen * kBytes / 4;
  alignas(kLen == 1 ? 4 : 16) uint32_t word[kWords];
};

template <int kBytes, int kLen>
__device__ __forceinline__ Pack<kBytes, kLen> load(const char* source) {
  if constexpr (kLen > 1) {
    static_assert(kLen * kBytes % 16 == 0);
    return *reinterpret_cast<const Pack<kBytes, kLen>*>(source);
  } else if constexpr (kBytes == 4) {
    return {{*reinterpret_cast<const uint32_t*>(source)}};
  } else {
    return {{*reinterpret_cast<const uint16_t*>(source)}};
  }
}

template <int kBytes, int kLen>
__device__ __forceinline__ void store(const Pack<kBytes, kLen>& pack, char* target) {
  if constexpr (kLen > 1) {
    *reinterpret_cast<Pack<kBytes, kLen>*>(target) = pack;
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(target) = pack.word[0];
  } else {
    *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(pack.word[0]);
  }
}

struct Float32 {
  static constexpr int kBytes = 4;
};

struct Float16 {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    return __half22float2(__halves2half2(__ushort_as_half(static_cast<uint16_t>(word)),
                                         __ushort_as_half(static_cast<uint16_t>(word >> 16))));
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return __half_as_ushort(__low2half(pair)) | uint32_t{__half_as_ushort(__high2half(pair))} << 16;
  }
};

struct BFloat16 {
  static constexpr int kBytes = 2;
  static __device__ __forceinline__ float2 widen(uint32_t word) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
  static __device__ __forceinline__ uint32_t narrow(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(__low2bfloat16(pair)) | uint32_t{__bfloat16_as_ushort(__high2bfloat16(pair))} << 16;
  }
};

template <class Type, int kLen>
__device__ __forceinline__ void widen(const Pack<Type::kBytes, kLen>& pack, float (&values)[kLen]) {
#pragma unroll
  for (int i = 0; i < kLen; ++i) {
    if constexpr (Type::kBytes == 4) {
      values[i] = __uint_as_float(pack.word[i]);
    } else {
      const float2 pair = Type::widen(pack.word[i / 2]);
      values[i] = i % 2 == 0 ? pair.x : pair.y;
    }
  }
}

template <class Type, int kLen>
__device__ __forceinline__ Pack<Type::kBytes, kLen> narrow(const float (&values)[kLen]) {
  Pack<Type::kBytes, kLen> pack;
#pragma unroll
  for (int i = 0; i < kLen; ++i) {
    if constexpr (Type::kBytes == 4) {
      pack.word[i] = __float_as_uint(values[i]);
    } else if (i % 2 == 0) {
      pack.word[i / 2] = Type::narrow(values[i], i + 1 < kLen ? values[i + 1] : 0.0f);
    }
  }
  return pack;
}

}  // namespace dalle_fast
