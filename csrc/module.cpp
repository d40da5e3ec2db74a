// The Python module dalle_fast._C: how this binary was built, and which instruction set it uses.
//
// Loading it registers the ops of library.cpp, which do not pass through pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <sstream>
#include <string>
#include <vector>

#include "common/dispatch.h"

namespace dalle_fast {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#else
  return std::string("gcc ") + __VERSION__;
#endif
}

std::vector<std::string> cpu_level_names() {
  std::vector<std::string> names;
  for (const CpuLevel level : compiled_cpu_levels()) names.emplace_back(cpu_level_name(level));
  return names;
}

// Splits TORCH_CUDA_ARCH_LIST as setup.py hands it over: "8.0;9.0".
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> architectures;
#if defined(DALLE_FAST_CUDA_ARCHITECTURES)
  std::istringstream list(DALLE_FAST_CUDA_ARCHITECTURES);
  for (std::string entry; std::getline(list, entry, ';');) architectures.push_back(entry);
#endif
  return architectures;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cpp_standard"] = __cplusplus;
  info["torch"] = TORCH_VERSION;
  info["cpu_levels"] = cpu_level_names();
  info["cpu_level"] = cpu_level_name(cpu_level());
  info["cuda_architectures"] = cuda_architectures();
  return info;
}

}  // namespace
}  // namespace dalle_fast

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled ops of dalle_fast, called as torch.ops.dalle_fast.<name>";
  m.def("build_info", &dalle_fast::build_info,
        "How this binary was built: compiler, cpp_standard, torch, cpu_levels, cuda_architectures; and which "
        "cpu_level is in use.");
  m.def("set_cpu_level", &dalle_fast::set_cpu_level, pybind11::arg("name"),
        "Run the CPU ops with the named instruction set. ValueError: it is unknown, or this CPU lacks it.");
}
