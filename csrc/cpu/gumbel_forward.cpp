// Gumbel-softmax quantisation on the CPU, forward; gumbel_args.h has the formulas.
//
// One item of work is kGroup tiles of 16 positions; for each block of 128 codes it makes the noise, follows the
// maximum and the sums of both softmaxes (online, rescaled where a maximum rises) and adds y times the block's rows of
// the codebook to z. Neither noise nor y leaves the L1 cache; the codebook is read once an item.
#include <cmath>

#include "gumbel_args.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct GumbelForwardArgs : GumbelArgs {
  int64_t* indices;  // (B * P)
  float* kl;         // (B * P)
  float* relaxed;    // (B * P, D): z
  const float* packed;  // the codebook, each block of codes in chunks of d
};

struct ForwardWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const GumbelForwardArgs* args, int64_t begin, int64_t end) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    using Int = typename I::Int;
    constexpr int kVectors = I::kVectors;
    // Of one tile, over the blocks of codes.
    struct State {
      Float maximum[kVectors], total[kVectors], lost[kVectors];  // of x / tau; what rounding took from total
      Float logit_maximum[kVectors], logit_total[kVectors], moment[kVectors];  // moment: sum of e^(l - max) (l - max)
      Int best[kVectors];
    };
    // A large weight's sum is rounded at each addition: a gradient would be off by as much as the weights' sum is from 1.
    constexpr int kSums = 4;
    const int64_t dim = args->dim, codes = args->logits.codes;
    Scratch scratch;
    float *logits = nullptr, *weights = nullptr, *rows = nullptr, *sums = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      logits = scratch.take(kBlockCodes * kTileQueries);
      weights = scratch.take(kGroup * kBlockCodes * kTileQueries);
      rows = scratch.take(kBlockCodes * kTileQueries);
      sums = scratch.take(kGroup * dim * kTileQueries);
      if (pass == 0) scratch.allocate();
    }
    State states[kGroup];
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first_tile = group * kGroup, num_tiles = std::min(kGroup, args->num_tiles() - first_tile);
      for (int64_t t = 0; t < num_tiles; ++t) {
        for (int v = 0; v < kVectors; ++v) {
          states[t].maximum[v] = states[t].logit_maximum[v] = I::splat(kMasked);
          states[t].total[v] = states[t].lost[v] = states[t].logit_total[v] = states[t].moment[v] = Float{};
          states[t].best[v] = Int{};
        }
      }
      std::memset(sums, 0, static_cast<size_t>(kGroup * dim * kTileQueries) * sizeof(float));
      for (int64_t block = 0; block < args->num_blocks(); ++block) {
        const int64_t first = block * kBlockCodes, count = std::min(kBlockCodes, codes - first);
        for (int64_t t = 0; t < num_tiles; ++t) {
          const RowsOfTile tile(args->logits, first_tile + t);
          const RowsOfTile next(args->logits, first_tile + (t + 1) % num_tiles);
          const int64_t next_block = t + 1 < num_tiles ? block : (block + 1) % args->num_blocks();
          State& state = states[t];
          float *tile_sums = sums + t * dim * kTileQueries, *tile_weights = weights + t * kBlockCodes * kTileQueries;
          load_block(args->logits, tile, first, count, rows, logits);
          add_noise<kLevel>(args->logits, {tile, block}, {next, next_block}, args->keys, count, logits, tile_weights);
          // Scalars of the vectors of a tile; the loops over codes run inside, so that they stay in registers.
          for (int v = 0; v < kVectors; ++v) {
            const float *l = logits + v * I::kLanes, *x = tile_weights + v * I::kLanes;
            Float maximum = state.maximum[v], logit_maximum = state.logit_maximum[v];
            Int best = state.best[v];
            for (int64_t c = 0; c < count; ++c) {
              const Float value = I::load(x + c * kTileQueries);
              const Int is_more = value > maximum;
              best = is_more ? Int{} + static_cast<int32_t>(first + c) : best;
              maximum = is_more ? value : maximum;
              logit_maximum = I::max(I::load(l + c * kTileQueries), logit_maximum);
            }
            state.best[v] = best;
            // Nothing but -inf so far: all differences are -inf and all weights 0.
            const Float base = maximum == kMasked ? Float{} : maximum;
            const Float factor = I::exp((state.maximum[v] - base) * args->inverse_tau);
            state.total[v] *= factor;
            state.lost[v] *= factor;
            Int has_risen = maximum > state.maximum[v];
            bool any = false;
            for (int i = 0; i < I::kLanes; ++i) any = any || has_risen[i] != 0;
            if (any && block > 0) {
              for (int64_t d = 0; d < dim; ++d) {
                float* at = tile_sums + d * kTileQueries + v * I::kLanes;
                I::store(at, I::load(at) * factor);
              }
            }
            state.maximum[v] = maximum;

            const Float logit_base = logit_maximum == kMasked ? Float{} : logit_maximum;
            // The differences so far grow by as much as the maximum; of sums that are 0, by nothing. Far below, the sums
            // become 0, and an infinite product times that would be NaN.
            Float rise = state.logit_maximum[v] == kMasked ? Float{} : state.logit_maximum[v] - logit_base;
            rise = rise < -100.0f ? I::splat(-100.0f) : rise;
            const Float logit_factor = I::exp(rise);
            Float logit_total = state.logit_total[v] * logit_factor;
            Float moment = (state.moment[v] + state.logit_total[v] * rise) * logit_factor;
            state.logit_maximum[v] = logit_maximum;

            Float totals[kSums] = {}, logit_totals[kSums] = {}, moments[kSums] = {};
            float* y = tile_weights + v * I::kLanes;
            const auto add = [&](int64_t c, int sum) __attribute__((always_inline)) {
              const Float weight = I::exp((I::load(y + c * kTileQueries) - base) * args->inverse_tau);
              I::store(y + c * kTileQueries, weight);
              totals[sum] += weight;
              const Float difference = I::load(l + c * kTileQueries) - logit_base;
              const Float q = I::exp(difference);
              logit_totals[sum] += q;
              moments[sum] += q * (difference < -100.0f ? I::splat(-100.0f) : difference);  // 0 * -inf is NaN
            };
            int64_t c = 0;
            for (; c + kSums <= count; c += kSums) {
#pragma GCC unroll 4
              for (int sum = 0; sum < kSums; ++sum) add(c + sum, sum);
            }
            for (; c < count; ++c) add(c, 0);
            const Float before = state.total[v];
            const Float added = (totals[0] + totals[1]) + (totals[2] + totals[3]) - state.lost[v];
            state.total[v] = before + added;
            state.lost[v] = (state.total[v] - before) - added;
            state.logit_total[v] = logit_total + ((logit_totals[0] + logit_totals[1]) + (logit_totals[2] + logit_totals[3]));
            state.moment[v] = moment + ((moments[0] + moments[1]) + (moments[2] + moments[3]));
          }
        }
        if (args->relaxed != nullptr) {
          multiply_tiles<kLevel, true>(args->packed + first * packed_size(1, dim), dim, weights,
                                       kBlockCodes * kTileQueries, num_tiles, count, sums, dim * kTileQueries);
        }
      }
      for (int64_t t = 0; t < num_tiles; ++t) finish<kLevel>(*args, first_tile + t, states[t], sums + t * dim * kTileQueries, rows);
    }
  }

  template <CpuLevel kLevel, class State>
  static DALLE_FAST_INLINE void finish(const GumbelForwardArgs& args, int64_t tile_index, const State& state,
                                       float* sums, float* scratch) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    const RowsOfTile tile(args.logits, tile_index);
    const int64_t total_rows = args.logits.rows(), dim = args.dim;
    float* stats[kNumStats];
    for (int s = 0; s < kNumStats; ++s) stats[s] = scratch + s * kTileQueries;
    float* best = scratch + kNumStats * kTileQueries;
    for (int v = 0; v < I::kVectors; ++v) {
      const Float inverse = 1.0f / state.total[v];
      const Float log_total = I::log(state.logit_total[v]);
      const Float negentropy = state.moment[v] / state.logit_total[v] - log_total;
      const auto is_number = state.logit_total[v] == state.logit_total[v];
      // Maxima pass over NaN, sums do not.
      I::store(stats[kMaximum] + v * I::kLanes, is_number ? state.maximum[v] : state.logit_total[v]);
      I::store(stats[kInverse] + v * I::kLanes, inverse);
      I::store(stats[kLogitMaximum] + v * I::kLanes, state.logit_maximum[v]);
      I::store(stats[kLogitInverse] + v * I::kLanes, 1.0f / state.logit_total[v]);
      I::store(stats[kLogTotal] + v * I::kLanes, is_number ? log_total : state.logit_total[v]);
      I::store(stats[kNegentropy] + v * I::kLanes, is_number ? negentropy : state.logit_total[v]);
      I::store(best + v * I::kLanes, reinterpret_cast<Float>(state.best[v]));
      if (args.relaxed == nullptr) continue;
      for (int64_t d = 0; d < dim; ++d) {
        float* at = sums + d * kTileQueries + v * I::kLanes;
        I::store(at, I::load(at) * inverse);
      }
    }
    const auto log_codes = static_cast<float>(std::log(static_cast<double>(args.logits.codes)));
    for (int i = 0; i < tile.count; ++i) {
      const int64_t row = tile.first + i;
      for (int s = 0; s < kNumStats; ++s) args.stats[s * total_rows + row] = stats[s][i];
      args.kl[row] = stats[kNegentropy][i] + log_codes;
      int32_t index;
      std::memcpy(&index, best + i, sizeof(index));
      args.indices[row] = index;
      if (args.relaxed == nullptr) continue;
      for (int64_t d = 0; d < dim; ++d) args.relaxed[row * dim + d] = sums[d * kTileQueries + i];
    }
  }
};

// y itself, from the stats of a forward pass.
struct WeightsWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const GumbelArgs* args, const LogitsView* out, int64_t begin,
                                                        int64_t end) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    Scratch scratch;
    float *logits = nullptr, *weights = nullptr, *rows = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      logits = scratch.take(kBlockCodes * kTileQueries);
      weights = scratch.take(kBlockCodes * kTileQueries);
      rows = scratch.take(kBlockCodes * kTileQueries);
      if (pass == 0) scratch.allocate();
    }
    const int64_t codes = args->logits.codes, total_rows = args->logits.rows();
    alignas(64) float maxima[kTileQueries], inverses[kTileQueries];
    for (int64_t t = begin; t < end; ++t) {
      const RowsOfTile tile(args->logits, t), out_tile(*out, t);
      for (int i = 0; i < kTileQueries; ++i) {
        const int64_t row = std::min(tile.first + i, total_rows - 1);
        maxima[i] = args->stats[kMaximum * total_rows + row];
        inverses[i] = args->stats[kInverse * total_rows + row];
      }
      for (int64_t block = 0; block < args->num_blocks(); ++block) {
        const int64_t first = block * kBlockCodes, count = std::min(kBlockCodes, codes - first);
        load_block(args->logits, tile, first, count, rows, logits);
        const int64_t next_block = (block + 1) % args->num_blocks();
        add_noise<kLevel>(args->logits, {tile, block}, {tile, next_block}, args->keys, count, logits, weights);
        for (int v = 0; v < I::kVectors; ++v) {
          const Float maximum = I::load(maxima + v * I::kLanes), inverse = I::load(inverses + v * I::kLanes);
          for (int64_t c = 0; c < count; ++c) {
            float* at = weights + c * kTileQueries + v * I::kLanes;
            I::store(at, I::exp((I::load(at) - maximum) * args->inverse_tau) * inverse);
          }
        }
        store_block<kLevel>(*out, out_tile, first, count, weights, false, rows);
      }
    }
  }
};

void gumbel_forward(const Tensor logits, const std::optional<Tensor> codebook, const Tensor seed, double tau,
                    Tensor stats, Tensor indices, Tensor kl, std::optional<Tensor> relaxed) {
  if (logits.numel() == 0) return;
  GumbelForwardArgs args{};
  fill_args(args, logits, seed, tau, stats);
  if (relaxed.has_value()) {
    args.codebook = floats(*codebook, "codebook");
    args.dim = codebook->size(1);
    args.relaxed = mutable_floats(*relaxed, "relaxed");
  }
  check_dtype(indices, "indices", ScalarType::Long);
  check_contiguous(indices, "indices");
  args.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  args.kl = mutable_floats(kl, "kl");
  const auto packed = uninitialised_floats(relaxed.has_value() ? args.logits.codes * packed_size(1, args.dim) : 0);
  args.packed = packed.get();
  if (relaxed.has_value()) {
    torch::stable::parallel_for(0, args.num_blocks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * kBlockCodes; first < std::min(end * kBlockCodes, args.logits.codes);
           first += kBlockCodes) {
        const int64_t count = std::min(kBlockCodes, args.logits.codes - first);
        pack_chunks(args.codebook + first * args.dim, args.dim, count, 1, args.dim,
                    packed.get() + first * packed_size(1, args.dim));
      }
    });
  }
  work_off(ceil_div(args.num_tiles(), kGroup), [&](int64_t begin, int64_t end) {
    run_at_cpu_level<ForwardWorker>(&args, begin, end);
  });
}

void gumbel_weights(const Tensor logits, const Tensor seed, double tau, const Tensor stats, Tensor weights) {
  if (logits.numel() == 0) return;
  GumbelArgs args{};
  fill_args(args, logits, seed, tau, stats);
  const LogitsView out = logits_view(weights);
  torch::stable::parallel_for(0, args.num_tiles(), 1, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<WeightsWorker>(&args, &out, begin, end);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("gumbel_forward_cpu", TORCH_BOX(&gumbel_forward));
  m.impl("gumbel_weights_cpu", TORCH_BOX(&gumbel_weights));
}

}  // namespace dalle_fast
