// Gumbel-softmax quantisation on the CPU.
//
//   x = logits + g      y = softmax(x / tau)      z = y C      kl = sum_k q_k ln q_k + ln K,  q = softmax(logits)
//   dy = C dz           dx = y (dy - dz . z) / tau + dkl q (ln q - sum q ln q)                dC = y^T dz
//
// Forward: one item of work is kGroup tiles of 16 positions; for each block of 128 codes it makes the noise, follows the
// maximum and the sums of both softmaxes (online, rescaled where a maximum rises) and adds y times the block's rows of
// the codebook to z. Neither noise nor y leaves the L1 cache; the codebook is read once an item.
//
// Backward: one item is a block of codes, for all positions: noise and y are made again from what the forward pass left
// of each position (maximum, sum, lse); the block's rows of dC stay in the L2 cache and are written once, so no two
// threads ever add to the same number and results are the same bits for any number of threads. Where there are fewer
// blocks than kMinItems, the positions are cut into runs, whose dC are added up in a fixed order; how many follows from
// the shape alone.
//
// Reads the logits once a pass and writes their gradient once; 2 K D FLOPs a position forward, 4 backward, and about 100
// vector instructions for 16 elements of noise and softmax. All arithmetic is float32.
#include <cmath>
#include <memory>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gumbel_tiles.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGroup = 4;
constexpr int64_t kMinItems = 8, kMaxBlocks = 4;
// From this size on the gradient of the logits is written past the cache, whose lines would else be read before they are
// written. A smaller one, who reads it next may find there.
constexpr int64_t kStreamBytes = int64_t{1} << 24;

// What the forward pass leaves of each position, (6, B * P): the maximum of x and 1 / sum exp((x - maximum) / tau); the
// maximum of the logits, 1 / sum exp(logit - maximum), the logarithm of that sum, and sum q ln q. One lse for maximum and
// sum would be rounded to their size, and exp(logit - lse) be off by as much.
enum Stat { kMaximum, kInverse, kLogitMaximum, kLogitInverse, kLogTotal, kNegentropy, kNumStats };

struct GumbelArgs {
  LogitsView logits;
  float inverse_tau;
  PhiloxKeys keys;
  const float* codebook;  // (K, D), rows one after the other
  int64_t dim;
  float* stats;           // (kNumStats, B * P)

  int64_t num_tiles() const { return ceil_div(logits.rows(), kTileQueries); }
  int64_t num_blocks() const { return ceil_div(logits.codes, kBlockCodes); }
};

struct GumbelForwardArgs : GumbelArgs {
  int64_t* indices;  // (B * P)
  float* kl;         // (B * P)
  float* relaxed;    // (B * P, D): z
  const float* packed;  // the codebook, each block of codes in chunks of d
};

struct GumbelBackwardArgs : GumbelArgs {
  const float* columns;      // (tiles, D, 16): dz
  const float* rows;         // (tiles, 16, padded D): dz
  const float* delta;        // (B * P): dz . z
  const float* grad_kl;      // (B * P), or null
  LogitsView grad_logits;    // data may be null
  bool stream;               // writes grad_logits past the cache
  float* grad_codebook;      // (runs, K, padded D), or null
  int64_t num_runs, padded, blocks_per_item;
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

struct BackwardWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const GumbelBackwardArgs* args, int64_t begin, int64_t end) {
    using I = Isa<kLevel>;
    constexpr int64_t kTile = kBlockCodes * kTileQueries;
    const int64_t dim = args->dim, codes = args->logits.codes, padded = args->padded;
    const bool to_logits = args->grad_logits.data != nullptr, to_codebook = args->grad_codebook != nullptr;
    Scratch scratch;
    float *logits = nullptr, *weights = nullptr, *products = nullptr, *rows = nullptr, *packed = nullptr;
    for (int pass = 0; pass < 2; ++pass) {
      logits = scratch.take(kGroup * kTile);
      weights = scratch.take(kGroup * kTile);
      products = scratch.take(kGroup * kTile);
      rows = scratch.take(kTile);
      packed = scratch.take(to_logits ? args->blocks_per_item * packed_size(dim, kBlockCodes) : 0);
      if (pass == 0) scratch.allocate();
    }
    for (int64_t item = begin; item < end; ++item) {
      const int64_t run = item % args->num_runs, first_block = item / args->num_runs * args->blocks_per_item;
      const int64_t last_block = std::min(first_block + args->blocks_per_item, args->num_blocks());
      const auto count_of = [&](int64_t block) { return std::min(kBlockCodes, codes - block * kBlockCodes); };
      const auto packed_of = [&](int64_t block) {
        return packed + (block - first_block) * packed_size(dim, kBlockCodes);
      };
      const auto grad_codebook_of = [&](int64_t block) {
        return args->grad_codebook + (run * codes + block * kBlockCodes) * padded;
      };
      for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t count = count_of(block);
        if (to_codebook) {
          std::memset(grad_codebook_of(block), 0, static_cast<size_t>(count * padded) * sizeof(float));
        }
        if (to_logits) {
          pack_chunks(args->codebook + block * kBlockCodes * dim, 1, dim, dim, count, packed_of(block));
        }
      }
      const int64_t last_tile = (run + 1) * args->num_tiles() / args->num_runs;
      for (int64_t group = run * args->num_tiles() / args->num_runs; group < last_tile; group += kGroup) {
        const int64_t num_tiles = std::min(kGroup, last_tile - group);
        for (int64_t block = first_block; block < last_block; ++block) {
          const int64_t first = block * kBlockCodes, count = count_of(block);
          for (int64_t t = 0; t < num_tiles; ++t) {
            float *tile_logits = logits + t * kTile, *tile_weights = weights + t * kTile;
            const RowsOfTile tile(args->logits, group + t);
            // The next tile of the group, or the first one for the next block, or of the next group.
            const bool ends_block = t + 1 == num_tiles, ends_group = ends_block && block + 1 == last_block;
            const int64_t next_tile = ends_group ? group + num_tiles : ends_block ? group : group + t + 1;
            const RowsOfTile next(args->logits, std::min(next_tile, args->num_tiles() - 1));
            const int64_t next_block = ends_group ? first_block : block + (ends_block ? 1 : 0);
            load_block(args->logits, tile, first, count, rows, tile_logits);
            add_noise<kLevel>(args->logits, {tile, block}, {next, next_block}, args->keys, count, tile_logits,
                              tile_weights);
            weigh<kLevel>(*args, tile, count, tile_weights);
          }
          if (to_logits) {
            multiply_tiles<kLevel, false>(packed_of(block), count, args->columns + group * dim * kTileQueries,
                                          dim * kTileQueries, num_tiles, dim, products, kTile);
            for (int64_t t = 0; t < num_tiles; ++t) {
              const RowsOfTile tile(args->logits, group + t), out_tile(args->grad_logits, group + t);
              differentiate<kLevel>(*args, tile, count, logits + t * kTile, weights + t * kTile, products + t * kTile);
              store_block<kLevel>(args->grad_logits, out_tile, first, count, products + t * kTile, args->stream, rows);
            }
          }
          if (to_codebook) {
            // Rows of dz past the end are 0, and so is what they add.
            scatter_tiles<kLevel>(weights, count, args->rows + group * kTileQueries * padded, padded, num_tiles,
                                  grad_codebook_of(block));
          }
        }
      }
    }
    if (args->stream) stream_fence();
  }

  // A number of each of a tile's positions, `from` indexed by row.
  template <class Float>
  struct PerPosition {
    float values[kTileQueries];

    DALLE_FAST_INLINE PerPosition(const float* from, const RowsOfTile& tile, int64_t total_rows) {
      for (int i = 0; i < kTileQueries; ++i) values[i] = from[std::min(tile.first + i, total_rows - 1)];
    }
  };

  // Perturbed logits become weights y.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void weigh(const GumbelBackwardArgs& args, const RowsOfTile& tile, int64_t count,
                                      float* weights) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    const int64_t total_rows = args.logits.rows();
    const PerPosition<Float> maxima(args.stats + kMaximum * total_rows, tile, total_rows);
    const PerPosition<Float> inverses(args.stats + kInverse * total_rows, tile, total_rows);
    for (int v = 0; v < I::kVectors; ++v) {
      const int lane = v * I::kLanes;
      const Float maximum = I::load(maxima.values + lane), inverse = I::load(inverses.values + lane);
      for (int64_t c = 0; c < count; ++c) {
        float* at = weights + c * kTileQueries + lane;
        I::store(at, I::exp((I::load(at) - maximum) * args.inverse_tau) * inverse);
      }
    }
  }

  // Products dy become gradients of the logits.
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void differentiate(const GumbelBackwardArgs& args, const RowsOfTile& tile, int64_t count,
                                              const float* logits, const float* weights, float* products) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    const int64_t total_rows = args.logits.rows();
    const auto stat = [&](Stat which) { return PerPosition<Float>(args.stats + which * total_rows, tile, total_rows); };
    const PerPosition<Float> deltas(args.delta, tile, total_rows);
    for (int v = 0; v < I::kVectors; ++v) {
      const int lane = v * I::kLanes;
      const Float delta = I::load(deltas.values + lane);
      for (int64_t c = 0; c < count; ++c) {
        float* at = products + c * kTileQueries + lane;
        const Float weight = I::load(weights + c * kTileQueries + lane);
        I::store(at, weight * args.inverse_tau * (I::load(at) - delta));
      }
    }
    if (args.grad_kl == nullptr) return;
    const auto maxima = stat(kLogitMaximum), inverses = stat(kLogitInverse);
    const auto log_totals = stat(kLogTotal), negentropies = stat(kNegentropy);
    const PerPosition<Float> grads_kl(args.grad_kl, tile, total_rows);
    for (int v = 0; v < I::kVectors; ++v) {
      const int lane = v * I::kLanes;
      const Float maximum = I::load(maxima.values + lane), inverse = I::load(inverses.values + lane);
      const Float log_total = I::load(log_totals.values + lane), negentropy = I::load(negentropies.values + lane);
      const Float grad_kl = I::load(grads_kl.values + lane);
      for (int64_t c = 0; c < count; ++c) {
        float* at = products + c * kTileQueries + lane;
        const Float difference = I::load(logits + c * kTileQueries + lane) - maximum;
        const Float q = I::exp(difference) * inverse;
        const Float log_q = (difference < -100.0f ? I::splat(-100.0f) : difference) - log_total;
        I::store(at, I::load(at) + grad_kl * q * (log_q - negentropy));
      }
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

// dz in the two forms that the loops want, and delta = dz . z; rows past the end are 0.
struct PrepareWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const GumbelBackwardArgs* args, const float* grad,
                                                        const float* relaxed, float* columns, float* rows, float* delta,
                                                        int64_t begin, int64_t end) {
    using I = Isa<kLevel>;
    using Float = typename I::Float;
    const int64_t dim = args->dim, padded = args->padded, total_rows = args->logits.rows();
    std::vector<float> samples(kTileQueries * dim), sample_columns(kTileQueries * dim);
    for (int64_t t = begin; t < end; ++t) {
      float* tile_rows = rows + t * kTileQueries * padded;
      std::memset(tile_rows, 0, static_cast<size_t>(kTileQueries * padded) * sizeof(float));
      for (int64_t i = 0; i < std::min<int64_t>(kTileQueries, total_rows - t * kTileQueries); ++i) {
        const int64_t row = t * kTileQueries + i;
        std::memcpy(tile_rows + i * padded, grad + row * dim, static_cast<size_t>(dim) * sizeof(float));
        std::memcpy(samples.data() + i * dim, relaxed + row * dim, static_cast<size_t>(dim) * sizeof(float));
      }
      float* tile_columns = columns + t * dim * kTileQueries;
      transpose_rows(tile_rows, padded, dim, tile_columns);
      transpose_rows(samples.data(), dim, dim, sample_columns.data());
      // In the order of dot_codes: where one code has all the weight, delta is its product to the bit, and cancels.
      alignas(64) float sums[kTileQueries];
      for (int v = 0; v < I::kVectors; ++v) {
        Float sum{};
        for (int64_t d = 0; d < dim; ++d) {
          const int64_t at = d * kTileQueries + v * I::kLanes;
          sum += I::load(sample_columns.data() + at) * I::load(tile_columns + at);
        }
        I::store(sums + v * I::kLanes, sum);
      }
      std::memcpy(delta + t * kTileQueries, sums,
                  static_cast<size_t>(std::min<int64_t>(kTileQueries, total_rows - t * kTileQueries)) * sizeof(float));
    }
  }
};

LogitsView logits_view(const Tensor& tensor) {
  const auto bytes = static_cast<int64_t>(tensor.element_size());
  LogitsView view;
  view.data = static_cast<char*>(const_cast<void*>(tensor.const_data_ptr()));
  view.type = storage_type(tensor);
  view.batch = tensor.size(0);
  view.codes = tensor.size(1);
  view.positions = tensor.size(2);
  view.batch_stride = tensor.stride(0) * bytes;
  view.code_stride = tensor.stride(1) * bytes;
  view.position_stride = tensor.stride(2) * bytes;
  return view;
}

// Asks for large pages where a new tensor lies. The gradient of the logits is so large, and so little is computed for an
// element, that mapping its pages of 4 KB one by one would take as long as a fifth of the backward pass.
void prefer_large_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(tensor.numel()) * tensor.element_size()) / kPage * kPage;
  int64_t extent = 1;
  for (int64_t d = 0; d < tensor.dim(); ++d) extent += (tensor.size(d) - 1) * tensor.stride(d);
  // A hint: where it is refused, nothing is lost.
  if (extent == tensor.numel() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)tensor;
#endif
}

const float* floats(const Tensor& tensor, const char* name) {
  check_dtype(tensor, name, ScalarType::Float);
  check_contiguous(tensor, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

float* mutable_floats(const Tensor& tensor, const char* name) { return const_cast<float*>(floats(tensor, name)); }

// Where std::vector would write zeros first, on one thread.
std::unique_ptr<float[]> uninitialised_floats(int64_t count) {
  return std::make_unique_for_overwrite<float[]>(static_cast<size_t>(count));
}

void fill_args(GumbelArgs& args, const Tensor& logits, const Tensor& seed, double tau, const Tensor& stats) {
  args.logits = logits_view(logits);
  // Neither 0, which times -inf would be NaN, nor infinite.
  args.inverse_tau = static_cast<float>(std::clamp(1.0 / tau, 2e-38, 3e38));
  check_dtype(seed, "seed", ScalarType::Long);
  args.keys = PhiloxKeys(static_cast<uint64_t>(*static_cast<const int64_t*>(seed.const_data_ptr())));
  args.stats = mutable_floats(stats, "stats");
}

// Calls call(begin, end) for parts of 0..count-1, on all threads, whoever is free next.
template <class Call>
void work_off(int64_t count, Call call) {
  WorkQueue queue(count);
  torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (int64_t item = queue.next(); item >= 0; item = queue.next()) call(item, item + 1);
  });
}

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

void gumbel_backward(const Tensor logits, const Tensor codebook, const Tensor seed, double tau, const Tensor stats,
                     const Tensor relaxed, const Tensor grad_relaxed, const std::optional<Tensor> grad_kl,
                     std::optional<Tensor> grad_logits, std::optional<Tensor> grad_codebook) {
  if (logits.numel() == 0) return;
  GumbelBackwardArgs args{};
  fill_args(args, logits, seed, tau, stats);
  args.codebook = floats(codebook, "codebook");
  args.dim = codebook.size(1);
  args.padded = ceil_div(args.dim, 16) * 16;
  args.grad_kl = grad_kl.has_value() ? floats(*grad_kl, "grad_kl") : nullptr;
  if (grad_logits.has_value()) {
    prefer_large_pages(*grad_logits);
    args.grad_logits = logits_view(*grad_logits);
    args.stream = grad_logits->numel() * static_cast<int64_t>(grad_logits->element_size()) >= kStreamBytes;
  }
  args.num_runs = std::clamp<int64_t>(ceil_div(kMinItems, args.num_blocks()), 1, args.num_tiles());

  // Neighbouring blocks of one item read neighbouring logits and the same dz, where there are items enough for all threads.
  const int64_t items_wanted = 4 * torch::stable::get_num_threads();
  args.blocks_per_item = std::clamp<int64_t>(args.num_blocks() * args.num_runs / items_wanted, 1, kMaxBlocks);

  const int64_t tiles = args.num_tiles(), codes = args.logits.codes;
  const auto columns = uninitialised_floats(tiles * args.dim * kTileQueries);
  const auto rows = uninitialised_floats(tiles * kTileQueries * args.padded);
  const auto delta = uninitialised_floats(args.logits.rows());
  args.columns = columns.get();
  args.rows = rows.get();
  args.delta = delta.get();
  float* to = grad_codebook.has_value() ? mutable_floats(*grad_codebook, "grad_codebook") : nullptr;
  const bool is_final = args.num_runs == 1 && args.padded == args.dim;
  const auto partial = uninitialised_floats(to == nullptr || is_final ? 0 : args.num_runs * codes * args.padded);
  args.grad_codebook = to == nullptr || is_final ? to : partial.get();
  const float *grad = floats(grad_relaxed, "grad_relaxed"), *z = floats(relaxed, "relaxed");
  torch::stable::parallel_for(0, tiles, 4, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<PrepareWorker>(&args, grad, z, columns.get(), rows.get(), delta.get(), begin, end);
  });
  work_off(ceil_div(args.num_blocks(), args.blocks_per_item) * args.num_runs, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<BackwardWorker>(&args, begin, end);
  });
  if (to == nullptr || is_final) return;
  torch::stable::parallel_for(0, codes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t code = begin; code < end; ++code) {
      for (int64_t d = 0; d < args.dim; ++d) {
        float sum = 0.0f;
        for (int64_t run = 0; run < args.num_runs; ++run) sum += partial[(run * codes + code) * args.padded + d];
        to[code * args.dim + d] = sum;
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("gumbel_forward_cpu", TORCH_BOX(&gumbel_forward));
  m.impl("gumbel_weights_cpu", TORCH_BOX(&gumbel_weights));
  m.impl("gumbel_backward_cpu", TORCH_BOX(&gumbel_backward));
}

}  // namespace dalle_fast
