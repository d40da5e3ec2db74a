// The AdamW update with 16-bit moments on CUDA devices, of all tensors of a table in one launch: common/adamw16.h has
// the arithmetic, and gives the bits that it gives on a CPU.
//
//     parameter           read                              written
//     16 bits             parameter, gradient, moments 8 B  parameter, moments 6 B     an element
//     16 bits, a master   the master instead     10 B       both              10 B
//     float32                                    16 B                         12 B
//
// One pass with a block of threads for each chunk. A thread updates eight neighbouring elements of 16 bits at a time,
// which share a counter of the generator, or four of float32; tensors that begin off a multiple of 16 bytes are updated
// element by element. Nothing is read on the host: a block computes its coefficients from the step, the scale and the
// sum of squares on the device, once and in float64, and leaves at once where `skip` is set.
#include <optional>

#include "../common/checks.h"
#include "../common/torch_stable.h"
#include "adamw16_kernel.h"
#include "launch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_columns(const Tensor& tensor, const char* name, int64_t columns) {
  if (tensor.dim() == 2 && tensor.size(1) == columns) return;
  throw std::runtime_error(std::string(name) + " must have shape (n, " + std::to_string(columns) + "), got " +
                           tuple_text(tensor.sizes()));
}

void multi_tensor_adamw16(const Tensor table, int64_t num_chunks, int64_t chunk, const Tensor hyper, const Tensor steps,
                          const Tensor scales, const std::optional<Tensor> skip,
                          const std::optional<Tensor> sum_of_squares, double grad_clip, int64_t seed, bool stochastic) {
  constexpr int64_t kRuleLen = sizeof(UpdateRule) / sizeof(double);
  check_columns(hyper, "hyper", kRuleLen);
  const int32_t device = table.get_device_index();
  const AdamParams params{
      .table = chunk_table(table, kNumAdamColumns, num_chunks, chunk),
      .rules = device_data<const UpdateRule>(hyper, "hyper", ScalarType::Double, hyper.numel(), device),
      .steps = device_data<const int64_t>(steps, "steps", ScalarType::Long, steps.numel(), device),
      .scales = device_data<const float>(scales, "scales", ScalarType::Float, scales.numel(), device),
      .skip = skip.has_value() ? device_data<const bool>(*skip, "skip", ScalarType::Bool, 1, device) : nullptr,
      .sum_of_squares = sum_of_squares.has_value() ? device_data<const double>(*sum_of_squares, "sum_of_squares",
                                                                               ScalarType::Double, 1, device)
                                                   : nullptr,
      .grad_clip = grad_clip,
      .seed = static_cast<uint64_t>(seed),
      .stochastic = stochastic};
  if (num_chunks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  adamw16_kernel<<<static_cast<unsigned>(num_chunks), kThreads, 0, current_stream(device)>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CUDA, m) { m.impl("multi_tensor_adamw16", TORCH_BOX(&multi_tensor_adamw16)); }

}  // namespace dalle_fast
