// One body of code, compiled for several x86 instruction sets, the one to run chosen at run time.
//
// run_at_cpu_level<kBody>(args...) calls the always-inline function kBody inside a function that carries the
// target attribute of the chosen level, so one binary runs on every x86-64 CPU and still uses AVX-512 where
// it is. run_at_cpu_level<Body>(args...) does the same with Body::run<level>(args...), for code that has to know
// the level, such as the length of its vectors; code that has a use for avx512_bf16 asks for it, all else is
// compiled up to avx512. Elsewhere (Arm) there is the scalar level alone, which is what
// the compiler's own target makes of the body.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

// avx512_bf16 needs inline assembly on vectors in functions that get their target from their caller; Clang refuses it.
#if defined(__x86_64__) && !defined(__clang__)
#define DALLE_FAST_HAS_AVX512_BF16
#endif

namespace dalle_fast {

enum class CpuLevel { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kAvx512Bf16:
      return "avx512_bf16";
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx2:
      return "avx2";
    case CpuLevel::kScalar:
      break;
  }
  return "scalar";
}

inline std::vector<CpuLevel> compiled_cpu_levels() {
#if defined(DALLE_FAST_HAS_AVX512_BF16)
  return {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16};
#elif defined(__x86_64__)
  return {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512};
#else
  return {CpuLevel::kScalar};
#endif
}

inline bool cpu_supports(CpuLevel level) {
#if defined(__x86_64__)
#if defined(__clang__)
  const bool f16c = true;  // unused: the instructions of float16 are inline assembly
#else
  const bool f16c = __builtin_cpu_supports("f16c");
#endif
  const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (level) {
    case CpuLevel::kAvx512Bf16:
#if defined(DALLE_FAST_HAS_AVX512_BF16)
      return avx512 && __builtin_cpu_supports("avx512bf16");
#else
      return false;
#endif
    case CpuLevel::kAvx512:
      return avx512;
    case CpuLevel::kAvx2:
      return avx2;
    case CpuLevel::kScalar:
      break;
  }
#endif
  return level == CpuLevel::kScalar;
}

// The level in use: the best one of this CPU until set_cpu_level names another.
inline CpuLevel& cpu_level() {
  static CpuLevel level = [] {
    CpuLevel best = CpuLevel::kScalar;
    for (const CpuLevel candidate : compiled_cpu_levels()) {
      if (cpu_supports(candidate)) best = candidate;
    }
    return best;
  }();
  return level;
}

// For tests and for the search after a wrong result; not for use while ops run in other threads.
inline void set_cpu_level(const std::string& name) {
  for (const CpuLevel level : compiled_cpu_levels()) {
    if (name != cpu_level_name(level)) continue;
    if (!cpu_supports(level)) throw std::invalid_argument("this CPU does not support cpu level " + name);
    cpu_level() = level;
    return;
  }
  std::string names;
  for (const CpuLevel level : compiled_cpu_levels()) names += std::string(" ") + cpu_level_name(level);
  throw std::invalid_argument("cpu level must be one of" + names + ", got " + name);
}

#define DALLE_FAST_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define DALLE_FAST_TARGET_AVX512 __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
#define DALLE_FAST_TARGET_AVX512_BF16 \
  __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace detail {

template <auto kBody>
struct AnyLevel {
  template <CpuLevel, class... Args>
  __attribute__((always_inline)) static inline void run(Args... args) {
    kBody(args...);
  }
};

template <class Body, class... Args>
void run_scalar(Args... args) {
  Body::template run<CpuLevel::kScalar>(args...);
}

#if defined(__x86_64__)
template <class Body, class... Args>
DALLE_FAST_TARGET_AVX2 void run_avx2(Args... args) {
  Body::template run<CpuLevel::kAvx2>(args...);
}

template <class Body, class... Args>
DALLE_FAST_TARGET_AVX512 void run_avx512(Args... args) {
  Body::template run<CpuLevel::kAvx512>(args...);
}

#endif

#if defined(DALLE_FAST_HAS_AVX512_BF16)
template <class Body, class... Args>
DALLE_FAST_TARGET_AVX512_BF16 void run_avx512_bf16(Args... args) {
  Body::template run<CpuLevel::kAvx512Bf16>(args...);
}
#endif

}  // namespace detail

// kHighest: up to which level Body is compiled. A body with a use for avx512_bf16 is for that level alone.
template <class Body, CpuLevel kHighest = CpuLevel::kAvx512, class... Args>
void run_at_cpu_level(Args... args) {
#if defined(DALLE_FAST_HAS_AVX512_BF16)
  if constexpr (kHighest == CpuLevel::kAvx512Bf16) return detail::run_avx512_bf16<Body>(args...);
#endif
  if constexpr (kHighest == CpuLevel::kAvx512) {
#if defined(__x86_64__)
    switch (cpu_level()) {
      case CpuLevel::kAvx512Bf16:
      case CpuLevel::kAvx512:
        return detail::run_avx512<Body>(args...);
      case CpuLevel::kAvx2:
        return detail::run_avx2<Body>(args...);
      case CpuLevel::kScalar:
        break;
    }
#endif
    detail::run_scalar<Body>(args...);
  }
}

template <auto kBody, class... Args>
void run_at_cpu_level(Args... args) {
  run_at_cpu_level<detail::AnyLevel<kBody>>(args...);
}

}  // namespace dalle_fast
