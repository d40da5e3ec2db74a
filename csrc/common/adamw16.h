// The AdamW update of one element with 16-bit moments, and how a 16-bit parameter is rounded: the same code for every
// instruction set of the CPU and for CUDA, and the same bits. dalle_fast/reference/optim.py says it in PyTorch.
//
//   m = fma(b1, m, ((1 - b1) factor) g)          factor = min(1, grad_clip / (|all gradients| + 1e-6)) / scale
//   r = (sqrt(1 - b2) factor) g                  v = min(fma(r, r, b2 v), variance_clip)
//   p = fma(p, 1 - lr weight_decay, -m / fma(sqrt(v), 1 / (size sqrt(1 - b2^t)), eps / size))
//
// with size = lr / (1 - b1^t), and 0 and infinity in place of the last two coefficients where it is below 1e-30, since
// float32 may not hold its inverse: nothing moves.
//
// Coefficients are computed in float64 and rounded to float32, in which all else is computed, each operation rounded as
// IEEE 754 has it and none fused that is not written as fma. A NaN is stored as one and the same word, whatever its
// sign and payload.
//
// `N` says what is computed with: OneElement, or a vector of the CPU's with the same functions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats.h"
#include "macros.h"

namespace dalle_fast {

struct OneElement : OneNumber {
  using OneNumber::least;
#if defined(__CUDA_ARCH__)
  static DALLE_FAST_INLINE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
  static DALLE_FAST_INLINE float sqrt(float x) { return __fsqrt_rn(x); }
  static DALLE_FAST_INLINE float divide(float a, float b) { return __fdiv_rn(a, b); }
#else
  static DALLE_FAST_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static DALLE_FAST_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
  static DALLE_FAST_INLINE float divide(float a, float b) { return a / b; }
#endif
  // a b - c
  static DALLE_FAST_INLINE float fms(float a, float b, float c) { return fma(a, b, -c); }
  // x where it is NaN.
  static DALLE_FAST_INLINE float least(float x, float limit) { return x > limit ? limit : x; }
  // Integers below 2^31.
  static DALLE_FAST_INLINE float from_integer(uint32_t x) { return static_cast<float>(static_cast<int32_t>(x)); }
  static DALLE_FAST_INLINE uint32_t to_integer(float x) { return static_cast<uint32_t>(static_cast<int32_t>(x)); }
};

// What the parameters of one group share: a row of the table `hyper`.
struct UpdateRule {
  double lr, beta1, beta2, eps, weight_decay, variance_clip;
};

namespace detail {

// The product, rounded: never fused with what is done to it.
DALLE_FAST_INLINE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  volatile double rounded = a * b;
  return rounded;
#endif
}

// By products alone, so that the host and a GPU, whose pow differ, agree.
DALLE_FAST_INLINE double power(double base, int64_t exponent) {
  double result = 1.0;
  for (; exponent > 0; exponent >>= 1) {
    if (exponent & 1) result = product(result, base);
    base = product(base, base);
  }
  return result;
}

}  // namespace detail

// min(1, grad_clip / (norm + 1e-6)); 1 where the quotient is NaN.
DALLE_FAST_INLINE double clip_of(double grad_clip, double sum_of_squares) {
  const double quotient = grad_clip / (::sqrt(sum_of_squares) + 1e-6);
  return quotient < 1.0 ? quotient : 1.0;
}

// What the elements of one parameter share at its update `step`, 1 for the first.
struct AdamCoefficients {
  float beta1, beta2, variance_clip, decay;
  float new_in_mean, new_in_root;        // of gradients as they come
  float root_in_denominator, denominator;  // the denominator is divided by the step size

  DALLE_FAST_INLINE AdamCoefficients(const UpdateRule& rule, int64_t step, double clip, float scale)
      : beta1(static_cast<float>(rule.beta1)),
        beta2(static_cast<float>(rule.beta2)),
        variance_clip(static_cast<float>(rule.variance_clip)),
        decay(static_cast<float>(1.0 - detail::product(rule.lr, rule.weight_decay))) {
    const double factor = clip / static_cast<double>(scale);
    new_in_mean = static_cast<float>((1.0 - rule.beta1) * factor);
    new_in_root = static_cast<float>(::sqrt(1.0 - rule.beta2) * factor);
    const double size = rule.lr / (1.0 - detail::power(rule.beta1, step));
    const double root = ::sqrt(1.0 - detail::power(rule.beta2, step));
    const bool moves = size >= 1e-30 || size <= -1e-30;
    root_in_denominator = moves ? static_cast<float>(1.0 / (root * size)) : 0.0f;
    denominator = moves ? static_cast<float>(rule.eps / size) : INFINITY;
  }
};

template <class N>
struct Adam {
  using Float = typename N::Float;
  using Unsigned = typename N::Unsigned;

  // One update in place; moments are rounded when they are stored, after they were used.
  static DALLE_FAST_INLINE void update(const AdamCoefficients& c, Float grad, Float& param, Float& mean,
                                       Float& variance) {
    param = moved(c, param, change(c, grad, mean, variance));
  }

  // Its first part: new moments, and what the parameter is to go down by.
  static DALLE_FAST_INLINE Float change(const AdamCoefficients& c, Float grad, Float& mean, Float& variance) {
    mean = N::fma(N::splat(c.beta1), mean, grad * c.new_in_mean);
    const Float root = grad * c.new_in_root;
    variance = N::least(N::fma(root, root, variance * c.beta2), N::splat(c.variance_clip));
    return N::divide(mean, N::fma(N::sqrt(variance), N::splat(c.root_in_denominator), N::splat(c.denominator)));
  }

  // Its second part.
  static DALLE_FAST_INLINE Float moved(const AdamCoefficients& c, Float param, Float change) {
    return N::fms(param, N::splat(c.decay), change);
  }

  static DALLE_FAST_INLINE Float one_nan(Float x) {
    return (N::bits(x) & 0x7fffffffu) > 0x7f800000u ? N::value(Unsigned{} + 0x7fc00000u) : x;
  }
};

// float16 words, in the low half of each number. Normal numbers get their exponent shifted; denormals are an integer
// times 2^-24; infinity and NaN keep all ones.
struct HalfWords {
  template <class N>
  static DALLE_FAST_INLINE typename N::Float widen(typename N::Unsigned word) {
    using Unsigned = typename N::Unsigned;
    const Unsigned magnitude = word & 0x7fffu;
    const Unsigned normal = (magnitude << 13) + (112u << 23);
    const Unsigned denormal = N::bits(N::from_integer(magnitude) * 0x1p-24f);
    const Unsigned finite = magnitude < 0x0400u ? denormal : normal;
    const Unsigned all = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : finite;
    return N::value(all | ((word & 0x8000u) << 16));
  }

  // To nearest, ties to even.
  template <class N>
  static DALLE_FAST_INLINE typename N::Unsigned nearest(typename N::Float x) {
    using Unsigned = typename N::Unsigned;
    const Unsigned bits = N::bits(x), magnitude = bits & 0x7fffffffu;
    const Unsigned normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
    // Adding 0.5 leaves the value, rounded to multiples of 2^-24, in the low bits.
    const Unsigned denormal = N::bits(N::value(magnitude) + 0.5f) - 0x3f000000u;
    Unsigned word = magnitude < 0x38800000u ? denormal : normal;
    word = magnitude >= 0x477ff000u ? Unsigned{} + 0x7c00u : word;  // rounds to 65536 or more
    word |= (bits >> 16) & 0x8000u;
    return magnitude > 0x7f800000u ? Unsigned{} + 0x7e00u : word;
  }

  // To one of the two neighbours: noise, 16 bits, is added below the last bit kept and what lies below is cut off. What
  // passes the largest finite value becomes it.
  template <class N>
  static DALLE_FAST_INLINE typename N::Unsigned stochastic(typename N::Float x, typename N::Unsigned noise) {
    using Unsigned = typename N::Unsigned;
    const Unsigned bits = N::bits(x), magnitude = bits & 0x7fffffffu;
    const Unsigned normal = (magnitude + (noise >> 3) - (112u << 23)) >> 13;
    const typename N::Float units =
        N::fma(N::value(magnitude), typename N::Float{} + 0x1p24f, N::from_integer(noise) * 0x1p-16f);
    Unsigned word = magnitude < 0x38800000u ? N::to_integer(units) : normal;
    word = word < 0x7bffu ? word : Unsigned{} + 0x7bffu;
    word |= (bits >> 16) & 0x8000u;
    return magnitude > 0x7f800000u ? Unsigned{} + 0x7e00u : word;
  }
};

// The same of bfloat16, the upper half of a float32.
struct Bfloat16Words {
  template <class N>
  static DALLE_FAST_INLINE typename N::Float widen(typename N::Unsigned word) {
    return N::value(word << 16);
  }

  template <class N>
  static DALLE_FAST_INLINE typename N::Unsigned nearest(typename N::Float x) {
    using Unsigned = typename N::Unsigned;
    const Unsigned bits = N::bits(x);
    const Unsigned word = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? Unsigned{} + 0x7fc0u : word;
  }

  template <class N>
  static DALLE_FAST_INLINE typename N::Unsigned stochastic(typename N::Float x, typename N::Unsigned noise) {
    using Unsigned = typename N::Unsigned;
    const Unsigned bits = N::bits(x), magnitude = bits & 0x7fffffffu;
    Unsigned word = (magnitude + noise) >> 16;
    word = word < 0x7f7fu ? word : Unsigned{} + 0x7f7fu;
    word |= (bits >> 16) & 0x8000u;
    return magnitude > 0x7f800000u ? Unsigned{} + 0x7fc0u : word;
  }
};

}  // namespace dalle_fast
