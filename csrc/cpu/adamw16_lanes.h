// What the AdamW16 update on the CPU computes with: vectors with the functions that common/adamw16.h asks for, and the
// noise of stochastic rounding.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/adamw16.h"
#include "../common/philox.h"
#include "attention_tiles.h"
#include "philox_lanes.h"
#include "storage_lanes.h"

namespace dalle_fast {

inline constexpr int64_t kUpdateBlock = 512;  // elements that go through one loop before they go through the next
inline constexpr int64_t kWordsOfLine = 32;  // of the cache
inline constexpr int64_t kNoiseSharing = 8;  // neighbours that share a counter of the generator

// What common/adamw16.h computes with, of a level's vectors.
template <CpuLevel kLevel>
struct AdamLanes {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  using Int = typename I::Int;
  using Unsigned = typename I::Unsigned;
  using Words = typename Lanes<kLevel>::ShortInMemory;
  using Register = typename Lanes<kLevel>::Short;
#if defined(__x86_64__) && !defined(__clang__)
  static constexpr bool kHasAssembly = kLevel != CpuLevel::kScalar;
#else
  static constexpr bool kHasAssembly = false;
#endif

  static DALLE_FAST_INLINE Float value(Unsigned bits) { return reinterpret_cast<Float>(bits); }
  static DALLE_FAST_INLINE Unsigned bits(Float value) { return reinterpret_cast<Unsigned>(value); }
  static DALLE_FAST_INLINE Float splat(const float& x) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      Float all;
      asm("vbroadcastss %1, %0" : "=v"(all) : "m"(x));
      return all;
    }
#endif
    return Float{} + x;
  }
  static DALLE_FAST_INLINE Unsigned constant(uint32_t x) {
    Unsigned all = Unsigned{} + x;
#if defined(__x86_64__) && !defined(__clang__)
    // Kept in a register or on the stack: the compiler would rather make it anew in each turn of a loop.
    if constexpr (kLevel == CpuLevel::kAvx512) asm("" : "+v"(all));
#endif
    return all;
  }
  static DALLE_FAST_INLINE Float from_integer(Unsigned x) {
    return __builtin_convertvector(reinterpret_cast<Int>(x), Float);
  }
  static DALLE_FAST_INLINE Unsigned to_integer(Float x) {
    return reinterpret_cast<Unsigned>(__builtin_convertvector(x, Int));
  }
  static DALLE_FAST_INLINE Float divide(Float a, Float b) { return a / b; }

  static DALLE_FAST_INLINE Float fma(Float a, Float b, Float c) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      asm("vfmadd213ps %2, %1, %0" : "+v"(b) : "v"(a), "v"(c));
      return b;
    }
#endif
    for (int i = 0; i < I::kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
  }
  static DALLE_FAST_INLINE Float fms(Float a, Float b, Float c) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      asm("vfmsub213ps %2, %1, %0" : "+v"(a) : "v"(b), "vm"(c));
      return a;
    }
#endif
    return fma(a, b, -c);
  }
  static DALLE_FAST_INLINE Float least(Float x, Float limit) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      asm("vminps %1, %2, %0" : "=v"(x) : "v"(x), "v"(limit));  // of a NaN and a number, the one named first
      return x;
    }
#endif
    return x > limit ? limit : x;
  }
  static DALLE_FAST_INLINE Unsigned least(Unsigned a, Unsigned b) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {  // the compiler makes two of it where b is constant
      asm("vpminud %2, %1, %0" : "=v"(a) : "v"(a), "v"(b));
      return a;
    }
#endif
    return a < b ? a : b;
  }
  static DALLE_FAST_INLINE Float sqrt(Float x) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      asm("vsqrtps %1, %0" : "=v"(x) : "v"(x));
    } else {
      asm("sqrtps %1, %0" : "=x"(x) : "x"(x));
    }
#else
    for (int i = 0; i < I::kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
#endif
    return x;
  }

  // Words in memory, with zeros or copies of their signs above them.
  template <bool kSigned>
  static DALLE_FAST_INLINE Unsigned load_words(const uint16_t* from) {
    const Words& words = *reinterpret_cast<const Words*>(from);
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kHasAssembly) {
      Unsigned wide;
      if constexpr (kSigned) {
        asm("vpmovsxwd %1, %0" : "=v"(wide) : "m"(words));
      } else {
        asm("vpmovzxwd %1, %0" : "=v"(wide) : "m"(words));
      }
      return wide;
    }
#endif
    if constexpr (kSigned) {
      typedef int16_t Signed __attribute__((vector_size(sizeof(Register))));
      const Signed signed_words = reinterpret_cast<Signed>(static_cast<Register>(words));
      return reinterpret_cast<Unsigned>(__builtin_convertvector(signed_words, Int));
    } else {
      return __builtin_convertvector(words, Unsigned);
    }
  }
  static DALLE_FAST_INLINE void store_words(uint16_t* to, Unsigned words) {
    Words& target = *reinterpret_cast<Words*>(to);  // auto would forget the alignment
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kLevel == CpuLevel::kAvx512) {
      Register narrow;
      asm("vpmovdw %1, %0" : "=v"(narrow) : "v"(words));
      target = narrow;
      return;
    }
#endif
    target = __builtin_convertvector(words, Words);
  }

  template <class Format>
  static DALLE_FAST_INLINE Float load(const uint16_t* from) {
    if constexpr (std::is_same_v<Format, HalfWords>) return Lanes<kLevel>::load(reinterpret_cast<const Half*>(from));
    return Format::template widen<AdamLanes>(load_words<false>(from));
  }

  template <class Format>
  static DALLE_FAST_INLINE void store_nearest(uint16_t* to, Float x) {
    if constexpr (std::is_same_v<Format, HalfWords>) {
      return Lanes<kLevel>::store(reinterpret_cast<Half*>(to), Adam<AdamLanes>::one_nan(x));
    }
    store_words(to, Format::template nearest<AdamLanes>(x));
  }

  template <class Format>
  static DALLE_FAST_INLINE void store_stochastic(uint16_t* to, Float x, const uint16_t* noise) {
#if defined(__x86_64__) && !defined(__clang__)
    if constexpr (kLevel == CpuLevel::kAvx512) {
      // Where all are normal numbers that stay finite, noise is added to the bits as they are, sign and all. Others are
      // rare, and take longer.
      constexpr bool kIsHalf = std::is_same_v<Format, HalfWords>;
      constexpr uint32_t kFirst = kIsHalf ? 0x38800000u : 0u, kEnd = kIsHalf ? 0x47800000u : 0x7f7f0000u;
      if (!any_above((bits(x) & constant(0x7fffffffu)) - constant(kFirst), constant(kEnd - kFirst - 1u))) [[likely]] {
        if constexpr (kIsHalf) {
          Register narrow = *reinterpret_cast<const Words*>(noise) >> 3;
          Unsigned wide;
          asm("vpmovzxwd %1, %0" : "=v"(wide) : "v"(narrow));
          asm("vcvtps2ph $3, %1, %0" : "=v"(narrow) : "v"(bits(x) + wide));  // cuts off
          *reinterpret_cast<Words*>(to) = narrow;
        } else {
          store_words(to, (bits(x) + load_words<false>(noise)) >> 16);
        }
        return;
      }
    }
#endif
    store_words(to, Format::template stochastic<AdamLanes>(x, load_words<false>(noise)));
  }

#if defined(__x86_64__) && !defined(__clang__)
  // Of 16 unsigned numbers.
  static DALLE_FAST_INLINE bool any_above(Unsigned x, Unsigned limit) {
    bool any;
    asm("vpcmpnleud %2, %1, %%k1\n\tkortestw %%k1, %%k1" : "=@ccnz"(any) : "v"(x), "v"(limit) : "k1");
    return any;
  }
#endif
};

// The noise of kUpdateBlock elements: the words of kUpdateBlock / 8 counters, in the order of the elements.
template <CpuLevel kLevel>
class NoiseBlock {
  using I = Isa<kLevel>;
  using Wide = typename I::Wide;
  static constexpr int kWide = I::kLanes / 2;  // counters in a vector, the low halves of 64 bits each

 public:
  // Counters (group, index, step) from group `first` on, all with the upper half of `first`. Meanwhile the words of as
  // many elements are fetched from each stream.
  DALLE_FAST_INLINE void fill(uint64_t first, uint32_t index, uint32_t step, const PhiloxKeys& keys,
                              const uint16_t* const (&streams)[4]) {
    // In the first two rounds no product depends on both the group's lower half and anything else.
    const uint64_t first_right = index * uint64_t{kPhiloxRight};
    const uint64_t first_left = ((first_right >> 32) ^ (first >> 32) ^ keys.low[0]) * kPhiloxLeft;
    const uint64_t key0 = static_cast<uint32_t>(first_right) ^ keys.low[1], key2 = (first_left >> 32) ^ keys.high[1];
    const uint64_t first_key2 = step ^ keys.high[0];
    // Even lanes have the first half of a vector's counters and odd ones the second, so that interleave sorts them.
    Wide group{};
#pragma GCC unroll 8
    for (int i = 0; i < kWide; ++i) group[i] = static_cast<uint64_t>(i % 2 * (kWide / 2) + i / 2);
    group += static_cast<uint32_t>(first);
    for (int64_t counter = 0; counter < kUpdateBlock / kNoiseSharing; counter += kWide, group += kWide) {
#pragma GCC unroll 4
      for (const uint16_t* stream : streams) {
#pragma GCC unroll 2
        for (int64_t ahead = 0; ahead < kWide * kNoiseSharing; ahead += kWordsOfLine) {
          __builtin_prefetch(stream + counter * kNoiseSharing + ahead);
        }
      }
      const Wide product = PhiloxLanes<kLevel>::multiply(group, Wide{} + kPhiloxLeft);
      Wide c1 = PhiloxLanes<kLevel>::multiply((product >> 32) ^ (Wide{} + first_key2), Wide{} + kPhiloxRight);
      Wide c0 = (c1 >> 32) ^ (Wide{} + key0), c2 = (product & 0xffffffffu) ^ (Wide{} + key2), c3 = Wide{} + first_left;
#pragma GCC unroll 8
      for (int round = 2; round < kRoundingNoiseRounds; ++round) {
        const Wide left = PhiloxLanes<kLevel>::multiply(c0, Wide{} + kPhiloxLeft);
        const Wide right = PhiloxLanes<kLevel>::multiply(c2, Wide{} + kPhiloxRight);
        c0 = (right >> 32) ^ c1 ^ (Wide{} + keys.low[round]);
        c2 = (left >> 32) ^ c3 ^ (Wide{} + keys.high[round]);
        c1 = right;
        c3 = left;
      }
      const Wide low = (c0 & 0xffffffffu) | (c1 << 32), high = (c2 & 0xffffffffu) | (c3 << 32);
      auto* to = reinterpret_cast<float*>(words_ + counter * 4);
      I::store(to, reinterpret_cast<typename I::Float>(interleave(low, high, false)));
      I::store(to + I::kLanes, reinterpret_cast<typename I::Float>(interleave(low, high, true)));
    }
  }

  DALLE_FAST_INLINE const uint16_t* bits(int64_t element) const {
    return reinterpret_cast<const uint16_t*>(words_) + element;
  }

 private:
  alignas(64) uint32_t words_[kUpdateBlock / 2];

  static DALLE_FAST_INLINE Wide interleave(Wide a, Wide b, bool high) {
    if constexpr (kWide == 8) {
      return high ? DALLE_FAST_SHUFFLE(Wide, a, b, 1, 9, 3, 11, 5, 13, 7, 15)
                  : DALLE_FAST_SHUFFLE(Wide, a, b, 0, 8, 2, 10, 4, 12, 6, 14);
    } else if constexpr (kWide == 4) {
      return high ? DALLE_FAST_SHUFFLE(Wide, a, b, 1, 5, 3, 7) : DALLE_FAST_SHUFFLE(Wide, a, b, 0, 4, 2, 6);
    } else {
      return high ? DALLE_FAST_SHUFFLE(Wide, a, b, 1, 3) : DALLE_FAST_SHUFFLE(Wide, a, b, 0, 2);
    }
  }
};

}  // namespace dalle_fast
