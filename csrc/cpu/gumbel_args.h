// What both passes of Gumbel-softmax quantisation on the CPU have in common:
//
//   x = logits + g      y = softmax(x / tau)      z = y C      kl = sum_k q_k ln q_k + ln K,  q = softmax(logits)
//   dy = C dz           dx = y (dy - dz . z) / tau + dkl q (ln q - sum q ln q)                dC = y^T dz
//
// Each reads the logits once; 2 K D FLOPs a position forward, 4 backward, and about 100 vector instructions for 16 elements
// of noise and softmax. All arithmetic is float32.
#pragma once

#include <memory>

#include "gumbel_tiles.h"

namespace dalle_fast {

inline constexpr int64_t kGroup = 4;  // tiles that share what is read of the codebook

// What the forward pass leaves of each position, (6, B * P): the maximum of x and 1 / sum exp((x - maximum) / tau); the
// maximum of the logits, 1 / sum exp(logit - maximum), the logarithm of that sum, and sum q ln q. One lse for maximum and
// sum would be rounded to their size, and exp(logit - lse) be off by as much.
enum Stat { kMaximum, kInverse, kLogitMaximum, kLogitInverse, kLogTotal, kNegentropy, kNumStats };

struct GumbelArgs {
  LogitsView logits;
  float inverse_tau;
  PhiloxKeys keys;
  const float* codebook;  // (K, D), rows one after the other
  int64_t dim;
  float* stats;           // (kNumStats, B * P)

  int64_t num_tiles() const { return ceil_div(logits.rows(), kTileQueries); }
  int64_t num_blocks() const { return ceil_div(logits.codes, kBlockCodes); }
};

inline LogitsView logits_view(const torch::stable::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  LogitsView view;
  view.data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  view.type = storage_type(tensor, "logits");
  view.batch = tensor.size(0);
  view.codes = tensor.size(1);
  view.positions = tensor.size(2);
  view.batch_stride = tensor.stride(0) * bytes;
  view.code_stride = tensor.stride(1) * bytes;
  view.position_stride = tensor.stride(2) * bytes;
  return view;
}

inline const float* floats(const torch::stable::Tensor& tensor, const char* name) {
  check_dtype(tensor, name, torch::headeronly::ScalarType::Float);
  check_contiguous(tensor, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

inline float* mutable_floats(const torch::stable::Tensor& tensor, const char* name) { return const_cast<float*>(floats(tensor, name)); }

// Where std::vector would write zeros first, on one thread.
inline std::unique_ptr<float[]> uninitialised_floats(int64_t count) {
  return std::make_unique_for_overwrite<float[]>(static_cast<size_t>(count));
}

inline void fill_args(GumbelArgs& args, const torch::stable::Tensor& logits, const torch::stable::Tensor& seed, double tau, const torch::stable::Tensor& stats) {
  args.logits = logits_view(logits);
  // Neither 0, which times -inf would be NaN, nor infinite.
  args.inverse_tau = static_cast<float>(std::clamp(1.0 / tau, 2e-38, 3e38));
  check_dtype(seed, "seed", torch::headeronly::ScalarType::Long);
  args.keys = PhiloxKeys(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())));
  args.stats = mutable_floats(stats, "stats");
}

}  // namespace dalle_fast
