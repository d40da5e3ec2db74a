// Forward pass of pattern attention on the CPU.
//
//   s = scale q k^T,   out = softmax(s) v,   lse = ln sum exp(s),   over the keys that a pattern shows each query
//
// One item of work is a run of query tiles of one head. Text keys and values are brought into rows of a fixed stride
// once an item (used in place where they lie so already); the tile's other keys are gathered beside them. For
// each tile all scores are made (they stay in the L1 or L2 cache), then one pass takes the exponential of score
// minus maximum, then the weights meet the values. Only where a tile sees more than kChunkKeys keys is the softmax
// done in several steps, each rescaling what came before.
//
// Reads q, k, v once a head and tile; writes out and lse once; 4 D FLOPs a pair of query and key. Sums are float32.
// Widened rows: the product's factor is folded into q, and one FMA serves one element. bfloat16 where the CPU multiplies its
// pairs (avx512_bf16): weights are rounded to bfloat16 before they meet the values. Else 16-bit inputs are widened.
#include "attention_rows.h"

namespace dalle_fast {

AttentionSizes attention_sizes(const torch::stable::Tensor& query, const torch::stable::Tensor& key,
                               const std::optional<torch::stable::Tensor>& text_lens,
                               const std::vector<int64_t>& pattern, double scale,
                               std::shared_ptr<const AttentionPlan>& plan) {
  if (pattern.size() != 6) {
    throw std::runtime_error("pattern must have 6 numbers, got " + std::to_string(pattern.size()));
  }
  const AttentionPattern described{static_cast<Rule>(pattern[0]), pattern[1], pattern[2], pattern[3],
                                   pattern[4], pattern[5]};
  AttentionSizes sizes{};
  sizes.type = storage_type(query, "query");
  sizes.batch = query.size(0);
  sizes.heads = query.size(1);
  sizes.key_heads = key.size(1);
  sizes.length = query.size(2);
  sizes.head_dim = query.size(3);
  sizes.text_len = std::min(described.text_len, sizes.length);
  sizes.scale = static_cast<float>(scale);
  if (text_lens.has_value()) {
    check_dtype(*text_lens, "text_lens", torch::headeronly::ScalarType::Long);
    check_contiguous(*text_lens, "text_lens");
    sizes.text_lens = static_cast<const int64_t*>(text_lens->const_data_ptr());
  }
  plan = attention_plan(described, sizes.length);
  sizes.plan = plan.get();
  return sizes;
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Keys in one softmax step: their scores take 32 KB.
constexpr int64_t kChunkKeys = 512;

struct ForwardArgs {
  AttentionSizes sizes;
  RowsView query, key, value, out;
  float* lse;  // (B, H, S), or null
};

// Keys and values as the loops want them.
struct Panel {
  const float* keys;
  const float* values;
};

struct PanelMemory {
  float* keys;
  float* values;
};

template <CpuLevel kLevel, class Rows, int kStride>
struct ForwardTile {
  using Math = typename Rows::Math;
  using Loops = TileLoops<kLevel, Math, kStride>;
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  static constexpr int kVectors = I::kVectors;

  const ForwardArgs& args;
  const int64_t units, value_stride;
  // Scratch.
  PanelMemory dense, local;
  float *query_rows, *queries, *scores, *sums, *out_rows;

  DALLE_FAST_INLINE ForwardTile(const ForwardArgs& args_, Scratch& scratch)
      : args(args_),
        units(Rows::units(args_.sizes.head_dim)),
        value_stride(Math::kIsPair ? args_.sizes.head_dim : kStride) {
    const AttentionSizes& sizes = args.sizes;
    const int64_t dense_keys = sizes.text_len + sizes.plan->max_image;
    const int64_t local_keys = sizes.plan->max_keys;
    dense = {scratch.take(keeps_dense_in_place() ? 0 : dense_keys * kStride),
             scratch.take(keeps_dense_in_place() ? 0 : Rows::packed_rows(dense_keys) * value_stride)};
    local = {scratch.take(local_keys * kStride), scratch.take(Rows::packed_rows(local_keys) * value_stride)};
    query_rows = scratch.take(kTileQueries * units);
    queries = scratch.take(kTileQueries * units);
    scores = scratch.take(kTileQueries * (kChunkKeys + 2));
    sums = scratch.take(kTileQueries * sizes.head_dim);
    out_rows = scratch.take(kTileQueries * sizes.head_dim);
  }

  // Whether rows of keys and values already lie as the loops want them.
  DALLE_FAST_INLINE bool rows_fit() const {
    constexpr int64_t kBytes = kStride * sizeof(float);
    return !Math::kIsPair && args.sizes.type == StorageType::kFloat && args.key.row_stride == kBytes &&
           args.value.row_stride == kBytes;
  }
  DALLE_FAST_INLINE bool keeps_dense_in_place() const {
    return rows_fit() && (args.sizes.text_lens == nullptr || args.sizes.plan->max_image == 0);
  }

  template <class Position>
  DALLE_FAST_INLINE Panel pack(int64_t b, int64_t key_head, int64_t count, Position position, PanelMemory to) {
    const int64_t head_dim = args.sizes.head_dim;
    const StorageType type = args.sizes.type;
    for (int64_t k = 0; k < count; ++k) {
      Rows::load(args.key.row(b, key_head, position(k)), type, head_dim, to.keys + k * kStride);
    }
    constexpr int kStep = Rows::kRowsAtOnce;
    for (int64_t k = 0; k < count; k += kStep) {
      const char* rows[kStep] = {};
      for (int64_t i = 0; i < kStep && k + i < count; ++i) rows[i] = args.value.row(b, key_head, position(k + i));
      Rows::load_packed(rows, type, head_dim, to.values + k / kStep * value_stride);
    }
    return {to.keys, to.values};
  }

  // One head's dense keys, for all tiles of an item.
  DALLE_FAST_INLINE Panel dense_panel(int64_t b, int64_t key_head, int64_t visible_text) {
    const AttentionSizes& sizes = args.sizes;
    if (keeps_dense_in_place()) return {args.key.floats(b, key_head, 0), args.value.floats(b, key_head, 0)};
    const int64_t count = visible_text + sizes.plan->max_image;
    return pack(b, key_head, count, [&](int64_t k) { return dense_position(k, visible_text, sizes.text_len); }, dense);
  }

  DALLE_FAST_INLINE Panel local_panel(int64_t b, int64_t key_head, const int32_t* keys, int64_t count) {
    if (count > 0 && rows_fit() && keys[count - 1] - keys[0] == count - 1) {
      return {args.key.floats(b, key_head, keys[0]), args.value.floats(b, key_head, keys[0])};
    }
    return pack(b, key_head, count, [&](int64_t k) { return keys[k]; }, local);
  }

  // What is taken from the scores: their maximum, or 0 where no key is seen, for inf - inf is NaN.
  static DALLE_FAST_INLINE Float finite_base(Float maximum) { return maximum == kMasked ? Float{} : maximum; }

  // Scores to weights, in place, or two rows of scores to one row of pairs.
  DALLE_FAST_INLINE void exponentials(int64_t num_keys, const Float (&base)[kVectors], const float* from, float* to,
                                      Float (&total)[kVectors]) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* in = from + v * I::kLanes;
      float* out = to + v * I::kLanes;
      Float even{}, odd{};
      int64_t k = 0;
      for (; k + 2 <= num_keys; k += 2) {
        const Float low = I::exp(I::load(in) - base[v]);
        const Float high = I::exp(I::load(in + kTileQueries) - base[v]);
        even += low;
        odd += high;
        if constexpr (Math::kIsPair) {
          I::store(out, Math::template interleave<I>(Math::template round<I>(low, high)));
          out += kTileQueries;
        } else {
          I::store(out, low);
          I::store(out + kTileQueries, high);
          out += 2 * kTileQueries;
        }
        in += 2 * kTileQueries;
      }
      if (k < num_keys) {
        const Float low = I::exp(I::load(in) - base[v]);
        even += low;
        if constexpr (Math::kIsPair) {
          I::store(out, Math::template interleave<I>(Math::template round<I>(low, Float{})));
        } else {
          I::store(out, low);
        }
      }
      total[v] += even + odd;
    }
  }

  DALLE_FAST_INLINE void run(const AttentionTile& tile, int64_t b, int64_t head, int64_t key_head, Panel dense_keys,
                             int64_t visible_text) {
    const AttentionSizes& sizes = args.sizes;
    const int64_t head_dim = sizes.head_dim;
    const int32_t* keys = sizes.plan->keys.data() + tile.first_key;
    const uint16_t* lanes = sizes.plan->lanes.data() + tile.first_key;
    const int64_t num_dense = std::min<int64_t>(tile.num_text, visible_text) + tile.num_image;
    const int64_t num_local =
        tile.is_text ? std::clamp<int64_t>(visible_text - tile.num_text, 0, tile.num_keys) : tile.num_keys;
    const Panel local_keys = local_panel(b, key_head, keys, num_local);

    const float factor = sizes.scale;
    for (int i = 0; i < kTileQueries; ++i) {
      float* row = query_rows + i * units;
      if (i < tile.num_queries) {
        Rows::load(args.query.row(b, head, tile.queries[i]), sizes.type, head_dim, row);
      } else {
        std::memset(row, 0, static_cast<size_t>(units) * sizeof(float));
      }
    }
    transpose_rows(query_rows, units, units, queries);
    if constexpr (!Math::kIsPair) {
      for (int64_t at = 0; at < units * kTileQueries; at += I::kLanes) {
        I::store(queries + at, I::load(queries + at) * factor);
      }
    }
    std::memset(sums, 0, static_cast<size_t>(kTileQueries * head_dim) * sizeof(float));

    Float maximum[kVectors], total[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      maximum[v] = I::splat(kMasked);
      total[v] = Float{};
    }
    int64_t dense_done = 0, local_done = 0;
    while (dense_done < num_dense || local_done < num_local) {
      const int64_t from_dense = std::min(num_dense - dense_done, kChunkKeys);
      const int64_t dense_rows = (from_dense + 1) / 2 * 2;  // the local keys start a pair of their own
      const int64_t from_local =
          dense_done + from_dense < num_dense ? 0 : std::min(num_local - local_done, kChunkKeys - dense_rows);

      Float new_maximum[kVectors];
      for (int v = 0; v < kVectors; ++v) new_maximum[v] = maximum[v];
      float* local_scores = scores + dense_rows * kTileQueries;
      {
        const float* at = dense_keys.keys + dense_done * kStride;
        const uint16_t* all_lanes = nullptr;
        int64_t left = from_dense;
        float* to = scores;
        Loops::template scores<I::kBlock>(at, left, all_lanes, queries, units, factor, to, new_maximum);
      }
      {
        const float* at = local_keys.keys + local_done * kStride;
        const uint16_t* some_lanes = lanes + local_done;
        int64_t left = from_local;
        float* to = local_scores;
        Loops::template scores<I::kBlock>(at, left, some_lanes, queries, units, factor, to, new_maximum);
      }
      if (dense_done + local_done > 0) rescale(maximum, new_maximum, total);
      for (int v = 0; v < kVectors; ++v) maximum[v] = new_maximum[v];

      Float base[kVectors];
      for (int v = 0; v < kVectors; ++v) base[v] = finite_base(maximum[v]);
      exponentials(from_dense, base, scores, scores, total);
      exponentials(from_local, base, local_scores, local_scores, total);
      constexpr int kStep = Rows::kRowsAtOnce;
      Loops::accumulate(dense_keys.values + dense_done / kStep * value_stride, value_stride, scores,
                        Rows::packed_rows(from_dense), head_dim, sums);
      Loops::accumulate(local_keys.values + local_done / kStep * value_stride, value_stride, local_scores,
                        Rows::packed_rows(from_local), head_dim, sums);
      dense_done += from_dense;
      local_done += from_local;
    }
    finish(tile, b, head, maximum, total);
  }

  // Brings what was summed so far from the old maximum to the new one.
  DALLE_FAST_INLINE void rescale(const Float (&maximum)[kVectors], const Float (&new_maximum)[kVectors],
                                 Float (&total)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      const Float factor = I::exp(maximum[v] - finite_base(new_maximum[v]));
      total[v] *= factor;
      for (int64_t d = 0; d < args.sizes.head_dim; ++d) {
        float* at = sums + d * kTileQueries + v * I::kLanes;
        I::store(at, I::load(at) * factor);
      }
    }
  }

  DALLE_FAST_INLINE void finish(const AttentionTile& tile, int64_t b, int64_t head, const Float (&maximum)[kVectors],
                                const Float (&total)[kVectors]) {
    const AttentionSizes& sizes = args.sizes;
    alignas(64) float lse[kTileQueries];
    for (int v = 0; v < kVectors; ++v) {
      const auto empty = total[v] == 0.0f;
      const Float inverse = empty ? Float{} : 1.0f / total[v];
      for (int64_t d = 0; d < sizes.head_dim; ++d) {
        float* at = sums + d * kTileQueries + v * I::kLanes;
        I::store(at, I::load(at) * inverse);
      }
      Float value = maximum[v] + I::log(total[v]);
      value = total[v] == total[v] ? value : total[v];  // NaN
      I::store(lse + v * I::kLanes, empty ? I::splat(kMasked) : value);
    }
    transpose_columns(sums, sizes.head_dim, out_rows, sizes.head_dim);
    for (int i = 0; i < tile.num_queries; ++i) {
      store_row(out_rows + i * sizes.head_dim, sizes.head_dim, 1.0f, sizes.type,
                args.out.row(b, head, tile.queries[i]));
    }
    if (args.lse == nullptr) return;
    for (int i = 0; i < tile.num_queries; ++i) {
      args.lse[(b * sizes.heads + head) * sizes.length + tile.queries[i]] = lse[i];
    }
  }
};

template <class Rows, int kStride>
struct ForwardWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const ForwardArgs* args, WorkQueue* queue, int64_t num_chunks) {
    using Tile = ForwardTile<kLevel, Rows, kStride>;
    Scratch scratch;
    Tile(*args, scratch);
    scratch.allocate();
    Tile tile(*args, scratch);
    const AttentionSizes& sizes = args->sizes;
    const auto num_tiles = static_cast<int64_t>(sizes.plan->tiles.size());
    for (int64_t item = queue->next(); item >= 0; item = queue->next()) {
      const int64_t chunk = item % num_chunks, head = item / num_chunks % sizes.heads;
      const int64_t b = item / num_chunks / sizes.heads, key_head = head * sizes.key_heads / sizes.heads;
      const int64_t visible_text = sizes.visible_text(b);
      const Panel dense = tile.dense_panel(b, key_head, visible_text);
      const int64_t end = (chunk + 1) * num_tiles / num_chunks;
      for (int64_t t = chunk * num_tiles / num_chunks; t < end; ++t) {
        tile.run(sizes.plan->tiles[t], b, head, key_head, dense, visible_text);
      }
    }
  }
};

void forward(const ForwardArgs& args) {
  const AttentionSizes& sizes = args.sizes;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t heads = sizes.batch * sizes.heads;
  // Enough items to keep all threads busy to the end; a head is cut only where there are few.
  const int64_t most_chunks = std::max<int64_t>(sizes.plan->tiles.size() / 4, 1);
  const int64_t num_chunks = threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(4 * threads, heads), 1, most_chunks);
  WorkQueue queue(heads * num_chunks);
  with_worker<ForwardWorker>(sizes.type, sizes.head_dim, [&]<class Worker, CpuLevel kHighest>() {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      run_at_cpu_level<Worker, kHighest>(&args, &queue, num_chunks);
    });
  });
}

void attention_forward(const Tensor query, const Tensor key, const Tensor value, const std::optional<Tensor> text_lens,
                       const std::vector<int64_t> pattern, double scale, Tensor out, std::optional<Tensor> lse) {
  if (query.numel() == 0) return;
  std::shared_ptr<const AttentionPlan> plan;
  ForwardArgs args{attention_sizes(query, key, text_lens, pattern, scale, plan),
                   rows_view(query),
                   rows_view(key),
                   rows_view(value),
                   rows_view(out),
                   nullptr};
  if (lse.has_value()) {
    check_dtype(*lse, "lse", ScalarType::Float);
    check_contiguous(*lse, "lse");
    args.lse = static_cast<float*>(lse->mutable_data_ptr());
  }
  forward(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("attention_forward_cpu", TORCH_BOX(&attention_forward)); }

}  // namespace dalle_fast
