// Argument checks of the compiled ops: the rule, then the value, by argument name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

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

}  // namespace dalle_fast
