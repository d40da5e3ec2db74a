// How the threads of a grid share a table's work: a block a chunk, packs of neighbouring elements a thread.
#pragma once

#include <cstdint>

#include "../common/macros.h"
#include "../common/tensor_table.h"

// Several turns of a loop at once cost registers; the host's compiler does not know the pragma.
#if defined(__CUDA_ARCH__)
#define DALLE_FAST_NO_UNROLL _Pragma("unroll 1")
#else
#define DALLE_FAST_NO_UNROLL
#endif

namespace dalle_fast {

constexpr int kLanes = 32;
constexpr int kThreads = 256;  // of a block

// Elements that share a counter of the generator; in 16-bit types they are 16 bytes.
constexpr int kSharing = 8;

// find_chunk by a warp: each step asks 32 rows at once, so that a table of a thousand takes two reads one after another
// and not ten. count_lanes(holds) is the number of lanes for which holds(lane) does; they are the first ones.
template <class CountLanes>
DALLE_FAST_INLINE TableChunk find_chunk_by_warp(const TensorTable& table, int64_t index, CountLanes count_lanes) {
  int64_t first = 0, size = table.num_rows;
  while (size > 1) {
    const int64_t step = (size + kLanes - 1) / kLanes;
    const int64_t passed = count_lanes([&](int lane) {
      return lane * step < size && table.common(first + lane * step, kFirstChunkColumn) <= index;
    });
    const int64_t skipped = (passed - 1) * step;
    first += skipped;
    size = size - skipped < step ? size - skipped : step;
  }
  const int64_t begin = (index - table.common(first, kFirstChunkColumn)) * table.chunk;
  const int64_t left = table.common(first, kNumelColumn) - begin;
  return {first, begin, left < table.chunk ? left : table.chunk};
}

// What a thread is given at a time: kPacks packs of kLen elements each, one pack every `threads` packs.
template <int kLen, int kPacks = 1>
struct Share {};

// Calls visit(Share, offset) until each of `count` elements was in one thread's share: in packs of kLen, kPacks of them
// at once while there are as many, and what is left one by one; all of them one by one where tensors are not `aligned`.
// The latter come first, for then nothing of theirs has to be kept during the others, the most.
template <int kLen, int kPacks, class Index, class Visit>
DALLE_FAST_INLINE void visit_elements(Index count, bool aligned, Index thread, Index threads, Visit visit) {
  const Index packed = aligned ? count / kLen * kLen : 0, stride = threads * kLen;
  DALLE_FAST_NO_UNROLL
  for (Index i = packed + thread; i < count; i += threads) visit(Share<1>{}, i);
  Index i = thread * kLen;
  if constexpr (kPacks > 1) {
    DALLE_FAST_NO_UNROLL
    for (; i < packed - (kPacks - 1) * stride; i += kPacks * stride) visit(Share<kLen, kPacks>{}, i);
  }
  DALLE_FAST_NO_UNROLL
  for (; i < packed; i += stride) visit(Share<kLen>{}, i);
}

}  // namespace dalle_fast
