// Moves a tensor's memory to huge pages, where Linux has them.
//
// Memory that is read from end to end, such as the weights in a step of decoding, takes a look into the page tables each
// 4 KB. In a virtual machine that look goes through two levels of tables, and memory that could be read at 60 GB/s is
// read at 35. Tensors of a few MB do not come in huge pages by themselves unless the administrator says so for all.
#include <cstdint>
#include <fstream>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/checks.h"

namespace dalle_fast {
namespace {

using torch::stable::Tensor;

#if defined(__linux__)

constexpr int kCollapse = 25;  // MADV_COLLAPSE, since Linux 6.1; an older one says EINVAL

// Bytes of a huge page; 0 where there are none, or the administrator wants none.
uintptr_t huge_page_bytes() {
  static const uintptr_t bytes = [] {
    const std::string folder = "/sys/kernel/mm/transparent_hugepage/";
    std::string policy;
    std::getline(std::ifstream(folder + "enabled"), policy);
    uintptr_t size = 0;
    std::ifstream(folder + "hpage_pmd_size") >> size;
    return policy.empty() || policy.find("[never]") != std::string::npos ? 0 : size;
  }();
  return bytes;
}

// Whole huge pages of [begin, end).
bool collapse(uintptr_t begin, uintptr_t end) {
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse) == 0;
}

bool use_huge_pages(const Tensor tensor) {
  check_contiguous(tensor, "tensor");
  const uintptr_t size = huge_page_bytes();
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(tensor.numel() * tensor.element_size());
  if (size == 0 || begin == end) return false;
  const auto down = [=](uintptr_t address) { return address / size * size; };
  const auto up = [=](uintptr_t address) { return down(address + size - 1); };
  // With what else lies in its first and last page; there may be something that cannot be moved.
  return collapse(down(begin), up(end)) || collapse(up(begin), down(end));
}

#else

bool use_huge_pages(const Tensor) { return false; }

#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CPU, m) { m.impl("use_huge_pages_cpu", TORCH_BOX(&use_huge_pages)); }

}  // namespace dalle_fast
