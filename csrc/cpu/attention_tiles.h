// The inner loops of attention on the CPU, on tiles of 16 queries: lane i of every vector is query i.
//
// Keys and values are rows in memory of which single elements are broadcast; what the 16 queries bring is
// transposed once a tile. So no key is ever transposed, a softmax runs along the lanes' own columns without any
// shuffle, and a mask is 16 bits a key.
//
//   scores        s[k][i]  = sum_d K[k][d] q[d][i]         (also V[k][d] dO[d][i])
//   accumulate    o[d][i] += sum_k V[k][d] p[k][i]         (also K[k][d] dS[k][i])
//   scatter_rows  dV[k][d] += sum_i p[k][i] dO[i][d]       (also dS[k][i] Q[i][d])
//
// "Units" are the 32 bits that one broadcast brings: one float, or two bfloat16 that the CPU multiplies and adds at
// once. All sums are float32. Vectors are the compiler's own (GCC and Clang), so that one source serves every
// instruction set; the few instructions without an operator are inline assembly.
#pragma once

#include <cstdint>
#include <cstring>

#include "../common/dispatch.h"
#include "../common/macros.h"
#include "attention_plan.h"

namespace dalle_fast {

inline constexpr float kMasked = -__builtin_inff();  // score of a key that is not seen

// Elements of the vectors a and b, b's numbered after a's; Indices is a vector type of integers of their size.
#if defined(__clang__)
#define DALLE_FAST_SHUFFLE(Indices, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DALLE_FAST_SHUFFLE(Indices, a, b, ...) __builtin_shuffle(a, b, Indices{__VA_ARGS__})
#endif

template <int kCount>
struct VectorTypes;

#define DALLE_FAST_VECTOR_TYPES(count)                                                           \
  template <>                                                                                    \
  struct VectorTypes<count> {                                                                    \
    typedef float Float __attribute__((vector_size(4 * count)));                                 \
    typedef int32_t Int __attribute__((vector_size(4 * count)));                                 \
    typedef uint32_t Unsigned __attribute__((vector_size(4 * count)));                           \
    typedef uint64_t Wide __attribute__((vector_size(4 * count)));                               \
    typedef float FloatInMemory __attribute__((vector_size(4 * count), aligned(4), may_alias));  \
    typedef int32_t IntInMemory __attribute__((vector_size(4 * count), aligned(4), may_alias));  \
  };
DALLE_FAST_VECTOR_TYPES(4)
DALLE_FAST_VECTOR_TYPES(8)
DALLE_FAST_VECTOR_TYPES(16)
#undef DALLE_FAST_VECTOR_TYPES

// What a level has: floats in a vector, and how many keys (or elements of a head) a block of accumulators takes.
template <CpuLevel kLevel>
struct Isa {
  static constexpr int kLanes = kLevel == CpuLevel::kScalar ? 4 : kLevel == CpuLevel::kAvx2 ? 8 : 16;
  static constexpr int kBlock = kLevel == CpuLevel::kScalar ? 2 : kLevel == CpuLevel::kAvx2 ? 4 : 16;
  static constexpr int kVectors = kTileQueries / kLanes;
  // scatter_rows: rows and vectors a row of a block of accumulators.
  static constexpr int kRows = kLevel == CpuLevel::kScalar ? 2 : 4;
  static constexpr int kRowVectors = kLanes == 16 ? 4 : 2;
  using Float = typename VectorTypes<kLanes>::Float;
  using Int = typename VectorTypes<kLanes>::Int;
  using Unsigned = typename VectorTypes<kLanes>::Unsigned;
  using Wide = typename VectorTypes<kLanes>::Wide;  // half as many, of 64 bits
  using FloatInMemory = typename VectorTypes<kLanes>::FloatInMemory;
  using IntInMemory = typename VectorTypes<kLanes>::IntInMemory;

  static DALLE_FAST_INLINE Float load(const float* from) { return *reinterpret_cast<const FloatInMemory*>(from); }
  static DALLE_FAST_INLINE void store(float* to, Float value) { *reinterpret_cast<FloatInMemory*>(to) = value; }
  static DALLE_FAST_INLINE Float splat(float value) { return Float{} + value; }

  // All bits set where bit (first_lane + lane) of `lanes` is.
  static DALLE_FAST_INLINE Int lane_mask(uint32_t lanes, int first_lane) {
    Int bits;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) bits[i] = 1 << i;
    const Int all = Int{} + static_cast<int32_t>(lanes >> first_lane);
    return (all & bits) != 0;
  }

  static DALLE_FAST_INLINE Float max(Float a, Float b) { return a > b ? a : b; }

  // e^x for x <= 0; 1 for 0, 0 below -87.3, NaN for NaN. The relative error is below 8e-8 + 3e-8 |x|, so that of a
  // softmax's weights is what float32 allows; without FMA instructions, at the scalar level, 8e-8 + 8e-8 |x|.
  static DALLE_FAST_INLINE Float exp(Float x) {
    constexpr float kLog2e = 1.44269504f;
    // 1.5 * 2^23 and the bias of a float's exponent: the sum's low bits are those of 2^(x log2 e), rounded.
    constexpr float kRound = 12582912.0f + 127.0f;
    const Float shifted = x * kLog2e + kRound;
    const Float f = x * kLog2e - (shifted - kRound);
    // 2^f by the polynomial of degree 6 with value 1 at 0 and the least relative error on [-1/2, 1/2], 2.0e-9, found by
    // iteratively reweighted least squares. Degree 5 leaves 9e-8, and twice the error after rounding.
    Float p = f * 1.5353361941e-4f + 1.3398874404e-3f;
    p = p * f + 9.6184373575e-3f;
    p = p * f + 5.5503324712e-2f;
    p = p * f + 2.4022647914e-1f;
    p = p * f + 6.9314720286e-1f;
    p = p * f + 1.0f;
    // A product, because a NaN would not survive if its exponent were added to.
    const Float power = p * reinterpret_cast<Float>(reinterpret_cast<Int>(shifted) << 23);
    return x < -87.3f ? Float{} : power;
  }

  // ln of positive normal numbers (of others, NaN too, it is some number), relative error below 1e-7. Of several vectors at
  // once, step by step: one's long chain of dependent instructions would leave the CPU idle.
  template <int kCount>
  static DALLE_FAST_INLINE void log(Float (&x)[kCount]) {
    constexpr int32_t kSqrtHalf = 0x3f3504f3;
    // ln(1 + f) = f - f^2 / 2 + f^3 P(f), P of degree 7 with the least relative error of the whole, 8e-9, found as exp's.
    constexpr float kCoefficients[] = {1.2761550338e-1f, -1.3160195068e-1f, 1.4201762470e-1f, -1.6623356478e-1f,
                                       2.0001226667e-1f, -2.5000821056e-1f, 3.3333331710e-1f, -0.5f};
    Float f[kCount], scale[kCount], p[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const Int bits = reinterpret_cast<Int>(x[i]), exponent = (bits - kSqrtHalf) >> 23;
      f[i] = reinterpret_cast<Float>(bits - (exponent << 23)) - 1.0f;  // exact; mantissa in [sqrt(1/2), sqrt(2))
      scale[i] = __builtin_convertvector(exponent, Float);
      p[i] = splat(-7.6344298376e-2f);
    }
#pragma GCC unroll 8
    for (const float coefficient : kCoefficients) {
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) p[i] = p[i] * f[i] + coefficient;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      // ln 2 in two parts, of which a product with the first is exact.
      const Float rest = (f[i] * f[i]) * p[i] + scale[i] * -2.12194440e-4f;
      x[i] = scale[i] * 0.693359375f + (f[i] + rest);
    }
  }

  static DALLE_FAST_INLINE Float log(Float x) {
    Float one[1] = {x};
    log(one);
    return one[0];
  }
};

// One unit is a float.
struct Float32Math {
  static constexpr bool kIsPair = false;

  template <class I>
  static DALLE_FAST_INLINE void add_product(typename I::Float& sum, const float* unit, typename I::Float vector) {
    sum += *unit * vector;
  }
};

// One unit is two bfloat16; for CpuLevel::kAvx512Bf16 alone.
struct Bf16PairMath {
  static constexpr bool kIsPair = true;

  template <class I>
  static DALLE_FAST_INLINE void add_product(typename I::Float& sum, const float* unit, typename I::Float vector) {
#if defined(DALLE_FAST_HAS_AVX512_BF16)
    typename I::Float result = sum;  // an operand in memory would keep the sums out of registers
    asm("vdpbf16ps %1%{1to16%}, %2, %0" : "+v"(result) : "m"(*unit), "v"(vector));
    sum = result;
#endif
  }

  // sum * factor, rounded: never fused with what comes after, so that both passes have the same scores.
  template <class I>
  static DALLE_FAST_INLINE typename I::Float times(typename I::Float sum, float factor) {
    typename I::Float product = sum * factor;
#if defined(DALLE_FAST_HAS_AVX512_BF16)
    asm("" : "+v"(product));
#endif
    return product;
  }

  // 32 bfloat16: those of `first`, then those of `second`, rounded to nearest, ties to even.
  template <class I>
  static DALLE_FAST_INLINE typename I::Float round(typename I::Float first, typename I::Float second) {
    typename I::Float rounded{};
#if defined(DALLE_FAST_HAS_AVX512_BF16)
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(first), "v"(second));
#endif
    return rounded;
  }

  // What round gave, as 16 units (first[i], second[i]).
  template <class I>
  static DALLE_FAST_INLINE typename I::Float interleave(typename I::Float rounded) {
    if constexpr (I::kLanes == 16) {
      typedef int16_t Halves __attribute__((vector_size(64)));
      const auto halves = reinterpret_cast<Halves>(rounded);
      rounded = reinterpret_cast<typename I::Float>(
          DALLE_FAST_SHUFFLE(Halves, halves, halves, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                             25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31));
    }
    return rounded;
  }
};

// to[c][r] = from[r][c] for 4 x 4 units.
DALLE_FAST_INLINE void transpose_4x4(const float* const (&from)[4], float* to, int64_t to_stride) {
  using V = VectorTypes<4>;
  const auto at = [](const float* p) { return static_cast<V::Float>(*reinterpret_cast<const V::FloatInMemory*>(p)); };
  const V::Float a = at(from[0]), b = at(from[1]), c = at(from[2]), d = at(from[3]);
  const V::Float ab_low = DALLE_FAST_SHUFFLE(V::Int, a, b, 0, 4, 1, 5);
  const V::Float ab_high = DALLE_FAST_SHUFFLE(V::Int, a, b, 2, 6, 3, 7);
  const V::Float cd_low = DALLE_FAST_SHUFFLE(V::Int, c, d, 0, 4, 1, 5);
  const V::Float cd_high = DALLE_FAST_SHUFFLE(V::Int, c, d, 2, 6, 3, 7);
  const auto put = [&](int row, V::Float value) { *reinterpret_cast<V::FloatInMemory*>(to + row * to_stride) = value; };
  put(0, DALLE_FAST_SHUFFLE(V::Int, ab_low, cd_low, 0, 1, 4, 5));
  put(1, DALLE_FAST_SHUFFLE(V::Int, ab_low, cd_low, 2, 3, 6, 7));
  put(2, DALLE_FAST_SHUFFLE(V::Int, ab_high, cd_high, 0, 1, 4, 5));
  put(3, DALLE_FAST_SHUFFLE(V::Int, ab_high, cd_high, 2, 3, 6, 7));
}

// columns[u][i] = rows[i][u] for 16 rows of `units` units.
DALLE_FAST_INLINE void transpose_rows(const float* rows, int64_t row_stride, int64_t units, float* columns) {
  for (int i = 0; i < kTileQueries; i += 4) {
    const float* r = rows + i * row_stride;
    int64_t u = 0;
    for (; u + 4 <= units; u += 4) {
      const float* const four[4] = {r + u, r + row_stride + u, r + 2 * row_stride + u, r + 3 * row_stride + u};
      transpose_4x4(four, columns + u * kTileQueries + i, kTileQueries);
    }
    for (; u < units; ++u) {
      for (int j = 0; j < 4; ++j) columns[u * kTileQueries + i + j] = r[j * row_stride + u];
    }
  }
}

// rows[i][u] = columns[u][i].
DALLE_FAST_INLINE void transpose_columns(const float* columns, int64_t units, float* rows, int64_t row_stride) {
  for (int i = 0; i < kTileQueries; i += 4) {
    float* r = rows + i * row_stride;
    int64_t u = 0;
    for (; u + 4 <= units; u += 4) {
      const float* c = columns + u * kTileQueries + i;
      const float* const four[4] = {c, c + kTileQueries, c + 2 * kTileQueries, c + 3 * kTileQueries};
      transpose_4x4(four, r + u, row_stride);
    }
    for (; u < units; ++u) {
      for (int j = 0; j < 4; ++j) r[j * row_stride + u] = columns[u * kTileQueries + i + j];
    }
  }
}

// The loops for one level and kind of unit. Rows of keys and values lie kStride units apart, known at compile time, so
// that 16 rows need one address register.
template <CpuLevel kLevel, class Math, int kStride>
struct TileLoops {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  using Int = typename I::Int;
  static constexpr int kVectors = I::kVectors;

  template <int kRows>
  static DALLE_FAST_INLINE void dot_rows(const float* rows, const float* columns, int64_t units,
                                         Float (&sums)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = Float{};
    }
    for (int64_t u = 0; u < units; ++u) {
      Float column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = I::load(columns + u * kTileQueries + v * I::kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Math::template add_product<I>(sums[r][v], rows + r * kStride + u, column[v]);
      }
    }
  }

  // scores[k][i] = sum_u keys[k][u] queries[u][i], of pairs times factor (floats come multiplied), kMasked where
  // lanes[k] lacks bit i; maxima[i] follows them. lanes may be null: all are seen.
  template <int kRows>
  static DALLE_FAST_INLINE void scores(const float*& keys, int64_t& num_keys, const uint16_t*& lanes,
                                       const float* queries, int64_t units, float factor, float*& scores_out,
                                       Float (&maxima)[kVectors]) {
    for (; num_keys >= kRows; num_keys -= kRows) {
      Float sums[kRows][kVectors];
      dot_rows<kRows>(keys, queries, units, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Float s = sums[r][v];
          if constexpr (Math::kIsPair) s = Math::template times<I>(s, factor);
          if (lanes != nullptr) s = I::lane_mask(lanes[r], v * I::kLanes) ? s : I::splat(kMasked);
          maxima[v] = I::max(s, maxima[v]);
          I::store(scores_out + r * kTileQueries + v * I::kLanes, s);
        }
      }
      keys += kRows * kStride;
      scores_out += kRows * kTileQueries;
      if (lanes != nullptr) lanes += kRows;
    }
    if constexpr (kRows > 1) scores<kRows / 2>(keys, num_keys, lanes, queries, units, factor, scores_out, maxima);
  }

  // sums[d][i] += sum over units u of rows[u][d] weights[u][i], for kCount elements d.
  template <int kCount>
  static DALLE_FAST_INLINE void accumulate_block(const float* rows, int64_t row_stride, const float* weights,
                                                 int64_t units, float* sums) {
    // A sum of its own for these rows, so that what many calls add up is not rounded at each row.
    Float block[kCount][kVectors];
#pragma GCC unroll 16
    for (int d = 0; d < kCount; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) block[d][v] = Float{};
    }
    for (int64_t u = 0; u < units; ++u) {
      Float weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weight[v] = I::load(weights + u * kTileQueries + v * I::kLanes);
#pragma GCC unroll 16
      for (int d = 0; d < kCount; ++d) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Math::template add_product<I>(block[d][v], rows + d, weight[v]);
      }
      rows += row_stride;
    }
#pragma GCC unroll 16
    for (int d = 0; d < kCount; ++d) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* sum = sums + d * kTileQueries + v * I::kLanes;
        I::store(sum, I::load(sum) + block[d][v]);
      }
    }
  }

  template <int kCount = I::kBlock>
  static DALLE_FAST_INLINE void accumulate(const float* rows, int64_t row_stride, const float* weights, int64_t units,
                                           int64_t head_dim, float* sums) {
    int64_t d = 0;
    for (; d + kCount <= head_dim; d += kCount) {
      accumulate_block<kCount>(rows + d, row_stride, weights, units, sums + d * kTileQueries);
    }
    if constexpr (kCount > 1) {
      if (d < head_dim) {
        accumulate<kCount / 2>(rows + d, row_stride, weights, units, head_dim - d, sums + d * kTileQueries);
      }
    }
  }

  // weights[k][i] = e^(scores - lse), with the scores that scores() makes, where lanes[k] has bit i, else 0;
  // grads[k][i] = weights[k][i] * (values . grad_out - delta).
  template <int kRows>
  static DALLE_FAST_INLINE void weights_and_grads(const float*& keys, const float*& values, int64_t& num_keys,
                                                  const uint16_t*& lanes, const float* queries, const float* grad_out,
                                                  int64_t units, float factor, const Float (&lse)[kVectors],
                                                  const Float (&delta)[kVectors], float*& weights, float*& grads) {
    for (; num_keys >= kRows; num_keys -= kRows) {
      Float sums[kRows][kVectors];
      dot_rows<kRows>(keys, queries, units, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Float s = sums[r][v];
          if constexpr (Math::kIsPair) s = Math::template times<I>(s, factor);
          Float p = I::exp(s - lse[v]);
          if (lanes != nullptr) p = I::lane_mask(lanes[r], v * I::kLanes) ? p : Float{};
          I::store(weights + r * kTileQueries + v * I::kLanes, p);
        }
      }
      dot_rows<kRows>(values, grad_out, units, sums);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int at = r * kTileQueries + v * I::kLanes;
          I::store(grads + at, I::load(weights + at) * (sums[r][v] - delta[v]));
        }
      }
      keys += kRows * kStride;
      values += kRows * kStride;
      weights += kRows * kTileQueries;
      grads += kRows * kTileQueries;
      if (lanes != nullptr) lanes += kRows;
    }
    if constexpr (kRows > 1) {
      weights_and_grads<kRows / 2>(keys, values, num_keys, lanes, queries, grad_out, units, factor, lse, delta, weights,
                                   grads);
    }
  }

  // Rounds weights and grads to bfloat16: of each key's 16 the pairs along the queries, in place (kWeightUnits units a
  // key), and of grads the pairs along the keys too, 16 units for two keys.
  static DALLE_FAST_INLINE void round_weights(int64_t num_keys, float* weights, float* grads, float* grad_pairs) {
    static_assert(Math::kIsPair);
    float *to_weights = weights, *to_grads = grads;
    for (int64_t k = 0; k < num_keys; k += 2) {
      const bool has_second = k + 1 < num_keys;
      const float *w = weights + k * kTileQueries, *g = grads + k * kTileQueries;
      const Float w0 = I::load(w), w1 = has_second ? I::load(w + kTileQueries) : Float{};
      const Float g0 = I::load(g), g1 = has_second ? I::load(g + kTileQueries) : Float{};
      const Float rounded = Math::template round<I>(g0, g1);
      I::store(to_weights, Math::template round<I>(w0, w1));
      I::store(to_grads, rounded);
      I::store(grad_pairs, Math::template interleave<I>(rounded));
      to_weights += kTileQueries;
      to_grads += kTileQueries;
      grad_pairs += kTileQueries;
    }
  }

  // Units of one key's 16 weights.
  static constexpr int kWeightUnits = Math::kIsPair ? kTileQueries / 2 : kTileQueries;

  // targets[k][d] += sum over units i of weights[k][i] rows[i][d], for kRows keys k and kCount vectors of d.
  template <int kRows, int kCount>
  static DALLE_FAST_INLINE void scatter_block(const float* weights, const float* rows, int64_t row_stride,
                                              float* const (&targets)[kRows]) {
    // A sum of its own for the 16 queries: added to one by one, a key's long sum would be rounded 16 times as often.
    Float block[kRows][kCount];
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int d = 0; d < kCount; ++d) block[k][d] = Float{};
    }
#pragma GCC unroll 2
    for (int i = 0; i < kWeightUnits; ++i) {
      Float row[kCount];
#pragma GCC unroll 4
      for (int d = 0; d < kCount; ++d) row[d] = I::load(rows + d * I::kLanes);
#pragma GCC unroll 4
      for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
        for (int d = 0; d < kCount; ++d) {
          Math::template add_product<I>(block[k][d], weights + k * kWeightUnits + i, row[d]);
        }
      }
      rows += row_stride;
    }
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
#pragma GCC unroll 4
      for (int d = 0; d < kCount; ++d) {
        float* target = targets[k] + d * I::kLanes;
        I::store(target, I::load(target) + block[k][d]);
      }
    }
  }

  template <int kRows>
  static DALLE_FAST_INLINE void scatter_rows(const float* weights, const float* rows, int64_t row_stride,
                                             float* const (&targets)[kRows]) {
    constexpr int kStep = I::kRowVectors * I::kLanes;
    int64_t d = 0;
    for (; d + kStep <= row_stride; d += kStep) {
      float* at[kRows];
      for (int k = 0; k < kRows; ++k) at[k] = targets[k] + d;
      scatter_block<kRows, I::kRowVectors>(weights, rows + d, row_stride, at);
    }
    for (; d < row_stride; d += I::kLanes) {
      float* at[kRows];
      for (int k = 0; k < kRows; ++k) at[k] = targets[k] + d;
      scatter_block<kRows, 1>(weights, rows + d, row_stride, at);
    }
  }

  // The same for any number of keys: key k's target is base + position(k) * row_stride.
  template <class Position>
  static DALLE_FAST_INLINE void scatter(const float* weights, int64_t num_keys, const float* rows, int64_t row_stride,
                                        float* base, Position position) {
    int64_t k = 0;
    for (; k + I::kRows <= num_keys; k += I::kRows) {
      float* targets[I::kRows];
      for (int r = 0; r < I::kRows; ++r) targets[r] = base + position(k + r) * row_stride;
      scatter_rows<I::kRows>(weights + k * kWeightUnits, rows, row_stride, targets);
    }
    for (; k < num_keys; ++k) {
      float* const targets[1] = {base + position(k) * row_stride};
      scatter_rows<1>(weights + k * kWeightUnits, rows, row_stride, targets);
    }
  }
};

}  // namespace dalle_fast
