#include "attention_plan.h"

#include <algorithm>
#include <mutex>
#include <utility>

namespace dalle_fast {
namespace {

constexpr size_t kPlansKept = 16;
constexpr uint16_t kAllLanes = 0xffff;

int64_t floor_mod(int64_t value, int64_t modulus) {
  const int64_t rest = value % modulus;
  return rest < 0 ? rest + modulus : rest;
}

bool is_tap(int64_t offset, int64_t first, int64_t last, int64_t step) {
  return offset % step == 0 && offset / step >= first && offset / step <= last;
}

bool is_wrapped_tap(int64_t offset, int64_t half, int64_t step, int64_t side) {
  const int64_t wrapped = floor_mod(offset, side), wrapped_step = step % side;
  for (int64_t tap = -half; tap <= half; ++tap) {
    if (floor_mod(tap % side * wrapped_step, side) == wrapped) return true;
  }
  return false;
}

// The part of the image that a prefix of the sequence reaches.
struct Image {
  int64_t rows, width, length;

  Image(const AttentionPattern& pattern, int64_t image_length)
      : rows((image_length + pattern.width - 1) / pattern.width), width(pattern.width), length(image_length) {}
};

// How 16 image queries are chosen: a patch of rows x columns, or 16 in raster order.
struct Shape {
  int64_t rows;
  int64_t columns;
  bool is_raster;

  int64_t num_tiles(const Image& image) const {
    if (is_raster) return (image.length + kTileQueries - 1) / kTileQueries;
    return ((image.rows + rows - 1) / rows) * ((image.width + columns - 1) / columns);
  }

  // Raster positions of the queries of tile `index`; patches go down the columns first.
  std::vector<int32_t> queries(const Image& image, int64_t index) const {
    std::vector<int32_t> found;
    if (is_raster) {
      const int64_t end = std::min((index + 1) * kTileQueries, image.length);
      for (int64_t p = index * kTileQueries; p < end; ++p) found.push_back(static_cast<int32_t>(p));
      return found;
    }
    const int64_t down = (image.rows + rows - 1) / rows;
    const int64_t row0 = index % down * rows, column0 = index / down * columns;
    for (int64_t r = row0; r < std::min(row0 + rows, image.rows); ++r) {
      for (int64_t c = column0; c < std::min(column0 + columns, image.width); ++c) {
        const int64_t p = r * image.width + c;
        if (p < image.length) found.push_back(static_cast<int32_t>(p));
      }
    }
    return found;
  }
};

// Collects the image keys that a set of image queries sees.
class KeyCollector {
 public:
  KeyCollector(const Image& image, const std::vector<Tap>& taps)
      : image_(image), taps_(taps), lanes_(image.rows * image.width, 0) {}

  // Raster positions of the keys, ascending; lanes(key) says which queries see one, until the next call.
  const std::vector<int32_t>& collect(const std::vector<int32_t>& queries) {
    for (const int32_t key : keys_) lanes_[key] = 0;
    keys_.clear();
    for (size_t lane = 0; lane < queries.size(); ++lane) {
      const int64_t row = queries[lane] / image_.width, column = queries[lane] % image_.width;
      for (const Tap& tap : taps_) {
        const int64_t r = row - tap.dr, c = column - tap.dc;
        if (r < 0) break;  // taps are sorted by dr
        if (c < 0 || c >= image_.width) continue;
        const int64_t key = r * image_.width + c;
        if (lanes_[key] == 0) keys_.push_back(static_cast<int32_t>(key));
        lanes_[key] |= static_cast<uint16_t>(1u << lane);
      }
    }
    std::sort(keys_.begin(), keys_.end());
    return keys_;
  }

  uint16_t lanes(int32_t key) const { return lanes_[key]; }

 private:
  const Image& image_;
  const std::vector<Tap>& taps_;
  std::vector<uint16_t> lanes_;
  std::vector<int32_t> keys_;
};

// The shape with the fewest keys in all, by a sample of its tiles.
Shape best_shape(const AttentionPattern& pattern, const Image& image, KeyCollector& collector) {
  constexpr Shape kShapes[] = {{1, 16, true}, {1, 16, false}, {2, 8, false}, {4, 4, false}, {8, 2, false}, {16, 1, false}};
  constexpr int64_t kSamples = 64;
  Shape best = kShapes[0];
  double best_cost = 0;
  for (const Shape& shape : kShapes) {
    const int64_t num_tiles = shape.num_tiles(image);
    const int64_t step = (num_tiles / kSamples) | 1;  // odd, not to meet one row of the grid only
    int64_t keys = 0, sampled = 0;
    for (int64_t index = 0; index < num_tiles; index += step, ++sampled) {
      keys += static_cast<int64_t>(collector.collect(shape.queries(image, index)).size());
    }
    const double cost = static_cast<double>(num_tiles) * (static_cast<double>(keys) / sampled + pattern.text_len);
    if (&shape == kShapes || cost < best_cost) {
      best = shape;
      best_cost = cost;
    }
  }
  return best;
}

void add_causal_keys(AttentionPlan& plan, AttentionTile& tile) {
  tile.first_key = static_cast<int64_t>(plan.keys.size());
  tile.num_keys = tile.num_queries;
  for (int32_t i = 0; i < tile.num_queries; ++i) {
    plan.keys.push_back(tile.queries[i]);
    plan.lanes.push_back(static_cast<uint16_t>(kAllLanes << i));
  }
}

// Tiles of consecutive positions first..end-1 of which each sees all before it.
void add_causal_tiles(AttentionPlan& plan, const AttentionPattern& pattern, int64_t first, int64_t end, bool is_text) {
  for (int64_t start = first; start < end; start += kTileQueries) {
    AttentionTile tile{};
    tile.is_text = is_text;
    tile.num_queries = static_cast<int32_t>(std::min<int64_t>(kTileQueries, end - start));
    for (int32_t i = 0; i < tile.num_queries; ++i) tile.queries[i] = static_cast<int32_t>(start + i);
    tile.num_text = static_cast<int32_t>(is_text ? start : pattern.text_len);
    tile.num_image = static_cast<int32_t>(is_text ? 0 : start - pattern.text_len);
    add_causal_keys(plan, tile);
    plan.tiles.push_back(tile);
  }
}

void add_image_tiles(AttentionPlan& plan, const AttentionPattern& pattern, int64_t image_length) {
  const Image image(pattern, image_length);
  const std::vector<Tap> taps = taps_of(pattern, image.rows);
  KeyCollector collector(image, taps);
  const Shape shape = best_shape(pattern, image, collector);
  const int64_t num_tiles = shape.num_tiles(image);
  for (int64_t index = 0; index < num_tiles; ++index) {
    const std::vector<int32_t> queries = shape.queries(image, index);
    if (queries.empty()) continue;
    const auto all = static_cast<uint16_t>((1u << queries.size()) - 1);
    AttentionTile tile{};
    tile.num_queries = static_cast<int32_t>(queries.size());
    for (size_t i = 0; i < queries.size(); ++i) {
      tile.queries[i] = static_cast<int32_t>(pattern.text_len) + queries[i];
    }
    tile.num_text = static_cast<int32_t>(pattern.text_len);
    const std::vector<int32_t>& keys = collector.collect(queries);
    // Keys that continue the dense run from the first image position need no list.
    size_t run = 0;
    while (run < keys.size() && keys[run] == static_cast<int32_t>(run) && collector.lanes(keys[run]) == all) ++run;
    if (run < 2 * kTileQueries) run = 0;  // not worth a pass of its own
    tile.num_image = static_cast<int32_t>(run);
    tile.first_key = static_cast<int64_t>(plan.keys.size());
    tile.num_keys = static_cast<int32_t>(keys.size() - run);
    for (size_t i = run; i < keys.size(); ++i) {
      plan.keys.push_back(static_cast<int32_t>(pattern.text_len) + keys[i]);
      plan.lanes.push_back(collector.lanes(keys[i]));
    }
    plan.tiles.push_back(tile);
  }
}

std::shared_ptr<const AttentionPlan> make_plan(const AttentionPattern& pattern, int64_t length) {
  auto plan = std::make_shared<AttentionPlan>();
  const int64_t text_length = std::min(pattern.text_len, length);
  add_causal_tiles(*plan, pattern, 0, text_length, true);
  if (length > pattern.text_len) {
    if (pattern.rule == Rule::kFull) {
      add_causal_tiles(*plan, pattern, pattern.text_len, length, false);
    } else {
      add_image_tiles(*plan, pattern, length - pattern.text_len);
    }
  }
  for (const AttentionTile& tile : plan->tiles) {
    plan->max_keys = std::max(plan->max_keys, tile.num_keys);
    plan->max_image = std::max(plan->max_image, tile.num_image);
  }
  return plan;
}

}  // namespace

bool AttentionPattern::reaches(int64_t dr, int64_t dc) const {
  const int64_t half = (kernel_size - 1) / 2;
  const int64_t offset = dr * width + dc;
  switch (rule) {
    case Rule::kFull:
      return true;
    case Rule::kRowRaster:
      return offset <= width;
    case Rule::kRowSameRow:
      return dr == 0;
    case Rule::kColumn:
      return dc == 0;
    case Rule::kConvRaster: {
      if (offset % dilation != 0) return false;
      const int64_t taps = offset / dilation;
      return taps < (half + 1) * width && (taps + half) % width <= 2 * half;
    }
    case Rule::kConvClip:
      return is_tap(dr, -half, half, dilation) && is_tap(dc, -half, half, dilation);
    case Rule::kConvTorus:
      return is_wrapped_tap(dr, half, dilation, height) && is_wrapped_tap(dc, half, dilation, width);
    case Rule::kConvCorner:
      return is_tap(dr, 0, kernel_size - 1, dilation) && is_tap(dc, 0, kernel_size - 1, dilation);
  }
  return false;
}

std::vector<Tap> taps_of(const AttentionPattern& pattern, int64_t rows) {
  std::vector<Tap> taps;
  for (int64_t dr = 0; dr < rows; ++dr) {
    for (int64_t dc = dr == 0 ? 0 : 1 - pattern.width; dc < pattern.width; ++dc) {
      if (pattern.reaches(dr, dc)) taps.push_back({static_cast<int32_t>(dr), static_cast<int32_t>(dc)});
    }
  }
  return taps;
}

std::shared_ptr<const AttentionPlan> attention_plan(const AttentionPattern& pattern, int64_t length) {
  struct Entry {
    AttentionPattern pattern;
    int64_t length;
    std::shared_ptr<const AttentionPlan> plan;
  };
  static std::mutex mutex;
  static std::vector<Entry> entries;  // the most recently used first
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) {
      return entry.length == length && entry.pattern == pattern;
    });
    if (found != entries.end()) {
      std::rotate(entries.begin(), found, found + 1);
      return entries.front().plan;
    }
  }
  std::shared_ptr<const AttentionPlan> plan = make_plan(pattern, length);
  const std::lock_guard<std::mutex> lock(mutex);
  if (entries.size() >= kPlansKept) entries.pop_back();
  entries.insert(entries.begin(), Entry{pattern, length, plan});
  return plan;
}

}  // namespace dalle_fast
