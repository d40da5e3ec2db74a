// A linear layer, and what surrounds it in a residual block, for the few rows of a decoding step, on the CPU.
//
//   out = residual + act(W LayerNorm(x) + b)
//
// Weights are read once, in place, in the order they lie in memory: with one row the time is that of reading them, and
// two or four rows of weights read side by side take twice as long. A tile is as many pairs of weight row and x row as a
// vector has lanes. Each pair has a vector of partial sums along K, and at the tile's end the vectors' lanes are added up
// side by side (lane_sums.h). So a sum's order depends on K alone: a row of x gives the same bits whatever rows are
// beside it, and for any number of threads.
//
// With several rows of x a tile's weights are first copied to scratch, step by step of a vector's length along K, and so
// is x: [steps][rows of the tile][lanes], of which the loop reads one vector after the other.
//
// 16-bit weights are widened; all arithmetic is float32. Source of the polynomial for erf: Abramowitz and Stegun,
// Handbook of Mathematical Functions, 7.1.26, absolute error 1.5e-7.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "../common/checks.h"
#include "lane_sums.h"
#include "storage_lanes.h"
#include "thread_memory.h"
#include "work_queue.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Activation { kNone, kFastGelu, kGelu, kGeluTanh };

// Bytes of weights that a thread takes at a time.
constexpr int64_t kChunkBytes = 65536;
// Below this many products of two numbers a second thread costs more than it saves.
constexpr int64_t kGrainProducts = 1 << 17;
constexpr int kLineBytes = 64;
constexpr int64_t kGrainNormElements = 32768;  // the same, of elements of x
constexpr int64_t kMostSamples = 4;  // rows of x in a tile, at any level
constexpr int64_t kMostLanes = 16;  // and rows of weights in a tile, at any level

int64_t round_up(int64_t value, int64_t to) { return ceil_div(value, to) * to; }

struct LinearArgs {
  const float* x;  // groups of rows, as LinearTile has them
  int64_t rows, columns;
  const void* weight;  // (width, columns)
  StorageType weight_type;
  int64_t width;
  const float* bias;      // (width), or null
  const float* residual;  // (rows, width), or null; may be out
  Activation activation;
  float* out;  // (rows, width)
};

// How many rows of x a tile takes.
template <CpuLevel kLevel>
constexpr int64_t tile_samples(int64_t rows) {
  return rows <= 2 ? rows : Isa<kLevel>::kLanes / 4 < 2 ? 2 : Isa<kLevel>::kLanes / 4;
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

  // sums[r] = w[r] . x, for rows of `count` one behind the other, of which the first `rows` are there.
  template <class Weight>
  static DALLE_FAST_INLINE void products_of_one(const Weight* w, int64_t rows, const float* x, int64_t count,
                                                float* sums) {
    Float partial[kLanes] = {};
    const int64_t whole = count / kLanes * kLanes;
    for (int r = 0; r < rows; ++r) {
      Float sum{};
      // Unrolled, so that the CPU looks further ahead, over the ends of rows and pages.
#pragma GCC unroll 8
      for (int64_t k = 0; k < whole; k += kLanes) sum += L::load(w + k) * L::load(x + k);
      if (whole < count) sum += load_part(w + whole, count - whole) * L::load(x + whole);
      partial[r] = sum;
      w += count;
    }
    I::store(sums, LaneSums<kLevel>::of(partial));
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
  static DALLE_FAST_INLINE void run(const LinearArgs* args, int64_t begin, int64_t end, float* sums, float* tile) {
    switch (args->weight_type) {
      case StorageType::kFloat:
        return chunk<kLevel, float>(*args, begin, end, sums, tile);
      case StorageType::kHalf:
        return chunk<kLevel, Half>(*args, begin, end, sums, tile);
      case StorageType::kBfloat16:
        return chunk<kLevel, Bfloat16>(*args, begin, end, sums, tile);
    }
  }

  template <CpuLevel kLevel, class Weight>
  static DALLE_FAST_INLINE void chunk(const LinearArgs& args, int64_t begin, int64_t end, float* sums, float* tile) {
    constexpr int kLanes = Isa<kLevel>::kLanes;
    const auto* weight = static_cast<const Weight*>(args.weight);
    if (args.rows == 1) {
      for (int64_t n = begin; n < end; n += kLanes) {
        LinearTile<kLevel>::template products_of_one<Weight>(weight + n * args.columns, std::min<int64_t>(kLanes, end - n),
                                                             args.x, args.columns, sums + (n - begin));
      }
    } else if (args.rows == 2) {
      tiles<kLevel, Weight, kLanes / tile_samples<kLevel>(2)>(args, weight, begin, end, sums, tile);
    } else {
      tiles<kLevel, Weight, kLanes / tile_samples<kLevel>(3)>(args, weight, begin, end, sums, tile);
    }
    const int64_t stride = end - begin + kMostLanes;
    for (int64_t row = 0; row < args.rows; ++row) finish<kLevel>(args, row, begin, end, sums + row * stride);
  }

  template <CpuLevel kLevel, class Weight, int kRows>
  static DALLE_FAST_INLINE void tiles(const LinearArgs& args, const Weight* weight, int64_t begin, int64_t end,
                                      float* sums, float* tile) {
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
      const float* x = args.x;
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
  static DALLE_FAST_INLINE void finish(const LinearArgs& args, int64_t row, int64_t begin, int64_t end,
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

struct NormArgs {
  const float* x;  // (rows, columns)
  int64_t rows, columns;
  const float *gain, *shift;  // (columns), or null: a copy
  float eps;
  float* out;  // groups of tile_samples rows, each [steps][samples][lanes]; zeros where x has no column or no row
};

struct NormWorker {
  // Groups begin..end - 1.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const NormArgs* args, int64_t begin, int64_t end) {
    using I = Isa<kLevel>;
    const int64_t columns = args->columns, steps = ceil_div(columns, I::kLanes);
    const int64_t samples = tile_samples<kLevel>(args->rows), size = steps * samples * I::kLanes;
    for (int64_t group = begin; group < end; ++group) {
      float* to = args->out + group * size;
      std::memset(to, 0, static_cast<size_t>(size) * sizeof(float));
      const int64_t first = group * samples;
      for (int64_t s = 0; s < std::min(samples, args->rows - first); ++s) {
        normalise<kLevel>(*args, args->x + (first + s) * columns, to + s * I::kLanes, samples * I::kLanes);
      }
    }
  }

  // One row; its vectors go `stride` apart.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void normalise(const NormArgs& args, const float* x, float* to, int64_t stride) {
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

struct CountSamples {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(int64_t rows, int64_t* samples) {
    *samples = tile_samples<kLevel>(rows);
  }
};

int64_t samples_at_cpu_level(int64_t rows) {
  int64_t samples = 0;
  run_at_cpu_level<CountSamples>(rows, &samples);
  return samples;
}

void decode_linear(const Tensor x, const Tensor weight, const std::optional<Tensor> bias,
                   const std::optional<Tensor> gain, const std::optional<Tensor> shift, double eps, int64_t activation,
                   const std::optional<Tensor> residual, Tensor out) {
  if (x.dim() != 2 || weight.dim() != 2) throw std::runtime_error("x and weight must have 2 dimensions");
  const int64_t rows = x.size(0), columns = weight.size(1), width = weight.size(0);
  if (gain.has_value() != shift.has_value()) throw std::runtime_error("gain and shift must be given together");
  if (activation < 0 || activation > static_cast<int64_t>(Activation::kGeluTanh)) {
    throw std::runtime_error("activation must be in 0..3, got " + std::to_string(activation));
  }
  check_contiguous(weight, "weight");
  LinearArgs args{};
  args.rows = rows;
  args.columns = columns;
  args.width = width;
  args.weight = weight.const_data_ptr();
  args.weight_type = storage_type(weight, "weight");
  args.activation = static_cast<Activation>(activation);
  args.out = data_of<float>(out, "out", ScalarType::Float, rows * width);
  const auto floats = [](const std::optional<Tensor>& tensor, const char* name, int64_t length) -> const float* {
    return tensor.has_value() ? data_of<const float>(*tensor, name, ScalarType::Float, length) : nullptr;
  };
  args.bias = floats(bias, "bias", width);
  args.residual = floats(residual, "residual", rows * width);
  NormArgs norm{};
  norm.x = data_of<const float>(x, "x", ScalarType::Float, rows * columns);
  norm.columns = columns;
  norm.gain = floats(gain, "gain", columns);
  norm.shift = floats(shift, "shift", columns);
  norm.eps = static_cast<float>(eps);
  if (rows == 0 || width == 0) return;

  static thread_local ThreadMemory inputs;
  norm.out = inputs.get(round_up(rows, kMostSamples) * round_up(std::max<int64_t>(columns, 1), kMostLanes));
  norm.rows = rows;
  const int64_t groups = ceil_div(rows, samples_at_cpu_level(rows));
  const int64_t group_columns = std::max<int64_t>(1, columns * ceil_div(rows, groups));
  const int64_t norm_grain = std::max<int64_t>(1, kGrainNormElements / group_columns);
  if (groups <= norm_grain) {
    run_at_cpu_level<NormWorker>(&norm, int64_t{0}, groups);
  } else {
    torch::stable::parallel_for(0, groups, norm_grain, [&](int64_t begin, int64_t end) {
      run_at_cpu_level<NormWorker>(&norm, begin, end);
    });
  }
  args.x = norm.out;

  const auto row_bytes = std::max<int64_t>(1, columns * static_cast<int64_t>(weight.element_size()));
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kMostLanes) * kMostLanes;
  const bool is_small = rows * width * columns < kGrainProducts;
  // Each thread reads most of its share in one go, and whoever is first takes of the rest.
  const int64_t threads = is_small ? 1 : torch::stable::get_num_threads();
  const int64_t share = rows > 1 ? 0 : width * 4 / 5 / threads / kMostLanes * kMostLanes;
  const int64_t shares = share > chunk ? threads : 0;
  const int64_t chunks = shares + ceil_div(width - shares * share, chunk);
  const auto work = [&](int64_t index, int64_t) {
    const int64_t begin = index < shares ? index * share : shares * share + (index - shares) * chunk;
    const int64_t end = index < shares ? begin + share : std::min(begin + chunk, width);
    static thread_local ThreadMemory memory;
    const int64_t sums = rows * (end - begin + kMostLanes);
    float* scratch = memory.get(sums + kMostLanes * round_up(columns, kMostLanes));
    run_at_cpu_level<LinearWorker>(&args, begin, end, scratch, scratch + sums);
  };
  if (is_small) {
    for (int64_t index = 0; index < chunks; ++index) work(index, index + 1);
  } else {
    work_off(chunks, work);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("decode_linear_cpu", TORCH_BOX(&decode_linear)); }

}  // namespace dalle_fast
