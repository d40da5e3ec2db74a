// As much of CUDA as the kernels of csrc/cuda use, on a CPU: a thread of the operating system for each thread of a block,
// one block after the other, so that barriers and exchanges between the lanes of a warp are real ones.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // of one block at a time
#define __builtin_assume(condition)

struct ThreadIndex {
  unsigned x = 0;
};
inline thread_local ThreadIndex threadIdx, blockIdx, gridDim;

struct float2 {
  float x, y;
};

namespace cuda_host {

struct Warp {
  explicit Warp(int lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  double values[32];
  bool votes[32];
};

struct Block {
  explicit Block(int threads) : barrier(threads) {
    for (int i = 0; i < threads / 32; ++i) warps.push_back(std::make_unique<Warp>(32));
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline Block* block = nullptr;
inline Warp& warp() { return *block->warps[threadIdx.x / 32]; }

// Runs the kernel for every thread of the blocks from first_block on, the last block first where `backwards` is set.
template <class Params>
void launch(void (*kernel)(Params), unsigned blocks, int threads, bool backwards, const Params& params,
            unsigned first_block = 0) {
  Block shared(threads);
  block = &shared;
  std::vector<std::thread> all;
  for (int t = 0; t < threads; ++t) {
    all.emplace_back([&, t] {
      threadIdx.x = static_cast<unsigned>(t);
      gridDim.x = blocks;
      for (unsigned b = first_block; b < blocks; ++b) {
        blockIdx.x = backwards ? blocks - 1 - (b - first_block) : b;
        kernel(params);
        shared.barrier.arrive_and_wait();
      }
    });
  }
  for (auto& thread : all) thread.join();
  block = nullptr;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::block->barrier.arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  return __atomic_fetch_add(counter, value, __ATOMIC_SEQ_CST);
}

inline double __shfl_down_sync(unsigned, double value, int ahead) {
  auto& warp = cuda_host::warp();
  const unsigned lane = threadIdx.x % 32, from = lane + static_cast<unsigned>(ahead);
  warp.values[lane] = value;
  warp.barrier.arrive_and_wait();
  const double found = from < 32 ? warp.values[from] : value;
  warp.barrier.arrive_and_wait();
  return found;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  auto& warp = cuda_host::warp();
  warp.votes[threadIdx.x % 32] = vote;
  warp.barrier.arrive_and_wait();
  unsigned all = 0;
  for (unsigned lane = 0; lane < 32; ++lane) all |= unsigned{warp.votes[lane]} << lane;
  warp.barrier.arrive_and_wait();
  return all;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline double __ldcg(const double* from) { return *from; }
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
