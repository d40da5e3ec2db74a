// A step of decoding as a list of parts, which all threads work off in one parallel region.
//
// A step is some hundred pieces of a few microseconds, each of which needs all of the one before. A region of its own
// for each costs as much as reading a small matrix: threads wake, and wait for each other at its end. Here they meet at
// counters (decode_parts.cpp).
//
// A part is made once, when all its sizes and addresses are known; a run works on a copy:
//
//   begin    for all parts, before the first item of any: throws if there is something wrong
//   divide   then: how many items there are for so many threads
//   run      an item; all of a part's before the first of the next, in any order, by any thread
//   end      for all parts, after the last item of all
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

#include "attention_rows.h"

namespace dalle_fast {

// In floats.
struct PartMemory {
  float* shared;  // what a part leaves to the next
  float* own;     // a thread's scratch
};

struct Division {
  int64_t items, shared, own;  // of memory, how much an item needs
};

enum class Activation { kNone, kFastGelu, kGelu, kGeluTanh };

// What goes into a linear layer, after LayerNorm, laid out in the shared memory as the products read it.
struct NormPart {
  const float* x;  // (rows, columns)
  int64_t rows, columns;
  const float *gain, *shift;  // (columns), or null: a copy
  float eps;
  int64_t groups_an_item;

  int64_t begin(std::vector<int32_t>&) const { return 4 * rows * columns; }
  Division divide(int64_t threads);
  void run(int64_t item, PartMemory memory) const;
  void end() const {}
};

// The products with the weights, and what follows them.
struct LinearPart {
  const float* x;  // laid out as NormPart does, or null: what it has left in the shared memory
  int64_t rows, columns;
  const void* weight;  // (width, columns)
  StorageType weight_type;
  int64_t width;
  const float* bias;      // (width), or null
  const float* residual;  // (rows, width), or null; may be out
  Activation activation;
  float* out;  // (rows, width)
  int64_t share, shares, chunk;  // columns of out: a share for each of so many threads, the rest in chunks

  int64_t begin(std::vector<int32_t>&) const { return rows * width * columns; }
  Division divide(int64_t threads);
  void run(int64_t item, PartMemory memory) const;
  void end() const {}
};

// Attention with cached keys and values, to which a position is appended.
struct CachePart {
  RowsView query, key, value, out;
  StorageType query_type, cache_type;
  const void *text_key, *text_value;
  void *image_key, *image_value;
  const int64_t* text_lens;
  int64_t* held;  // positions in the cache
  AttentionPattern pattern;
  int64_t prompts, samples, heads, head_dim, slots;  // samples: of a prompt
  float scale;
  int64_t new_slot;      // of the position that is appended
  const int32_t* seen;   // slots of the image positions that it sees, itself among them
  int64_t num_seen;
  int64_t block, num_blocks;  // samples in an item; items in a prompt and head

  int64_t padded_dim() const { return ceil_div(head_dim, kTileQueries) * kTileQueries; }
  int64_t padded_text() const { return ceil_div(pattern.text_len, kTileQueries) * kTileQueries; }
  int64_t score_stride() const { return padded_text() + ceil_div(num_seen, kTileQueries) * kTileQueries; }

  int64_t begin(std::vector<int32_t>& seen_slots);  // which must stay as they are until the end
  Division divide(int64_t threads);
  void run(int64_t item, PartMemory memory) const;
  void end() const { *held += 1; }
};

// The states that a step reads: embed_token.cpp.
struct EmbedPart {
  const int64_t* tokens;  // (samples, length)
  const int64_t* position;
  const float* embedding;  // (codes, width)
  const float* start;      // (width)
  const float* place;      // (length, width)
  float* out;              // (rows, width)
  int64_t samples, length, codes, width, rows;
  int64_t samples_an_item;

  int64_t begin(std::vector<int32_t>&) const;
  Division divide(int64_t threads);
  void run(int64_t item, PartMemory memory) const;
  void end() const {}
};

// From scores to tokens: draw_token.cpp.
struct DrawPart {
  const float* conditional;    // (samples, codes)
  const float* unconditional;  // (samples, codes), or null: no guidance
  float cond_scale;
  int64_t samples, codes;
  const int64_t* seeds;  // (samples)
  const int64_t* position;
  const bool* keep;      // (samples, length), or null
  bool takes_likeliest;  // a temperature of 0
  float temperature;
  int64_t top_k;
  double top_p;
  int64_t* tokens;  // (samples, length)
  int64_t length;
  float* scores;  // (samples)
  int64_t samples_an_item;

  int64_t place(int64_t sample) const { return sample * length + *position; }
  bool keeps(int64_t sample) const { return keep != nullptr && keep[place(sample)]; }

  int64_t begin(std::vector<int32_t>&) const;
  Division divide(int64_t threads);
  void run(int64_t item, PartMemory memory) const;
  void end() const {}
};

// begin() says how much there is to do, in products of two numbers, by which more threads are worth their while.
using Part = std::variant<EmbedPart, NormPart, LinearPart, CachePart, DrawPart>;
static_assert(std::is_trivially_copyable_v<Part>, "a plan keeps parts as bytes");

// Runs parts one after the other, each on all threads.
void run_parts(std::span<const Part> parts);

// Parts as a tensor of bytes, on the device of `like`.
torch::stable::Tensor plan_of(std::span<const Part> parts, const torch::stable::Tensor& like);

}  // namespace dalle_fast
