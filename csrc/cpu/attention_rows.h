// What attention's forward and backward pass on the CPU share: arguments, rows in and out of every storage type,
// gathered keys, scratch memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../common/checks.h"
#include "../common/torch_stable.h"
#include "attention_plan.h"
#include "attention_tiles.h"
#include "storage_types.h"
#include "work_queue.h"

namespace dalle_fast {

typedef uint32_t BfloatPair __attribute__((may_alias));

// A (B, H, S, D) tensor; strides in bytes.
struct RowsView {
  char* data = nullptr;
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, element_stride = 0;

  char* row(int64_t batch, int64_t head, int64_t position) const {
    return data + batch * batch_stride + head * head_stride + position * row_stride;
  }
  const float* floats(int64_t batch, int64_t head, int64_t position) const {
    return reinterpret_cast<const float*>(row(batch, head, position));
  }
};

inline RowsView rows_view(const torch::stable::Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  return {static_cast<char*>(const_cast<void*>(tensor.const_data_ptr())), tensor.stride(0) * bytes,
          tensor.stride(1) * bytes, tensor.stride(2) * bytes, tensor.stride(3) * bytes};
}

struct AttentionSizes {
  StorageType type;
  int64_t batch, heads, key_heads, length, head_dim;
  int64_t text_len;               // of the pattern, cut to the length
  const int64_t* text_lens;       // (batch,), or null
  float scale;
  const AttentionPlan* plan;

  // Text keys that are not hidden from sample `b`.
  int64_t visible_text(int64_t b) const {
    return text_lens == nullptr ? text_len : std::clamp<int64_t>(text_lens[b], 0, text_len);
  }
};

template <class T>
DALLE_FAST_INLINE void widen(const char* row, int64_t count, float* to) {
  const auto* from = reinterpret_cast<const T*>(row);
  for (int64_t d = 0; d < count; ++d) to[d] = to_float(from[d]);
}

// `count` elements from `row` on, as floats.
DALLE_FAST_INLINE void load_row(const char* row, StorageType type, int64_t count, float* to) {
  switch (type) {
    case StorageType::kFloat:
      return widen<float>(row, count, to);
    case StorageType::kHalf:
      return widen<Half>(row, count, to);
    case StorageType::kBfloat16:
      return widen<Bfloat16>(row, count, to);
  }
}

// The same, elements `stride` bytes apart.
DALLE_FAST_INLINE void load_strided_row(const char* row, StorageType type, int64_t stride, int64_t count, float* to) {
  if (stride == (type == StorageType::kFloat ? 4 : 2)) return load_row(row, type, count, to);
  for (int64_t d = 0; d < count; ++d) load_row(row + d * stride, type, 1, to + d);
}

template <class T>
DALLE_FAST_INLINE void narrow(const float* from, int64_t count, float factor, char* row) {
  auto* to = reinterpret_cast<T*>(row);
  for (int64_t d = 0; d < count; ++d) from_float(from[d] * factor, to[d]);
}

DALLE_FAST_INLINE void store_row(const float* from, int64_t count, float factor, StorageType type, char* row) {
  switch (type) {
    case StorageType::kFloat:
      return narrow<float>(from, count, factor, row);
    case StorageType::kHalf:
      return narrow<Half>(from, count, factor, row);
    case StorageType::kBfloat16:
      return narrow<Bfloat16>(from, count, factor, row);
  }
}

// How rows are brought to the loops: each by itself in units along the head (load), or several at once in units along
// the rows (load_packed). As floats, from any storage type:
struct WideRows {
  using Math = Float32Math;
  static constexpr int kRowsAtOnce = 1;

  static int64_t units(int64_t head_dim) { return head_dim; }
  static int64_t packed_rows(int64_t rows) { return rows; }

  static DALLE_FAST_INLINE void load(const char* row, StorageType type, int64_t head_dim, float* to) {
    load_row(row, type, head_dim, to);
  }
  static DALLE_FAST_INLINE void load_packed(const char* const (&rows)[1], StorageType type, int64_t head_dim,
                                            float* to) {
    load_row(rows[0], type, head_dim, to);
  }
};

// As pairs of bfloat16, from bfloat16:
struct PairRows {
  using Math = Bf16PairMath;
  static constexpr int kRowsAtOnce = 2;

  static int64_t units(int64_t head_dim) { return (head_dim + 1) / 2; }
  static int64_t packed_rows(int64_t rows) { return (rows + 1) / 2; }

  static DALLE_FAST_INLINE void load(const char* row, StorageType, int64_t head_dim, float* to) {
    if (head_dim % 2 != 0) to[head_dim / 2] = 0.0f;
    std::memcpy(to, row, static_cast<size_t>(head_dim) * sizeof(Bfloat16));
  }
  // The second row may be null: zeros.
  static DALLE_FAST_INLINE void load_packed(const char* const (&rows)[2], StorageType, int64_t head_dim, float* to) {
    auto* units = reinterpret_cast<BfloatPair*>(to);
    const auto *low = reinterpret_cast<const Bfloat16*>(rows[0]), *high = reinterpret_cast<const Bfloat16*>(rows[1]);
    if (high == nullptr) {
      for (int64_t d = 0; d < head_dim; ++d) units[d] = low[d].bits;
    } else {
      for (int64_t d = 0; d < head_dim; ++d) units[d] = low[d].bits | (static_cast<uint32_t>(high[d].bits) << 16);
    }
  }
};

// Position of the dense key `index` of a tile: the visible text, then the image from its start.
DALLE_FAST_INLINE int64_t dense_position(int64_t index, int64_t visible_text, int64_t text_len) {
  return index < visible_text ? index : text_len + (index - visible_text);
}

// Memory for one thread, 64-byte aligned, given out in pieces; its size is counted by a first pass over the same calls.
class Scratch {
 public:
  float* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 0)) * sizeof(float) + 63) / 64 * 64;
    float* piece = base_ == nullptr ? nullptr : reinterpret_cast<float*>(base_.get() + used_);
    used_ += bytes;
    if (base_ != nullptr && used_ > size_) throw std::logic_error("scratch memory was counted too small");
    return piece;
  }

  void allocate() {
    base_.reset(static_cast<char*>(std::aligned_alloc(64, std::max<size_t>(used_, 64))));
    if (base_ == nullptr) throw std::bad_alloc();
    size_ = used_;
    used_ = 0;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> base_;
  size_t used_ = 0, size_ = 0;
};

// Calls call<Worker<Rows, stride>, highest level>() for the way in which the CPU takes rows of this type and size. A
// worker is what run_at_cpu_level takes; its row stride is known at compile time.
template <template <class Rows, int kStride> class Worker, class Call>
void with_worker(StorageType type, int64_t head_dim, Call call) {
  const auto with_stride = [&]<class Rows, CpuLevel kHighest>() {
    const int64_t units = Rows::units(head_dim);
    if (units <= 32) return call.template operator()<Worker<Rows, 32>, kHighest>();
    if (units <= 64) return call.template operator()<Worker<Rows, 64>, kHighest>();
    if (units <= 128) return call.template operator()<Worker<Rows, 128>, kHighest>();
    return call.template operator()<Worker<Rows, 256>, kHighest>();
  };
#if defined(DALLE_FAST_HAS_AVX512_BF16)
  if (type == StorageType::kBfloat16 && cpu_level() == CpuLevel::kAvx512Bf16) {
    return with_stride.template operator()<PairRows, CpuLevel::kAvx512Bf16>();
  }
#endif
  with_stride.template operator()<WideRows, CpuLevel::kAvx512>();
}

// The arguments that forward and backward have in common, checked.
AttentionSizes attention_sizes(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                               const std::optional<torch::stable::Tensor>& text_lens,
                               const std::vector<int64_t>& pattern, double scale,
                               std::shared_ptr<const AttentionPlan>& plan);

}  // namespace dalle_fast
