// Gradient scaling on CUDA devices: into and out of a residual block, and out of all parameters' gradients at once.
//
//     resblock_scale         out = filter(grad * scale)                        4 B read, 2 or 4 B written an element
//     resblock_unscale_add   out = grad_identity + filter(grad / scale)        8 B read, 4 B written
//     multi_tensor_unscale   grad = filter(grad / scales[block]),              2 or 4 B read, and written with `write`
//                            nonfinite[block], sum_of_squares
//
// where filter replaces non-finite elements by 0. Each is one launch and bound by memory, and reads the scales on the
// device. multi_tensor_unscale has a block of threads for each chunk of the table; each leaves the sum of its squares,
// in float64, in a workspace, and the last one to finish adds them up, in an order that does not depend on which that
// is: the results are the same bits every time.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/checks.h"
#include "../common/torch_stable.h"
#include "grad_scale_kernels.h"
#include "launch.h"

namespace dalle_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxBlocks = 65535;  // a grid-stride loop covers what lies beyond

// Runs the kernel over all elements of out, of type Out, on its device's current stream.
template <class Out>
void launch(void (*kernel)(ResblockParams), const Tensor& grad, const Tensor& scale, const Tensor* grad_identity,
            const Tensor& out) {
  const int64_t count = out.numel();
  if (count == 0) return;
  const ResblockParams params{
      .grad = static_cast<const float*>(grad.const_data_ptr()),
      .scale = device_data<const float>(scale, "scale", ScalarType::Float, 1, out.get_device_index()),
      .grad_identity = grad_identity == nullptr ? nullptr : static_cast<const float*>(grad_identity->const_data_ptr()),
      .out = out.mutable_data_ptr(),
      .num_elements = count};
  const int64_t elements = int64_t{kThreads} * kResblockLen<Out>;  // of a block
  const int64_t blocks = std::min((count + elements - 1) / elements, kMaxBlocks);
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(out.get_device_index())>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void resblock_scale(const Tensor grad, const Tensor scale, Tensor out) {
  check_dtype(grad, "grad", ScalarType::Float);
  check_cuda_device(grad, "grad", out.get_device_index());
  check_laid_out_alike(out, "out", grad, "grad");
  switch (out.scalar_type()) {
    case ScalarType::Float:
      return launch<Float32>(resblock_scale_kernel<Float32>, grad, scale, nullptr, out);
    case ScalarType::Half:
      return launch<Float16>(resblock_scale_kernel<Float16>, grad, scale, nullptr, out);
    case ScalarType::BFloat16:
      return launch<BFloat16>(resblock_scale_kernel<BFloat16>, grad, scale, nullptr, out);
    default:
      throw std::runtime_error(std::string("out must be float32, float16 or bfloat16, got ") +
                               torch::headeronly::toString(out.scalar_type()));
  }
}

void resblock_unscale_add(const Tensor grad, const Tensor scale, const Tensor grad_identity, Tensor out) {
  check_dtype(grad, "grad", ScalarType::Float);
  check_dtype(grad_identity, "grad_identity", ScalarType::Float);
  check_dtype(out, "out", ScalarType::Float);
  check_cuda_device(grad, "grad", out.get_device_index());
  check_cuda_device(grad_identity, "grad_identity", out.get_device_index());
  check_laid_out_alike(grad_identity, "grad_identity", grad, "grad");
  check_laid_out_alike(out, "out", grad, "grad");
  launch<Float32>(resblock_unscale_add_kernel, grad, scale, &grad_identity, out);
}

void multi_tensor_unscale(const Tensor table, int64_t num_chunks, int64_t chunk, const Tensor scales, bool write,
                          Tensor nonfinite, Tensor sum_of_squares) {
  const int64_t num_blocks = scales.numel();
  const int32_t device = table.get_device_index();
  UnscaleParams params{
      .table = chunk_table(table, kNumUnscaleColumns, num_chunks, chunk),
      .scales = device_data<const float>(scales, "scales", ScalarType::Float, num_blocks, device),
      .nonfinite = device_data<bool>(nonfinite, "nonfinite", ScalarType::Bool, num_blocks, device),
      .sum_of_squares = device_data<double>(sum_of_squares, "sum_of_squares", ScalarType::Double, 1, device)};
  if (num_chunks == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  // Taken from the stream's own memory, and free for the launches after this one when it returns.
  Tensor workspace = torch::stable::new_empty(table, {num_chunks + 1}, ScalarType::Double);
  params.chunk_sums = static_cast<double*>(workspace.mutable_data_ptr());
  params.finished = reinterpret_cast<unsigned*>(params.chunk_sums + num_chunks);
  STD_CUDA_CHECK(cudaMemsetAsync(params.finished, 0, sizeof(*params.finished), stream));
  const auto kernel = write ? unscale_kernel<true> : unscale_kernel<false>;
  kernel<<<static_cast<unsigned>(num_chunks), kThreads, 0, stream>>>(params);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dalle_fast, CUDA, m) {
  m.impl("resblock_scale", TORCH_BOX(&resblock_scale));
  m.impl("resblock_unscale_add", TORCH_BOX(&resblock_unscale_add));
  m.impl("multi_tensor_unscale", TORCH_BOX(&multi_tensor_unscale));
}

}  // namespace dalle_fast
