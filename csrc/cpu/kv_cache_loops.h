// The inner loops of a decoding step's attention on the CPU: products of a few rows with a panel of keys or values,
// scores of gathered keys, and the softmax. kv_cache.cpp says what is made of them, and why each sum has its order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lane_sums.h"
#include "storage_lanes.h"
#include "work_queue.h"

namespace dalle_fast {

inline constexpr int kRowSamples = 6;  // samples in one block of accumulators

// Brings the rows of the image's keys or values that some samples need closer, in the order in which they are used.
struct RowFetcher {
  const char* image;  // of the first sample
  int64_t sample_stride, row_bytes;
  const int32_t* seen;
  int64_t num_seen, left;
  int64_t rows_a_call;
  int64_t next = 0;

  DALLE_FAST_INLINE void fetch() { fetch(rows_a_call); }
  DALLE_FAST_INLINE void fetch(int64_t rows) {
    for (; rows > 0 && left > 0; --rows, --left) {
      const char* row = image + seen[next] * row_bytes;
      for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++next < num_seen) continue;
      next = 0;
      image += sample_stride;
    }
  }
};

template <class T, CpuLevel kLevel>
struct StepLoops {
  using L = Lanes<kLevel>;
  using I = Isa<kLevel>;
  using Float = typename I::Float;
  using Int = typename I::Int;
  static constexpr int kLanes = I::kLanes;
  // Vectors of a row of accumulators, by the number of samples.
  static constexpr int kRowVectors = kLanes == 16 ? 4 : 2;
  static constexpr int64_t kColumns = kRowVectors * kLanes;  // of a block of a copy

  // to[s][n] = sum_k factors[s][k] row(k)[n]
  template <int kSamples, int kVectors, class Row>
  static DALLE_FAST_INLINE void product_block(Row row, int64_t count, const float* factors, int64_t factor_stride,
                                              float* to, int64_t to_stride, RowFetcher& ahead) {
    Float sums[kSamples][kVectors];
    const float* factor[kSamples];
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
      factor[s] = factors + s * factor_stride;
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) sums[s][v] = Float{};
    }
    for (int64_t k = 0; k < count; ++k) {
      ahead.fetch();
      const auto* from = row(k);
      Float vectors[kVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) vectors[v] = L::load(from + v * kLanes);
#pragma GCC unroll 8
      for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) sums[s][v] += factor[s][k] * vectors[v];
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 16
      for (int v = 0; v < kVectors; ++v) I::store(to + s * to_stride + v * kLanes, sums[s][v]);
    }
  }

  // Columns first..wanted-1, as far as whole vectors go within the `available` ones; the first column left.
  template <int kSamples, int kVectors, class Row>
  static DALLE_FAST_INLINE int64_t product_columns(Row row, int64_t count, const float* factors, int64_t factor_stride,
                                                   int64_t first, int64_t wanted, int64_t available, float* to,
                                                   int64_t to_stride, RowFetcher& ahead) {
    for (; wanted - first > kVectors / 2 * kLanes && first + kVectors * kLanes <= available;
         first += kVectors * kLanes) {
      const auto at = [&](int64_t k) __attribute__((always_inline)) { return row(k) + first; };
      product_block<kSamples, kVectors>(at, count, factors, factor_stride, to + first, to_stride, ahead);
    }
    if constexpr (kVectors > 1) {
      first = product_columns<kSamples, kVectors / 2>(row, count, factors, factor_stride, first, wanted, available, to,
                                                      to_stride, ahead);
    }
    return first;
  }

  // to[s][n] = sum_k factors[s][k] row(k)[n] for kSamples rows and the columns n below `wanted`. A row has `available`
  // columns, a whole vector or more; columns beyond the wanted ones are written to up to a whole vector.
  template <int kSamples, class Row>
  static DALLE_FAST_INLINE void product_rows(Row row, int64_t count, const float* factors, int64_t factor_stride,
                                             int64_t wanted, int64_t available, float* to, int64_t to_stride,
                                             RowFetcher& ahead) {
    constexpr int kVectors = kSamples == 1 ? 4 * kRowVectors : kSamples == 2 ? 2 * kRowVectors : kRowVectors;
    const int64_t done = product_columns<kSamples, kVectors>(row, count, factors, factor_stride, 0, wanted, available,
                                                             to, to_stride, ahead);
    if (done >= wanted) return;
    // The last vector overlaps the one before it.
    const int64_t last = available - kLanes;
    const auto at = [&](int64_t k) __attribute__((always_inline)) { return row(k) + last; };
    product_block<kSamples, 1>(at, count, factors, factor_stride, to + last, to_stride, ahead);
  }

  // Quarters of the passes over all columns, kColumns at a time, that the products of so many samples take.
  static DALLE_FAST_INLINE int64_t product_passes(int64_t samples) { return samples == kRowSamples ? 4 : samples; }

  template <class Row>
  static DALLE_FAST_INLINE void product(int64_t samples, Row row, int64_t count, const float* factors,
                                        int64_t factor_stride, int64_t wanted, int64_t available, float* to,
                                        int64_t to_stride, RowFetcher& ahead) {
    if (samples == kRowSamples) {
      return product_rows<kRowSamples>(row, count, factors, factor_stride, wanted, available, to, to_stride, ahead);
    }
    for (; samples >= 2; samples -= 2) {
      product_rows<2>(row, count, factors, factor_stride, wanted, available, to, to_stride, ahead);
      factors += 2 * factor_stride;
      to += 2 * to_stride;
    }
    if (samples == 1) product_rows<1>(row, count, factors, factor_stride, wanted, available, to, to_stride, ahead);
  }

  // Rows as they lie in memory, or copied: in blocks of kColumns columns, filled up with zeros.
  template <class Element>
  struct Panel {
    const Element* data;
    int64_t row_stride, block_stride;
    int64_t columns;        // of a row
    int64_t block_columns;  // of these in a block
  };

  static DALLE_FAST_INLINE Panel<T> in_place(const T* data, int64_t columns) {
    return {data, columns, 0, columns, columns};
  }

  static DALLE_FAST_INLINE Panel<float> copied(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                                               float* to) {
    const int64_t padded = ceil_div(columns, kLanes) * kLanes;
    for (int64_t first = 0; first < columns; first += kColumns) {
      float* block = to + first * rows;
      for (int64_t k = 0; k < rows; ++k) {
        const T* row = from + k * from_stride + first;
        float* target = block + k * kColumns;
        const int64_t count = std::min(columns - first, kColumns);
        int64_t n = 0;
        for (; n + kLanes <= count; n += kLanes) I::store(target + n, L::load(row + n));
        if (n == count) continue;
        I::store(target + n, Float{});
        for (; n < count; ++n) target[n] = to_float(row[n]);
      }
    }
    return {to, kColumns, rows * kColumns, padded, kColumns};
  }

  template <class Element>
  static DALLE_FAST_INLINE void product(int64_t samples, const Panel<Element>& rows, int64_t count,
                                        const float* factors, int64_t factor_stride, int64_t wanted, float* to,
                                        int64_t to_stride, RowFetcher& ahead) {
    for (int64_t first = 0; first < wanted; first += rows.block_columns) {
      const Element* block = rows.data + first / rows.block_columns * rows.block_stride;
      const int64_t stride = rows.row_stride;
      const auto row = [=](int64_t k) __attribute__((always_inline)) { return block + k * stride; };
      product(samples, row, count, factors, factor_stride, std::min(wanted - first, rows.block_columns),
              std::min(rows.columns - first, rows.block_columns), to + first, to_stride, ahead);
    }
  }

  // How the elements past the last whole vector of a row are taken: as a vector that ends with the row, those before
  // them masked out; a row that is shorter than a vector as the start of one.
  struct RowEnd {
    int64_t head_dim, whole;
    Int mask;

    DALLE_FAST_INLINE explicit RowEnd(int64_t head_dim_) : head_dim(head_dim_), whole(head_dim_ / kLanes * kLanes) {
      int32_t lanes[kLanes];
      for (int i = 0; i < kLanes; ++i) lanes[i] = i >= kLanes - (head_dim - whole) ? -1 : 0;
      std::memcpy(&mask, lanes, sizeof(mask));
    }
    DALLE_FAST_INLINE bool empty() const { return whole == head_dim; }

    template <class Element>
    DALLE_FAST_INLINE Float load(const Element* row) const {
      if (whole > 0) return L::keep(L::load(row + head_dim - kLanes), mask);
      float short_row[kLanes] = {};
      for (int64_t d = 0; d < head_dim; ++d) short_row[d] = to_float(row[d]);
      return I::load(short_row);
    }
  };

  // Scores of up to kKeys image keys, written as a whole vector of which those past `count` say nothing.
  template <int kKeys>
  static DALLE_FAST_INLINE void image_scores(const T* keys, const int32_t* slots, int64_t count, const float* query,
                                             const float* query_end, const RowEnd& end, float* to) {
    const T* row[kKeys];
    Float sums[kLanes];
#pragma GCC unroll 16
    for (int j = 0; j < kKeys; ++j) row[j] = keys + slots[std::min<int64_t>(j, count - 1)] * end.head_dim;
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) sums[j] = Float{};
    for (int64_t d = 0; d < end.whole; d += kLanes) {
      const Float part = I::load(query + d);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) sums[j] += part * L::load(row[j] + d);
    }
    if (!end.empty()) {
      const Float part = I::load(query_end);
#pragma GCC unroll 16
      for (int j = 0; j < kKeys; ++j) sums[j] += part * end.load(row[j]);
    }
    I::store(to, LaneSums<kLevel>::of(sums));
  }

  // Scores to weights, in place, of `count` keys, whole vectors; their sum.
  static DALLE_FAST_INLINE float softmax(float* scores, int64_t count) {
    Float maxima = I::splat(kMasked);
    for (int64_t k = 0; k < count; k += kLanes) maxima = I::max(I::load(scores + k), maxima);
    float lanes[kLanes];
    std::memcpy(lanes, &maxima, sizeof(lanes));
    const float maximum = *std::max_element(lanes, lanes + kLanes);
    const Float base = I::splat(maximum == kMasked ? 0.0f : maximum);  // inf - inf would be NaN
    Float total{};
    for (int64_t k = 0; k < count; k += kLanes) {
      const Float weights = I::exp(I::load(scores + k) - base);
      I::store(scores + k, weights);
      total += weights;
    }
    std::memcpy(lanes, &total, sizeof(lanes));
    for (int step = kLanes / 2; step > 0; step /= 2) {
      for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
    }
    return lanes[0];
  }
};

}  // namespace dalle_fast
