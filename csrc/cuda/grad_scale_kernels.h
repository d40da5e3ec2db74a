// The kernels of grad_scale.cu.
//
// Apart from their launches, so that tests/cuda_host runs them on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "../common/tensor_table.h"
#include "chunks.h"
#include "elements.h"

namespace dalle_fast {

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < INFINITY; }
__device__ __forceinline__ float filter(float value) { return is_finite(value) ? value : 0.0f; }

struct ResblockParams {
  const float* grad;
  const float* scale;          // one element
  const float* grad_identity;  // of resblock_unscale_add alone
  void* out;
  int64_t num_elements;
};

// Elements of which a thread takes a pack: 16 bytes of the result.
template <class Out>
constexpr int kResblockLen = 16 / Out::kBytes;

// Calls visit(Share, offset) for the elements that are this thread's among those of the whole grid.
template <int kLen, class Visit>
__device__ __forceinline__ void visit_tensor(int64_t count, bool aligned, Visit visit) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x, threads = int64_t{gridDim.x} * kThreads;
  visit_elements<kLen, 1>(count, aligned, thread, threads, visit);
}

template <class Out>
__global__ __launch_bounds__(kThreads) void resblock_scale_kernel(ResblockParams params) {
  const auto* from = reinterpret_cast<const char*>(params.grad);
  auto* to = static_cast<char*>(params.out);
  const float scale = *params.scale;
  const bool aligned = is_aligned(from) && is_aligned(to);
  visit_tensor<kResblockLen<Out>>(params.num_elements, aligned, [&]<int kLen>(Share<kLen>, int64_t i) {
    float values[kLen];
    widen<Float32>(load<4, kLen>(from + i * 4), values);
#pragma unroll
    for (int j = 0; j < kLen; ++j) values[j] = filter(values[j] * scale);
    store(narrow<Out>(values), to + i * Out::kBytes);
  });
}

__global__ __launch_bounds__(kThreads) void resblock_unscale_add_kernel(ResblockParams params) {
  const auto* from = reinterpret_cast<const char*>(params.grad);
  const auto* identity = reinterpret_cast<const char*>(params.grad_identity);
  auto* to = static_cast<char*>(params.out);
  const float scale = *params.scale;
  const bool aligned = is_aligned(from) && is_aligned(identity) && is_aligned(to);
  visit_tensor<kResblockLen<Float32>>(params.num_elements, aligned, [&]<int kLen>(Share<kLen>, int64_t i) {
    const auto grad = load<4, kLen>(from + i * 4);
    const auto grad_identity = load<4, kLen>(identity + i * 4);
    float values[kLen], sums[kLen];
    widen<Float32>(grad, values);
    widen<Float32>(grad_identity, sums);
#pragma unroll
    for (int j = 0; j < kLen; ++j) sums[j] += filter(values[j] / scale);
    store(narrow<Float32>(sums), to + i * 4);
  });
}

struct UnscaleParams {
  TensorTable table;
  const float* scales;
  bool* nonfinite;
  double* sum_of_squares;
  double* chunk_sums;  // one a chunk
  unsigned* finished;  // blocks that left theirs; 0 at the start
};

// The sum over the block's threads, in a fixed order, for thread 0 alone.
__device__ __forceinline__ double sum_of_block(double value) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  constexpr int kWarps = kThreads / kLanes;
  __shared__ double warp_sums[kWarps];
  __syncthreads();  // the sums of a call before are read
#pragma unroll
  for (int ahead = kLanes / 2; ahead > 0; ahead /= 2) value += __shfl_down_sync(kAllLanes, value, ahead);
  if (threadIdx.x % kLanes == 0) warp_sums[threadIdx.x / kLanes] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
  }
  return sum;
}

struct Found {
  double sum_of_squares;
  bool nonfinite;
};

// The squares are summed of what is divided, and the sum is divided. Without kDivides no quotient is made: it is none
// that is written, and finite where what is divided is, which holds for a scale of 1 or more.
template <class Type, bool kWrite, bool kDivides>
__device__ __forceinline__ Found unscale_chunk(char* grad, int count, float scale) {
  double sum = 0.0;
  bool nonfinite = false;
  const auto unscale = [&]<int kLen, int kPacks>(Share<kLen, kPacks>, int begin) {
    char* at[kPacks];
    Pack<Type::kBytes, kLen> packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      at[k] = grad + int64_t{begin + k * kThreads * kLen} * Type::kBytes;
      packs[k] = load<Type::kBytes, kLen>(at[k]);
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float values[kLen];
      widen<Type>(packs[k], values);
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        const float quotient = kDivides ? values[j] / scale : values[j];
        const bool keep = is_finite(quotient);
        const double kept = keep ? values[j] : 0.0f;
        nonfinite |= !keep;
        sum = fma(kept, kept, sum);
        values[j] = keep ? quotient : 0.0f;
      }
      if constexpr (kWrite) store(narrow<Type>(values), at[k]);
    }
  };
  // 64 bytes on their way for each thread.
  visit_elements<16 / Type::kBytes, 4>(count, is_aligned(grad), static_cast<int>(threadIdx.x), kThreads, unscale);
  return {sum, nonfinite};
}

template <class Type, bool kWrite>
__device__ __forceinline__ Found unscale_chunk(int64_t address, TableChunk chunk, float scale) {
  char* grad = global_pointer(address) + chunk.begin * Type::kBytes;
  const int count = static_cast<int>(chunk.count);
  if (!kWrite && scale >= 1.0f) return unscale_chunk<Type, kWrite, false>(grad, count, scale);
  return unscale_chunk<Type, kWrite, true>(grad, count, scale);
}

template <bool kWrite>
__global__ __launch_bounds__(kThreads, 4) void unscale_kernel(UnscaleParams params) {
  const TableChunk chunk = find_chunk_by_warp(params.table, blockIdx.x, CountLanes{});
  const int64_t* row = params.table.row(chunk.row);
  const int64_t block = row[kUnscaleBlock], dtype = params.table.common(chunk.row, kDtypeColumn);
  const float scale = params.scales[block];
  Found found;
  if (dtype == kTableFloat) {
    found = unscale_chunk<Float32, kWrite>(row[kUnscaleGrad], chunk, scale);
  } else if (dtype == kTableHalf) {
    found = unscale_chunk<Float16, kWrite>(row[kUnscaleGrad], chunk, scale);
  } else {
    found = unscale_chunk<BFloat16, kWrite>(row[kUnscaleGrad], chunk, scale);
  }
  // All that store it store the same.
  if (found.nonfinite) params.nonfinite[block] = true;

  const double chunk_sum = sum_of_block(found.sum_of_squares);
  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    // Where no quotient is finite the scale may be 0 or NaN.
    params.chunk_sums[blockIdx.x] = chunk_sum == 0.0 ? 0.0 : chunk_sum / (double{scale} * double{scale});
    __threadfence();  // so that whoever counts the last block sees the sums of all
    is_last = atomicAdd(params.finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < params.table.num_chunks; i += kThreads) sum += __ldcg(params.chunk_sums + i);
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) *params.sum_of_squares += sum;
}

}  // namespace dalle_fast
