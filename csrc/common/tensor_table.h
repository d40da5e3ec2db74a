// The table by which one call reaches many tensors, as dalle_fast/ops/tensor_table.py builds it, and its chunks.
//
// A row a tensor, int64: the columns of the op, then those of TableColumn. The work of all tensors is cut into chunks
// of so many elements, none of which spans two tensors, numbered from 0 over the whole table.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "checks.h"
#include "macros.h"

namespace dalle_fast {

// Behind the op's own columns.
enum TableColumn { kNumelColumn, kDtypeColumn, kFirstChunkColumn, kNumTableColumns };

// What kDtypeColumn holds.
enum TableDtype { kTableFloat, kTableHalf, kTableBfloat16 };

struct TensorTable {
  const int64_t* cells;
  int64_t num_rows;
  int64_t num_columns;
  int64_t num_chunks;
  int64_t chunk;  // elements

  DALLE_FAST_INLINE const int64_t* row(int64_t index) const { return cells + index * num_columns; }
  DALLE_FAST_INLINE int64_t common(int64_t index, TableColumn column) const {
    return row(index)[num_columns - kNumTableColumns + column];
  }
};

// The elements `begin` to `begin` + `count` of the tensor of row `row`.
struct TableChunk {
  int64_t row, begin, count;
};

// The chunk of this number, by binary search: the last row whose chunks begin at it or before. Rows without elements
// have no chunks and the first chunk of the row after them, so that they are passed over.
DALLE_FAST_INLINE TableChunk find_chunk(const TensorTable& table, int64_t index) {
  int64_t low = 0, high = table.num_rows - 1;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (table.common(middle, kFirstChunkColumn) <= index) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t begin = (index - table.common(low, kFirstChunkColumn)) * table.chunk;
  const int64_t left = table.common(low, kNumelColumn) - begin;
  return {low, begin, left < table.chunk ? left : table.chunk};
}

// The table of an op's arguments; it lies where the tensors do, so that the rows are not looked at.
inline TensorTable tensor_table(const torch::stable::Tensor& table, int64_t num_op_columns, int64_t num_chunks,
                                int64_t chunk) {
  const int64_t num_columns = num_op_columns + kNumTableColumns;
  check_dtype(table, "table", torch::headeronly::ScalarType::Long);
  check_contiguous(table, "table");
  if (table.dim() != 2 || table.size(1) != num_columns) {
    throw std::runtime_error("table must have two dimensions and " + std::to_string(num_columns) +
                             " columns, got shape " + tuple_text(table.sizes()));
  }
  if (chunk <= 0) throw std::runtime_error("chunk must be > 0, got " + std::to_string(chunk));
  if (num_chunks < 0 || (num_chunks > 0 && table.size(0) == 0)) {
    throw std::runtime_error("num_chunks must be >= 0, and 0 of an empty table, got " + std::to_string(num_chunks));
  }
  return {static_cast<const int64_t*>(table.const_data_ptr()), table.size(0), num_columns, num_chunks, chunk};
}

// Columns of multi_tensor_unscale.
enum UnscaleColumn { kUnscaleGrad, kUnscaleBlock, kNumUnscaleColumns };

// Columns of multi_tensor_adamw16; kAdamMaster is 0 where there is none.
enum AdamColumn {
  kAdamParam,
  kAdamGrad,
  kAdamMean,
  kAdamVariance,
  kAdamMaster,
  kAdamGroup,
  kAdamBlock,
  kAdamIndex,
  kNumAdamColumns
};

}  // namespace dalle_fast
