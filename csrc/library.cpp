// The schema of every compiled op. They are registered while dalle_fast._C is loaded, and called as
// torch.ops.dalle_fast.<name>; the code is registered beside them in cpu/ and cuda/.
#include "common/torch_stable.h"

STABLE_TORCH_LIBRARY(dalle_fast, m) {
  m.def("encode_169(Tensor values) -> Tensor");
  m.def("decode_169(Tensor words) -> Tensor");
  m.def("encode_0610(Tensor values) -> Tensor");
  m.def("decode_0610(Tensor words) -> Tensor");
  m.def(
      "attention_forward_cpu(Tensor query, Tensor key, Tensor value, Tensor? text_lens, int[] pattern, float scale, "
      "Tensor(a!) out, Tensor(b!)? lse) -> ()");
  m.def(
      "attention_backward_cpu(Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor grad_out, "
      "Tensor? grad_lse, Tensor? text_lens, int[] pattern, float scale, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value) -> ()");
  // `pattern` is Pattern.code; the storage is that of dalle_fast/reference/kv_cache.py.
  m.def(
      "attention_with_kvcache_cpu(Tensor query, Tensor key, Tensor value, Tensor text_key, Tensor text_value, "
      "Tensor(a!) image_key, Tensor(b!) image_value, Tensor(c!) held, Tensor text_lens, int[] pattern, float scale, "
      "Tensor(d!) out) -> ()");
  // `activation`: 0 none, 1 fast_gelu, 2 gelu, 3 gelu_tanh.
  m.def(
      "decode_linear_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift, float eps, int activation, "
      "Tensor? residual, Tensor(a!) out) -> ()");
  // Whether the memory is in huge pages now.
  m.def("use_huge_pages_cpu(Tensor tensor) -> bool");
  m.def(
      "embed_token_cpu(Tensor tokens, Tensor position, Tensor embedding, Tensor start, Tensor place, Tensor(a!) out) "
      "-> ()");
  m.def(
      "draw_token_cpu(Tensor logits, Tensor seeds, Tensor position, Tensor? keep, float temperature, int top_k, "
      "float top_p, float? cond_scale, Tensor(a!) tokens, Tensor(b!) scores) -> ()");
  // What these four would do, to be done by run_decode_plan_cpu: one plan, or several one behind the other. A plan holds
  // addresses; what lies there is changed, which a schema cannot say.
  m.def(
      "attention_with_kvcache_plan_cpu(Tensor query, Tensor key, Tensor value, Tensor text_key, Tensor text_value, "
      "Tensor image_key, Tensor image_value, Tensor held, Tensor text_lens, int[] pattern, float scale, Tensor out) "
      "-> Tensor");
  m.def(
      "decode_linear_plan_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor? gain, Tensor? shift, float eps, "
      "int activation, Tensor? residual, Tensor out) -> Tensor");
  m.def(
      "embed_token_plan_cpu(Tensor tokens, Tensor position, Tensor embedding, Tensor start, Tensor place, Tensor out) "
      "-> Tensor");
  m.def(
      "draw_token_plan_cpu(Tensor logits, Tensor seeds, Tensor position, Tensor? keep, float temperature, int top_k, "
      "float top_p, float? cond_scale, Tensor tokens, Tensor scores) -> Tensor");
  // `advance` is 1 more in the end.
  m.def("run_decode_plan_cpu(Tensor plan, Tensor(a!)? advance) -> ()");
  m.def(
      "gumbel_forward_cpu(Tensor logits, Tensor? codebook, Tensor seed, float tau, Tensor(a!) stats, "
      "Tensor(b!) indices, Tensor(c!) kl, Tensor(d!)? relaxed) -> ()");
  m.def("gumbel_weights_cpu(Tensor logits, Tensor seed, float tau, Tensor stats, Tensor(a!) weights) -> ()");
  m.def(
      "gumbel_backward_cpu(Tensor logits, Tensor codebook, Tensor seed, float tau, Tensor stats, Tensor relaxed, "
      "Tensor grad_relaxed, Tensor? grad_kl, Tensor(a!)? grad_logits, Tensor(b!)? grad_codebook) -> ()");
  m.def(
      "counted_targets_cpu(Tensor target, int num_classes, int ignore_index, Tensor(a!) positions, Tensor(b!) counted) "
      "-> int");
  m.def(
      "cross_entropy_rows_cpu(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor? factor, bool with_grad, "
      "Tensor(b!) losses) -> ()");
  // One pass of the gradient, each: filter(grad * scale) to out's dtype, and grad_identity + filter(grad / scale).
  m.def("resblock_scale(Tensor grad, Tensor scale, Tensor(a!) out) -> ()");
  m.def("resblock_unscale_add(Tensor grad, Tensor scale, Tensor grad_identity, Tensor(a!) out) -> ()");
  // Over all tensors that the rows of a table point to: dalle_fast/ops/tensor_table.py. What the pointers point to is
  // changed too, which a schema cannot say.
  m.def(
      "multi_tensor_unscale(Tensor table, int num_chunks, int chunk, Tensor scales, bool write, Tensor(a!) nonfinite, "
      "Tensor(b!) sum_of_squares) -> ()");
  m.def(
      "multi_tensor_adamw16(Tensor table, int num_chunks, int chunk, Tensor hyper, Tensor steps, Tensor scales, "
      "Tensor? skip, Tensor? sum_of_squares, float grad_clip, int seed, bool stochastic) -> ()");
}
