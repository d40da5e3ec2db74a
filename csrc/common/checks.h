// Argument checks of the compiled ops: the rule, then the value, by argument name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "torch_stable.h"

namespace dalle_fast {

template <class Range>
std::string tuple_text(const Range& values) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < values.size(); ++i) text << (i == 0 ? "" : ", ") << values[i];
  text << ")";
  return text.str();
}

inline void check_dtype(const torch::stable::Tensor& tensor, const char* name,
                        torch::headeronly::ScalarType dtype) {
  if (tensor.scalar_type() == dtype) return;
  std::ostringstream message;
  message << name << " must have dtype " << torch::headeronly::toString(dtype) << ", got "
          << torch::headeronly::toString(tensor.scalar_type());
  throw std::runtime_error(message.str());
}

inline void check_contiguous(const torch::stable::Tensor& tensor, const char* name) {
  if (tensor.is_contiguous()) return;
  std::ostringstream message;
  message << name << " must be contiguous, got shape " << tuple_text(tensor.sizes()) << " with strides "
          << tuple_text(tensor.strides());
  throw std::runtime_error(message.str());
}

inline void check_length(const torch::stable::Tensor& tensor, const char* name, int64_t length) {
  if (tensor.numel() == length) return;
  throw std::runtime_error(std::string(name) + " must have " + std::to_string(length) + " elements, got " +
                           std::to_string(tensor.numel()));
}

inline void check_shape(const torch::stable::Tensor& tensor, const char* name,
                        const std::vector<int64_t>& shape) {
  bool is_right = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t d = 0; is_right && d < shape.size(); ++d) {
    is_right = tensor.size(static_cast<int64_t>(d)) == shape[d];
  }
  if (is_right) return;
  throw std::runtime_error(std::string(name) + " must have shape " + tuple_text(shape) + ", got " +
                           tuple_text(tensor.sizes()));
}

// The data of a contiguous tensor of this many elements.
template <class T>
T* data_of(const torch::stable::Tensor& tensor, const char* name, torch::headeronly::ScalarType dtype, int64_t length) {
  check_dtype(tensor, name, dtype);
  check_contiguous(tensor, name);
  check_length(tensor, name, length);
  return static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// Laid out alike, and each fills as much memory as it has elements, none of them twice.
inline void check_laid_out_alike(const torch::stable::Tensor& tensor, const char* name,
                                 const torch::stable::Tensor& like, const char* like_name) {
  bool alike = tensor.dim() == like.dim();
  for (int64_t d = 0; alike && d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d);
    alike = size == like.size(d) && (size <= 1 || tensor.stride(d) == like.stride(d));
  }
  const auto layout = [](const torch::stable::Tensor& of) {
    return "shape " + tuple_text(of.sizes()) + " with strides " + tuple_text(of.strides());
  };
  if (!alike) {
    throw std::runtime_error(std::string(name) + " must be laid out as " + like_name + ", " + layout(like) + ", got " +
                             layout(tensor));
  }
  // From the innermost dimension outwards, each steps over what those within it fill.
  int64_t filled = 1;
  for (int64_t turn = 0; turn < tensor.dim(); ++turn) {
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      if (tensor.size(d) > 1 && tensor.stride(d) == filled) filled *= tensor.size(d);
    }
  }
  if (tensor.numel() != 0 && filled != tensor.numel()) {
    throw std::runtime_error(std::string(name) + " must fill its memory without gaps, got " + layout(tensor));
  }
}

}  // namespace dalle_fast
