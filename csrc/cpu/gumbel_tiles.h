// The inner loops of Gumbel-softmax quantisation on the CPU, on tiles of 16 positions: lane i of every vector is
// position i, as in attention_tiles.h, and a block is 128 codes, those that share 32 counters of the generator.
//
//   add_noise       logits[c][i] - ln(-ln u), u from Philox-4x32-10: docs/gumbel.md
//   load_block      logits as floats, [code][position], whichever way they lie in memory
//   multiply_tiles  for several tiles t at once: out[t][r][i] = sum_u rows[u][r] columns[t][u][i]
//   scatter_tiles   out[c][d] += sum_t sum_i weights[t][c][i] rows[t][i][d]
#pragma once

#include <cstdint>
#include <cstring>

#include "attention_rows.h"
#include "attention_tiles.h"
#include "philox_lanes.h"

namespace dalle_fast {

// Logits (B, K, P): strides in bytes. Row b * P + p of the noise is position p of sample b.
struct LogitsView {
  char* data = nullptr;
  StorageType type = StorageType::kFloat;
  int64_t batch = 0, codes = 0, positions = 0;
  int64_t batch_stride = 0, code_stride = 0, position_stride = 0;

  int64_t rows() const { return batch * positions; }
  int64_t item_size() const { return type == StorageType::kFloat ? 4 : 2; }
};

// 16 rows of the logits; those past the end repeat the last one, and are not written.
struct RowsOfTile {
  enum class Layout { kPositionsFirst, kCodesFirst, kOther };
  int64_t first;
  int count;
  int64_t offset[kTileQueries];  // of code 0, in bytes
  uint64_t rows[2][kTileQueries / 2];  // of the noise: even lanes, odd lanes
  Layout layout;

  RowsOfTile(const LogitsView& logits, int64_t tile) : first(tile * kTileQueries) {
    count = static_cast<int>(std::min<int64_t>(kTileQueries, logits.rows() - first));
    bool consecutive = count == kTileQueries;
    for (int i = 0; i < kTileQueries; ++i) {
      const int64_t flat = std::min(first + i, logits.rows() - 1);
      rows[i % 2][i / 2] = static_cast<uint64_t>(flat);
      offset[i] =
          flat / logits.positions * logits.batch_stride + flat % logits.positions * logits.position_stride;
      consecutive = consecutive && offset[i] == offset[0] + i * logits.item_size();
    }
    layout = consecutive ? Layout::kPositionsFirst
                         : logits.code_stride == logits.item_size() ? Layout::kCodesFirst : Layout::kOther;
  }
};

// Codes first..first+count-1 of a tile: to[c][i]; `rows` is scratch for 16 x kBlockCodes floats.
DALLE_FAST_INLINE void load_block(const LogitsView& logits, const RowsOfTile& tile, int64_t first, int64_t count,
                                  float* rows, float* to) {
  using Layout = RowsOfTile::Layout;
  const char* base = logits.data + first * logits.code_stride;
  if (tile.layout == Layout::kPositionsFirst) {
    for (int64_t c = 0; c < count; ++c) {
      load_row(base + c * logits.code_stride + tile.offset[0], logits.type, kTileQueries, to + c * kTileQueries);
    }
    return;
  }
  for (int i = 0; i < kTileQueries; ++i) {
    load_strided_row(base + tile.offset[i], logits.type, logits.code_stride, count, rows + i * kBlockCodes);
  }
  transpose_rows(rows, kBlockCodes, count, to);
}

// Copies whole lines of 64 bytes past the cache; both ends are aligned. A fence has to follow the last one.
template <CpuLevel kLevel>
DALLE_FAST_INLINE void stream_lines(const void* from, int64_t bytes, char* to) {
#if defined(__x86_64__) && !defined(__clang__)
  using I = Isa<kLevel>;
  using InMemory = typename I::FloatInMemory;
  for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(sizeof(InMemory))) {
    const typename I::Float piece = *reinterpret_cast<const InMemory*>(static_cast<const char*>(from) + at);
    if constexpr (kLevel == CpuLevel::kScalar) {
      asm("movntps %1, %0" : "=m"(*reinterpret_cast<InMemory*>(to + at)) : "x"(piece));
    } else {
      asm("vmovntps %1, %0" : "=m"(*reinterpret_cast<InMemory*>(to + at)) : "v"(piece));
    }
  }
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

// Before what was streamed is read elsewhere.
DALLE_FAST_INLINE void stream_fence() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

// `count` floats to a row in memory, past the cache where `stream` asks for it and the row consists of whole lines.
template <CpuLevel kLevel>
DALLE_FAST_INLINE void store_or_stream_row(const float* from, int64_t count, StorageType type, bool stream, char* row) {
  constexpr int64_t kLine = 64;
  const int64_t bytes = count * (type == StorageType::kFloat ? 4 : 2);
  if (!stream || reinterpret_cast<uintptr_t>(row) % kLine != 0 || bytes % kLine != 0) {
    return store_row(from, count, 1.0f, type, row);
  }
  if (type == StorageType::kFloat) return stream_lines<kLevel>(from, bytes, row);
  alignas(kLine) char narrowed[kBlockCodes * 2];
  store_row(from, count, 1.0f, type, narrowed);
  stream_lines<kLevel>(narrowed, bytes, row);
}

// The reverse: from[c][i] to the memory that `logits` describes; `rows` is scratch as for load_block.
template <CpuLevel kLevel>
DALLE_FAST_INLINE void store_block(const LogitsView& logits, const RowsOfTile& tile, int64_t first, int64_t count,
                                   const float* from, bool stream, float* rows) {
  using Layout = RowsOfTile::Layout;
  char* base = logits.data + first * logits.code_stride;
  if (tile.layout == Layout::kPositionsFirst) {
    for (int64_t c = 0; c < count; ++c) {
      store_or_stream_row<kLevel>(from + c * kTileQueries, kTileQueries, logits.type, stream,
                                  base + c * logits.code_stride + tile.offset[0]);
    }
    return;
  }
  transpose_columns(from, count, rows, kBlockCodes);
  for (int i = 0; i < tile.count; ++i) {
    if (tile.layout == Layout::kCodesFirst) {
      store_or_stream_row<kLevel>(rows + i * kBlockCodes, count, logits.type, stream, base + tile.offset[i]);
    } else {
      for (int64_t c = 0; c < count; ++c) {
        store_row(rows + i * kBlockCodes + c, 1, 1.0f, logits.type, base + tile.offset[i] + c * logits.code_stride);
      }
    }
  }
}

// Asks for one of kBlockCounters parts of the lines in which a tile's logits lie.
DALLE_FAST_INLINE void prefetch_part(const LogitsView& logits, const RowsOfTile& tile, int64_t first, int64_t count,
                                     int part) {
  constexpr int kLine = 64;
  using Layout = RowsOfTile::Layout;
  const char* base = logits.data + first * logits.code_stride;
  if (tile.layout == Layout::kPositionsFirst) {
    constexpr int kCodes = kBlockCodes / kBlockCounters;
    for (int64_t c = part * kCodes; c < std::min<int64_t>(count, (part + 1) * kCodes); ++c) {
      __builtin_prefetch(base + c * logits.code_stride + tile.offset[0]);
    }
  } else if (tile.layout == Layout::kCodesFirst) {
    constexpr int kParts = kBlockCounters / kTileQueries;  // of a row
    const int64_t bytes = count * logits.item_size(), half = kBlockCodes * logits.item_size() / kParts;
    const char* row = base + tile.offset[part / kParts];
    for (int64_t at = part % kParts * half; at < std::min(bytes, (part % kParts + 1) * half); at += kLine) {
      __builtin_prefetch(row + at);
    }
  }
}

// A tile and a block of its codes.
struct TileBlock {
  const RowsOfTile& tile;
  int64_t block;
};

// perturbed[c][i] = logits[c][i] + noise, for the `count` codes of a block. Meanwhile the logits of `next` are brought in.
template <CpuLevel kLevel>
DALLE_FAST_INLINE void add_noise(const LogitsView& view, TileBlock at, TileBlock next, const PhiloxKeys& keys,
                                 int64_t count, const float* logits, float* perturbed) {
  using I = Isa<kLevel>;
  using Lanes = PhiloxLanes<kLevel>;
  const PhiloxRows rows(at.tile.rows, keys);
  const int64_t next_first = next.block * kBlockCodes, next_count = std::min(kBlockCodes, view.codes - next_first);
  // Two loops, words and then their logarithms: each is a long chain, and of one alone the CPU overlaps more turns.
  for (int counter = 0; counter < kBlockCounters && counter < count; ++counter) {
    prefetch_part(view, next.tile, next_first, next_count, counter);
    typename I::Int words[4][I::kVectors];
    Lanes::words(rows, static_cast<uint32_t>(at.block * kBlockCounters + counter), keys, words);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      const int64_t code = w * kBlockCounters + counter;
      if (code >= count) break;
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) {
        I::store(perturbed + code * kTileQueries + v * I::kLanes, reinterpret_cast<typename I::Float>(words[w][v]));
      }
    }
  }
  const auto add = [&]<int kCount>(int64_t first) __attribute__((always_inline)) {
    typename I::Float noise[kCount];
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) noise[i] = I::load(perturbed + first + i * I::kLanes);
    Lanes::template gumbel<kCount>(noise);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const int64_t i_first = first + i * I::kLanes;
      I::store(perturbed + i_first, I::load(logits + i_first) + noise[i]);
    }
  };
  constexpr int kAtOnce = I::kLanes == 16 ? 8 : 2;  // as registers allow
  const int64_t end = count * kTileQueries;
  int64_t first = 0;
  for (; first + kAtOnce * I::kLanes <= end; first += kAtOnce * I::kLanes) add.template operator()<kAtOnce>(first);
  for (; first < end; first += I::kLanes) add.template operator()<1>(first);
}

// Numbers r of a matrix rows[u][r] as multiply_tiles reads them: chunks of kChunk numbers r, in each chunk the kChunk of
// one u after those of another. In a matrix that is not packed they would lie so far apart that they evict one another.
inline constexpr int64_t kChunk = 8;

inline int64_t packed_size(int64_t units, int64_t count) { return (count + kChunk - 1) / kChunk * kChunk * units; }

// packed = rows[u][r], found at rows[u * unit_stride + r * stride].
DALLE_FAST_INLINE void pack_chunks(const float* rows, int64_t unit_stride, int64_t units, int64_t stride, int64_t count,
                                   float* packed) {
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t in_chunk = std::min(kChunk, count - first);
    for (int64_t u = 0; u < units; ++u) {
      for (int64_t r = 0; r < in_chunk; ++r) packed[u * kChunk + r] = rows[u * unit_stride + (first + r) * stride];
    }
    packed += units * kChunk;
  }
}

// out[t][r][i] = sum_u rows[u][r] columns[t][u][i], or that added to out, for kTiles tiles and kCount numbers r of one
// chunk.
template <CpuLevel kLevel, bool kAdd, int kCount, int kTiles>
DALLE_FAST_INLINE void multiply_block(const float* rows, const float* columns, int64_t columns_stride, int64_t units,
                                      float* out, int64_t out_stride) {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  Float sums[kCount][kTiles][I::kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) sums[r][t][v] = Float{};
    }
  }
  for (int64_t u = 0; u < units; ++u) {
    Float column[kTiles][I::kVectors];
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) {
        column[t][v] = I::load(columns + t * columns_stride + u * kTileQueries + v * I::kLanes);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
        for (int v = 0; v < I::kVectors; ++v) sums[r][t][v] += rows[r] * column[t][v];
      }
    }
    rows += kChunk;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int t = 0; t < kTiles; ++t) {
#pragma GCC unroll 4
      for (int v = 0; v < I::kVectors; ++v) {
        float* to = out + t * out_stride + r * kTileQueries + v * I::kLanes;
        I::store(to, kAdd ? I::load(to) + sums[r][t][v] : sums[r][t][v]);
      }
    }
  }
}

// The same for `count` numbers r, the first of which begins a chunk, or a part of one.
template <CpuLevel kLevel, bool kAdd, int kTiles, int kCount>
DALLE_FAST_INLINE void multiply_rows(const float* packed, int64_t count, const float* columns, int64_t columns_stride,
                                     int64_t units, float* out, int64_t out_stride) {
  int64_t r = 0;
  for (; r + kCount <= count; r += kCount) {
    multiply_block<kLevel, kAdd, kCount, kTiles>(packed + r / kChunk * kChunk * units + r % kChunk, columns,
                                                 columns_stride, units, out + r * kTileQueries, out_stride);
  }
  if constexpr (kCount > 1) {
    if (r < count) {
      multiply_rows<kLevel, kAdd, kTiles, kCount / 2>(packed + r / kChunk * kChunk * units + r % kChunk, count - r,
                                                      columns, columns_stride, units, out + r * kTileQueries,
                                                      out_stride);
    }
  }
}

// The same for any number of tiles, whose columns and results lie columns_stride and out_stride floats after those of the
// tile before. The sums run over u in order, at each level.
template <CpuLevel kLevel, bool kAdd>
DALLE_FAST_INLINE void multiply_tiles(const float* packed, int64_t count, const float* columns, int64_t columns_stride,
                                      int64_t num_tiles, int64_t units, float* out, int64_t out_stride) {
  // Of as many sums as there are registers for, two tiles need fewer loads: what is broadcast serves both.
  constexpr int kTiles = Isa<kLevel>::kVectors == 1 ? 2 : 1;
  constexpr int kCount = Isa<kLevel>::kBlock / kTiles;
  static_assert(kChunk % kCount == 0);
  int64_t t = 0;
  for (; t + kTiles <= num_tiles; t += kTiles) {
    multiply_rows<kLevel, kAdd, kTiles, kCount>(packed, count, columns + t * columns_stride, columns_stride, units,
                                                out + t * out_stride, out_stride);
  }
  for (; t < num_tiles; ++t) {
    multiply_rows<kLevel, kAdd, 1, kCount>(packed, count, columns + t * columns_stride, columns_stride, units,
                                           out + t * out_stride, out_stride);
  }
}

// to[c][d] += sum_t sum_i weights[t][c][i] rows[t][i][d], for kRows codes c and kCount vectors of d.
template <CpuLevel kLevel, int kRows, int kCount>
DALLE_FAST_INLINE void scatter_block(const float* weights, const float* rows, int64_t width, int64_t num_tiles,
                                     float* to) {
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  // A sum of its own for these positions: added to one by one, a code's long sum would be rounded more often.
  Float sums[kRows][kCount];
#pragma GCC unroll 4
  for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 4
    for (int d = 0; d < kCount; ++d) sums[c][d] = Float{};
  }
  for (int64_t t = 0; t < num_tiles; ++t) {
#pragma GCC unroll 2
    for (int i = 0; i < kTileQueries; ++i) {
      Float row[kCount];
#pragma GCC unroll 4
      for (int d = 0; d < kCount; ++d) row[d] = I::load(rows + i * width + d * I::kLanes);
#pragma GCC unroll 4
      for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 4
        for (int d = 0; d < kCount; ++d) sums[c][d] += weights[c * kTileQueries + i] * row[d];
      }
    }
    weights += kBlockCodes * kTileQueries;
    rows += kTileQueries * width;
  }
#pragma GCC unroll 4
  for (int c = 0; c < kRows; ++c) {
#pragma GCC unroll 4
    for (int d = 0; d < kCount; ++d) {
      float* at = to + c * width + d * I::kLanes;
      I::store(at, I::load(at) + sums[c][d]);
    }
  }
}

template <CpuLevel kLevel, int kCount>
DALLE_FAST_INLINE void scatter_columns(const float* weights, int64_t num_codes, const float* rows, int64_t width,
                                       int64_t num_tiles, float* to) {
  constexpr int kRows = Isa<kLevel>::kRows;
  int64_t c = 0;
  for (; c + kRows <= num_codes; c += kRows) {
    scatter_block<kLevel, kRows, kCount>(weights + c * kTileQueries, rows, width, num_tiles, to + c * width);
  }
  for (; c < num_codes; ++c) {
    scatter_block<kLevel, 1, kCount>(weights + c * kTileQueries, rows, width, num_tiles, to + c * width);
  }
}

// The same for a block's codes and all of a width that is a multiple of 16. The strip of rows that one turn of the outer
// loop reads stays in the L1 cache for all codes.
template <CpuLevel kLevel>
DALLE_FAST_INLINE void scatter_tiles(const float* weights, int64_t num_codes, const float* rows, int64_t width,
                                     int64_t num_tiles, float* to) {
  using I = Isa<kLevel>;
  constexpr int64_t kStep = I::kRowVectors * I::kLanes;
  int64_t d = 0;
  for (; d + kStep <= width; d += kStep) {
    scatter_columns<kLevel, I::kRowVectors>(weights, num_codes, rows + d, width, num_tiles, to + d);
  }
  for (; d < width; d += I::kLanes) {
    scatter_columns<kLevel, 1>(weights, num_codes, rows + d, width, num_tiles, to + d);
  }
}

}  // namespace dalle_fast
