// The kernel of adamw16.cu.
//
// Apart from the launch, so that tests/cuda_host runs it on a CPU.
#pragma once

#include <cstdint>
#include <new>

#include "../common/adamw16.h"
#include "../common/philox.h"
#include "../common/tensor_table.h"
#include "chunks.h"
#include "elements.h"

namespace dalle_fast {

enum class Rounding { kStochastic, kNearest, kFromMaster };

struct AdamParams {
  TensorTable table;
  const UpdateRule* rules;
  const int64_t* steps;
  const float* scales;
  const bool* skip;              // or null
  const double* sum_of_squares;  // or null
  double grad_clip;
  uint64_t seed;
  bool stochastic;
};

// Of a chunk's first element, in a tensor whose elements, and those of its moments, have kBytes.
template <int kBytes, bool kHasMaster>
struct Pointers {
  char *param, *grad, *mean, *variance, *master = nullptr;
  bool aligned;

  __device__ __forceinline__ Pointers(const int64_t* row, int64_t begin)
      : param(global_pointer(row[kAdamParam]) + begin * kBytes),
        grad(global_pointer(row[kAdamGrad]) + begin * kBytes),
        mean(global_pointer(row[kAdamMean]) + begin * kBytes),
        variance(global_pointer(row[kAdamVariance]) + begin * kBytes),
        aligned(is_aligned(param) && is_aligned(grad) && is_aligned(mean) && is_aligned(variance)) {
    if constexpr (kHasMaster) {
      master = global_pointer(row[kAdamMaster]) + begin * 4;
      aligned = aligned && is_aligned(master);
    }
  }
};

// Float32, with moments in float32.
__device__ __forceinline__ void update_floats(const int64_t* row, const TableChunk& chunk, const AdamCoefficients& c) {
  using A = Adam<OneElement>;
  const Pointers<4, false> at(row, chunk.begin);
  const auto update = [&]<int kLen>(Share<kLen>, int offset) {
    const int64_t byte = int64_t{offset} * 4;
    const auto grads = load<4, kLen>(at.grad + byte);
    auto params = load<4, kLen>(at.param + byte);
    auto means = load<4, kLen>(at.mean + byte);
    auto variances = load<4, kLen>(at.variance + byte);
#pragma unroll
    for (int i = 0; i < kLen; ++i) {
      float p = OneElement::value(params.word[i]), m = OneElement::value(means.word[i]);
      float v = OneElement::value(variances.word[i]);
      A::update(c, OneElement::value(grads.word[i]), p, m, v);
      params.word[i] = OneElement::bits(A::one_nan(p));
      means.word[i] = OneElement::bits(A::one_nan(m));
      variances.word[i] = OneElement::bits(A::one_nan(v));
    }
    store(params, at.param + byte);
    store(means, at.mean + byte);
    store(variances, at.variance + byte);
  };
  const int count = static_cast<int>(chunk.count);
  visit_elements<4, 1>(count, at.aligned, static_cast<int>(threadIdx.x), kThreads, update);
}

// What an element's noise is made from, its number apart.
struct NoiseKey {
  uint32_t index, step;
  uint64_t seed;
};

// The noise of kLen elements from `first` on, two to a word.
template <int kLen>
__device__ __forceinline__ PhiloxWords noise_of(int64_t first, const NoiseKey& key) {
  const auto group = static_cast<uint64_t>(first / kSharing);
  const PhiloxWords counter{{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), key.index, key.step}};
  PhiloxWords noise = philox<kRoundingNoiseRounds>(counter, key.seed);
  if constexpr (kLen == 1) {
    const int number = static_cast<int>(first % kSharing);
    const uint32_t low = number < 4 ? noise.words[0] : noise.words[2];
    const uint32_t high = number < 4 ? noise.words[1] : noise.words[3];
    noise.words[0] = (number % 4 < 2 ? low : high) >> (16 * (number % 2));
  }
  return noise;
}

// Two elements as a word of 16 bits each.
template <class Words>
__device__ __forceinline__ uint32_t round_stochastically(const float (&pair)[2], uint32_t noise) {
  return Words::template stochastic<OneElement>(pair[0], noise & 0xffffu) |
         Words::template stochastic<OneElement>(pair[1], noise >> 16) << 16;
}

template <class Type, class Words>
__device__ __forceinline__ uint32_t round_to_nearest(const float (&pair)[2]) {
  uint32_t word = Type::narrow(pair[0], pair[1]);
  // The instruction's NaN is another one.
  if (pair[0] != pair[0]) word = (word & 0xffff0000u) | Words::template nearest<OneElement>(pair[0]);
  if (pair[1] != pair[1]) word = (word & 0xffffu) | Words::template nearest<OneElement>(pair[1]) << 16;
  return word;
}

// Type of 16 bits, whose words are rounded as Words has it.
template <class Type, class Words, Rounding kRounding>
__device__ __forceinline__ void update_words(const int64_t* row, const TableChunk& chunk, const AdamCoefficients& c,
                                             const NoiseKey& key) {
  using A = Adam<OneElement>;
  constexpr bool kHasMaster = kRounding == Rounding::kFromMaster;
  const Pointers<2, kHasMaster> at(row, chunk.begin);
  const auto update = [&]<int kLen>(Share<kLen>, int offset) {
    const int64_t byte = int64_t{offset} * 2;
    const auto grads = load<2, kLen>(at.grad + byte);
    auto means = load<2, kLen>(at.mean + byte);
    auto variances = load<2, kLen>(at.variance + byte);
    Pack<2, kLen> params;
    [[maybe_unused]] Pack<4, kLen> masters;
    [[maybe_unused]] PhiloxWords noise;
    if constexpr (kHasMaster) {
      masters = load<4, kLen>(at.master + byte * 2);
    } else {
      params = load<2, kLen>(at.param + byte);
    }
    if constexpr (kRounding == Rounding::kStochastic) noise = noise_of<kLen>(chunk.begin + offset, key);
    // Two at a time, so that few are wide at once.
#pragma unroll
    for (int word = 0; word < (kLen + 1) / 2; ++word) {
      const float2 g = Type::widen(grads.word[word]);
      float2 widened{};
      if constexpr (!kHasMaster) widened = Type::widen(params.word[word]);
      float p[2] = {widened.x, widened.y};
      uint32_t new_means = 0, new_variances = 0;
#pragma unroll
      for (int half = 0; half < (kLen == 1 ? 1 : 2); ++half) {
        const int shift = 16 * half;
        float m = Format169::decode(static_cast<uint16_t>(means.word[word] >> shift));
        float v = Format0610::decode(static_cast<uint16_t>(variances.word[word] >> shift));
        if constexpr (kHasMaster) p[half] = OneElement::value(masters.word[2 * word + half]);
        A::update(c, half == 0 ? g.x : g.y, p[half], m, v);
        new_means |= uint32_t{Format169::encode(m)} << shift;
        new_variances |= uint32_t{Format0610::encode(v)} << shift;
        if constexpr (kHasMaster) masters.word[2 * word + half] = OneElement::bits(A::one_nan(p[half]));
      }
      means.word[word] = new_means;
      variances.word[word] = new_variances;
      if constexpr (kRounding == Rounding::kStochastic) {
        params.word[word] = round_stochastically<Words>(p, noise.words[word]);
      } else {
        params.word[word] = round_to_nearest<Type, Words>(p);
      }
    }
    store(means, at.mean + byte);
    store(variances, at.variance + byte);
    store(params, at.param + byte);
    if constexpr (kHasMaster) store(masters, at.master + byte * 2);
  };
  const int count = static_cast<int>(chunk.count);
  visit_elements<kSharing, 1>(count, at.aligned, static_cast<int>(threadIdx.x), kThreads, update);
}

__global__ __launch_bounds__(kThreads, 3) void adamw16_kernel(AdamParams params) {
  if (params.skip != nullptr && *params.skip) return;
  const TableChunk chunk = find_chunk_by_warp(params.table, blockIdx.x, CountLanes{});
  const int64_t* row = params.table.row(chunk.row);
  const int64_t index = row[kAdamIndex], step = params.steps[index];

  alignas(AdamCoefficients) __shared__ unsigned char storage[sizeof(AdamCoefficients)];
  if (threadIdx.x == 0) {
    const double clip = params.sum_of_squares == nullptr ? 1.0 : clip_of(params.grad_clip, *params.sum_of_squares);
    new (storage) AdamCoefficients(params.rules[row[kAdamGroup]], step, clip, params.scales[row[kAdamBlock]]);
  }
  __syncthreads();
  const AdamCoefficients& c = *reinterpret_cast<const AdamCoefficients*>(storage);

  const int64_t dtype = params.table.common(chunk.row, kDtypeColumn);
  if (dtype == kTableFloat) return update_floats(row, chunk, c);
  const NoiseKey key{static_cast<uint32_t>(index), static_cast<uint32_t>(step), params.seed};
  const auto update = [&]<class Type, class Words>(Type, Words) {
    if (row[kAdamMaster] != 0) {
      update_words<Type, Words, Rounding::kFromMaster>(row, chunk, c, key);
    } else if (params.stochastic) {
      update_words<Type, Words, Rounding::kStochastic>(row, chunk, c, key);
    } else {
      update_words<Type, Words, Rounding::kNearest>(row, chunk, c, key);
    }
  };
  if (dtype == kTableHalf) {
    update(Float16{}, HalfWords{});
  } else {
    update(BFloat16{}, Bfloat16Words{});
  }
}

}  // namespace dalle_fast
