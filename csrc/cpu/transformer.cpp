// A transformer layer on the CPU, the torch side: allocates, picks the instruction set, spreads samples over threads.
// The algorithm stands in transformer_kernel.h.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <utility>

#include "capability.h"
#include "outputs.h"
#include "problems.h"
#include "residual_norm_tensors.h"
#include "transformer_problem.h"

#define HELO_FAST_KERNEL "transformer_kernel.h"
#include "each_set.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t kRows = 144;     // of a chunk, about: its part of all tensors stays in a second-level cache of 1 to 2 MiB
constexpr int64_t kMostTasks = 16;  // each with sums of its own for the gradients of the weights

template <std::size_t dims>
Tensor fresh(const int64_t (&sizes)[dims]) {
  return empty(torch::headeronly::ScalarType::Float, sizes);
}

float* floats(const Tensor& t) { return static_cast<float*>(const_cast<void*>(t.const_data_ptr())); }

// Heads of the D columns from `first` of a [B, n, stride] tensor: [B, H, n, d].
View heads(float* data, int64_t n, int64_t stride, int64_t d, int64_t first = 0) {
  return {reinterpret_cast<unsigned char*>(data + first), Storage::float32, n * stride, d, stride, 1};
}

// What the forward makes, and the backward needs again.
struct Made {
  Tensor projected, attended, lse;  // [B, n, 3 D], [B, n, D], [B, H, n]
  Tensor between, mean1, rstd1;     // [B, n, D], [B n] twice
  Tensor inner, returned;           // [B, n, F], [B, n, D]
  Tensor mean2, rstd2;              // [B n]
};

struct Options {
  std::optional<Tensor> attention_seed, dropout_seed;  // int64, one element
  int64_t H;
  double scale;
  int64_t drop_below, cut_below;
  double rescale;
};

// The arguments that forward and backward share.
TransformerArguments arguments(const Tensor& x, const std::optional<Tensor>& beside, const Tensor& w1, const Tensor& norm1_weight,
                               const Tensor& norm2_weight, const Made& made, const Options& options) {
  TransformerArguments a{};
  a.sets = beside ? 2 : 1;
  a.batch = x.size(0) * a.sets, a.tokens = x.size(1), a.width = x.size(2), a.hidden = w1.size(0);
  a.samples = std::max<int64_t>(1, kRows / a.tokens);
  a.attend = &float_attention(), a.normalise = &float_residual_norm();
  a.x[0] = floats(x), a.x[1] = beside ? floats(*beside) : nullptr;
  a.projected = floats(made.projected), a.attended = floats(made.attended), a.between = floats(made.between);
  a.inner = floats(made.inner), a.returned = floats(made.returned);

  AttentionArguments& t = a.attention;
  t.B = a.batch, t.H = options.H, t.n = t.m = a.tokens, t.d = a.width / t.H;
  t.q = heads(a.projected, a.tokens, 3 * a.width, t.d), t.k = heads(a.projected, a.tokens, 3 * a.width, t.d, a.width);
  t.v = heads(a.projected, a.tokens, 3 * a.width, t.d, 2 * a.width), t.out = heads(a.attended, a.tokens, a.width, t.d);
  t.lse = {reinterpret_cast<unsigned char*>(floats(made.lse)), Storage::float32, t.H * a.tokens, a.tokens, 1, 1};
  t.scale = options.scale, t.rescale = options.rescale, t.masked = options.attention_seed.has_value();
  if (t.masked) t.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(options.attention_seed->const_data_ptr()));
  t.drop_below = static_cast<uint32_t>(options.drop_below), t.cut_below = static_cast<uint32_t>(options.cut_below);

  a.first_norm = norm_arguments(x, made.attended, norm1_weight, std::nullopt, 0, 1.0);
  a.first_norm.x.data = nullptr;  // each chunk gathers its own
  a.last_norm = norm_arguments(made.between, made.returned, norm2_weight, options.dropout_seed, options.cut_below, options.rescale);
  const auto bytes = [](const Tensor& t) { return reinterpret_cast<unsigned char*>(floats(t)); };
  a.first_norm.mean = bytes(made.mean1), a.first_norm.rstd = bytes(made.rstd1);
  a.last_norm.mean = bytes(made.mean2), a.last_norm.rstd = bytes(made.rstd2);
  return a;
}

int64_t chunks(const TransformerArguments& a) { return (a.batch + a.samples - 1) / a.samples; }

// Multiply-adds of a sample's forward pass.
int64_t work(const TransformerArguments& a) {
  return a.tokens * (3 * a.width * a.width + 2 * a.width * a.hidden + 2 * a.tokens * a.width);
}

// One under the other.
void stack(const Tensor& q, const Tensor& k, const Tensor& v, float* to) {
  for (const Tensor* w : {&q, &k, &v}) to = std::copy(floats(*w), floats(*w) + w->numel(), to);
}

// Every tensor is float32 and contiguous.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> transformer_layer_fwd(
    const Tensor& x, const std::optional<Tensor>& beside,                    // [B, n, D]: one set of tokens, or two for each sample
    const Tensor& wq, const Tensor& wk, const Tensor& wv,                    // [D, D]
    const Tensor& norm1_weight, const Tensor& norm1_bias,                    // [D]
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,  // [F, D], [F], [D, F], [D]
    const Tensor& norm2_weight, const Tensor& norm2_bias,                    // [D]
    const std::optional<Tensor>& attention_seed, const std::optional<Tensor>& dropout_seed, int64_t H, double scale, double eps1,
    double eps2, int64_t drop_below, int64_t cut_below, double rescale) {
  const int64_t B = x.size(0) * (beside ? 2 : 1), n = x.size(1), D = x.size(2), F = w1.size(0);
  const Made made{fresh({B, n, 3 * D}), fresh({B, n, D}), fresh({B, H, n}), fresh({B, n, D}), fresh({B * n}),
                  fresh({B * n}),       fresh({B, n, F}), fresh({B, n, D}), fresh({B * n}),   fresh({B * n})};
  const Tensor out = fresh({B, n, D});
  const Options options{attention_seed, dropout_seed, H, scale, drop_below, cut_below, rescale};
  TransformerArguments a = arguments(x, beside, w1, norm1_weight, norm2_weight, made, options);
  a.first_norm.bias = rows(norm1_bias, D), a.first_norm.out = rows(made.between, D), a.first_norm.eps = eps1;
  a.last_norm.bias = rows(norm2_bias, D), a.last_norm.out = rows(out, D), a.last_norm.eps = eps2;
  a.b1 = floats(b1), a.b2 = floats(b2);

  const TransformerKernel& run = pick(baseline::transformer, avx2::transformer, avx512::transformer);
  const Scratch weights = take_scratch((6 * D * D + 2 * D * F) * int64_t(sizeof(float)));
  float *projections = reinterpret_cast<float*>(weights.get()), *projections_t = projections + 3 * D * D;
  float *w1_t = projections_t + 3 * D * D, *w2_t = w1_t + D * F;
  stack(wq, wk, wv, projections);
  run.transpose(projections, 3 * D, D, projections_t);
  run.transpose(floats(w1), F, D, w1_t);
  run.transpose(floats(w2), D, F, w2_t);
  a.projections_t = projections_t, a.w1_t = w1_t, a.w2_t = w2_t;
  for_each_problem(chunks(a), work(a) * a.samples, run.scratch_bytes(a, false),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.fwd(a, begin, end, scratch); });
  return {out,         made.projected, made.attended, made.lse,   made.between, made.mean1,
          made.rstd1, made.inner,     made.returned, made.mean2, made.rstd2};
}

// The gradients of x, of what stands beside it and of the eleven parameters, in the forward's order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
transformer_layer_bwd(const Tensor& grad_out, const Tensor& x, const std::optional<Tensor>& beside, const Tensor& wq, const Tensor& wk,
                      const Tensor& wv, const Tensor& norm1_weight, const Tensor& w1, const Tensor& w2, const Tensor& norm2_weight,
                      const Tensor& projected, const Tensor& attended, const Tensor& lse, const Tensor& between, const Tensor& mean1,
                      const Tensor& rstd1, const Tensor& inner, const Tensor& returned, const Tensor& mean2, const Tensor& rstd2,
                      const std::optional<Tensor>& attention_seed, const std::optional<Tensor>& dropout_seed, int64_t H, double scale,
                      int64_t drop_below, int64_t cut_below, double rescale) {
  const Made made{projected, attended, lse, between, mean1, rstd1, inner, returned, mean2, rstd2};
  const Options options{attention_seed, dropout_seed, H, scale, drop_below, cut_below, rescale};
  TransformerArguments a = arguments(x, beside, w1, norm1_weight, norm2_weight, made, options);
  const int64_t D = a.width, F = a.hidden;
  const TransformerKernel& run = pick(baseline::transformer, avx2::transformer, avx512::transformer);
  const Scratch projections = take_scratch(3 * D * D * int64_t(sizeof(float)));
  stack(wq, wk, wv, reinterpret_cast<float*>(projections.get()));
  a.projections = reinterpret_cast<float*>(projections.get()), a.w1 = floats(w1), a.w2 = floats(w2);
  const int64_t each = a.batch / a.sets;
  Tensor dx = fresh({each, a.tokens, D}), d_beside = beside ? fresh({each, a.tokens, D}) : fresh({0});
  a.dx[0] = floats(dx), a.dx[1] = floats(d_beside);
  a.attention.grad_out = heads(nullptr, a.tokens, D, a.attention.d);
  for (View* view : {&a.attention.dq, &a.attention.dk, &a.attention.dv}) *view = heads(nullptr, a.tokens, 3 * D, a.attention.d);

  const TransformerPart part(D, F);
  a.tasks = std::min(kMostTasks, chunks(a));
  const Tensor parts = fresh({a.tasks, part.size()}), norm_parts = fresh({2, chunks(a) * kNormSlices, 2, a.normalise->padded(D)});
  a.parts = floats(parts);
  a.last_norm.grad_out = rows(grad_out, D);
  a.first_norm.grad_out = a.first_norm.dx = a.last_norm.dx = a.last_norm.dy = {nullptr, Storage::float32, 0, 0, D, 1};
  a.first_norm.parts = reinterpret_cast<unsigned char*>(floats(norm_parts));
  a.last_norm.parts = a.first_norm.parts + norm_parts.numel() / 2 * int64_t(sizeof(float));
  for_each_problem(a.tasks, 2 * work(a) * a.batch / a.tasks, run.scratch_bytes(a, true),
                   [&](int64_t begin, int64_t end, unsigned char* scratch) { run.bwd(a, begin, end, scratch); });

  int64_t first = 0;
  const auto piece = [&](auto... sizes) {
    Tensor gradient = fresh({sizes...});
    torch::stable::parallel_for(0, gradient.numel(), 4096,
                                [&](int64_t begin, int64_t end) { run.sum(a, first, floats(gradient), begin, end); });
    first += gradient.numel();
    return gradient;
  };
  Tensor dwq = piece(D, D), dwk = piece(D, D), dwv = piece(D, D);
  Tensor dw1 = piece(F, D), dw2 = piece(D, F), db1 = piece(F), db2 = piece(D);
  const auto sum_norm = [&](ResidualNormArguments& norm) {
    Tensor dweight = fresh({D}), dbias = fresh({D});
    norm.slices = chunks(a) * kNormSlices, norm.dweight = rows(dweight, D), norm.dbias = rows(dbias, D);
    a.normalise->sum(norm, take_scratch(a.normalise->scratch_bytes(D)).get());
    return std::pair(dweight, dbias);
  };
  auto [dnorm1_weight, dnorm1_bias] = sum_norm(a.first_norm);
  auto [dnorm2_weight, dnorm2_bias] = sum_norm(a.last_norm);
  return {dx, d_beside, dwq, dwk, dwv, dnorm1_weight, dnorm1_bias, dw1, db1, dw2, db2, dnorm2_weight, dnorm2_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(helo_fast_cpu, CPU, m) {
  m.impl("transformer_layer_fwd", TORCH_BOX(&transformer_layer_fwd));
  m.impl("transformer_layer_bwd", TORCH_BOX(&transformer_layer_bwd));
}
