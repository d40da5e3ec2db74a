// Backward pass of pattern attention on the CPU; the scores are made again from lse.
//
//   p = exp(scale q k^T - lse)      delta = sum_d out dO - dlse      dS = p (dO v^T - delta)
//   dv = p^T dO      dq = scale dS k      dk = scale dS^T q
//
// One item of work is a run of query tiles of one key head (and of all query heads that share it). A tile makes p and
// dS for a few keys at a time, adds to the dv and dk of those keys, which are float32 sums of the whole head, and
// to its own dq. At the end of the item the sums are written out. Where there are fewer key heads than kMinItems, a
// head's tiles are cut into several runs with sums of their own, added up in a fixed order: how many runs depends on
// the shape alone, so results are the same bits for any number of threads.
//
// Reads q, k, v, out, dO and writes dq, dk, dv once a head; 10 D FLOPs a pair of query and key (5 products). All sums
// are float32. bfloat16 where the CPU multiplies its pairs (avx512_bf16): p and dS are rounded to it before they meet dO,
// q and k. Else 16-bit inputs are widened.
#include "attention_rows.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Keys whose p and dS are made at once: they take 16 KB together.
constexpr int64_t kStepKeys = 128;
// Fewest items to cut the work into.
constexpr int64_t kMinItems = 4;

struct BackwardArgs {
  AttentionSizes sizes;
  RowsView query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  const float* lse;       // (B, H, S)
  const float* grad_lse;  // (B, H, S), or null
  int64_t num_runs;       // of a key head's tiles
  float* partial;         // (B * Hkv * num_runs, 2, S, stride), or null where num_runs is 1
};

// Keys and values as the loops want them.
struct Panel {
  const float* keys;      // rows
  const float* values;    // rows
  const float* key_rows;  // packed along the keys
};

template <CpuLevel kLevel, class Rows, int kStride>
struct BackwardTile {
  using Math = typename Rows::Math;
  using Loops = TileLoops<kLevel, Math, kStride>;
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  static constexpr int kVectors = I::kVectors;
  static constexpr int64_t kRowBytes = kStride * sizeof(float);

  // What each query brings to every pair.
  struct QueryTerms {
    Float lse[kVectors], delta[kVectors];
  };

  // Scratch for the rows of a panel.
  struct PanelMemory {
    float *keys, *values, *key_rows;

    DALLE_FAST_INLINE PanelMemory(Scratch& scratch, int64_t rows, int64_t head_dim)
        : keys(scratch.take(rows * kStride)),
          values(scratch.take(rows * kStride)),
          key_rows(Math::kIsPair ? scratch.take(Rows::packed_rows(rows) * head_dim) : keys) {}
  };

  const BackwardArgs& args;
  const AttentionSizes& sizes;
  const int64_t units;
  const int64_t padded;  // head size in whole vectors
  const bool rows_fit;   // keys and values lie as the loops want them
  PanelMemory text_memory, image_memory, local_memory;
  // Of the tile: rows as they are loaded, transposed for products with keys and values, packed along the queries.
  float *query_rows, *queries, *packed_queries, *grad_rows, *grads_out, *packed_grads;
  float *weights, *grads, *grad_pairs, *grad_query, *wide_row, *out_row;
  float *own_grad_keys, *own_grad_values;
  float *grad_keys, *grad_values;  // (S, padded), of the current item

  DALLE_FAST_INLINE BackwardTile(const BackwardArgs& args_, Scratch& scratch)
      : args(args_),
        sizes(args_.sizes),
        units(Rows::units(args_.sizes.head_dim)),
        padded(ceil_div(args_.sizes.head_dim, I::kLanes) * I::kLanes),
        rows_fit(!Math::kIsPair && sizes.type == StorageType::kFloat && args.key.row_stride == kRowBytes &&
                 args.value.row_stride == kRowBytes),
        text_memory(scratch, rows_fit ? 0 : sizes.text_len, sizes.head_dim),
        image_memory(scratch, rows_fit ? 0 : sizes.plan->max_image, sizes.head_dim),
        local_memory(scratch, sizes.plan->max_keys, sizes.head_dim) {
    query_rows = scratch.take(kTileQueries * units);
    queries = scratch.take(kTileQueries * units);
    packed_queries = scratch.take(Rows::packed_rows(kTileQueries) * padded);
    grad_rows = scratch.take(kTileQueries * units);
    grads_out = scratch.take(kTileQueries * units);
    packed_grads = scratch.take(Rows::packed_rows(kTileQueries) * padded);
    weights = scratch.take(kTileQueries * kStepKeys);
    grads = scratch.take(kTileQueries * kStepKeys);
    grad_pairs = Math::kIsPair ? scratch.take(kTileQueries * kStepKeys / 2) : grads;
    grad_query = scratch.take(2 * kTileQueries * sizes.head_dim);
    wide_row = scratch.take(padded);
    out_row = scratch.take(padded);
    const int64_t own = args.partial == nullptr ? sizes.length * padded : 0;
    own_grad_keys = scratch.take(own);
    own_grad_values = scratch.take(own);
  }

  template <class Position>
  DALLE_FAST_INLINE Panel pack(int64_t b, int64_t key_head, int64_t count, Position position, PanelMemory to) {
    for (int64_t k = 0; k < count; ++k) {
      Rows::load(args.key.row(b, key_head, position(k)), sizes.type, sizes.head_dim, to.keys + k * kStride);
      Rows::load(args.value.row(b, key_head, position(k)), sizes.type, sizes.head_dim, to.values + k * kStride);
    }
    if constexpr (Math::kIsPair) {
      constexpr int kStep = Rows::kRowsAtOnce;
      for (int64_t k = 0; k < count; k += kStep) {
        const char* rows[kStep] = {};
        for (int64_t i = 0; i < kStep && k + i < count; ++i) rows[i] = args.key.row(b, key_head, position(k + i));
        Rows::load_packed(rows, sizes.type, sizes.head_dim, to.key_rows + k / kStep * sizes.head_dim);
      }
    }
    return {to.keys, to.values, to.key_rows};
  }

  // `count` consecutive positions from `first` on, in place if they can be.
  DALLE_FAST_INLINE Panel run_panel(int64_t b, int64_t key_head, int64_t first, int64_t count, PanelMemory to) {
    if (rows_fit) {
      const float* keys = args.key.floats(b, key_head, first);
      return {keys, args.value.floats(b, key_head, first), keys};
    }
    return pack(b, key_head, count, [&](int64_t k) { return first + k; }, to);
  }

  DALLE_FAST_INLINE Panel local_panel(int64_t b, int64_t key_head, const int32_t* keys, int64_t count) {
    if (count > 0 && keys[count - 1] - keys[0] == count - 1) {
      return run_panel(b, key_head, keys[0], count, local_memory);
    }
    return pack(b, key_head, count, [&](int64_t k) { return keys[k]; }, local_memory);
  }

  // Sums of a new item, at `at` or in the scratch memory where that is null.
  DALLE_FAST_INLINE void start_item(float* at) {
    const int64_t count = sizes.length * padded;
    grad_keys = at == nullptr ? own_grad_keys : at;
    grad_values = at == nullptr ? own_grad_values : at + count;
    std::memset(grad_keys, 0, static_cast<size_t>(count) * sizeof(float));
    std::memset(grad_values, 0, static_cast<size_t>(count) * sizeof(float));
  }

  // p and dS of some keys, and what they add to dv, dk and dq.
  template <class Position>
  DALLE_FAST_INLINE void step(Panel panel, const uint16_t* lanes, int64_t count, Position position,
                              const QueryTerms& terms) {
    for (int64_t done = 0; done < count; done += kStepKeys) {
      const int64_t num_keys = std::min(count - done, kStepKeys);
      {
        const float *at_keys = panel.keys + done * kStride, *at_values = panel.values + done * kStride;
        const uint16_t* at_lanes = lanes == nullptr ? nullptr : lanes + done;
        float *to_weights = weights, *to_grads = grads;
        int64_t left = num_keys;
        Loops::template weights_and_grads<I::kBlock>(at_keys, at_values, left, at_lanes, queries, grads_out, units,
                                                     sizes.scale, terms.lse, terms.delta, to_weights, to_grads);
      }
      if constexpr (Math::kIsPair) Loops::round_weights(num_keys, weights, grads, grad_pairs);
      const auto at = [&](int64_t k) { return position(done + k); };
      Loops::scatter(weights, num_keys, packed_grads, padded, grad_values, at);
      Loops::scatter(grads, num_keys, packed_queries, padded, grad_keys, at);
      const int64_t row_stride = Math::kIsPair ? sizes.head_dim : kStride;
      Loops::accumulate(panel.key_rows + Rows::packed_rows(done) * row_stride, row_stride, grad_pairs,
                        Rows::packed_rows(num_keys), sizes.head_dim, grad_query);
    }
  }

  DALLE_FAST_INLINE void run(const AttentionTile& tile, int64_t b, int64_t head, int64_t key_head, Panel text,
                             Panel image, int64_t visible_text) {
    const int32_t* keys = sizes.plan->keys.data() + tile.first_key;
    const uint16_t* lanes = sizes.plan->lanes.data() + tile.first_key;
    const int64_t num_text = std::min<int64_t>(tile.num_text, visible_text);
    const int64_t num_local =
        tile.is_text ? std::clamp<int64_t>(visible_text - tile.num_text, 0, tile.num_keys) : tile.num_keys;

    const QueryTerms terms = load_queries(tile, b, head);
    std::memset(grad_query, 0, static_cast<size_t>(kTileQueries * sizes.head_dim) * sizeof(float));
    step(text, nullptr, num_text, [](int64_t k) { return k; }, terms);
    step(image, nullptr, tile.num_image, [&](int64_t k) { return sizes.text_len + k; }, terms);
    step(local_panel(b, key_head, keys, num_local), lanes, num_local, [&](int64_t k) { return keys[k]; }, terms);

    float* rows = grad_query + kTileQueries * sizes.head_dim;
    transpose_columns(grad_query, sizes.head_dim, rows, sizes.head_dim);
    for (int i = 0; i < tile.num_queries; ++i) {
      store_row(rows + i * sizes.head_dim, sizes.head_dim, sizes.scale, sizes.type,
                args.grad_query.row(b, head, tile.queries[i]));
    }
  }

  // Row d of 16 queries packed along the queries; missing rows and the end of the rows are 0.
  DALLE_FAST_INLINE void pack_queries(const float* rows, float* packed) {
    if constexpr (Math::kIsPair) {
      for (int i = 0; i < kTileQueries; i += 2) {
        const char* const pair[2] = {reinterpret_cast<const char*>(rows + i * units),
                                     reinterpret_cast<const char*>(rows + (i + 1) * units)};
        Rows::load_packed(pair, sizes.type, sizes.head_dim, packed + i / 2 * padded);
      }
    } else {
      for (int i = 0; i < kTileQueries; ++i) {
        std::memcpy(packed + i * padded, rows + i * units, static_cast<size_t>(units) * sizeof(float));
      }
    }
  }

  DALLE_FAST_INLINE QueryTerms load_queries(const AttentionTile& tile, int64_t b, int64_t head) {
    const int64_t head_dim = sizes.head_dim;
    alignas(64) float row_lse[kTileQueries] = {}, row_delta[kTileQueries] = {};
    std::memset(query_rows, 0, static_cast<size_t>(kTileQueries * units) * sizeof(float));
    std::memset(grad_rows, 0, static_cast<size_t>(kTileQueries * units) * sizeof(float));
    std::memset(packed_queries, 0, static_cast<size_t>(Rows::packed_rows(kTileQueries) * padded) * sizeof(float));
    std::memset(packed_grads, 0, static_cast<size_t>(Rows::packed_rows(kTileQueries) * padded) * sizeof(float));
    for (int64_t d = head_dim; d < padded; ++d) wide_row[d] = out_row[d] = 0.0f;
    for (int i = 0; i < tile.num_queries; ++i) {
      const int64_t position = tile.queries[i], flat = (b * sizes.heads + head) * sizes.length + position;
      const char* grad_row = args.grad_out.row(b, head, position);
      Rows::load(args.query.row(b, head, position), sizes.type, head_dim, query_rows + i * units);
      load_strided_row(grad_row, sizes.type, args.grad_out.element_stride, head_dim, wide_row);
      if constexpr (Math::kIsPair) {
        // Exact: the values were bfloat16.
        narrow<Bfloat16>(wide_row, head_dim, 1.0f, reinterpret_cast<char*>(grad_rows + i * units));
      } else {
        std::memcpy(grad_rows + i * units, wide_row, static_cast<size_t>(head_dim) * sizeof(float));
      }
      load_row(args.out.row(b, head, position), sizes.type, head_dim, out_row);
      Float sum{};
      for (int64_t d = 0; d < padded; d += I::kLanes) sum += I::load(wide_row + d) * I::load(out_row + d);
      float total = 0.0f;
      for (int lane = 0; lane < I::kLanes; ++lane) total += sum[lane];
      row_delta[i] = total - (args.grad_lse == nullptr ? 0.0f : args.grad_lse[flat]);
      row_lse[i] = args.lse[flat] == kMasked ? -kMasked : args.lse[flat];  // saw no key: all weights are 0
    }
    QueryTerms terms;
    for (int v = 0; v < kVectors; ++v) {
      terms.lse[v] = I::load(row_lse + v * I::kLanes);
      terms.delta[v] = I::load(row_delta + v * I::kLanes);
    }
    transpose_rows(query_rows, units, units, queries);
    if constexpr (!Math::kIsPair) {
      // As the forward pass does, to the bit: then what rounding does to the scores is in lse too and cancels.
      for (int64_t at = 0; at < units * kTileQueries; at += I::kLanes) {
        I::store(queries + at, I::load(queries + at) * sizes.scale);
      }
    }
    transpose_rows(grad_rows, units, units, grads_out);
    pack_queries(query_rows, packed_queries);
    pack_queries(grad_rows, packed_grads);
    return terms;
  }

  // Writes positions begin..end-1 of a head's dk and dv from float32 sums.
  DALLE_FAST_INLINE void write_out(int64_t b, int64_t key_head, int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      store_row(grad_keys + s * padded, sizes.head_dim, sizes.scale, sizes.type, args.grad_key.row(b, key_head, s));
      store_row(grad_values + s * padded, sizes.head_dim, 1.0f, sizes.type, args.grad_value.row(b, key_head, s));
    }
  }
};

template <class Rows, int kStride>
struct BackwardWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const BackwardArgs* args, WorkQueue* queue) {
    using Tile = BackwardTile<kLevel, Rows, kStride>;
    Scratch scratch;
    Tile(*args, scratch);
    scratch.allocate();
    Tile tile(*args, scratch);
    const AttentionSizes& sizes = args->sizes;
    const auto num_tiles = static_cast<int64_t>(sizes.plan->tiles.size());
    const int64_t group = sizes.heads / sizes.key_heads, runs = args->num_runs;
    for (int64_t item = queue->next(); item >= 0; item = queue->next()) {
      const int64_t run = item % runs, key_head = item / runs % sizes.key_heads, b = item / runs / sizes.key_heads;
      const int64_t visible_text = sizes.visible_text(b);
      tile.start_item(args->partial == nullptr ? nullptr : args->partial + item * 2 * sizes.length * tile.padded);
      const Panel text = tile.run_panel(b, key_head, 0, visible_text, tile.text_memory);
      const Panel image = tile.run_panel(b, key_head, sizes.text_len, sizes.plan->max_image, tile.image_memory);
      for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
        for (int64_t t = run * num_tiles / runs; t < (run + 1) * num_tiles / runs; ++t) {
          tile.run(sizes.plan->tiles[t], b, head, key_head, text, image, visible_text);
        }
      }
      if (args->partial == nullptr) tile.write_out(b, key_head, 0, sizes.length);
    }
  }
};

// Adds up the runs of each head, in order, and writes them out.
struct ReduceWorker {
  template <CpuLevel kLevel>
  __attribute__((always_inline)) static inline void run(const BackwardArgs* args, int64_t begin, int64_t end) {
    using I = Isa<kLevel>;
    const AttentionSizes& sizes = args->sizes;
    const int64_t padded = ceil_div(sizes.head_dim, I::kLanes) * I::kLanes, row = 2 * sizes.length * padded;
    for (int64_t item = begin; item < end; ++item) {  // one position of one key head
      const int64_t s = item % sizes.length, head = item / sizes.length;
      const int64_t key_head = head % sizes.key_heads, b = head / sizes.key_heads;
      float* keys = args->partial + head * args->num_runs * row + s * padded;
      float* values = keys + sizes.length * padded;
      for (int64_t other = 1; other < args->num_runs; ++other) {
        for (int64_t d = 0; d < padded; d += I::kLanes) {
          I::store(keys + d, I::load(keys + d) + I::load(keys + other * row + d));
          I::store(values + d, I::load(values + d) + I::load(values + other * row + d));
        }
      }
      store_row(keys, sizes.head_dim, sizes.scale, sizes.type, args->grad_key.row(b, key_head, s));
      store_row(values, sizes.head_dim, 1.0f, sizes.type, args->grad_value.row(b, key_head, s));
    }
  }
};

void backward(BackwardArgs args) {
  const AttentionSizes& sizes = args.sizes;
  const int64_t heads = sizes.batch * sizes.key_heads;
  args.num_runs = std::min<int64_t>(ceil_div(kMinItems, heads), static_cast<int64_t>(sizes.plan->tiles.size()));
  const int64_t most_padded = ceil_div(sizes.head_dim, 16) * 16;
  std::vector<float> partial(args.num_runs > 1 ? heads * args.num_runs * 2 * sizes.length * most_padded : 0);
  args.partial = args.num_runs > 1 ? partial.data() : nullptr;
  WorkQueue queue(heads * args.num_runs);
  with_worker<BackwardWorker>(sizes.type, sizes.head_dim, [&]<class Worker, CpuLevel kHighest>() {
    torch::stable::parallel_for(0, torch::stable::get_num_threads(), 1, [&](int64_t, int64_t) {
      run_at_cpu_level<Worker, kHighest>(&args, &queue);
    });
  });
  if (args.partial == nullptr) return;
  torch::stable::parallel_for(0, heads * sizes.length, 64, [&](int64_t begin, int64_t end) {
    run_at_cpu_level<ReduceWorker>(&args, begin, end);
  });
}

const float* lse_data(const Tensor& tensor, const char* name) {
  check_dtype(tensor, name, ScalarType::Float);
  check_contiguous(tensor, name);
  return static_cast<const float*>(tensor.const_data_ptr());
}

void attention_backward(const Tensor query, const Tensor key, const Tensor value, const Tensor out, const Tensor lse,
                        const Tensor grad_out, const std::optional<Tensor> grad_lse,
                        const std::optional<Tensor> text_lens, const std::vector<int64_t> pattern, double scale,
                        Tensor grad_query, Tensor grad_key, Tensor grad_value) {
  if (query.numel() == 0) return;
  std::shared_ptr<const AttentionPlan> plan;
  BackwardArgs args{};
  args.sizes = attention_sizes(query, key, text_lens, pattern, scale, plan);
  args.query = rows_view(query);
  args.key = rows_view(key);
  args.value = rows_view(value);
  args.out = rows_view(out);
  args.grad_out = rows_view(grad_out);
  args.grad_query = rows_view(grad_query);
  args.grad_key = rows_view(grad_key);
  args.grad_value = rows_view(grad_value);
  args.lse = lse_data(lse, "lse");
  args.grad_lse = grad_lse.has_value() ? lse_data(*grad_lse, "grad_lse") : nullptr;
  backward(args);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("attention_backward_cpu", TORCH_BOX(&attention_backward)); }

}  // namespace dalle_fast
