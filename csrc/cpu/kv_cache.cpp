// One step of decoding with cached keys and values on the CPU: append a position to the cache and attend from it.
//
//   s = scale q k^T,   out = softmax(s) v,   over the text of the sample's prompt and the image keys that it sees
//
// The storage is that of dalle_fast/reference/kv_cache.py. One item of work is a prompt, a head and a run of the
// prompt's samples, taken six at a time: text scores and what the text's values add are products of six rows with the
// text's keys and values. An item of many samples takes them from a float32 copy without the strides that collide in
// the CPU's caches. The image's keys and values are each sample's own; they are fetched while the text is multiplied.
// Reads K and V of the text once an item and those of the image that are seen once, and takes 4 D FLOPs a pair of query
// and key. Nothing is allocated once a thread's scratch memory has its size.
//
// A sample's result has the same bits whatever is computed beside it: each sum runs over its own keys or elements in an
// order that follows from its own sizes. Text scores have a lane a key and add up along the head; image scores have a
// lane an element and end in one tree; values add up along the keys, text and image apart. Sums are float32.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "decode_parts.h"
#include "kv_cache_loops.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// An item of so many samples copies the text's keys and values.
constexpr int64_t kCopyFrom = 3 * kRowSamples;
// Products of two numbers that take as long as what is done with an element of a key or a value.
constexpr int64_t kElementProducts = 4;
constexpr size_t kPatternsKept = 16;

// The scratch memory of an item.
struct StepScratch {
  float *keys, *values;  // copies of the text's
  float *queries;        // by sample: the row, then the vector that holds its end
  float *scores, *text_sums, *image_sums;

  static int64_t size(const CachePart& args) {
    return args.head_dim * wide_text(args) + args.pattern.text_len * wide_dim(args) +
           kRowSamples * (3 * args.padded_dim() + kTileQueries + args.score_stride());
  }

  StepScratch(const CachePart& args, float* memory) {
    const auto take = [&](int64_t count) { return std::exchange(memory, memory + count); };
    keys = take(args.head_dim * wide_text(args));
    values = take(args.pattern.text_len * wide_dim(args));
    queries = take(kRowSamples * (args.padded_dim() + kTileQueries));
    scores = take(kRowSamples * args.score_stride());
    text_sums = take(kRowSamples * args.padded_dim());
    image_sums = take(kRowSamples * args.padded_dim());
  }

 private:
  // Copies have whole blocks of columns.
  static int64_t wide_text(const CachePart& args) { return ceil_div(args.pattern.text_len, 64) * 64; }
  static int64_t wide_dim(const CachePart& args) { return ceil_div(args.head_dim, 64) * 64; }
};

template <class T>
struct StepWorker {
  template <CpuLevel kLevel>
  static DALLE_FAST_INLINE void run(const CachePart* args, int64_t item, float* memory) {
    using Loops = StepLoops<T, kLevel>;
    const int64_t block = item % args->num_blocks, head = item / args->num_blocks % args->heads;
    const int64_t prompt = item / args->num_blocks / args->heads;
    const int64_t first = block * args->block, end = std::min(first + args->block, args->samples);
    const int64_t visible_text = std::clamp<int64_t>(args->text_lens[prompt], 0, args->pattern.text_len);
    const int64_t panel_elements = args->head_dim * args->pattern.text_len, panel = prompt * args->heads + head;
    const T* keys = static_cast<const T*>(args->text_key) + panel * panel_elements;
    const T* values = static_cast<const T*>(args->text_value) + panel * panel_elements;

    const StepScratch scratch(*args, memory);
    const bool copies = end - first >= kCopyFrom;
    const bool copies_keys = copies || args->pattern.text_len < Loops::kLanes;
    const bool copies_values = (copies && !std::is_same_v<T, float>) || args->head_dim < Loops::kLanes;
    auto key_panel = Loops::in_place(keys, args->pattern.text_len);
    auto value_panel = Loops::in_place(values, args->head_dim);
    typename Loops::template Panel<float> key_copy{}, value_copy{};
    if (copies_keys) key_copy = Loops::copied(keys, args->pattern.text_len, args->head_dim, visible_text, scratch.keys);
    if (copies_values) value_copy = Loops::copied(values, args->head_dim, visible_text, args->head_dim, scratch.values);

    for (int64_t sample = first; sample < end; sample += kRowSamples) {
      const int64_t count = std::min<int64_t>(end - sample, kRowSamples);
      Rows<kLevel> rows{*args, scratch, head, prompt * args->samples + sample, count, visible_text};
      rows.begin();
      RowFetcher ahead = rows.fetcher(args->image_key);
      if (copies_keys) {
        rows.text_scores(key_copy, ahead);
      } else {
        rows.text_scores(key_panel, ahead);
      }
      rows.image_scores_and_weights(ahead);
      ahead = rows.fetcher(args->image_value);
      if (copies_values) {
        rows.text_values(value_copy, ahead);
      } else {
        rows.text_values(value_panel, ahead);
      }
      rows.image_values(ahead);
      rows.finish();
    }
  }

  // Up to kRowSamples samples of one prompt and head.
  template <CpuLevel kLevel>
  struct Rows {
    using Loops = StepLoops<T, kLevel>;
    static constexpr int kLanes = Loops::kLanes;

    const CachePart& args;
    const StepScratch& scratch;
    int64_t head, first, samples, visible_text;
    int64_t padded_text = 0, score_stride = 0, padded_dim = 0, query_stride = 0;
    float totals[kRowSamples] = {};

    DALLE_FAST_INLINE T* image(void* base, int64_t s) const {
      return static_cast<T*>(base) + ((first + s) * args.heads + head) * args.slots * args.head_dim;
    }

    static DALLE_FAST_INLINE void append(const char* row, StorageType type, int64_t count, float* wide, T* to) {
      load_row(row, type, count, wide);
      for (int64_t d = 0; d < count; ++d) from_float(wide[d], to[d]);
    }

    // Appends keys and values, and takes the queries.
    DALLE_FAST_INLINE void begin() {
      const int64_t head_dim = args.head_dim;
      padded_text = ceil_div(visible_text, kLanes) * kLanes;
      score_stride = args.score_stride();
      padded_dim = args.padded_dim();
      query_stride = padded_dim + kTileQueries;
      const typename Loops::RowEnd end(head_dim);
      for (int64_t s = 0; s < samples; ++s) {
        float* query = scratch.queries + s * query_stride;
        const int64_t to = args.new_slot * head_dim;
        append(args.key.row(first + s, head, 0), args.query_type, head_dim, query, image(args.image_key, s) + to);
        append(args.value.row(first + s, head, 0), args.query_type, head_dim, query, image(args.image_value, s) + to);
        load_row(args.query.row(first + s, head, 0), args.query_type, head_dim, query);
        for (int64_t d = 0; d < head_dim; ++d) query[d] *= args.scale;
        if (!end.empty()) Loops::I::store(query + padded_dim, end.load(query));
      }
    }

    // To be called during one product with the text, and then for what is left.
    DALLE_FAST_INLINE RowFetcher fetcher(void* base) const {
      const int64_t row_bytes = args.head_dim * static_cast<int64_t>(sizeof(T)), rows = args.num_seen * samples;
      const int64_t calls = args.head_dim * visible_text * Loops::product_passes(samples) / (4 * Loops::kColumns);
      return {reinterpret_cast<const char*>(image(base, 0)),
              args.heads * args.slots * row_bytes,
              row_bytes,
              args.seen,
              args.num_seen,
              rows,
              ceil_div(rows, std::max<int64_t>(calls, 1))};
    }

    template <class Panel>
    DALLE_FAST_INLINE void text_scores(const Panel& keys, RowFetcher& ahead) {
      Loops::product(samples, keys, args.head_dim, scratch.queries, query_stride, visible_text, scratch.scores,
                     score_stride, ahead);
    }

    DALLE_FAST_INLINE void image_scores_and_weights(RowFetcher& ahead) {
      ahead.fetch(kLanes);
      constexpr int kFew = kLanes / 4;
      const typename Loops::RowEnd end(args.head_dim);
      for (int64_t s = 0; s < samples; ++s) {
        const float* query = scratch.queries + s * query_stride;
        float* scores = scratch.scores + s * score_stride;
        for (int64_t k = visible_text; k < padded_text; ++k) scores[k] = kMasked;
        const T* keys = image(args.image_key, s);
        float* to = scores + padded_text;
        int64_t k = 0;
        for (; k < args.num_seen; k += kLanes) {
          const int64_t count = std::min<int64_t>(args.num_seen - k, kLanes);
          ahead.fetch(kLanes);
          if (count > kFew) {
            Loops::template image_scores<kLanes>(keys, args.seen + k, count, query, query + padded_dim, end, to + k);
          } else {
            Loops::template image_scores<kFew>(keys, args.seen + k, count, query, query + padded_dim, end, to + k);
          }
        }
        for (int64_t j = args.num_seen; j < k; ++j) to[j] = kMasked;
        totals[s] = Loops::softmax(scores, padded_text + k);
      }
    }

    template <class Panel>
    DALLE_FAST_INLINE void text_values(const Panel& values, RowFetcher& ahead) {
      Loops::product(samples, values, visible_text, scratch.scores, score_stride, args.head_dim, scratch.text_sums,
                     padded_dim, ahead);
    }

    DALLE_FAST_INLINE void image_values(RowFetcher& ahead) {
      ahead.rows_a_call = 1;
      ahead.fetch(kLanes / 2);
      const int64_t head_dim = args.head_dim;
      for (int64_t s = 0; s < samples; ++s) {
        const T* values = image(args.image_value, s);
        const float* weights = scratch.scores + s * score_stride + padded_text;
        float* to = scratch.image_sums + s * padded_dim;
        if (head_dim < kLanes) {
          std::memset(to, 0, static_cast<size_t>(head_dim) * sizeof(float));
          for (int64_t k = 0; k < args.num_seen; ++k) {
            for (int64_t d = 0; d < head_dim; ++d) to[d] += weights[k] * to_float(values[args.seen[k] * head_dim + d]);
          }
          continue;
        }
        const int32_t* seen = args.seen;
        const auto row = [=](int64_t k) __attribute__((always_inline)) { return values + seen[k] * head_dim; };
        Loops::template product_rows<1>(row, args.num_seen, weights, 0, head_dim, head_dim, to, 0, ahead);
      }
    }

    DALLE_FAST_INLINE void finish() {
      for (int64_t s = 0; s < samples; ++s) {
        float *sums = scratch.text_sums + s * padded_dim, *image = scratch.image_sums + s * padded_dim;
        const float total = totals[s];
        for (int64_t d = 0; d < args.head_dim; ++d) {
          const float sum = visible_text > 0 ? sums[d] + image[d] : image[d];
          sums[d] = total == 0.0f ? 0.0f : sum / total;
        }
        store_row(sums, args.head_dim, 1.0f, args.query_type, args.out.row(first + s, head, 0));
      }
    }
  };
};

// The taps of the last few patterns.
std::shared_ptr<const std::vector<Tap>> kept_taps(const AttentionPattern& pattern) {
  using Taps = std::shared_ptr<const std::vector<Tap>>;
  static std::mutex mutex;
  static std::vector<std::pair<AttentionPattern, Taps>> kept;  // the most recently made first
  const std::lock_guard<std::mutex> lock(mutex);
  for (const auto& [known, taps] : kept) {
    if (known == pattern) return taps;
  }
  if (kept.size() >= kPatternsKept) kept.pop_back();
  kept.emplace(kept.begin(), pattern, std::make_shared<const std::vector<Tap>>(taps_of(pattern, pattern.height)));
  return kept.front().second;
}

AttentionPattern pattern_of(const std::vector<int64_t>& code) {
  if (code.size() != 6) throw std::runtime_error("pattern must have 6 numbers, got " + std::to_string(code.size()));
  const bool is_rule = code[0] >= 0 && code[0] <= static_cast<int64_t>(Rule::kConvCorner);
  const bool is_grid = code[1] >= 0 && std::min(code[2], code[3]) >= 1;
  const bool fits = std::max({code[1], code[2], code[3]}) <= INT32_MAX;
  const AttentionPattern pattern{static_cast<Rule>(code[0]), code[1], code[2], code[3], code[4], code[5]};
  const bool is_kernel = pattern.rule < Rule::kConvRaster || std::min(code[4], code[5]) >= 1;
  if (is_rule && is_grid && fits && is_kernel) return pattern;
  throw std::runtime_error("pattern must be a pattern's code, got " + tuple_text(code));
}

// As many as the pattern needs; of convolutions find_seen_slots tells what is seen back.
void check_slots(const AttentionPattern& pattern, int64_t slots) {
  const int64_t image_len = pattern.height * pattern.width;
  int64_t needed = image_len;
  if (pattern.rule == Rule::kRowRaster) needed = std::min(pattern.width + 1, image_len);
  if (pattern.rule == Rule::kRowSameRow) needed = pattern.width;
  if (pattern.rule >= Rule::kConvRaster) needed = std::max<int64_t>(slots, 1);
  if (slots == needed) return;
  throw std::runtime_error("image_key must have " + std::to_string(needed) + " slots, got " + std::to_string(slots));
}

// The slots of the image positions that the position n sees.
void find_seen_slots(const AttentionPattern& pattern, int64_t n, int64_t slots, std::vector<int32_t>& seen) {
  const int64_t row = n / pattern.width, column = n % pattern.width;
  const auto take_run = [&](int64_t first, int64_t count) {
    seen.resize(count);
    std::iota(seen.begin(), seen.end(), static_cast<int32_t>(first));
  };
  switch (pattern.rule) {
    case Rule::kFull:
    case Rule::kRowRaster:
      return take_run(0, std::min(n + 1, slots));
    case Rule::kRowSameRow:
      return take_run(0, column + 1);
    case Rule::kColumn:
      return take_run(column * pattern.height, row + 1);
    default:
      break;
  }
  seen.clear();
  const auto taps = kept_taps(pattern);
  for (const Tap& tap : *taps) {
    const int64_t r = row - tap.dr, c = column - tap.dc;
    if (r < 0) break;  // taps are sorted by dr
    if (c < 0 || c >= pattern.width) continue;
    const int64_t key = r * pattern.width + c;
    if (n - key >= slots) {
      throw std::runtime_error("image_key must have more than " + std::to_string(n - key) +
                               " slots, as many as the pattern sees back, got " + std::to_string(slots));
    }
    seen.push_back(static_cast<int32_t>(key % slots));
  }
}

// Of a row for each sample and head, (B, H, 1, D).
void check_rows(const Tensor& tensor, const char* name, const std::vector<int64_t>& shape) {
  check_shape(tensor, name, shape);
  if (tensor.stride(3) == 1 || shape[3] <= 1) return;
  throw std::runtime_error(std::string(name) + " must have a contiguous last dimension, got strides " +
                           tuple_text(tensor.strides()));
}

CachePart part_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& text_key,
                  const Tensor& text_value, Tensor& image_key, Tensor& image_value, Tensor& held,
                  const Tensor& text_lens, const std::vector<int64_t>& pattern, double scale, Tensor& out) {
  CachePart part{};
  part.pattern = pattern_of(pattern);
  if (image_key.dim() != 4 || text_value.dim() != 4) {
    throw std::runtime_error("image_key and text_value must have 4 dimensions, got shapes " +
                             tuple_text(image_key.sizes()) + " and " + tuple_text(text_value.sizes()));
  }
  const int64_t batch = image_key.size(0), prompts = text_value.size(0), text_len = part.pattern.text_len;
  if (batch < 1 || prompts < 1 || batch % prompts != 0) {
    throw std::runtime_error("the batch must be a multiple of the number of prompts, got " + std::to_string(batch) +
                             " and " + std::to_string(prompts));
  }
  const ScalarType dtype = image_key.scalar_type();
  part.cache_type = storage_type(image_key, "image_key");
  part.prompts = prompts;
  part.samples = batch / prompts;
  part.heads = image_key.size(1);
  part.slots = image_key.size(2);
  part.head_dim = image_key.size(3);
  part.scale = static_cast<float>(scale);
  const std::vector<int64_t> shape{batch, part.heads, 1, part.head_dim};
  check_rows(query, "query", shape);
  check_rows(key, "key", shape);
  check_rows(value, "value", shape);
  check_rows(out, "out", shape);
  part.query = rows_view(query);
  part.key = rows_view(key);
  part.value = rows_view(value);
  part.out = rows_view(out);
  part.query_type = storage_type(query, "query");
  check_dtype(key, "key", query.scalar_type());
  check_dtype(value, "value", query.scalar_type());
  check_dtype(out, "out", query.scalar_type());
  const int64_t text_elements = prompts * part.heads * part.head_dim * text_len;
  const int64_t image_elements = batch * part.heads * part.head_dim * part.slots;
  part.text_key = data_of<const void>(text_key, "text_key", dtype, text_elements);
  part.text_value = data_of<const void>(text_value, "text_value", dtype, text_elements);
  part.image_key = data_of<void>(image_key, "image_key", dtype, image_elements);
  part.image_value = data_of<void>(image_value, "image_value", dtype, image_elements);
  part.text_lens = data_of<const int64_t>(text_lens, "text_lens", ScalarType::Long, prompts);
  check_slots(part.pattern, part.slots);
  part.held = data_of<int64_t>(held, "held", ScalarType::Long, 1);
  return part;
}

void attention_with_kvcache(const Tensor query, const Tensor key, const Tensor value, const Tensor text_key,
                            const Tensor text_value, Tensor image_key, Tensor image_value, Tensor held,
                            const Tensor text_lens, const std::vector<int64_t> pattern, double scale, Tensor out) {
  const Part part = part_of(query, key, value, text_key, text_value, image_key, image_value, held, text_lens, pattern,
                            scale, out);
  run_parts({&part, 1});
}

Tensor attention_with_kvcache_plan(const Tensor query, const Tensor key, const Tensor value, const Tensor text_key,
                                   const Tensor text_value, Tensor image_key, Tensor image_value, Tensor held,
                                   const Tensor text_lens, const std::vector<int64_t> pattern, double scale,
                                   Tensor out) {
  const Part part = part_of(query, key, value, text_key, text_value, image_key, image_value, held, text_lens, pattern,
                            scale, out);
  return plan_of({&part, 1}, query);
}

}  // namespace

int64_t CachePart::begin(std::vector<int32_t>& seen_slots) {
  const int64_t n = *held - pattern.text_len;
  if (n < 0) {
    throw std::runtime_error("the cache must hold the " + std::to_string(pattern.text_len) +
                             " text positions first: call prefill()");
  }
  if (*held >= pattern.seq_len()) {
    throw std::runtime_error("the cache is full, it holds all " + std::to_string(pattern.seq_len()) +
                             " positions: call reset()");
  }
  new_slot = pattern.rule == Rule::kColumn ? n % pattern.width * pattern.height + n / pattern.width : n % slots;
  find_seen_slots(pattern, n, slots, seen_slots);
  seen = seen_slots.data();
  num_seen = static_cast<int64_t>(seen_slots.size());
  return kElementProducts * prompts * samples * heads * head_dim * (pattern.text_len + num_seen);
}

Division CachePart::divide(int64_t threads) {
  // Enough items to keep all threads busy to the end; a prompt's samples are cut only where there are few heads.
  const int64_t panels = prompts * heads;
  const int64_t most_blocks = ceil_div(samples, kRowSamples);
  const int64_t wanted_blocks = threads == 1 ? 1 : std::clamp<int64_t>(ceil_div(4 * threads, panels), 1, most_blocks);
  block = ceil_div(ceil_div(samples, wanted_blocks), kRowSamples) * kRowSamples;
  num_blocks = ceil_div(samples, block);
  return {panels * num_blocks, 0, StepScratch::size(*this)};
}

void CachePart::run(int64_t item, PartMemory memory) const {
  switch (cache_type) {
    case StorageType::kFloat:
      return run_at_cpu_level<StepWorker<float>>(this, item, memory.own);
    case StorageType::kHalf:
      return run_at_cpu_level<StepWorker<Half>>(this, item, memory.own);
    case StorageType::kBfloat16:
      return run_at_cpu_level<StepWorker<Bfloat16>>(this, item, memory.own);
  }
}

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) {
  m.impl("attention_with_kvcache_cpu", TORCH_BOX(&attention_with_kvcache));
  m.impl("attention_with_kvcache_plan_cpu", TORCH_BOX(&attention_with_kvcache_plan));
}

}  // namespace dalle_fast
