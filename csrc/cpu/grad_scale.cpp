// Gradient scaling of residual blocks on the CPU: docs/mixed_precision.md.
//
//   resblock_scale         out = cast(filter(grad * scale))                    4 bytes an element read, 2 or 4 written
//   resblock_unscale_add   out = grad_identity + filter(grad / scale)          8 read, 4 written
//   multi_tensor_unscale   g = filter(g / scale of its block), all tensors     2 or 4 read, as many written
//
// where filter replaces what is not finite by 0. Each is one pass and memory bound: quotients are quotients and no
// products with a reciprocal, for the divisions hide behind the memory. Results have the bits of the reference, the sum
// of squares excepted.
//
// multi_tensor_unscale sees whether a quotient is finite from the gradient itself, which is to be no larger than the
// largest one with a finite quotient. It sums the squares of such gradients in float64 and divides the sums by the
// squared scale. Element i of a chunk goes to sum i mod 16, at every CPU level, and the chunks' sums are added in the
// order of the chunks: the same bits for any number of threads. The squares are exact, so that the relative error is
// below (chunk / 16 + 16 + number of chunks + 4) 2^-53.
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <vector>

#include "../common/checks.h"
#include "../common/tensor_table.h"
#include "storage_lanes.h"
#include "work_queue.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many elements a thread costs more than it saves.
constexpr int64_t kGrainElements = 32768;
constexpr int kSums = 16;

DALLE_FAST_INLINE float filter(float value) { return std::fabs(value) <= FLT_MAX ? value : 0.0f; }

template <class Out>
struct ScaleWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const float* grad, float scale, Out* out, int64_t count) {
    using L = Lanes<kLevel>;
    int64_t i = 0;
    for (; i + L::kCount <= count; i += L::kCount) {
      const auto product = L::load(grad + i) * scale;
      L::store(out + i, L::keep(product, L::at_most(product, FLT_MAX)));
    }
    for (; i < count; ++i) from_float(filter(grad[i] * scale), out[i]);
  }
};

struct UnscaleAddWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const float* grad, float scale, const float* grad_identity, float* out,
                                    int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = grad_identity[i] + filter(grad[i] / scale);
  }
};

// The largest magnitude that has a finite quotient by `scale`, by bisection: quotients grow with it. -1: none has.
float largest_dividend(float scale) {
  const auto is_finite = [scale](uint32_t bits) { return std::isfinite(float_of_bits(bits) / scale); };
  uint32_t low = 0, high = bits_of_float(FLT_MAX);
  if (!is_finite(low)) return -1.0f;
  if (is_finite(high)) return FLT_MAX;
  while (low < high) {
    const uint32_t middle = low + (high - low + 1) / 2;
    if (is_finite(middle)) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return float_of_bits(low);
}

struct UnscaleArgs {
  TensorTable table;
  const float* scales;
  bool write;
  bool* nonfinite;  // set by several threads
  double* sums;     // one a chunk
};

struct UnscaleWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const UnscaleArgs* args, int64_t index) {
    const TableChunk chunk = find_chunk(args->table, index);
    switch (static_cast<TableDtype>(args->table.common(chunk.row, kDtypeColumn))) {
      case kTableFloat:
        return unscale<kLevel, float>(*args, index, chunk);
      case kTableHalf:
        return unscale<kLevel, Half>(*args, index, chunk);
      case kTableBfloat16:
        return unscale<kLevel, Bfloat16>(*args, index, chunk);
    }
  }

  template <CpuLevel kLevel, class T>
  static DALLE_FAST_INLINE void unscale(const UnscaleArgs& args, int64_t index, const TableChunk& chunk) {
    const int64_t* row = args.table.row(chunk.row);
    auto* grads = reinterpret_cast<T*>(row[kUnscaleGrad]) + chunk.begin;
    const int64_t block = row[kUnscaleBlock];
    const float scale = args.scales[block], largest = largest_dividend(scale);
    const float divisor = largest < 0.0f ? 1.0f : scale;  // of zeros alone
    double sums[kSums];
    const bool finite = args.write ? pass<kLevel, true>(grads, chunk.count, divisor, largest, sums)
                                   : pass<kLevel, false>(grads, chunk.count, divisor, largest, sums);
    double total = 0.0;
    for (const double sum : sums) total += sum;
    args.sums[index] = total / (static_cast<double>(divisor) * divisor);
    if (!finite) __atomic_store_n(args.nonfinite + block, true, __ATOMIC_RELAXED);
  }

  // Whether all quotients are finite.
  template <CpuLevel kLevel, bool kWrite, class T>
  static DALLE_FAST_INLINE bool pass(T* grads, int64_t count, float divisor, float largest, double (&to)[kSums]) {
    using L = Lanes<kLevel>;
    constexpr int kVectors = kSums / L::kCount;
    typename L::HalfDouble sums[2 * kVectors] = {};
    typename L::Int finite = typename L::Int{} - 1;
    const auto take = [&](T* at) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto values = L::load(at + v * L::kCount);
        const auto mask = L::at_most(values, largest);
        const auto kept = L::keep(values, mask);
        finite &= mask;
        typename L::HalfDouble lower, upper;
        L::widen(kept, lower, upper);
        sums[2 * v] += lower * lower;
        sums[2 * v + 1] += upper * upper;
        if constexpr (kWrite) L::store(at + v * L::kCount, kept / divisor);
      }
    };
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) take(grads + i);
    if (i < count) {
      T rest[kSums] = {};
      for (int64_t j = i; j < count; ++j) rest[j - i] = grads[j];
      take(rest);
      if constexpr (kWrite) {
        for (int64_t j = i; j < count; ++j) grads[j] = rest[j - i];
      }
    }
    // Out through copies: what is indexed, or has its address taken, would lie in memory all through the loop.
#pragma GCC unroll 8
    for (int h = 0; h < 2 * kVectors; ++h) {
      const auto copy = sums[h];
      std::memcpy(to + h * (L::kCount / 2), &copy, sizeof(copy));
    }
    int32_t lanes[L::kCount];
    const auto copy = finite;
    std::memcpy(lanes, &copy, sizeof(lanes));
    return std::all_of(lanes, lanes + L::kCount, [](int32_t lane) { return lane != 0; });
  }
};

float scale_of(const Tensor& scale) { return *data_of<const float>(scale, "scale", ScalarType::Float, 1); }

template <class Out>
void scale_to(const Tensor& grad, float scale, const Tensor& out) {
  const auto* from = static_cast<const float*>(grad.const_data_ptr());
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, grad.numel(), kGrainElements, [=](int64_t begin, int64_t end) {
    run_at_cpu_level<ScaleWorker<Out>>(from + begin, scale, to + begin, end - begin);
  });
}

void resblock_scale(const Tensor grad, const Tensor scale, Tensor out) {
  check_dtype(grad, "grad", ScalarType::Float);
  check_laid_out_alike(out, "out", grad, "grad");
  const float factor = scale_of(scale);
  switch (storage_type(out, "out")) {
    case StorageType::kFloat:
      return scale_to<float>(grad, factor, out);
    case StorageType::kHalf:
      return scale_to<Half>(grad, factor, out);
    case StorageType::kBfloat16:
      return scale_to<Bfloat16>(grad, factor, out);
  }
}

void resblock_unscale_add(const Tensor grad, const Tensor scale, const Tensor grad_identity, Tensor out) {
  check_dtype(grad, "grad", ScalarType::Float);
  check_dtype(grad_identity, "grad_identity", ScalarType::Float);
  check_dtype(out, "out", ScalarType::Float);
  check_laid_out_alike(grad_identity, "grad_identity", grad, "grad");
  check_laid_out_alike(out, "out", grad, "grad");
  const float divisor = scale_of(scale);
  const auto* from = static_cast<const float*>(grad.const_data_ptr());
  const auto* identity = static_cast<const float*>(grad_identity.const_data_ptr());
  auto* to = static_cast<float*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, grad.numel(), kGrainElements, [=](int64_t begin, int64_t end) {
    run_at_cpu_level<UnscaleAddWorker>(from + begin, divisor, identity + begin, to + begin, end - begin);
  });
}

void multi_tensor_unscale(const Tensor table, int64_t num_chunks, int64_t chunk, const Tensor scales, bool write,
                          Tensor nonfinite, Tensor sum_of_squares) {
  const int64_t num_blocks = scales.numel();
  const TensorTable rows = tensor_table(table, kNumUnscaleColumns, num_chunks, chunk);
  std::vector<double> sums(num_chunks);
  const UnscaleArgs args{.table = rows,
                         .scales = data_of<const float>(scales, "scales", ScalarType::Float, num_blocks),
                         .write = write,
                         .nonfinite = data_of<bool>(nonfinite, "nonfinite", ScalarType::Bool, num_blocks),
                         .sums = sums.data()};
  auto* total = data_of<double>(sum_of_squares, "sum_of_squares", ScalarType::Double, 1);
  int64_t elements = 0;
  for (int64_t row = 0; row < rows.num_rows; ++row) elements += rows.common(row, kNumelColumn);
  const auto work = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) run_at_cpu_level<UnscaleWorker>(&args, index);
  };
  work_off(num_chunks, work, ceil_div(elements, kGrainElements));
  for (const double sum : sums) *total += sum;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("resblock_scale", TORCH_BOX(&resblock_scale));
  m.impl("resblock_unscale_add", TORCH_BOX(&resblock_unscale_add));
  m.impl("multi_tensor_unscale", TORCH_BOX(&multi_tensor_unscale));
}

}  // namespace dalle_fast
