// A linear layer, and what surrounds it in a residual block, for the few rows of a decoding step, on the CPU.
//
//   out = residual + act(W LayerNorm(x) + b)
//
// Weights are read once, in place, in the order they lie in memory: with few rows of x the time is that of reading them,
// and two or four rows of weights read side by side take twice as long. Each pair of a weight row and an x row has a
// vector of partial sums along K, and the lanes of as many of these as a vector has lanes are added up side by side
// (lane_sums.h). So a sum's order depends on K alone: a row of x gives the same bits whatever rows are beside it, and
// for any number of threads.
//
// x is laid out in groups of rows, [steps of a vector's length along K][rows of the group][lanes]. With more rows of it a
// tile of weights is copied in the same way, and the loop over pairs reads one vector after the other.
//
// 16-bit weights are widened; all arithmetic is float32. Source of the polynomial for erf: Abramowitz and Stegun,
// Handbook of Mathematical Functions, 7.1.26, absolute error 1.5e-7.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../common/checks.h"
#include "decode_parts.h"
#include "lane_sums.h"
#include "storage_lanes.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkBytes = 65536;       // of weights that a thread takes at a time
constexpr int64_t kItemNormElements = 4096;  // of x
constexpr int kLineBytes = 64;
constexpr int64_t kRowsInPlace = 8;          // of x, up to which weights are read where they lie
constexpr int64_t kColumnsOfFour = 1024;     // of a group of more than two rows that are to stay in the first cache
constexpr int64_t kMostSamples = 4;          // rows of x in a group, at any level
constexpr int64_t kMostLanes = 16;           // and rows of weights in a tile, at any level

int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

template <CpuLevel kLevel>
constexpr int64_t kGroup = Isa<kLevel>::kLanes == 16 ? 4 : 2;

// Rows of x that meet a row of weights at once.
template <CpuLevel kLevel>
int64_t group_rows(int64_t rows, int64_t columns) {
  if (rows == 1) return 1;
  return rows == 2 || (rows <= kRowsInPlace && columns > kColumnsOfFour) ? 2 : kGroup<kLevel>;
}

template <CpuLevel kLevel>
struct LinearTile {
  using I = Isa<kLevel>;
  using L = Lanes<kLevel>;
  using Float = typename I::Float;
  static constexpr int kLanes = I::kLanes;

  template <class Weight>
  static DALLE_FAST_INLINE Float load_part(const Weight* from, int64_t count) {
    Weight part[kLanes] = {};
    std::memcpy(part, from, static_cast<size_t>(count) * sizeof(Weight));
    return L::load(part);
  }

  // sums[s * stride + r] = w[r] . x[s], of w [rows][count], no more rows than lanes, and x [steps][kSamples][lanes].
  template <int kSamples, class Weight>
  static DALLE_FAST_INLINE void products_in_place(const Weight* w, int64_t rows, const float* x, int64_t count,
                                                  float* sums, int64_t stride) {
    Float partial[kSamples][kLanes] = {};
    for (int r = 0; r < rows; ++r) {
      Float row[kSamples];
      row_products<kSamples>(w, x, count, row);
#pragma GCC unroll 4
      for (int s = 0; s < kSamples; ++s) partial[s][r] = row[s];
      w += count;
    }
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) I::store(sums + s * stride, LaneSums<kLevel>::of(partial[s]));
  }

  // Of one row, added up lane by lane.
  template <int kSamples, class Weight>
  static DALLE_FAST_INLINE void row_products(const Weight* w, const float* x, int64_t count, Float (&sums)[kSamples]) {
    const int64_t whole = count / kLanes * kLanes;
    // Unrolled, so that the CPU looks further ahead, over the ends of rows and pages.
    if constexpr (kLanes == 16 && std::is_same_v<Weight, float>) {
      // Zen 4 reads memory a fifth faster in loads of 32 bytes than in those of 64.
      using Half8 = Isa<CpuLevel::kAvx2>;
      typename Half8::Float low[kSamples] = {}, high[kSamples] = {};
#pragma GCC unroll 8
      for (int64_t k = 0; k < whole; k += kLanes) {
        const auto left = Half8::load(w + k), right = Half8::load(w + k + Half8::kLanes);
#pragma GCC unroll 4
        for (int s = 0; s < kSamples; ++s) {
          const float* values = x + k * kSamples + s * kLanes;
          low[s] += left * Half8::load(values);
          high[s] += right * Half8::load(values + Half8::kLanes);
        }
      }
#pragma GCC unroll 4
      for (int s = 0; s < kSamples; ++s) {
        std::memcpy(&sums[s], &low[s], sizeof(low[s]));
        std::memcpy(reinterpret_cast<char*>(&sums[s]) + sizeof(low[s]), &high[s], sizeof(high[s]));
      }
    } else {
#pragma GCC unroll 4
      for (int s = 0; s < kSamples; ++s) sums[s] = Float{};
#pragma GCC unroll 8
      for (int64_t k = 0; k < whole; k += kLanes) {
        const Float weights = L::load(w + k);
#pragma GCC unroll 4
        for (int s = 0; s < kSamples; ++s) sums[s] += weights * I::load(x + k * kSamples + s * kLanes);
      }
    }
    if (whole == count) return;
    const Float weights = load_part(w + whole, count - whole);
#pragma GCC unroll 4
    for (int s = 0; s < kSamples; ++s) sums[s] += weights * I::load(x + whole * kSamples + s * kLanes);
  }

  // sums[s * kRows + r] = w[r] . x[s], of w [steps][kRows][lanes] and x [steps][lanes / kRows][lanes]. kAheadBytes of
  // `ahead` are fetched in each step.
  template <int kRows, int kAheadBytes>
  static DALLE_FAST_INLINE void products(const float* w, const float* x, int64_t steps, const char* ahead, float* sums) {
    constexpr int kSamples = kLanes / kRows;
    Float partial[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) partial[i] = Float{};
    for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 16
      for (int byte = 0; byte < kAheadBytes; byte += kLineBytes) __builtin_prefetch(ahead + byte);
      ahead += kAheadBytes;
      Float weights[kRows];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) weights[r] = I::load(w + r * kLanes);
#pragma GCC unroll 16
      for (int s = 0; s < kSamples; ++s) {
        const Float value = I::load(x + s * kLanes);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) partial[s * kRows + r] += weights[r] * value;
      }
      w += kRows * kLanes;
      x += kSamples * kLanes;
    }
    I::store(sums, LaneSums<kLevel>::of(partial));
  }

  static DALLE_FAST_INLINE Float sigmoid(Float x) {
    const Float power = I::exp(x < Float{} ? x : -x);
    const Float part = 1.0f / (1.0f + power);
    return x < Float{} ? power * part : part;
  }

  static DALLE_FAST_INLINE Float activate(Float x, Activation activation) {
    switch (activation) {
      case Activation::kFastGelu:
        return x * sigmoid(1.702f * x);
      case Activation::kGelu: {
        const Float z = (x < Float{} ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.3275911f * z);
        Float p = t * 1.061405429f - 1.453152027f;
        p = p * t + 1.421413741f;
        p = p * t - 0.284496736f;
        p = p * t + 0.254829592f;
        const Float tail = 0.5f * (p * t * I::exp(-(z * z)));  // of the normal distribution, beyond |x|
        return x * (x < Float{} ? tail : 1.0f - tail);
      }
      case Activation::kGeluTanh:
        // 0.5 (1 + tanh u) is sigmoid(2 u).
        return x * sigmoid(1.59576912f * (x + 0.044715f * (x * x * x)));
      case Activation::kNone:
        break;
    }
    return x;
  }
};

struct LinearWorker {
  // Columns [begin, end) of out. sums is scratch for rows x (end - begin + kMostLanes), tile for a tile's weights.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const LinearPart* args, const float* x, int64_t begin, int64_t end, float* sums,
                                    float* tile) {
    switch (args->weight_type) {
      case StorageType::kFloat:
        return chunk<kLevel, float>(*args, x, begin, end, sums, tile);
      case StorageType::kHalf:
        return chunk<kLevel, Half>(*args, x, begin, end, sums, tile);
      case StorageType::kBfloat16:
        return chunk<kLevel, Bfloat16>(*args, x, begin, end, sums, tile);
    }
  }

  template <CpuLevel kLevel, class Weight>
  static DALLE_FAST_INLINE void chunk(const LinearPart& args, const float* x, int64_t begin, int64_t end, float* sums,
                                      float* tile) {
    const auto* weight = static_cast<const Weight*>(args.weight);
    if (args.rows > kRowsInPlace) {
      tiles<kLevel, Weight, Isa<kLevel>::kLanes / kGroup<kLevel>>(args, x, weight, begin, end, sums, tile);
    } else {
      switch (group_rows<kLevel>(args.rows, args.columns)) {
        case 1:
          in_place<kLevel, Weight, 1>(args, x, weight, begin, end, sums);
          break;
        case 2:
          in_place<kLevel, Weight, 2>(args, x, weight, begin, end, sums);
          break;
        default:
          in_place<kLevel, Weight, kGroup<kLevel>>(args, x, weight, begin, end, sums);
      }
    }
    const int64_t stride = end - begin + kMostLanes;
    for (int64_t row = 0; row < args.rows; ++row) finish<kLevel>(args, row, begin, end, sums + row * stride);
  }

  template <CpuLevel kLevel, class Weight, int kSamples>
  static DALLE_FAST_INLINE void in_place(const LinearPart& args, const float* inputs, const Weight* weight,
                                         int64_t begin, int64_t end, float* sums) {
    using Tile = LinearTile<kLevel>;
    constexpr int kLanes = Tile::kLanes;
    const int64_t columns = args.columns, group = ceil_div(columns, kLanes) * kSamples * kLanes;
    const int64_t stride = end - begin + kMostLanes;
    for (int64_t n = begin; n < end; n += kLanes) {
      const int64_t count = std::min<int64_t>(kLanes, end - n);
      const float* x = inputs;
      for (int64_t row = 0; row < args.rows; row += kSamples) {
        float* to = sums + row * stride + (n - begin);
        Tile::template products_in_place<kSamples>(weight + n * columns, count, x, columns, to, stride);
        x += group;
      }
    }
  }

  template <CpuLevel kLevel, class Weight, int kRows>
  static DALLE_FAST_INLINE void tiles(const LinearPart& args, const float* inputs, const Weight* weight, int64_t begin,
                                      int64_t end, float* sums, float* tile) {
    using Tile = LinearTile<kLevel>;
    using L = Lanes<kLevel>;
    constexpr int kLanes = Tile::kLanes, kSamples = kLanes / kRows;
    const int64_t stride = end - begin + kMostLanes, steps = ceil_div(args.columns, kLanes);
    for (int64_t n = begin; n < end; n += kRows) {
      for (int r = 0; r < kRows; ++r) {
        // The last row again where there are no more.
        const Weight* row = weight + std::min(n + r, end - 1) * args.columns;
        float* to = tile + r * kLanes;
        int64_t k = 0;
        for (; k + kLanes <= args.columns; k += kLanes) L::store(to + k * kRows, L::load(row + k));
        if (k < args.columns) L::store(to + k * kRows, Tile::load_part(row + k, args.columns - k));
      }
      const float* x = inputs;
      for (int64_t row = 0; row < args.rows; row += kSamples) {
        alignas(64) float products[kLanes];
        if (row == 0) {
          // The next tile's weights, which would else wait for the memory while the CPU waits for them.
          const auto* next = reinterpret_cast<const char*>(weight + (n + kRows) * args.columns);
          Tile::template products<kRows, kRows * kLanes * sizeof(Weight)>(tile, x, steps, next, products);
        } else {
          Tile::template products<kRows, 0>(tile, x, steps, nullptr, products);
        }
        x += steps * kSamples * kLanes;
        for (int64_t s = 0; s < std::min<int64_t>(kSamples, args.rows - row); ++s) {
          std::memcpy(sums + (row + s) * stride + (n - begin), products + s * kRows, kRows * sizeof(float));
        }
      }
    }
  }

  // Bias, activation and residual of a row's columns.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void finish(const LinearPart& args, int64_t row, int64_t begin, int64_t end,
                                       const float* sums) {
    using Tile = LinearTile<kLevel>;
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    for (int64_t n = begin; n < end; n += Tile::kLanes) {
      const int64_t count = std::min<int64_t>(Tile::kLanes, end - n);
      const bool whole = count == Tile::kLanes;
      const auto load = [&](const float* from) { return whole ? I::load(from) : Tile::load_part(from, count); };
      Float value = load(sums + (n - begin));
      if (args.bias != nullptr) value += load(args.bias + n);
      value = Tile::activate(value, args.activation);
      if (args.residual != nullptr) value += load(args.residual + row * args.width + n);
      float* to = args.out + row * args.width + n;
      if (whole) {
        I::store(to, value);
      } else {
        float part[Tile::kLanes];
        I::store(part, value);
        std::memcpy(to, part, static_cast<size_t>(count) * sizeof(float));
      }
    }
  }
};

struct NormWorker {
  // Groups begin..end - 1 of group_rows rows, each [steps][samples][lanes]; zeros where x has no column or no row.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const NormPart* args, int64_t begin, int64_t end, float* out) {
    using I = Isa<kLevel>;
    const int64_t columns = args->columns, steps = ceil_div(columns, I::kLanes);
    const int64_t samples = group_rows<kLevel>(args->rows, columns), size = steps * samples * I::kLanes;
    for (int64_t group = begin; group < end; ++group) {
      float* to = out + group * size;
      std::memset(to, 0, static_cast<size_t>(size) * sizeof(float));
      const int64_t first = group * samples;
      for (int64_t s = 0; s < std::min(samples, args->rows - first); ++s) {
        normalise<kLevel>(*args, args->x + (first + s) * columns, to + s * I::kLanes, samples * I::kLanes);
      }
    }
  }

  // One row; its vectors go `stride` apart.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void normalise(const NormPart& args, const float* x, float* to, int64_t stride) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    const int64_t columns = args.columns;
    float mean = 0.0f, factor = 1.0f;
    if (args.gain != nullptr) {
      const auto count = static_cast<float>(columns);
      mean = total<kLevel>(columns, [&](int64_t k) { return I::load(x + k); }, [&](int64_t k) { return x[k]; }) / count;
      const float variance = total<kLevel>(
          columns,
          [&](int64_t k) {
            const Float off = I::load(x + k) - mean;
            return off * off;
          },
          [&](int64_t k) { return (x[k] - mean) * (x[k] - mean); }) / count;
      factor = 1.0f / std::sqrt(variance + args.eps);
    }
    int64_t k = 0;
    for (; k + I::kLanes <= columns; k += I::kLanes) {
      Float value = I::load(x + k);
      if (args.gain != nullptr) value = (value - mean) * factor * I::load(args.gain + k) + I::load(args.shift + k);
      I::store(to, value);
      to += stride;
    }
    for (; k < columns; ++k) {
      *to++ = args.gain == nullptr ? x[k] : (x[k] - mean) * factor * args.gain[k] + args.shift[k];
    }
  }

  template <CpuLevel kLevel, class Vector, class Element>
  static DALLE_FAST_INLINE float total(int64_t count, Vector vector, Element element) {
    using I = Isa<kLevel>;
    typename I::Float sums{};
    int64_t k = 0;
    for (; k + I::kLanes <= count; k += I::kLanes) sums += vector(k);
    float sum = 0.0f;
    for (int i = 0; i < I::kLanes; ++i) sum += sums[i];
    for (; k < count; ++k) sum += element(k);
    return sum;
  }
};

struct CountGroups {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const NormPart* part, int64_t* groups) {
    *groups = ceil_div(part->rows, group_rows<kLevel>(part->rows, part->columns));
  }
};

int64_t groups_of(const NormPart* part) {
  int64_t groups = 0;
  run_at_cpu_level<CountGroups>(part, &groups);
  return groups;
}

std::vector<Part> parts_of(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& gain, const std::optional<Tensor>& shift, double eps,
                           int64_t activation, const std::optional<Tensor>& residual, Tensor& out) {
  if (x.dim() != 2 || weight.dim() != 2) throw std::runtime_error("x and weight must have 2 dimensions");
  const int64_t rows = x.size(0), columns = weight.size(1), width = weight.size(0);
  if (gain.has_value() != shift.has_value()) throw std::runtime_error("gain and shift must be given together");
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kGeluTanh)) {
    throw std::runtime_error("activation must be in 0..3, got " + std::to_string(activation));
  }
  check_contiguous(weight, "weight");
  LinearPart products{};
  products.rows = rows;
  products.columns = columns;
  products.width = width;
  products.weight = weight.const_data_ptr();
  products.weight_type = storage_type(weight, "weight");
  products.activation = static_cast<Activation>(activation);
  products.out = data_of<float>(out, "out", ScalarType::Float, rows * width);
  const auto floats = [](const std::optional<Tensor>& tensor, const char* name, int64_t length) -> const float* {
    return tensor.has_value() ? data_of<const float>(*tensor, name, ScalarType::Float, length) : nullptr;
  };
  products.bias = floats(bias, "bias", width);
  products.residual = floats(residual, "residual", rows * width);
  NormPart norm{};
  norm.x = data_of<const float>(x, "x", ScalarType::Float, rows * columns);
  norm.rows = rows;
  norm.columns = columns;
  norm.gain = floats(gain, "gain", columns);
  norm.shift = floats(shift, "shift", columns);
  norm.eps = static_cast<float>(eps);
  if (rows == 0 || width == 0) return {};
  if (rows > 1 || columns % kMostLanes != 0 || norm.gain != nullptr) return {norm, products};
  products.x = norm.x;  // is laid out as it should be already
  return {products};
}

void decode_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                   const std::optional<Tensor> gain, const std::optional<Tensor> shift, double eps, int64_t activation,
                   const std::optional<Tensor> residual, Tensor out) {
  run_parts(parts_of(x, weight, bias, gain, shift, eps, activation, residual, out));
}

Tensor decode_linear_plan(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                          const std::optional<Tensor> gain, const std::optional<Tensor> shift, double eps,
                          int64_t activation, const std::optional<Tensor> residual, Tensor out) {
  return plan_of(parts_of(x, weight, bias, gain, shift, eps, activation, residual, out), x);
}

}  // namespace

Division NormPart::divide(int64_t) {
  const int64_t groups = groups_of(this);
  const int64_t group_columns = std::max<int64_t>(1, columns * ceil_div(rows, groups));
  groups_an_item = std::max<int64_t>(1, kItemNormElements / group_columns);
  const int64_t elements = round_up(rows, kMostSamples) * round_up(std::max<int64_t>(columns, 1), kMostLanes);
  return {ceil_div(groups, groups_an_item), elements, 0};
}

void NormPart::run(int64_t item, PartMemory memory) const {
  const int64_t first = item * groups_an_item, end = std::min(first + groups_an_item, groups_of(this));
  run_at_cpu_level<NormWorker>(this, first, end, memory.shared);
}

Division LinearPart::divide(int64_t threads) {
  const auto row_bytes = std::max<int64_t>(1, columns * storage_bytes(weight_type));
  chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kMostLanes) * kMostLanes;
  // Each thread reads most of its share in one go, and whoever is first takes of the rest.
  share = rows > kRowsInPlace ? 0 : width * 4 / 5 / threads / kMostLanes * kMostLanes;
  shares = share > chunk ? threads : 0;
  const int64_t most_columns = std::min(shares > 0 ? share : chunk, width);
  const int64_t sums = round_up(rows, kMostSamples) * (most_columns + kMostLanes);
  const int64_t own = sums + kMostLanes * round_up(columns, kMostLanes);
  return {shares + ceil_div(width - shares * share, chunk), 0, own};
}

void LinearPart::run(int64_t item, PartMemory memory) const {
  const int64_t begin = item < shares ? item * share : shares * share + (item - shares) * chunk;
  const int64_t end = item < shares ? begin + share : std::min(begin + chunk, width);
  float* tile = memory.own + round_up(rows, kMostSamples) * (end - begin + kMostLanes);
  const float* inputs = x != nullptr ? x : memory.shared;
  run_at_cpu_level<LinearWorker>(this, inputs, begin, end, memory.own, tile);
}

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("decode_linear_cpu", TORCH_BOX(&decode_linear));
  m.impl("decode_linear_plan_cpu", TORCH_BOX(&decode_linear_plan));
}

}  // namespace dalle_fast
