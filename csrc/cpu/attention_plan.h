// Who sees whom, cut into tiles of 16 queries.
//
// A tile's queries share two dense runs of keys, the first num_text positions and the first num_image of the image,
// which all of them see, and a list of further keys, each with one bit a query that says who sees it. Image queries are
// grouped into the shape that needs the fewest keys in all: for row attention 16 in raster order, for column attention 16
// of one column, for convolutions a patch. The lists take memory in proportion to the positions times the
// window, and nothing is ever as large as the square of the sequence.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

namespace dalle_fast {

inline constexpr int kTileQueries = 16;

// The codes of patterns.py's Pattern.code.
enum class Rule { kFull, kRowRaster, kRowSameRow, kColumn, kConvRaster, kConvClip, kConvTorus, kConvCorner };

struct AttentionPattern {
  Rule rule;
  int64_t text_len;
  int64_t height;
  int64_t width;
  int64_t kernel_size;
  int64_t dilation;

  int64_t seq_len() const { return text_len + height * width; }
  // Whether an image query sees the image key dr rows and dc columns before it, causality aside.
  bool reaches(int64_t dr, int64_t dc) const;
  bool operator==(const AttentionPattern&) const = default;
};

// An offset (rows, columns) from an image query back to a key that it sees.
struct Tap {
  int32_t dr;
  int32_t dc;
};

// Those within the first `rows` rows of the image, nearest row first.
std::vector<Tap> taps_of(const AttentionPattern& pattern, int64_t rows);

struct AttentionTile {
  int32_t queries[kTileQueries];  // sequence positions, ascending where they are text
  int32_t num_queries;
  int32_t num_text;   // text keys 0..num_text-1 are seen by all
  int32_t num_image;  // image keys text_len..text_len+num_image-1 are seen by all
  int64_t first_key;  // of AttentionPlan::keys
  int32_t num_keys;
  bool is_text;
};

struct AttentionPlan {
  std::vector<AttentionTile> tiles;
  std::vector<int32_t> keys;    // ascending within a tile
  std::vector<uint16_t> lanes;  // bit i: the tile's query i sees the key
  int32_t max_keys = 0;         // longest list of a tile
  int32_t max_image = 0;        // longest image run of a tile
};

// The plan of the first `length` positions; the last few plans are kept.
std::shared_ptr<const AttentionPlan> attention_plan(const AttentionPattern& pattern, int64_t length);

}  // namespace dalle_fast
