// What every launch needs of torch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../common/checks.h"
#include "../common/tensor_table.h"
#include "../common/torch_stable.h"
#include "chunks.h"

namespace dalle_fast {

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda_device(const torch::stable::Tensor& tensor, const char* name, int32_t device_index) {
  if (tensor.is_cuda() && tensor.get_device_index() == device_index) return;
  throw std::runtime_error(std::string(name) + " must be on CUDA device " + std::to_string(device_index) + ", got " +
                           (tensor.is_cuda() ? "CUDA device " + std::to_string(tensor.get_device_index()) : "a CPU"));
}

// data_of, of a tensor that has to be on this CUDA device.
template <class T>
T* device_data(const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType dtype,
               int64_t length, int32_t device_index) {
  check_cuda_device(tensor, name, device_index);
  return data_of<T>(tensor, name, dtype, length);
}

// A table for a launch of a block a chunk.
inline TensorTable chunk_table(const torch::stable::Tensor& table, int64_t num_op_columns, int64_t num_chunks,
                               int64_t chunk) {
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1, kMaxChunk = int64_t{1} << 29;
  if (num_chunks > kMaxBlocks) {
    throw std::runtime_error("num_chunks must be below 2^31, got " + std::to_string(num_chunks));
  }
  if (chunk % kSharing != 0 || chunk > kMaxChunk) {
    throw std::runtime_error("chunk must be a multiple of 8 up to 2^29, got " + std::to_string(chunk));
  }
  return tensor_table(table, num_op_columns, num_chunks, chunk);
}

}  // namespace dalle_fast
