// The CUDA extension: schemas of the kernels, and the module that Python imports to register them. They are those of csrc/ops.cpp, but that
// attention's backward takes no output, and returns the parts of a sum for its caller to add up.

#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(helo_fast_cuda, m) {
  m.def(
      "sinkhorn_fwd(Tensor cost, Tensor? a, Tensor? b, float epsilon, int max_iter, float? tol, int check_every, "
      "float? tau_a, float? tau_b, bool keep_history) "
      "-> (Tensor plan, Tensor f, Tensor g, Tensor transport_cost, Tensor marginal_error, Tensor n_iter, Tensor converged, "
      "Tensor? history)");
  m.def(
      "sinkhorn_implicit_bwd(Tensor cost, Tensor a, Tensor b, Tensor plan, Tensor? grad_plan, Tensor? grad_f, Tensor? grad_g, "
      "Tensor? grad_transport_cost, float epsilon, float? tau_a, float? tau_b) -> (Tensor d_cost, Tensor d_a, Tensor d_b)");
  m.def(
      "gromov_from_tokens_fwd(Tensor x, Tensor y, Tensor a, Tensor b, Tensor? cost_xy, float threshold, bool over_batch, float alpha, "
      "str method, float epsilon, int outer_iter, int inner_iter, float? tol) "
      "-> (Tensor plan, Tensor gw_cost, Tensor marginal_error, Tensor n_iter, Tensor converged)");
  m.def(
      "lcd_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? seed, float scale, int drop_below, int cut_below, "
      "float rescale) -> (Tensor out, Tensor lse)");
  m.def(
      "lcd_attention_bwd(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor lse, Tensor? seed, float scale, "
      "int drop_below, int cut_below, float rescale, bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)");
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
