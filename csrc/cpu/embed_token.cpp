// The states that a step of decoding reads, on the CPU, in one pass instead of a dozen small ops.
//
//   out[row] = (position = 0 ? start : embedding[tokens[row mod samples, position - 1]]) + place[position]
#include <cstring>

#include "../common/checks.h"
#include "attention_tiles.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct AddWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const float* a, const float* b, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
  }
};

void embed_token(const Tensor tokens, const Tensor position, const Tensor embedding, const Tensor start,
                 const Tensor place, Tensor out) {
  if (tokens.dim() != 2 || embedding.dim() != 2 || out.dim() != 2) {
    throw std::runtime_error("tokens, embedding and out must have 2 dimensions");
  }
  const int64_t samples = tokens.size(0), length = tokens.size(1), codes = embedding.size(0), width = embedding.size(1);
  const int64_t rows = out.size(0);
  const auto* token = data_of<const int64_t>(tokens, "tokens", ScalarType::Long, samples * length);
  const int64_t p = *data_of<const int64_t>(position, "position", ScalarType::Long, 1);
  const auto* table = data_of<const float>(embedding, "embedding", ScalarType::Float, codes * width);
  const auto* first = data_of<const float>(start, "start", ScalarType::Float, width);
  const auto* places = data_of<const float>(place, "place", ScalarType::Float, length * width);
  auto* to = data_of<float>(out, "out", ScalarType::Float, rows * width);
  if (p < 0 || p >= length) {
    throw std::runtime_error("position must be in 0.." + std::to_string(length - 1) + ", got " + std::to_string(p));
  }
  if (samples == 0 || rows % samples != 0) {
    throw std::runtime_error("out must have a multiple of the " + std::to_string(samples) + " samples as rows, got " +
                             std::to_string(rows));
  }
  for (int64_t sample = 0; sample < samples; ++sample) {
    const float* state = first;
    if (p > 0) {
      const int64_t code = token[sample * length + p - 1];
      if (code < 0 || code >= codes) {
        throw std::runtime_error("tokens must be in 0.." + std::to_string(codes - 1) + ", got " + std::to_string(code));
      }
      state = table + code * width;
    }
    run_at_cpu_level<AddWorker>(state, places + p * width, to + sample * width, width);
  }
  for (int64_t row = samples; row < rows; row += samples) {
    std::memcpy(to + row * width, to, static_cast<size_t>(samples * width) * sizeof(float));
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("embed_token_cpu", TORCH_BOX(&embed_token)); }

}  // namespace dalle_fast
