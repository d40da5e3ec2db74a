// encode and decode of the 16-bit storage formats of common/formats.h, on CUDA devices.
//
// One pass: 4 bytes read and 2 written per element (encode), or the reverse (decode), so memory bound. A
// thread handles eight elements at a time, 16 bytes of words and twice 16 bytes of values, where both
// pointers are 16-byte aligned; the rest, and everything in a view that starts off that grid, goes element by
// element.
#include "../common/formats.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "../common/checks.h"
#include "../common/torch_stable.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 65535;  // a grid-stride loop covers what lies beyond
constexpr int64_t kVectorLen = 8;

struct alignas(16) Values4 {
  float value[4];
};

struct alignas(16) Words8 {
  uint16_t word[8];
};

struct Params {
  int64_t num_elements;
  int64_t num_vectors;  // of kVectorLen elements each, from the start; 0 where a pointer is not aligned
};

template <class Format>
__global__ void encode_kernel(const float* __restrict__ values, uint16_t* __restrict__ words, Params params) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto* values4 = reinterpret_cast<const Values4*>(values);
  auto* words8 = reinterpret_cast<Words8*>(words);
  for (int64_t i = start; i < params.num_vectors; i += step) {
    const Values4 low = values4[2 * i];
    const Values4 high = values4[2 * i + 1];
    Words8 packed;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      packed.word[j] = Format::encode(low.value[j]);
      packed.word[4 + j] = Format::encode(high.value[j]);
    }
    words8[i] = packed;
  }
  for (int64_t i = params.num_vectors * kVectorLen + start; i < params.num_elements; i += step) {
    words[i] = Format::encode(values[i]);
  }
}

template <class Format>
__global__ void decode_kernel(const uint16_t* __restrict__ words, float* __restrict__ values, Params params) {
  const int64_t start = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const auto* words8 = reinterpret_cast<const Words8*>(words);
  auto* values4 = reinterpret_cast<Values4*>(values);
  for (int64_t i = start; i < params.num_vectors; i += step) {
    const Words8 packed = words8[i];
    Values4 low;
    Values4 high;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      low.value[j] = Format::decode(packed.word[j]);
      high.value[j] = Format::decode(packed.word[4 + j]);
    }
    values4[2 * i] = low;
    values4[2 * i + 1] = high;
  }
  for (int64_t i = params.num_vectors * kVectorLen + start; i < params.num_elements; i += step) {
    values[i] = Format::decode(words[i]);
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % alignof(Words8) == 0; }

// Runs the kernel over all elements of source on its device's current stream.
template <class Source, class Target>
void launch(void (*kernel)(const Source*, Target*, Params), const Tensor& source, const Tensor& target) {
  const int64_t count = source.numel();
  if (count == 0) return;
  const auto* source_ptr = static_cast<const Source*>(source.const_data_ptr());
  auto* target_ptr = static_cast<Target*>(target.mutable_data_ptr());
  const bool aligned = is_aligned(source_ptr) && is_aligned(target_ptr);
  const Params params{.num_elements = count, .num_vectors = aligned ? count / kVectorLen : 0};
  const int64_t work_items = aligned ? params.num_vectors + count % kVectorLen : count;
  const int64_t blocks = std::min((work_items + kThreads - 1) / kThreads, kMaxBlocks);

  const torch::stable::accelerator::DeviceGuard guard(source.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(source.get_device_index(), &stream));
  kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      source_ptr, target_ptr, params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Format>
Tensor encode(const Tensor& values) {
  check_dtype(values, "values", ScalarType::Float);
  check_contiguous(values, "values");
  Tensor words = torch::stable::new_empty(values, values.sizes(), ScalarType::Short);
  launch(encode_kernel<Format>, values, words);
  return words;
}

template <class Format>
Tensor decode(const Tensor& words) {
  check_dtype(words, "words", ScalarType::Short);
  check_contiguous(words, "words");
  Tensor values = torch::stable::new_empty(words, words.sizes(), ScalarType::Float);
  launch(decode_kernel<Format>, words, values);
  return values;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CUDA, m) {
  m.impl("encode_169", TORCH_BOX(&encode<Format169>));
  m.impl("decode_169", TORCH_BOX(&decode<Format169>));
  m.impl("encode_0610", TORCH_BOX(&encode<Format0610>));
  m.impl("decode_0610", TORCH_BOX(&decode<Format0610>));
}

}  // namespace dalle_fast
