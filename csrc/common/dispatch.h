// One function body, compiled for several x86 instruction sets, the one to run chosen at run time.
//
// run_at_cpu_level<kBody>(args...) calls the always-inline function kBody inside a function that carries the
// target attribute of the chosen level, so one binary runs on every x86-64 CPU and still uses AVX-512 where
// it is. Elsewhere (Arm) there is the scalar level alone, which is what the compiler's own target makes of
// the body.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

namespace dalle_fast {

enum class CpuLevel { kScalar, kAvx2, kAvx512 };

inline const char* cpu_level_name(CpuLevel level) {
  switch (level) {
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
#if defined(__x86_64__)
  return {CpuLevel::kScalar, CpuLevel::kAvx2, CpuLevel::kAvx512};
#else
  return {CpuLevel::kScalar};
#endif
}

inline bool cpu_supports(CpuLevel level) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2");
  if (level == CpuLevel::kAvx512) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
  return level == CpuLevel::kScalar || avx2;
#else
  return level == CpuLevel::kScalar;
#endif
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

namespace detail {

template <auto kBody, class... Args>
void run_scalar(Args... args) {
  kBody(args...);
}

#if defined(__x86_64__)
template <auto kBody, class... Args>
__attribute__((target("avx2"))) void run_avx2(Args... args) {
  kBody(args...);
}

template <auto kBody, class... Args>
__attribute__((target("avx2,avx512f,avx512bw,avx512dq,avx512vl"))) void run_avx512(Args... args) {
  kBody(args...);
}
#endif

}  // namespace detail

template <auto kBody, class... Args>
void run_at_cpu_level(Args... args) {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return detail::run_avx512<kBody>(args...);
    case CpuLevel::kAvx2:
      return detail::run_avx2<kBody>(args...);
    case CpuLevel::kScalar:
      break;
  }
#endif
  detail::run_scalar<kBody>(args...);
}

}  // namespace dalle_fast
