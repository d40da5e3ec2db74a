// The AdamW update with 16-bit moments on the CPU, over all tensors of a table in one pass: common/adamw16.h has the
// arithmetic, dalle_fast/ops/tensor_table.py the table.
//
// A 16-bit parameter costs 14 bytes of memory traffic (parameter, gradient and moments read, all but the gradient
// written), half of what AdamW in float32 moves, so that the arithmetic is what takes the time. Its rounding noise
// is made for a block of elements at a time, before they are updated, while the block is fetched from memory.
//
// Elements past a tensor's last whole vector go one by one, through the code that a GPU runs.
#include "../common/adamw16.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/checks.h"
#include "../common/tensor_table.h"
#include "../common/torch_stable.h"
#include "adamw16_lanes.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// How a tensor's elements lie in memory. kIsWide: as floats, its moments too.
struct FloatStorage {
  static constexpr bool kIsWide = true;
};
struct HalfStorage {
  static constexpr bool kIsWide = false;
  using Format = HalfWords;
};
struct Bfloat16Storage {
  static constexpr bool kIsWide = false;
  using Format = Bfloat16Words;
};

enum class Rounding { kStochastic, kNearest, kFromMaster };

struct AdamArgs {
  TensorTable table;
  const UpdateRule* rules;
  const int64_t* steps;
  const float* scales;
  double clip;
  uint64_t seed;
  bool stochastic;
};

// A row of the table.
struct AdamRow {
  static constexpr int64_t kColumns = kNumAdamColumns + static_cast<int64_t>(kNumTableColumns);
  int64_t cells[kColumns];

  template <class T>
  DALLE_FAST_INLINE T* address(AdamColumn column) const {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(cells[column]));
  }
  DALLE_FAST_INLINE int64_t operator[](AdamColumn column) const { return cells[column]; }
  DALLE_FAST_INLINE int64_t dtype() const { return cells[kNumAdamColumns + static_cast<int64_t>(kDtypeColumn)]; }
};

struct AdamWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const AdamArgs* args, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const TableChunk chunk = find_chunk(args->table, index);
      const AdamRow& row = *reinterpret_cast<const AdamRow*>(args->table.row(chunk.row));
      const int64_t first = chunk.begin, last = first + chunk.count;
      switch (row.dtype()) {
        case kTableFloat:
          update<kLevel, FloatStorage, Rounding::kNearest>(*args, row, first, last);
          break;
        case kTableHalf:
          update_words<kLevel, HalfStorage>(*args, row, first, last);
          break;
        default:
          update_words<kLevel, Bfloat16Storage>(*args, row, first, last);
      }
    }
  }

  template <CpuLevel kLevel, class Storage>
  static DALLE_FAST_INLINE void update_words(const AdamArgs& args, const AdamRow& row, int64_t first, int64_t last) {
    if (row[kAdamMaster] != 0) {
      update<kLevel, Storage, Rounding::kFromMaster>(args, row, first, last);
    } else if (args.stochastic) {
      update<kLevel, Storage, Rounding::kStochastic>(args, row, first, last);
    } else {
      update<kLevel, Storage, Rounding::kNearest>(args, row, first, last);
    }
  }

  static constexpr AdamColumn kStreams[] = {kAdamGrad, kAdamMean, kAdamVariance, kAdamParam};

  // Elements first..last-1 of a tensor; `first` is a multiple of kNoiseSharing.
  template <CpuLevel kLevel, class Storage, Rounding kRounding>
  static DALLE_FAST_INLINE void update(const AdamArgs& args, const AdamRow& row, int64_t first, int64_t last) {
    constexpr int64_t kLanes = Isa<kLevel>::kLanes;
    const int64_t step = args.steps[row[kAdamIndex]];
    const AdamCoefficients c(args.rules[row[kAdamGroup]], step, args.clip, args.scales[row[kAdamBlock]]);
    const PhiloxKeys keys(args.seed);
    while (first < last) {
      // Blocks end at multiples of their length, so that the upper half of a block's counters is the same.
      const int64_t end = std::min(last, first / kUpdateBlock * kUpdateBlock + kUpdateBlock);
      const int64_t whole = first + (end - first) / kLanes * kLanes;
      alignas(64) float changes[kUpdateBlock];
      NoiseBlock<kLevel> noise;
      if constexpr (kRounding == Rounding::kStochastic) {
        const uint16_t* streams[4];
        for (int s = 0; s < 4; ++s) streams[s] = row.address<uint16_t>(kStreams[s]) + first;
        noise.fill(static_cast<uint64_t>(first / kNoiseSharing), static_cast<uint32_t>(row[kAdamIndex]),
                   static_cast<uint32_t>(step), keys, streams);
      }
      update_moments<AdamLanes<kLevel>, Storage>(c, row, first, whole, kLanes, changes);
      update_moments<OneLane, Storage>(c, row, whole, end, 1, changes + (whole - first));
      move_params<AdamLanes<kLevel>, Storage, kRounding>(c, row, first, whole, kLanes, changes, noise.bits(0));
      move_params<OneLane, Storage, kRounding>(c, row, whole, end, 1, changes + (whole - first),
                                               noise.bits(whole - first));
      first = end;
    }
  }

  // OneElement with the loads and stores of Lanes.
  struct OneLane : OneElement {
    template <bool kSigned>
    static DALLE_FAST_INLINE uint32_t load_words(const uint16_t* from) {
      return kSigned ? static_cast<uint32_t>(static_cast<int16_t>(*from)) : *from;
    }
    static DALLE_FAST_INLINE void store_words(uint16_t* to, uint32_t word) { *to = static_cast<uint16_t>(word); }
    template <class Format>
    static DALLE_FAST_INLINE float load(const uint16_t* from) {
      return Format::template widen<OneLane>(*from);
    }
    template <class Format>
    static DALLE_FAST_INLINE void store_nearest(uint16_t* to, float x) {
      store_words(to, Format::template nearest<OneLane>(x));
    }
    template <class Format>
    static DALLE_FAST_INLINE void store_stochastic(uint16_t* to, float x, const uint16_t* noise) {
      store_words(to, Format::template stochastic<OneLane>(x, *noise));
    }
  };

  template <class N>
  static DALLE_FAST_INLINE typename N::Float load_floats(const float* from) {
    typename N::Float x;
    std::memcpy(&x, from, sizeof(x));
    return x;
  }
  template <class N>
  static DALLE_FAST_INLINE void put_floats(float* to, typename N::Float x) {
    std::memcpy(to, &x, sizeof(x));
  }
  template <class N>
  static DALLE_FAST_INLINE void store_floats(float* to, typename N::Float x) {
    put_floats<N>(to, Adam<N>::one_nan(x));
  }

  // Elements first..last-1, `lanes` at a time.
  template <class N, class Storage>
  static DALLE_FAST_INLINE void update_moments(const AdamCoefficients& coefficients, const AdamRow& row, int64_t first,
                                               int64_t last, int64_t lanes, float* changes) {
    const AdamCoefficients* c = &coefficients;
    for (int64_t i = first; i < last; i += lanes, changes += lanes) {
      asm("" : "+r"(c));  // to be loaded where they are used: the registers are for other constants
      if constexpr (Storage::kIsWide) {
        auto *mean = row.address<float>(kAdamMean) + i, *variance = row.address<float>(kAdamVariance) + i;
        auto m = load_floats<N>(mean), v = load_floats<N>(variance);
        put_floats<N>(changes, Adam<N>::change(*c, load_floats<N>(row.address<const float>(kAdamGrad) + i), m, v));
        store_floats<N>(mean, m);
        store_floats<N>(variance, v);
      } else {
        using Format = typename Storage::Format;
        auto *mean = row.address<uint16_t>(kAdamMean) + i, *variance = row.address<uint16_t>(kAdamVariance) + i;
        auto m = Format169::decode<N>(N::template load_words<true>(mean));
        auto v = Format0610::decode<N>(N::template load_words<false>(variance));
        put_floats<N>(changes,
                      Adam<N>::change(*c, N::template load<Format>(row.address<const uint16_t>(kAdamGrad) + i), m, v));
        N::store_words(mean, Format169::encode<N>(m));
        N::store_words(variance, Format0610::encode<N>(v));
      }
    }
  }

  template <class N, class Storage, Rounding kRounding>
  static DALLE_FAST_INLINE void move_params(const AdamCoefficients& c, const AdamRow& row, int64_t first, int64_t last,
                                            int64_t lanes, const float* changes, const uint16_t* noise) {
    for (int64_t i = first; i < last; i += lanes, changes += lanes, noise += lanes) {
      const auto change = load_floats<N>(changes);
      if constexpr (Storage::kIsWide) {
        auto* param = row.address<float>(kAdamParam) + i;
        store_floats<N>(param, Adam<N>::moved(c, load_floats<N>(param), change));
      } else {
        using Format = typename Storage::Format;
        auto* param = row.address<uint16_t>(kAdamParam) + i;
        if constexpr (kRounding == Rounding::kFromMaster) {
          auto* master = row.address<float>(kAdamMaster) + i;
          const auto p = Adam<N>::moved(c, load_floats<N>(master), change);
          store_floats<N>(master, p);
          N::template store_nearest<Format>(param, p);
        } else {
          const auto p = Adam<N>::moved(c, N::template load<Format>(param), change);
          if constexpr (kRounding == Rounding::kStochastic) {
            N::template store_stochastic<Format>(param, p, noise);
          } else {
            N::template store_nearest<Format>(param, p);
          }
        }
      }
    }
  }
};

void multi_tensor_adamw16(const Tensor table, int64_t num_chunks, int64_t chunk, const Tensor hyper, const Tensor steps,
                          const Tensor scales, const std::optional<Tensor> skip,
                          const std::optional<Tensor> sum_of_squares, double grad_clip, int64_t seed, bool stochastic) {
  AdamArgs args{};
  args.table = tensor_table(table, kNumAdamColumns, num_chunks, chunk);
  if (chunk % kNoiseSharing != 0) {
    throw std::runtime_error("chunk must be a multiple of 8, got " + std::to_string(chunk));
  }
  constexpr int64_t kHyperColumns = sizeof(UpdateRule) / sizeof(double);
  if (hyper.dim() != 2 || hyper.size(1) != kHyperColumns) {
    throw std::runtime_error("hyper must have two dimensions and " + std::to_string(kHyperColumns) +
                             " columns, got shape " + tuple_text(hyper.sizes()));
  }
  args.rules = reinterpret_cast<const UpdateRule*>(data_of<double>(hyper, "hyper", ScalarType::Double, hyper.numel()));
  args.steps = data_of<int64_t>(steps, "steps", ScalarType::Long, steps.numel());
  args.scales = data_of<float>(scales, "scales", ScalarType::Float, scales.numel());
  args.clip = 1.0;
  if (sum_of_squares.has_value()) {
    args.clip = clip_of(grad_clip, *data_of<double>(*sum_of_squares, "sum_of_squares", ScalarType::Double, 1));
  }
  args.seed = static_cast<uint64_t>(seed);
  args.stochastic = stochastic;
  if (skip.has_value() && *data_of<bool>(*skip, "skip", ScalarType::Bool, 1)) return;
  torch::stable::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<AdamWorker>(&args, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("multi_tensor_adamw16", TORCH_BOX(&multi_tensor_adamw16)); }

}  // namespace dalle_fast
