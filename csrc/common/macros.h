// DALLE_FAST_INLINE marks code that is compiled once for every caller: for host and device by nvcc, and for
// every instruction set of dispatch.h by the host compiler. A plain `inline` would not do: a function that is
// called instead of inlined keeps the instruction set it was compiled for.
#pragma once

#if defined(__CUDACC__)
#define DALLE_FAST_INLINE __host__ __device__ __forceinline__
#else
#define DALLE_FAST_INLINE inline __attribute__((always_inline))
#endif
