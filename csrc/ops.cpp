// The CPU extension: schemas of the kernels, and the module that Python imports to register them.
//
// These ops are internal: helo_fast/ops/<op>/backends.py calls them with contiguous tensors of checked shapes.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/capability.h"

namespace {

std::string cpu_capability() { return capability_name(capability()); }

}  // namespace

STABLE_TORCH_LIBRARY(helo_fast_cpu, m) {
  m.def(
      "sinkhorn_fwd(Tensor cost, Tensor? a, Tensor? b, float epsilon, int max_iter, float? tol, int check_every, "
      "float? tau_a, float? tau_b, bool keep_history) "
      "-> (Tensor plan, Tensor f, Tensor g, Tensor transport_cost, Tensor marginal_error, Tensor n_iter, Tensor converged, "
      "Tensor? history)");
  m.def(
      "gromov_wasserstein_fwd(Tensor cost_x, Tensor cost_y, Tensor a, Tensor b, Tensor? cost_xy, float alpha, str method, "
      "float epsilon, int outer_iter, int inner_iter, float? tol) "
      "-> (Tensor plan, Tensor gw_cost, Tensor marginal_error, Tensor n_iter, Tensor converged)");
  m.def(
      "gromov_from_tokens_fwd(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? cost_xy, float threshold, bool over_batch, float alpha, "
      "str method, float epsilon, int outer_iter, int inner_iter, float? tol) "
      "-> (Tensor plan, Tensor gw_cost, Tensor marginal_error, Tensor n_iter, Tensor converged)");
  m.def(
      "gromov_wasserstein_bwd(Tensor cost_x, Tensor cost_y, Tensor plan, Tensor grad_cost, float alpha, bool fused) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "gromov_from_tokens_bwd(Tensor x, Tensor y, Tensor a, Tensor b, Tensor plan, Tensor grad_cost, float threshold, bool over_batch, "
      "float alpha, bool cross_given) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sinkhorn_implicit_bwd(Tensor cost, Tensor a, Tensor b, Tensor plan, Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, "
      "Tensor? grad_transport_cost, float epsilon, float? tau_a, float? tau_b) -> (Tensor d_cost, Tensor d_a, Tensor d_b)");
  m.def(
      "sinkhorn_unrolled_bwd(Tensor cost, Tensor a, Tensor b, Tensor plan, Tensor history, Tensor n_iter, Tensor? grad_plan, "
      "Tensor? grad_f, Tensor? grad_g, Tensor? grad_transport_cost, float epsilon, float? tau_a, float? tau_b) "
      "-> (Tensor d_cost, Tensor d_a, Tensor d_b)");
  m.def(
      "lcd_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed, float scale, int drop_below, int cut_below, "
      "float rescale) -> (Tensor out, Tensor lse)");
  m.def(
      "lcd_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor out, Tensor lse, Tensor? seed, "
      "float scale, int drop_below, int cut_below, float rescale, bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
  m.def(
      "residual_norm_fwd(Tensor x, Tensor y, Tensor weight, Tensor bias, Tensor? seed, float eps, int cut_below, float rescale) "
      "-> (Tensor out, Tensor mean, Tensor rstd)");
  m.def(
      "residual_norm_bwd(Tensor grad_out, Tensor x, Tensor y, Tensor weight, Tensor mean, Tensor rstd, Tensor? seed, int cut_below, "
      "float rescale) -> (Tensor dx, Tensor dy, Tensor dweight, Tensor dbias)");
  m.def(
      "transformer_layer_fwd(Tensor x, Tensor? beside, Tensor wq, Tensor wk, Tensor wv, Tensor norm1_weight, Tensor norm1_bias, Tensor w1, Tensor b1, "
      "Tensor w2, Tensor b2, Tensor norm2_weight, Tensor norm2_bias, Tensor? attention_seed, Tensor? dropout_seed, int H, float scale, "
      "float eps1, float eps2, int drop_below, int cut_below, float rescale) -> (Tensor out, Tensor projected, Tensor attended, "
      "Tensor lse, Tensor between, Tensor mean1, Tensor rstd1, Tensor inner, Tensor returned, Tensor mean2, Tensor rstd2)");
  m.def(
      "transformer_layer_bwd(Tensor grad_out, Tensor x, Tensor? beside, Tensor wq, Tensor wk, Tensor wv, Tensor norm1_weight, Tensor w1, Tensor w2, "
      "Tensor norm2_weight, Tensor projected, Tensor attended, Tensor lse, Tensor between, Tensor mean1, Tensor rstd1, Tensor inner, "
      "Tensor returned, Tensor mean2, Tensor rstd2, Tensor? attention_seed, Tensor? dropout_seed, int H, float scale, int drop_below, "
      "int cut_below, float rescale) -> (Tensor dx, Tensor d_beside, Tensor dwq, Tensor dwk, Tensor dwv, Tensor dnorm1_weight, Tensor dnorm1_bias, "
      "Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dnorm2_weight, Tensor dnorm2_bias)");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
