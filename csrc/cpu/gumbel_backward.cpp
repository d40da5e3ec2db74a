// Gumbel-softmax quantisation on the CPU, backward; gumbel_args.h has the formulas.
//
// One item is a few neighbouring blocks of codes, for all positions: noise and y are made again from what the forward pass
// left of each position (maximum, sum, lse); the blocks' rows of dC stay in the L2 cache and are written once, so no two
// threads ever add to the same number and results are the same bits for any number of threads, though how many blocks an
// item has depends on it. Where there are fewer blocks than kMinItems, the positions are cut into runs, whose dC are added
// up in a fixed order; how many follows from the shape alone. The gradient of the logits is written once.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gumbel_args.h"

namespace dalle_fast {
namespace {

using torch::stable::Tensor;

constexpr int64_t kMinItems = 8, kMaxBlocks = 4;
// From this size on the gradient of the logits is written past the cache, whose lines would else be read before they are
// written. A smaller one, who reads it next may find there.
constexpr int64_t kStreamBytes = int64_t{1} << 24;

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

struct BackwardWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const GumbelBackwardArgs* args, int64_t begin, int64_t end) {
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

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("gumbel_backward_cpu", TORCH_BOX(&gumbel_backward)); }

}  // namespace dalle_fast
