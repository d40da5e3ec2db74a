// The states that a step of decoding reads, on the CPU, in one pass instead of a dozen small ops.
//
//   out[row] = (position = 0 ? start : embedding[tokens[row mod samples, position - 1]]) + place[position]
#include <cstring>

#include "../common/checks.h"
#include "attention_tiles.h"
#include "decode_parts.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kItemElements = 16384;  // of the table

struct AddWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const float* a, const float* b, float* out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
  }
};

Part part_of(const Tensor& tokens, const Tensor& position, const Tensor& embedding, const Tensor& start,
             const Tensor& place, Tensor& out) {
  if (tokens.dim() != 2 || embedding.dim() != 2 || out.dim() != 2) {
    throw std::runtime_error("tokens, embedding and out must have 2 dimensions");
  }
  EmbedPart part{};
  part.samples = tokens.size(0);
  part.length = tokens.size(1);
  part.codes = embedding.size(0);
  part.width = embedding.size(1);
  part.rows = out.size(0);
  part.tokens = data_of<const int64_t>(tokens, "tokens", ScalarType::Long, part.samples * part.length);
  part.position = data_of<const int64_t>(position, "position", ScalarType::Long, 1);
  part.embedding = data_of<const float>(embedding, "embedding", ScalarType::Float, part.codes * part.width);
  part.start = data_of<const float>(start, "start", ScalarType::Float, part.width);
  part.place = data_of<const float>(place, "place", ScalarType::Float, part.length * part.width);
  part.out = data_of<float>(out, "out", ScalarType::Float, part.rows * part.width);
  if (part.samples == 0 || part.rows % part.samples != 0) {
    throw std::runtime_error("out must have a multiple of the " + std::to_string(part.samples) +
                             " samples as rows, got " + std::to_string(part.rows));
  }
  return part;
}

void embed_token(const Tensor tokens, const Tensor position, const Tensor embedding, const Tensor start,
                 const Tensor place, Tensor out) {
  const Part part = part_of(tokens, position, embedding, start, place, out);
  run_parts({&part, 1});
}

Tensor embed_token_plan(const Tensor tokens, const Tensor position, const Tensor embedding, const Tensor start,
                        const Tensor place, Tensor out) {
  const Part part = part_of(tokens, position, embedding, start, place, out);
  return plan_of({&part, 1}, out);
}

}  // namespace

int64_t EmbedPart::begin(std::vector<int32_t>&) const {
  if (*position < 0 || *position >= length) {
    throw std::runtime_error("position must be in 0.." + std::to_string(length - 1) + ", got " +
                             std::to_string(*position));
  }
  for (int64_t sample = 0; *position > 0 && sample < samples; ++sample) {
    const int64_t code = tokens[sample * length + *position - 1];
    if (code >= 0 && code < codes) continue;
    throw std::runtime_error("tokens must be in 0.." + std::to_string(codes - 1) + ", got " + std::to_string(code));
  }
  return rows * width;
}

Division EmbedPart::divide(int64_t) {
  samples_an_item = std::max<int64_t>(1, kItemElements / std::max<int64_t>(width, 1));
  return {ceil_div(samples, samples_an_item), 0, 0};
}

void EmbedPart::run(int64_t item, PartMemory) const {
  const int64_t first = item * samples_an_item, end = std::min(first + samples_an_item, samples);
  for (int64_t sample = first; sample < end; ++sample) {
    const float* state = *position == 0 ? start : embedding + tokens[sample * length + *position - 1] * width;
    float* to = out + sample * width;
    run_at_cpu_level<AddWorker>(state, place + *position * width, to, width);
    for (int64_t row = samples; row < rows; row += samples) {
      std::memcpy(to + row * width, to, static_cast<size_t>(width) * sizeof(float));
    }
  }
}

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("embed_token_cpu", TORCH_BOX(&embed_token));
  m.impl("embed_token_plan_cpu", TORCH_BOX(&embed_token_plan));
}

}  // namespace dalle_fast
