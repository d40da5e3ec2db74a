// Softmax cross-entropy on the CPU: of rows of logits their losses, and in their place their gradients.
//
//   x_v = logits_v + bias_v      loss = ln sum_v e^(x_v - m) + m - x_t,  m = max_v x_v
//   d loss / d x_v = e^(x_v - m) / sum_u e^(x_u - m) - (v = t)           times the row's factor, if there is one
//
// One thread takes a row at a time, three times in a row: for its maximum (the bias added in place), for the exponentials
// and their sum (in place where gradients are asked for), and to scale them. A row of 8192 logits is 32 KB, so the second
// and third time it comes from the cache that the first left it in. Each row is the work of one thread, in an order that
// depends on its length alone: results are the same bits for any number of threads. All arithmetic is float32.
//
// NaN and infinities come out as of torch.nn.functional.cross_entropy: a NaN or +inf among the logits, or nothing but
// -inf, makes the row NaN.
#include <cmath>

#include "attention_rows.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many logits a thread costs more than it saves.
constexpr int64_t kGrainElements = 16384;

struct CrossEntropyArgs {
  float* logits;          // (rows, classes)
  int64_t classes;
  const float* bias;      // (classes), or null
  const int64_t* target;  // (rows)
  const float* factor;    // (rows), or null: 1
  bool with_grad;
  float* losses;          // (rows)
};

struct CrossEntropyWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const CrossEntropyArgs* args, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* x = args->logits + row * args->classes;
      const float m = args->bias == nullptr ? maximum<kLevel, false>(x, args->bias, args->classes)
                                            : maximum<kLevel, true>(x, args->bias, args->classes);
      const int64_t target = args->target[row];
      const float difference = x[target] - m;
      const float total = args->with_grad ? exponentials<kLevel, true>(x, m, args->classes)
                                          : exponentials<kLevel, false>(x, m, args->classes);
      args->losses[row] = std::log(total) - difference;
      if (!args->with_grad) continue;
      const float factor = args->factor == nullptr ? 1.0f : args->factor[row];
      scale<kLevel>(x, factor / total, args->classes);
      x[target] -= factor;
    }
  }

  // Loads and stores past the last whole vector go one by one, through the same arithmetic in one vector.
  template <CpuLevel kLevel, bool kHasBias>
  static DALLE_FAST_INLINE float maximum(float* x, const float* bias, int64_t count) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    constexpr int kChains = 4;  // of dependent instructions, side by side
    Float maxima[kChains];
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) maxima[c] = I::splat(kMasked);
    int64_t v = 0;
    for (; v + kChains * I::kLanes <= count; v += kChains * I::kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        Float value = I::load(x + v + c * I::kLanes);
        if constexpr (kHasBias) {
          value += I::load(bias + v + c * I::kLanes);
          I::store(x + v + c * I::kLanes, value);
        }
        maxima[c] = I::max(value, maxima[c]);  // in this order a NaN is passed over; the sum will have it
      }
    }
    float most = kMasked;
    for (; v < count; ++v) {
      if constexpr (kHasBias) x[v] += bias[v];
      most = x[v] > most ? x[v] : most;
    }
    const Float both = I::max(I::max(maxima[0], maxima[1]), I::max(maxima[2], maxima[3]));
    for (int i = 0; i < I::kLanes; ++i) most = both[i] > most ? both[i] : most;
    return most;
  }

  // The sum of e^(x - m), and with kStore the exponentials in place of x.
  template <CpuLevel kLevel, bool kStore>
  static DALLE_FAST_INLINE float exponentials(float* x, float m, int64_t count) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    constexpr int kChains = 4;
    Float totals[kChains] = {};
    int64_t v = 0;
    for (; v + kChains * I::kLanes <= count; v += kChains * I::kLanes) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const Float power = I::exp(I::load(x + v + c * I::kLanes) - m);
        if constexpr (kStore) I::store(x + v + c * I::kLanes, power);
        totals[c] += power;
      }
    }
    for (; v < count; v += I::kLanes) {
      const auto left = static_cast<int>(std::min<int64_t>(I::kLanes, count - v));
      Float rest = I::splat(kMasked);
      for (int i = 0; i < left; ++i) rest[i] = x[v + i];
      Float power = I::exp(rest - m);
      for (int i = left; i < I::kLanes; ++i) power[i] = 0.0f;  // where m is -inf they are NaN
      if constexpr (kStore) {
        for (int i = 0; i < left; ++i) x[v + i] = power[i];
      }
      totals[0] += power;
    }
    const Float sums = (totals[0] + totals[1]) + (totals[2] + totals[3]);
    float total = 0.0f;
    for (int i = 0; i < I::kLanes; ++i) total += sums[i];
    return total;
  }

  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void scale(float* x, float factor, int64_t count) {
    using I = Isa<kLevel>;
    int64_t v = 0;
    for (; v + I::kLanes <= count; v += I::kLanes) I::store(x + v, I::load(x + v) * factor);
    for (; v < count; ++v) x[v] *= factor;
  }
};

// Writes the positions whose target is not ignore_index, and their targets, in order. Returns how many there are, or
// -1 - p if the target of position p is not in 0..num_classes-1.
int64_t counted_targets(const Tensor target, int64_t num_classes, int64_t ignore_index, Tensor positions,
                        Tensor counted) {
  const int64_t length = target.numel();
  const auto* from = data_of<const int64_t>(target, "target", ScalarType::Long, length);
  auto* to_positions = data_of<int64_t>(positions, "positions", ScalarType::Long, length);
  auto* to_targets = data_of<int64_t>(counted, "counted", ScalarType::Long, length);
  int64_t count = 0;
  for (int64_t position = 0; position < length; ++position) {
    if (from[position] == ignore_index) continue;
    if (from[position] < 0 || from[position] >= num_classes) return -1 - position;
    to_positions[count] = position;
    to_targets[count++] = from[position];
  }
  return count;
}

// Losses of rows of logits; with_grad puts the gradients times the rows' factors in the logits' place, else they are
// left as they are, with the bias added.
void cross_entropy_rows(Tensor logits, const std::optional<Tensor> bias, const Tensor target,
                        const std::optional<Tensor> factor, bool with_grad, Tensor losses) {
  const int64_t rows = logits.size(0), classes = logits.size(1);
  CrossEntropyArgs args{};
  args.logits = data_of<float>(logits, "logits", ScalarType::Float, rows * classes);
  args.classes = classes;
  args.bias = bias.has_value() ? data_of<const float>(*bias, "bias", ScalarType::Float, classes) : nullptr;
  args.target = data_of<const int64_t>(target, "target", ScalarType::Long, rows);
  args.factor = factor.has_value() ? data_of<const float>(*factor, "factor", ScalarType::Float, rows) : nullptr;
  args.with_grad = with_grad;
  args.losses = data_of<float>(losses, "losses", ScalarType::Float, rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (args.target[row] >= 0 && args.target[row] < classes) continue;
    throw std::runtime_error("target must be in 0.." + std::to_string(classes - 1) + ", got " +
                             std::to_string(args.target[row]));
  }
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, classes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<CrossEntropyWorker>(&args, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("counted_targets_cpu", TORCH_BOX(&counted_targets));
  m.impl("cross_entropy_rows_cpu", TORCH_BOX(&cross_entropy_rows));
}

}  // namespace dalle_fast
