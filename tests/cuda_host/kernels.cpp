// The kernels of csrc/cuda/grad_scale.cu and adamw16.cu as functions of a library for a CPU, for tests/test_cuda_kernels.py.
#include "../../csrc/cuda/adamw16_kernel.h"
#include "../../csrc/cuda/grad_scale_kernels.h"

using namespace dalle_fast;

extern "C" {

void resblock_scale(const float* grad, const float* scale, void* out, int out_dtype, int64_t count, unsigned blocks) {
  const ResblockParams params{grad, scale, nullptr, out, count};
  const auto kernel = out_dtype == kTableFloat  ? resblock_scale_kernel<Float32>
                      : out_dtype == kTableHalf ? resblock_scale_kernel<Float16>
                                                : resblock_scale_kernel<BFloat16>;
  cuda_host::launch(kernel, blocks, kThreads, false, params);
}

void resblock_unscale_add(const float* grad, const float* scale, const float* grad_identity, float* out, int64_t count,
                          unsigned blocks) {
  const ResblockParams params{grad, scale, grad_identity, out, count};
  cuda_host::launch(resblock_unscale_add_kernel, blocks, kThreads, false, params);
}

void multi_tensor_unscale(const int64_t* table, int64_t num_rows, int64_t num_chunks, int64_t chunk, const float* scales,
                          bool write, bool* nonfinite, double* sum_of_squares, double* workspace, bool backwards) {
  unsigned finished = 0;
  const UnscaleParams params{{table, num_rows, int64_t{kNumUnscaleColumns} + kNumTableColumns, num_chunks, chunk},
                             scales,
                             nonfinite,
                             sum_of_squares,
                             workspace,
                             &finished};
  cuda_host::launch(write ? unscale_kernel<true> : unscale_kernel<false>, static_cast<unsigned>(num_chunks),
                    kThreads, backwards, params);
}

// The chunks from first_chunk on, so many of them.
void multi_tensor_adamw16(const int64_t* table, int64_t num_rows, int64_t first_chunk, int64_t num_chunks, int64_t chunk,
                          const double* rules, const int64_t* steps, const float* scales, const bool* skip,
                          const double* sum_of_squares, double grad_clip, uint64_t seed, bool stochastic) {
  const int64_t end = first_chunk + num_chunks;
  const AdamParams params{{table, num_rows, int64_t{kNumAdamColumns} + kNumTableColumns, end, chunk},
                          reinterpret_cast<const UpdateRule*>(rules),
                          steps,
                          scales,
                          skip,
                          sum_of_squares,
                          grad_clip,
                          seed,
                          stochastic};
  cuda_host::launch(adamw16_kernel, static_cast<unsigned>(end), kThreads, false, params,
                    static_cast<unsigned>(first_chunk));
}

// The row that a warp finds for each chunk, and where in its tensor the chunk begins.
void find_chunks(const int64_t* table, int64_t num_rows, int64_t num_columns, int64_t num_chunks, int64_t chunk,
                 int64_t* rows, int64_t* begins) {
  const auto count_lanes = [](auto holds) {
    int count = 0;
    for (int lane = 0; lane < kLanes; ++lane) count += holds(lane);
    return count;
  };
  for (int64_t i = 0; i < num_chunks; ++i) {
    const TableChunk found = find_chunk_by_warp({table, num_rows, num_columns, num_chunks, chunk}, i, count_lanes);
    rows[i] = found.row;
    begins[i] = found.begin;
  }
}
}
