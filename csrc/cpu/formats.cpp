// encode and decode of the 16-bit storage formats of common/formats.h, on the CPU.
//
// One pass: 4 bytes read and 2 written per element (encode), or the reverse (decode), so memory bound.
// Threads are torch's own, hence torch.set_num_threads holds here too.
#include "../common/formats.h"

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/torch_stable.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a thread costs more than it saves.
constexpr int64_t kGrainSize = 32768;

template <class Format>
DALLE_FAST_INLINE void encode_range(const float* __restrict__ values, uint16_t* __restrict__ words,
                                    int64_t count) {
  for (int64_t i = 0; i < count; ++i) words[i] = Format::encode(values[i]);
}

template <class Format>
DALLE_FAST_INLINE void decode_range(const uint16_t* __restrict__ words, float* __restrict__ values,
                                    int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = Format::decode(words[i]);
}

template <class Format>
Tensor encode(const Tensor& values) {
  check_dtype(values, "values", ScalarType::Float);
  check_contiguous(values, "values");
  Tensor words = torch::stable::new_empty(values, values.sizes(), ScalarType::Short);
  const int64_t count = values.numel();
  if (count == 0) return words;
  const auto* source = static_cast<const float*>(values.const_data_ptr());
  auto* target = static_cast<uint16_t*>(words.mutable_data_ptr());
  torch::stable::parallel_for(0, count, kGrainSize, [=](int64_t begin, int64_t end) {
    run_at_cpu_level<encode_range<Format>>(source + begin, target + begin, end - begin);
  });
  return words;
}

template <class Format>
Tensor decode(const Tensor& words) {
  check_dtype(words, "words", ScalarType::Short);
  check_contiguous(words, "words");
  Tensor values = torch::stable::new_empty(words, words.sizes(), ScalarType::Float);
  const int64_t count = words.numel();
  if (count == 0) return values;
  const auto* source = static_cast<const uint16_t*>(words.const_data_ptr());
  auto* target = static_cast<float*>(values.mutable_data_ptr());
  torch::stable::parallel_for(0, count, kGrainSize, [=](int64_t begin, int64_t end) {
    run_at_cpu_level<decode_range<Format>>(source + begin, target + begin, end - begin);
  });
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("encode_169", TORCH_BOX(&encode<Format169>));
  m.impl("decode_169", TORCH_BOX(&decode<Format169>));
  m.impl("encode_0610", TORCH_BOX(&encode<Format0610>));
  m.impl("decode_0610", TORCH_BOX(&decode<Format0610>));
}

}  // namespace dalle_fast
