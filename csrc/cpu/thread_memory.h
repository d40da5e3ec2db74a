// Memory that a thread keeps from call to call, so that calls of a few microseconds allocate nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dalle_fast {

// Floats, 64-byte aligned, as many as were ever asked for: to be declared static thread_local.
class ThreadMemory {
 public:
  // Memory for `count` floats; what it held before may be lost.
  float* get(int64_t count) {
    if (count > size_) {
      const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
      size_ = 0;
      memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = static_cast<int64_t>(bytes / sizeof(float));
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

}  // namespace dalle_fast
